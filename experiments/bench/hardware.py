"""What accelerators can do at best, and what of a step fits into their memory."""

from collections.abc import Iterator
from typing import Any

PEAKS = (
    # the first that is part of the name counts
    ("H100 PCIe", 756),
    ("H100 NVL", 835),
    ("H100", 989),
    ("H200", 989),
    ("GH200", 989),
    ("B200", 2250),
    ("A100", 312),
    ("L40S", 362),
    ("L4", 121),
    ("TPU v4", 275),
    ("TPU v5 lite", 197),
    ("TPU v5e", 197),
    ("TPU v5", 459),
    ("TPU v6", 918),
    ("TPU7x", 2307),
)
"""Part of a device's name to TFLOP/s of its dense bfloat16 products, from the vendors' data sheets."""


def peak_flops(device_kind: str) -> float | None:
    """Operations per second of dense bfloat16 products; None where they are not known.

    >>> peak_flops("NVIDIA H100 80GB HBM3")
    989000000000000.0
    """
    return next((1e12 * peak for part, peak in PEAKS if part in device_kind), None)


def stored_bytes(
    model: Any, remat: str, rows: int, length: int, itemsize: int = 2, *, scores: bool = True
) -> int:
    """About what the backward pass finds stored of the layers, in bytes.

    Args:
        model: A ``ModelConfig``.
        remat: What is stored: see ``CausalLM.hidden``.
        rows: Sequences of a micro-batch.
        length: Tokens of each.
        itemsize: Bytes of an activation.
        scores: Whether attention stores a number for each pair of tokens.
    """
    heads, kv_heads = model.num_heads * model.head_dim, model.num_kv_heads * model.head_dim
    carried = model.hidden_size
    products = heads + 2 * kv_heads + 2 * model.hidden_size + 2 * model.intermediate_size
    attention = 2 * heads + kv_heads  # rotated queries and keys, and what is seen
    per_token = itemsize * carried
    if remat != "full":
        per_token += itemsize * (products + attention)
    if remat == "none":
        # inputs of norms and nonlinearities, some of them in float32; logits and shares of attention
        per_token += 4 * (4 * model.hidden_size + 2 * model.intermediate_size + heads)
        per_token += scores * model.num_heads * length * (4 + 4 + itemsize)
    return model.num_layers * rows * length * per_token


def workspace_bytes(model: Any, rows: int, length: int, itemsize: int = 2, *, scores: bool = True) -> int:
    """About what one layer's backward pass, the head and dense gradients take for a while, in bytes."""
    layer = stored_bytes(model, "none", rows, length, itemsize, scores=scores) // model.num_layers
    matrix = 4 * model.hidden_size * max(model.intermediate_size, model.num_heads * model.head_dim)
    logits = 3 * 4 * 512 * model.vocab_size
    return layer + 3 * matrix + logits


def settings_that_fit(
    model: Any, held: int, usable: int, length: int, most_rows: int, *, scores: bool = True
) -> Iterator[tuple[int, str]]:
    """Sequences of a micro-batch and what is stored of it, first what should be fastest.

    Computing all of a layer again costs more than half the sequences do; fewer than that cost more.

    Args:
        model: A ``ModelConfig``.
        held: Bytes that lie on the device between steps.
        usable: Bytes of the device's memory.
        length: Tokens of a sequence.
        most_rows: Sequences to begin with; fewer follow.
        scores: See ``stored_bytes``.

    Yields:
        (rows, remat); the last, a single sequence of which the least is stored, whether it fits or not.
    """
    settings = []
    for some in ((most_rows, most_rows // 2), (most_rows // 4, most_rows // 8)):
        settings += [(rows, remat) for rows in some for remat in ("none", "dots") if rows]
        settings += [(rows, "full") for rows in some if rows]
    for rows, remat in settings:
        need = held + workspace_bytes(model, rows, length, scores=scores)
        if need + stored_bytes(model, remat, rows, length, scores=scores) <= usable:
            yield rows, remat
    yield 1, "full"
