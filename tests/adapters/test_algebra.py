"""The algebra of sparse adapters against dense NumPy, over random problems."""

import dataclasses

import numpy as np
import pytest
from absl import app, flags
from hypothesis import given, settings
from hypothesis import strategies as st

from spiel_jax.adapters import (
    AdapterError,
    Entries,
    LoraAdapter,
    Origin,
    SparseAdapter,
    add,
    info,
    intersect,
    overlap,
    prune,
    read_adapter,
    scale,
    subtract,
    ties,
    union,
    weighted_sum,
    write_adapter,
)
from spiel_jax.adapters import __main__ as command

SHAPES = {
    "model.layers.0.mlp.up_proj.weight": (3, 5),
    "model.layers.1.mlp.up_proj.weight": (3, 5),
    "model.layers.1.self_attn.q_proj.weight": (1, 4),
    "lm_head.weight": (7, 2),
}
# few values, so that some cancel and some are equal; zeros, as fresh entries have
NUMBERS = st.sampled_from([0.0, 0.5, -0.5, 1.0, -1.0, 0.1, 3e-8, -7.25])


@st.composite
def sparse_adapters(draw):
    entries = {}
    names = draw(st.sets(st.sampled_from(list(SHAPES)), min_size=1))
    for name in sorted(names):
        size = int(np.prod(SHAPES[name]))
        positions = sorted(draw(st.sets(st.integers(0, size - 1), min_size=1)))
        values = draw(st.lists(NUMBERS, min_size=len(positions), max_size=len(positions)))
        entries[name] = Entries(SHAPES[name], np.array(positions), np.array(values, np.float32))
    return SparseAdapter(entries)


several = st.lists(sparse_adapters(), min_size=1, max_size=4)
problems = settings(max_examples=25, deadline=None, derandomize=True, database=None)


def dense(adapter):
    """Values [7, 5 * 4] and where there are entries, all weights one under another."""
    values, has = {}, {}
    for name, shape in SHAPES.items():
        values[name], has[name] = np.zeros(shape), np.zeros(shape, bool)
        if name in adapter.entries:
            entries = adapter.entries[name]
            values[name].reshape(-1)[entries.positions] = entries.values
            has[name].reshape(-1)[entries.positions] = True
    flat = [np.concatenate([part.reshape(-1) for part in parts.values()]) for parts in (values, has)]
    return flat[0], flat[1]


def assert_is(adapter, values, has):
    """The adapter has entries just there, of just these values, rounded once."""
    found, where = dense(adapter)
    np.testing.assert_array_equal(where, has)
    np.testing.assert_array_equal(found, np.where(has, values, 0).astype(np.float32))
    assert all(entries.count for entries in adapter.entries.values())


def stacked(adapters):
    values, has = zip(*map(dense, adapters), strict=True)
    return np.stack(values), np.stack(has)


@problems
@given(several, st.data())
def test_sums(adapters, data):
    values, has = stacked(adapters)
    n = len(adapters)
    factors = data.draw(st.lists(st.sampled_from([1.0, -1.0, 0.3, 0.0]), min_size=n, max_size=n))
    total = sum(factor * one for factor, one in zip(factors, values, strict=True))
    assert_is(weighted_sum(adapters, factors), total, has.any(0))
    assert_is(add(*adapters), sum(values), has.any(0))
    assert_is(scale(adapters[0], -0.3), -0.3 * values[0], has[0])
    assert_is(subtract(adapters[0], adapters[-1]), values[0] - values[-1], has[0] | has[-1])


@problems
@given(several)
def test_parts(adapters):
    values, has = stacked(adapters)
    if has.all(0).any():
        assert_is(intersect(*adapters), values[0], has.all(0))
    else:
        with pytest.raises(AdapterError, match="no entry is left"):
            intersect(*adapters)
    first = np.take_along_axis(values, has.argmax(0)[None], 0)[0]
    assert_is(union(*adapters), first, has.any(0))


@problems
@given(several, st.sampled_from([None, 0.2, 0.5]), st.data())
def test_ties(adapters, density, data):
    n = len(adapters)
    factors = data.draw(st.lists(st.sampled_from([1.0, 0.3]), min_size=n, max_size=n))
    try:
        kept = adapters if density is None else [prune(one, density, each=True) for one in adapters]
    except AdapterError:
        with pytest.raises(AdapterError, match="no entry is left"):
            ties(adapters, factors, density=density)
        return
    values, _ = stacked(kept)
    sign = np.where(values.sum(0) >= 0, 1, -1)
    agree = (np.sign(values) == sign).astype(float)
    weighted = sum(a * v * f for a, v, f in zip(agree, values, factors, strict=True))
    count = agree.sum(0)
    if not count.any():
        with pytest.raises(AdapterError, match="no entry is left"):
            ties(adapters, factors, density=density)
        return
    assert_is(ties(adapters, factors, density=density), weighted / np.maximum(count, 1), count > 0)


@problems
@given(sparse_adapters(), st.floats(0.01, 1), st.booleans())
def test_prune(adapter, density, each):
    values, has = dense(adapter)
    bounds = np.cumsum([0, *(int(np.prod(shape)) for shape in SHAPES.values())])
    kept = np.zeros_like(has)
    parts = {n: slice(bounds[i], bounds[i + 1]) for i, n in enumerate(SHAPES) if n in adapter.entries}
    order = {n: parts[n] for n in adapter.entries}
    groups = [[part] for part in order.values()] if each else [list(order.values())]
    for group in groups:
        places = np.concatenate([np.arange(values.size)[part] for part in group])
        most = max(n for n in range(places.size + 1) if n / places.size <= density)
        ranked = sorted((-abs(values[at]), rank) for rank, at in enumerate(places) if has[at])
        kept[[places[rank] for _, rank in ranked[:most]]] = True
    if kept.any():
        pruned = prune(adapter, density, each=each)
        assert_is(pruned, values, kept)
        if not each:
            assert prune(adapter, adapter.density).entries.keys() == adapter.entries.keys()
            assert prune(adapter, adapter.density).count == adapter.count
    else:
        with pytest.raises(AdapterError, match="no entry is left"):
            prune(adapter, density, each=each)


@problems
@given(several)
def test_overlap_and_info(adapters):
    values, has = stacked(adapters)
    found = overlap(adapters)
    np.testing.assert_array_equal(found["shared"], has.astype(int) @ has.astype(int).T)
    norms = np.linalg.norm(values, axis=1)
    for i, j in np.ndindex(found["cosine"].shape):
        scales = norms[i] * norms[j]
        expected = values[i] @ values[j] / scales if scales else 0
        np.testing.assert_allclose(found["cosine"][i, j], expected, rtol=1e-12, atol=1e-15)
    about = info(adapters[0])
    assert about.total.count == adapters[0].count == has[0].sum()
    np.testing.assert_allclose(about.total.norm, norms[0], rtol=1e-12)
    assert about.total.density == adapters[0].density
    for shares in (about.layers, about.modules):
        assert sum(share.count for share in shares.values()) == about.total.count
    assert set(about.layers) <= {-1, 0, 1}
    assert set(about.modules) <= {"mlp.up_proj", "self_attn.q_proj", "lm_head"}


def test_ties_is_that_of_peft():
    import torch
    from peft.utils.merge_utils import ties as theirs

    rng, shape = np.random.default_rng(0), (20, 30)
    adapters, tensors = [], []
    for _ in range(3):
        positions = np.sort(rng.choice(600, 150, replace=False))
        values = rng.normal(size=150).astype(np.float32)
        adapters.append(SparseAdapter({"a.weight": Entries(shape, positions, values)}))
        tensors.append(torch.tensor(dense_of(adapters[-1], shape)))
    weights = [1.0, 0.5, 0.25]
    expected = theirs(tensors, torch.tensor(weights), density=0.1).numpy()
    found = dense_of(ties(adapters, weights, density=0.1), shape)
    np.testing.assert_array_equal(found != 0, expected != 0)
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def dense_of(adapter, shape):
    found = np.zeros(shape, np.float32)
    found.reshape(-1)[adapter.entries["a.weight"].positions] = adapter.entries["a.weight"].values
    return found


def one_entry(shape=(2, 3), **origin):
    return SparseAdapter(
        {"a.weight": Entries(shape, np.array([1]), np.ones(1, np.float32))}, Origin(**origin)
    )


class TestBases:
    def test_different_ones_are_refused_unless_forced(self):
        one, other = (one_entry(base=n, fingerprint={"a": n, "b": "x"}) for n in ("one", "other"))
        for combine in (add, subtract, union, intersect):
            with pytest.raises(AdapterError, match=r"different base models: a differs \(one, other\)"):
                combine(one, other)
            assert combine(one, other, any_base=True).count == 1
        with pytest.raises(AdapterError, match="different base models"):
            overlap([one, other])
        with pytest.raises(AdapterError, match="different base models"):
            ties([one, other])

    def test_names_decide_where_there_is_no_fingerprint(self):
        with pytest.raises(AdapterError, match="one and other, and not both have a fingerprint"):
            add(one_entry(base="one"), one_entry(base="other"))
        assert add(one_entry(base="one"), one_entry()).origin.base == "one"
        both = add(one_entry(fingerprint={"a": "1"}), one_entry(base="x", step=3))
        assert both.origin == Origin("x", {"a": "1"})

    def test_what_cannot_be_combined(self):
        with pytest.raises(AdapterError, match=r"a.weight is \[2, 3\] for one adapter, \[3, 2\]"):
            add(one_entry(), one_entry((3, 2)), any_base=True)
        with pytest.raises(AdapterError, match="is lora: expected sparse"):
            add(one_entry(), LoraAdapter({}))
        with pytest.raises(AdapterError, match=r"weights = \[1.0\]: expected 2 finite numbers"):
            weighted_sum([one_entry(), one_entry()], [1.0])
        with pytest.raises(AdapterError, match="a value is not finite"):
            scale(one_entry(), 1e39)
        with pytest.raises(AdapterError, match="density = 0: expected"):
            prune(one_entry(), 0)


def run(*arguments):
    options = flags.FlagValues()
    command.define_flags(options)
    options(["adapters", *map(str, arguments)])
    command.main(options)


class TestCommand:
    @pytest.fixture
    def written(self, tmp_path):
        rng = np.random.default_rng(0)
        for number, name in enumerate("ab"):
            positions = np.arange(number, 12, 2 + number)
            values = rng.normal(size=positions.size).astype(np.float32)
            entries = {"model.layers.3.mlp.up_proj.weight": Entries((3, 4), positions, values)}
            write_adapter(SparseAdapter(entries, Origin("base", step=5)), tmp_path / name)
        return tmp_path

    def test_what_is_shown(self, written, capsys):
        run("--do=info", f"--adapter={written / 'a'}")
        shown = capsys.readouterr().out
        assert "base: base" in shown
        assert "step: 5" in shown
        assert "layer 3            6  50.0000%" in shown
        run("--do=overlap", f"--adapter={written / 'a'}", f"--adapter={written / 'b'}")
        assert "       2   25.00%" in capsys.readouterr().out

    @pytest.mark.parametrize(
        ("flag", "expected"),
        [
            (["sum", "--weights=2,-1"], lambda a, b: weighted_sum([a, b], [2, -1])),
            (["subtract"], subtract),
            (["ties", "--density=0.25"], lambda a, b: ties([a, b], density=0.25)),
            (["intersect"], intersect),
            (["union"], union),
        ],
    )
    def test_results(self, flag, expected, written, capsys):
        name, *more = flag
        paths = [written / "a", written / "b"]
        run(f"--do={name}", *(f"--adapter={path}" for path in paths), *more, f"--out={written / 'c'}")
        found, wanted = read_adapter(written / "c"), expected(*map(read_adapter, paths))
        assert dataclasses.asdict(found.origin) == dataclasses.asdict(wanted.origin)
        assert found.entries.keys() == wanted.entries.keys()
        for key, entries in wanted.entries.items():
            np.testing.assert_array_equal(found.entries[key].positions, entries.positions)
            np.testing.assert_array_equal(found.entries[key].values, entries.values)
        assert f"{wanted.count} entries" in capsys.readouterr().out

    @pytest.mark.parametrize(
        ("arguments", "match"),
        [
            (["--do=overlap", "--adapter=a"], "takes 2 or more adapters, got 1"),
            (["--do=prune", "--adapter=a", "--adapter=b"], "takes 1 adapters, got 2"),
            (["--do=prune", "--adapter=a", "--out=c"], "needs --density"),
            (["--do=info", "--adapter=a", "--weights=1"], "--weights means nothing"),
            (["--do=info", "--adapter=a", "--out=c"], "takes no --out"),
            (["--do=sum", "--adapter=a"], "needs --out"),
        ],
    )
    def test_flags_that_do_not_go_together(self, arguments, match):
        with pytest.raises(app.UsageError, match=match):
            run(*arguments)

    def test_what_is_combined_is_not_overwritten(self, written):
        with pytest.raises(AdapterError, match="which is needed"):
            run("--do=prune", f"--adapter={written / 'a'}", "--density=0.1", f"--out={written / 'a'}")
        with pytest.raises(app.UsageError, match="expected numbers"):
            run("--do=sum", f"--adapter={written / 'a'}", "--weights=x", f"--out={written / 'c'}")
