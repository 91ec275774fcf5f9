"""Updates of a served model in place: the entries that a step changes, as the weights that they become.

What inference servers take: the checkpoint's name of a tensor, its full shape, flat positions, and *absolute*
values in the checkpoint's dtype. Entries that were dropped are among them, with what the base has there.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from spiel_jax.adapters.adapter import AdapterError
from spiel_jax.adapters.entries import position_dtype
from spiel_jax.adapters.files import read_tensors, write_dict
from spiel_jax.adapters.formats.description import describe, described
from spiel_jax.adapters.formats.format import Export, Format, register
from spiel_jax.adapters.formats.merged import weights_dtype
from spiel_jax.adapters.sparse_adapter import SparseAdapter

FILE = "update.safetensors"
_POSITIONS, _VALUES = ".positions", ".values"


@dataclass(frozen=True)
class WeightPatch:
    """New entries of one tensor of a checkpoint.

    Attributes:
        name: The tensor's Hugging Face name.
        shape: Its full shape.
        positions: [k] int32 (int64 where the tensor has more than 2^31 entries), flat, ascending.
        values: [k] what they become, in the checkpoint's dtype.
    """

    name: str
    shape: tuple[int, int]
    positions: np.ndarray
    values: np.ndarray

    def apply(self, tensor: np.ndarray) -> np.ndarray:
        """The tensor with its new entries.

        Raises:
            AdapterError: If its shape or dtype is another.
        """
        if tensor.shape != self.shape or tensor.dtype != self.values.dtype:
            raise AdapterError(
                f"{self.name} is {tensor.dtype}{list(tensor.shape)}, the patch is for "
                f"{self.values.dtype}{list(self.shape)}"
            )
        new = np.array(tensor)
        new.reshape(-1)[self.positions] = self.values
        return new


def weight_patches(export: Export) -> Iterator[WeightPatch]:
    """The patches from one step of a run to another, one tensor at a time.

    Args:
        export: ``adapter`` is the later step, ``since`` the earlier one; None for the base model itself. The
            dtype is that of the checkpoint that is served; default: that of the run.

    Yields:
        A patch for each tensor that changes; of these only the entries whose bits do.

    Raises:
        AdapterError: If the adapters are not sparse, or not of one base model, or the base is another.
    """
    new, old, base = export.adapter, export.since, export.base
    if base is None or not isinstance(new, SparseAdapter) or not isinstance(old, SparseAdapter | None):
        raise AdapterError("an update is between steps of a sparse method, on their base model")
    if old is not None and old.origin.fingerprint != new.origin.fingerprint and export.check:
        raise AdapterError("the two steps are of different base models")
    base, dtype = base.fresh(), weights_dtype(export, base)
    bits = np.dtype(f"u{dtype.itemsize}")
    before = {} if old is None else old.entries
    for name in sorted(new.entries.keys() | before.keys()):
        parts = [one.entries[name] for one in (new, old) if one is not None and name in one.entries]
        if name not in base.tensors or any(base.tensors[name].shape != part.shape for part in parts):
            raise AdapterError(f"the base model has no {name} of the adapter's shape")
        tensor = base.tensor(name)
        shape = parts[0].shape
        positions = np.unique(np.concatenate([part.positions for part in parts]))
        place = np.divmod(positions, shape[1])
        is_now, was = (
            adapter.merged(name, tensor, dtype)[place]
            if adapter is not None and name in adapter.entries
            else tensor[place].astype(dtype)
            for adapter in (new, old)
        )
        changed = is_now.view(bits) != was.view(bits)
        if changed.any():
            yield WeightPatch(name, shape, positions[changed].astype(position_dtype(shape)), is_now[changed])
    base.check(export.expected, "the adapter")


def apply_patches(tensors: Mapping[str, np.ndarray], patches: Iterable[WeightPatch]) -> dict[str, np.ndarray]:
    """A checkpoint's tensors with the patches in them.

    Raises:
        AdapterError: If there is no such tensor, or it is of another shape or dtype.
    """
    found = dict(tensors)
    for patch in patches:
        if patch.name not in found:
            raise AdapterError(f"there is no {patch.name} to patch")
        found[patch.name] = patch.apply(found[patch.name])
    return found


@register
class SparseUpdate(Format):
    """``update.safetensors``: positions and absolute values of each tensor that changes."""

    name = "sparse_update"
    kinds = ("sparse",)
    needs_base = True

    def write(self, export: Export, folder: Path) -> None:
        """See ``Format``."""
        tensors = {}
        for patch in weight_patches(export):
            tensors[patch.name + _POSITIONS], tensors[patch.name + _VALUES] = patch.positions, patch.values
        since = None if export.since is None else export.since.origin.step
        write_dict(folder / FILE, tensors, describe(export.adapter, tensors, self.name, since=since))


def read_patches(path: str | Path, shapes: Mapping[str, tuple[int, ...]]) -> Iterator[WeightPatch]:
    """The patches of a file that ``sparse_update`` wrote.

    Args:
        path: The file, or its folder.
        shapes: Of the served checkpoint's tensors, by name.

    Raises:
        NotFoundError: If there is none.
        AdapterError: If it is damaged, or does not fit the tensors.
    """
    path = Path(path).expanduser()
    tensors, metadata = read_tensors(path / FILE if path.is_dir() else path)
    about = described(metadata, tensors)
    if about.said.get("format") != SparseUpdate.name:
        raise AdapterError(
            f"{path}: its format is {about.said.get('format')!r}, expected {SparseUpdate.name!r}"
        )
    names = {name.removesuffix(_POSITIONS).removesuffix(_VALUES) for name in tensors}
    if tensors.keys() != {name + part for name in names for part in (_POSITIONS, _VALUES)}:
        raise AdapterError(f"{path}: expected positions and values of each tensor and nothing else")
    patches = []
    for name in sorted(names):
        positions, values, shape = tensors[name + _POSITIONS], tensors[name + _VALUES], shapes.get(name, ())
        size = int(np.prod(shape, dtype=np.int64))
        good = len(shape) == 2 and positions.ndim == 1 and positions.shape == values.shape
        good = good and positions.dtype.kind == "i" and values.dtype.kind in "fV" and positions.size > 0
        if not good or positions.min() < 0 or positions.max() >= size or (np.diff(positions) <= 0).any():
            raise AdapterError(f"{path}: the entries of {name[:200]!r} do not fit a tensor of {list(shape)}")
        if not np.isfinite(values).all():
            raise AdapterError(f"{path}: a value of {name[:200]!r} is not finite")
        patches.append(WeightPatch(name, (shape[0], shape[1]), positions, values))
    yield from patches
