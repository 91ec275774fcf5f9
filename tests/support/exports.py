"""Adapters of each kind on a tiny model, and comparisons of them."""

import numpy as np

from spiel_jax.adapters import Entries, Factors, IA3Adapter, LoraAdapter, LowRank, Origin, SparseAdapter
from spiel_jax.adapters.adapter import tensors_of
from spiel_jax.adapters.hybrid import HybridAdapter
from spiel_jax.models import open_model
from spiel_jax.models.io.fingerprint import fingerprint


def origin_of(folder, dtype="float32", **config):
    base = open_model(str(folder)).load(dtype, progress=False)
    return Origin(str(folder), fingerprint(base), {"model.dtype": dtype, "method": "test", **config}, 7)


def matrices(model):
    """Name to shape of the linears of the blocks."""
    return {n: slot.shape for n, slot in tensors_of(model).items() if n.endswith("_proj.weight")}


def sparse_adapter(model, origin=None, *, names=None, seed=0, density=0.05, scale=0.1):
    """Random entries, of some matrices a few more."""
    rng, entries = np.random.default_rng(seed), {}
    for number, (name, shape) in enumerate(matrices(model).items()):
        if names is None or names(name):
            size = shape[0] * shape[1]
            count = max(1, int(size * density)) + number % 3
            positions = np.sort(rng.choice(size, count, replace=False))
            values = rng.normal(0, scale, count).astype(np.float32)
            values[0] = 0.0  # as a fresh entry has
            entries[name] = Entries(shape, positions, values)
    return SparseAdapter(entries, origin or Origin())


def lora_adapter(model, origin=None, *, rslora=False, seed=0, uneven=True, scale=0.2):
    rng, found = np.random.default_rng(seed), {}
    for number, (name, shape) in enumerate(matrices(model).items()):
        rank = 2 + (uneven and number == 3)
        a = rng.normal(0, scale, (rank, shape[1]))
        b = rng.normal(0, scale, (shape[0], rank))
        alpha = 8.0 if uneven and number == 1 else 4.0
        found[name] = LowRank(a.astype(np.float32), b.astype(np.float32), alpha)
    return LoraAdapter(found, rslora, origin or Origin())


def ia3_adapter(model, origin=None, seed=0, scale=0.2):
    rng, found = np.random.default_rng(seed), {}
    for name, shape in matrices(model).items():
        inputs = "down_proj" in name
        if inputs or "k_proj" in name or "v_proj" in name:
            values = rng.normal(1, scale, shape[1 if inputs else 0]).astype(np.float32)
            found[name] = Factors(values, inputs, shape)
    return IA3Adapter(found, origin or Origin())


def hybrid_adapter(model, origin=None):
    return HybridAdapter(sparse_adapter(model, origin), lora_adapter(model, origin, uneven=False))


def adapter_of_kind(kind, model, origin=None, **options):
    makers = {"sparse": sparse_adapter, "lora": lora_adapter, "ia3": ia3_adapter, "hybrid": hybrid_adapter}
    return makers[kind](model, origin, **options)


def arrays(adapter):
    """The arrays of an adapter by name, and what else there is."""
    if adapter.kind == "hybrid":
        (entries, shapes), (terms, more) = arrays(adapter.sparse), arrays(adapter.low_rank)
        return {n: (*entries[n], *terms[n]) for n in entries}, (shapes, more)
    if adapter.kind == "sparse":
        return {n: (e.positions, e.values) for n, e in adapter.entries.items()}, adapter.shapes
    if adapter.kind == "lora":
        terms = adapter.matrices
        return {n: (t.a, t.b) for n, t in terms.items()}, {
            n: (t.alpha, adapter.rslora) for n, t in terms.items()
        }
    return {n: (f.values,) for n, f in adapter.factors.items()}, {
        n: (f.inputs, f.shape) for n, f in adapter.factors.items()
    }


def assert_same(one, other, *, origin=True):
    """Adapters are equal bit for bit."""
    assert type(one) is type(other)
    (left, more), (right, others) = arrays(one), arrays(other)
    assert left.keys() == right.keys()
    assert more == others
    for name in left:
        for a, b in zip(left[name], right[name], strict=True):
            assert a.dtype == b.dtype, name
            assert a.tobytes() == b.tobytes(), name
    if origin:
        assert one.origin == other.origin
