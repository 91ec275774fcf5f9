"""The arrays of a checkpoint: read, and held against the digests that were saved with them."""

import gc
import logging
import sys
import time
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import tensorstore
from orbax.checkpoint import v1 as ocp

from spiel_jax.checkpoint.metadata import DIGESTS, CheckpointError, Damaged, metadata_of, one_line
from spiel_jax.ops.digest import digests
from spiel_jax.ops.tree import named_leaves

_log = logging.getLogger(__name__)

_SETTLED = 0.2  # seconds, after which reads that were begun beside one that failed are over


def here() -> jax.sharding.Sharding:
    """On one device, wherever it was saved."""
    options: Any = jax.config
    return jax.sharding.SingleDeviceSharding(options.jax_default_device or jax.local_devices()[0])


def stored_arrays(folder: Path, step: int) -> dict[str, Any]:
    """The shapes and dtypes of the arrays of a checkpoint, by part.

    Raises:
        Damaged: If they cannot be read.
    """
    metadata, place = metadata_of(folder, step), folder / str(step)
    parts = Counter(name.partition(".")[0] for name in metadata.get(DIGESTS, ()))
    if lost := sorted(part for part in parts if not (place / part).is_dir()):
        raise Damaged(folder, step, f"its part {', '.join(lost)} is missing")
    with _damage(folder, step, "what it holds"):
        for part, count in parts.items():
            if len(_opened(place / part)) < count:
                raise Damaged(folder, step, f"arrays of its part {part} are missing")
        found = ocp.checkpointables_metadata(str(place)).metadata
        if lost := sorted(part for part in parts | found.keys() if found.get(part) is None):
            raise Damaged(folder, step, f"its part {', '.join(lost)} cannot be read")
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here()), dict(found))


def load_arrays(folder: Path, step: int, like: Mapping[str, Any]) -> dict[str, Any]:
    """Parts of a checkpoint, checked.

    Args:
        folder: The folder of checkpoints.
        step: Which of them.
        like: Part to pytree of shapes, dtypes and shardings.

    Raises:
        CheckpointError: If it holds other arrays.
        Damaged: If they cannot be read, or are not what was saved.
    """
    stored, place = stored_arrays(folder, step), folder / str(step)
    _check_fits(folder, step, named_leaves({part: stored.get(part) for part in like}), named_leaves(like))
    with _damage(folder, step, "its arrays"):
        if jax.process_count() == 1:  # else each would read the parts of all
            for array in (array for part in like for array in _opened(place / part)):
                array.read().result()
        found = ocp.load_checkpointables(str(place), dict(like))
    saved = metadata_of(folder, step).get(DIGESTS)
    if saved is None:
        _log.warning("checkpoint %d is of an earlier version, without digests of its arrays", step)
        return found
    other = [name for name, digest in digests(found).items() if saved.get(name) != digest]
    if other:
        more = f" and {len(other) - 3} more" if len(other) > 3 else ""
        raise Damaged(
            folder, step, f"the values of {', '.join(other[:3])}{more} are not those that were saved"
        )
    return found


@contextmanager
def _damage(folder: Path, step: int, what: str) -> Iterator[None]:
    """Whatever is raised when a checkpoint is read, as damage.

    What Orbax and TensorStore had begun besides, and complain of later, is let go without a word.
    """
    log, hook = logging.getLogger("asyncio"), sys.unraisablehook
    was_disabled, problem = log.disabled, None

    def unraisable(lost: Any) -> None:
        if isinstance(lost.exc_value, KeyboardInterrupt):  # a signal's
            hook(lost)

    log.disabled, sys.unraisablehook = True, unraisable
    try:
        try:
            yield
        except Damaged as error:
            problem = error.problem
        except Exception as error:  # of the system, of Orbax, of TensorStore, of whatever parses for them
            problem = f"{what} cannot be read: {one_line(error)}"
        if problem is not None:  # the error itself holds all that was begun
            time.sleep(_SETTLED)
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "coroutine .* was never awaited")
                gc.collect()
            raise Damaged(folder, step, problem)
    finally:
        log.disabled, sys.unraisablehook = was_disabled, hook


def _opened(place: Path) -> list[tensorstore.TensorStore]:
    """The arrays of a part.

    Opened, and read, before Orbax does: where one fails, Orbax leaves what it has begun with the others
    behind, which then complains at any time.
    """
    store = {"driver": "ocdbt", "base": {"driver": "file", "path": f"{place}/"}}
    keys = tensorstore.KvStore.open(store).result().list().result()
    arrays: list[Any] = [
        {
            "driver": "zarr3",
            "kvstore": store | {"path": key.decode().removesuffix("zarr.json")},
            "fill_missing_data_reads": False,
        }
        for key in keys
        if key.endswith(b"zarr.json")
    ]
    return [tensorstore.open(array, open=True, read=True).result() for array in arrays]


def _check_fits(folder: Path, step: int, stored: Mapping[str, Any], like: Mapping[str, Any]) -> None:
    lines = []
    for name in dict.fromkeys((*like, *stored)):
        then, now = (f"{x.dtype}{list(x.shape)}" if (x := of.get(name)) is not None else "nothing"
                     for of in (stored, like))  # fmt: skip
        if then != now:
            lines.append(f"{name} is {then} there, {now} here")
    if lines:
        more = f"; {len(lines) - 3} more differ" if len(lines) > 3 else ""
        raise CheckpointError(f"checkpoint {step} in {folder} does not fit: {'; '.join(lines[:3])}{more}")


def check_whole(folder: Path, step: int) -> None:
    """Reads all of a checkpoint, part by part.

    Raises:
        Damaged: If it is not what was saved.
    """
    for part, arrays in stored_arrays(folder, step).items():
        load_arrays(folder, step, {part: arrays})
