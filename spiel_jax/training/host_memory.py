"""Memory of the host that compiling leaves with the allocator, given back to the system."""

import contextlib
import ctypes
import sys
from collections.abc import Iterator
from typing import Any

import jax

_COMPILED = "/jax/core/compile/backend_compile_duration"
_LONG = 2.0  # seconds: what is compiled faster leaves little


@contextlib.contextmanager
def given_back_after_compiling() -> Iterator[None]:
    """Inside, whenever a program was compiled, before it runs and takes memory of its own.

    After the step of a 7B model it is half a GB, which the peak of the process would have beside that of the
    step. Nothing where the C library cannot.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None

    def compiled(event: str, duration_secs: float, **_: Any) -> None:
        if trim is not None and event == _COMPILED and duration_secs > _LONG:
            trim(0)

    jax.monitoring.register_event_duration_secs_listener(compiled)
    try:
        yield
    finally:
        jax.monitoring.unregister_event_duration_listener(compiled)
