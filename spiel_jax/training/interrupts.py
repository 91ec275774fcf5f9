"""What SIGINT and SIGTERM do to a command: the first one ends it in order, the second at once."""

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

STOPPED = 75
"""Exit status of a run that was stopped after a step, and saved: the same command continues it.

The number is that of EX_TEMPFAIL in sysexits.h: try again.
"""


class Interrupted(KeyboardInterrupt):
    """A signal came while there was nothing to finish first.

    Attributes:
        number: Of the signal.
    """

    def __init__(self, number: int):
        super().__init__(number)
        self.number = number


@contextmanager
def ended_by_signals() -> Iterator[None]:
    """Ends the program in one line, with status 128 + the signal's number, after a SIGINT or SIGTERM in here.

    What is called in here may handle the first signal otherwise, as a training run does. A second one ends
    the process whatever it does, also inside a compiler, which Python does not interrupt: it is a thread
    that waits for it.

    What a signal raises is lost where Python happens to collect garbage, in a finaliser or a callback of the
    collector, which no exception leaves: it is raised again a moment later.
    """

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise Interrupted(number)

    def unraisable(lost: Any) -> None:
        if not isinstance(lost.exc_value, Interrupted):
            otherwise(lost)
            return
        signal.signal(signal.SIGALRM, lambda _, frame, number=lost.exc_value.number: interrupt(number, frame))
        signal.setitimer(signal.ITIMER_REAL, 0.05)

    otherwise, sys.unraisablehook = sys.unraisablehook, unraisable
    heard, told = os.pipe()
    os.set_blocking(told, False)
    signal.set_wakeup_fd(told, warn_on_full_buffer=False)
    threading.Thread(target=_end_on_second, args=(heard,), daemon=True).start()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, interrupt)
    try:
        yield
    except KeyboardInterrupt as error:
        number = error.number if isinstance(error, Interrupted) else signal.SIGINT
        print(f"interrupted by {signal.Signals(number).name}", file=sys.stderr, flush=True)
        sys.exit(128 + number)
    finally:
        sys.unraisablehook = otherwise


def _end_on_second(heard: int) -> None:
    """Reads the numbers of signals as they come, before Python handles them."""
    asked = False
    while True:
        number = os.read(heard, 1)[0]
        if number not in (signal.SIGINT, signal.SIGTERM):
            continue
        if asked:
            os.write(2, f"ended at once by a second signal, {signal.Signals(number).name}\n".encode())
            os._exit(128 + number)
        asked = True


@contextmanager
def stop_on_signal(several: bool) -> Iterator[Callable[[], bool]]:
    """Turns the first SIGINT or SIGTERM into a request to stop after the current step.

    Args:
        several: Whether there are several processes: SIGTERM is then for JAX, which tells all of them (see
            ``processes.stop_agreed``).

    Yields:
        Whether a stop was asked for.
    """
    asked = []

    def ask(number: int, frame: Any) -> None:
        asked.append(number)
        os.write(2, b"\nstopping after this step, to save; a second signal ends at once\n")
        for name, handler in before.items():
            signal.signal(name, handler)  # a second signal means it
        if several:
            signal.raise_signal(signal.SIGTERM)

    before = {}
    try:
        for name in (signal.SIGINT,) if several else (signal.SIGINT, signal.SIGTERM):
            before[name] = signal.signal(name, ask)
    except ValueError:  # not in the main thread: whoever runs us there handles signals
        pass
    try:
        yield lambda: bool(asked)
    finally:
        for name, handler in before.items():
            signal.signal(name, handler)
