"""What the command shows of adapters, as text."""

from collections.abc import Mapping, Sequence

import numpy as np

from spiel_jax.adapters.adapter import Adapter
from spiel_jax.adapters.info import Share, info


def info_table(name: str, adapter: Adapter) -> str:
    """Where an adapter comes from, and what it has in all, by kind of weight and by layer.

    Raises:
        AdapterError: If it is not sparse.
    """
    found, origin = info(adapter), adapter.origin
    facts = {
        "base": origin.base or "not known",
        "base checked by": "fingerprint" if origin.fingerprint else "nothing: it has no fingerprint",
        "method": origin.config.get("method"),
        "step": origin.step,
    }
    rows = [("all", found.total)]
    rows += [(module, share) for module, share in found.modules.items()]
    rows += [(f"layer {n}" if n >= 0 else "no layer", share) for n, share in found.layers.items()]
    head = [name, *(f"  {key}: {value}" for key, value in facts.items() if value is not None)]
    cells = [("", "entries", "density", "norm", "largest"), *(_cells(label, share) for label, share in rows)]
    return "\n".join([*head, *_aligned(cells)])


def _cells(label: str, share: Share) -> tuple[str, ...]:
    density = f"{100 * share.density:.4f}%"
    return label, f"{share.count:,}", density, f"{share.norm:.4g}", f"{share.largest:.4g}"


def overlap_table(names: Sequence[str], found: Mapping[str, np.ndarray]) -> str:
    """What every two adapters share: positions, these as a share of those of both, and the cosine."""
    shared, cosine = found["shared"], found["cosine"]
    cells = [("", "", "shared", "of both", "cosine")]
    for i, one in enumerate(names):
        for j in range(i + 1, len(names)):
            both = shared[i, i] + shared[j, j] - shared[i, j]
            ratio = f"{100 * shared[i, j] / both:.2f}%"
            cells.append((one, names[j], f"{shared[i, j]:,}", ratio, f"{cosine[i, j]:.4f}"))
    return "\n".join(_aligned(cells, left=2))


def _aligned(rows: Sequence[Sequence[str]], left: int = 1) -> list[str]:
    """Rows as lines, the first columns to the left and the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.ljust(width) if number < left else cell.rjust(width)
            for number, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
