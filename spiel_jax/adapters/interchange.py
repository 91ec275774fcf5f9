"""Adapters to files and back, whatever the format."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from spiel_jax.adapters.adapter import Adapter, AdapterError
from spiel_jax.adapters.base import Base
from spiel_jax.adapters.files import new_folder
from spiel_jax.adapters.formats.format import FORMATS, Export, format_named
from spiel_jax.errors import NotFoundError
from spiel_jax.models.config import ModelConfig


def write_adapter(
    adapter: Adapter,
    out: str | Path,
    format: str = "native",
    *,
    base: Base | None = None,
    dtype: Any = None,
    since: Adapter | None = None,
    overwrite: bool = False,
    check: bool = True,
    shard_bytes: int = 5 * 10**9,
    keep: Iterable[str | Path] = (),
) -> Path:
    """Writes an adapter into a folder: all of it, or nothing.

    Args:
        adapter: See ``adapter_of_run`` and ``read_adapter``.
        out: The folder. What was written there before by this function is replaced.
        format: Name of one of ``FORMATS``.
        base: Its base model, from ``open_base``; "merged" and "sparse_update" need it.
        dtype: Of the weights of "merged" and "sparse_update" (default: that of the run), or of the values of
            "native" (default: float32).
        since: "sparse_update" only: the adapter of an earlier step; None for an update of the base.
        overwrite: Replace what else is in the folder.
        check: Whether the base must be the one the adapter was trained on, by its fingerprint.
        shard_bytes: "merged" only: bytes of a file, at most, unless a single tensor has more.
        keep: Files and folders that must not be lost where ``overwrite`` would delete them.

    Returns:
        The folder.

    Raises:
        AdapterError: If the format cannot hold the adapter, the folder holds something else, the base is
            another, or the disk is full.
    """
    chosen, out = format_named(format), Path(out)
    if adapter.kind not in chosen.kinds:
        able = [name for name, one in FORMATS.items() if adapter.kind in one.kinds]
        raise AdapterError(
            f"format {format!r} holds {', '.join(chosen.kinds)}, this is {adapter.kind}: expected one of "
            f"{', '.join(able)}"
        )
    if chosen.needs_base and base is None:
        raise AdapterError(f"format {format!r} needs the base model")
    if base is not None:
        adapter.parameters(base.config)  # fits
        if base.source.checkpoint is not None:
            keep = [*keep, base.source.checkpoint.path]
    export = Export(adapter, base, _dtype(dtype), since, check, shard_bytes)
    with new_folder(out, overwrite=overwrite, keep=map(Path, keep)) as folder:
        chosen.write(export, folder)
    return out


def read_adapter(path: str | Path, model: ModelConfig | None = None) -> Adapter:
    """Reads an adapter that anybody wrote: ours, PEFT's, or the original implementation's.

    What is read is checked: sizes, types, positions in range and distinct, finite numbers, names. Nothing in
    it is run, and no other file is opened than those of its folder.

    Args:
        path: A folder, or a file of the format "native".
        model: Shape of the base model. The adapter must fit it; of those that do not say the shapes of their
            weights (all that we did not write) it has to be given.

    Raises:
        NotFoundError: If there is nothing.
        AdapterError: If it is in no known format, damaged, has what is not supported, or does not fit the
            model.
    """
    path = Path(path).expanduser()
    if not path.exists():
        raise NotFoundError(f"there is no {path}: expected the folder of an adapter")
    for format in FORMATS.values():
        if format.recognises(path):
            try:
                adapter = format.read(path, model)
                if model is not None:
                    adapter.parameters(model)
            except AdapterError as error:
                raise AdapterError(f"{path} ({format.name}): {error}") from error
            return adapter
    known = [name for name, one in FORMATS.items() if one.reads]
    raise AdapterError(f"{path} is no adapter in a format that is read: {', '.join(known)}")


def _dtype(dtype: Any) -> np.dtype | None:
    try:
        return None if dtype is None else np.dtype(jnp.dtype(dtype))
    except TypeError:
        raise AdapterError(f"dtype {dtype!r}: expected bfloat16, float16 or float32") from None
