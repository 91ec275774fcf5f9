"""spiel() around Optax's optimizers: replaced entries start afresh, all others do as the optimizer does."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from support.optax_cases import TARGETS, Lowest, around

import spiel_jax as sj

SINGLE = {"single": sj.Target((3, 3), 1)}
labels = {"one": "a", "stack": "b"}
contrib = optax.contrib

INNER = {
    "adamw": lambda: optax.adamw(0.1),
    "adamw, decay of some": lambda: optax.adamw(0.1, mask={"one": True, "stack": False}),
    "adam, narrow mu": lambda: optax.adam(0.1, mu_dtype=jnp.bfloat16),
    "adam after adaptive clipping": lambda: optax.chain(optax.adaptive_grad_clip(0.5), optax.adam(0.1)),
    "adamw, injected": lambda: optax.inject_hyperparams(optax.adamw)(optax.linear_schedule(0.1, 0.0, 9)),
    "lion": lambda: optax.lion(0.1),
    "sgd, momentum": lambda: optax.sgd(0.1, momentum=0.9, nesterov=True),
    "adagrad": lambda: optax.adagrad(0.1, initial_accumulator_value=0.1),
    "adafactor, unfactored": lambda: optax.adafactor(0.1, factored=False, momentum=0.9),
    "adafactor, too small to factor": lambda: optax.adafactor(0.1),
    "schedule-free adamw": lambda: contrib.schedule_free_adamw(0.1, weight_decay=0.1),
    "rprop": lambda: optax.rprop(0.1),
    "novograd, one moment per target": lambda: optax.novograd(0.1),
    "noisy sgd": lambda: optax.noisy_sgd(0.1, key=3),
    "prodigy, holds the first values": lambda: contrib.prodigy(0.1),
    "partition": lambda: optax.partition({"a": optax.adam(0.1), "b": optax.sgd(0.1, 0.9)}, labels),
    "masked": lambda: optax.masked(optax.adam(0.1), {"one": True, "stack": False}),
    "aged adam": lambda: optax.chain(sj.scale_by_aged_adam(), optax.scale(-0.1)),
    "accumulated": lambda: optax.MultiSteps(optax.adam(0.1), 2),
}

SLOW = (  # the state is of a kind that another one has
    "adamw, decay of some",
    "adam after adaptive clipping",
    "lion",
    "adafactor, unfactored",
    "rprop",
    "masked",
)


def both_ways(inner, targets, rate, dtype=jnp.float32):
    """A step without and one with a reselection, from one compiled program so that both round alike."""
    plan = sj.Reselection(9, every=1, accumulation=1, rate=sj.constant(rate), first=None)
    tx = sj.spiel(inner, targets, growth=Lowest(), schedule=plan)

    @jax.jit
    def run(key, values, state):
        grads = optax.tree.random_like(key, values)
        outcomes = []
        for reselect in (False, True):
            updates, new = tx.update(grads, state, values, reselect=reselect)
            outcomes.append((updates, new))
        fresh = inner.init(optax.apply_updates(values, updates))
        return (values, *outcomes[0]), (values, *outcomes[1]), fresh

    values = sj.zeros(targets, dtype)
    state = jax.jit(tx.init)(values)
    for number in range(3):  # moments that have something to lose
        plain, reselected, fresh = run(jax.random.key(number), values, state)
        values, state = optax.apply_updates(values, plain[1]), plain[2]
    return jax.tree.map(unwrapped, (plain, reselected, fresh))


def unwrapped(leaf):
    is_key = jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    return np.asarray(jax.random.key_data(leaf) if is_key else leaf)


def check_reset(plain, reselected, fresh):
    """Compares bit for bit; returns how many entries of the inner state were reset."""
    (values, updates, state), (_, new_updates, new_state) = plain, reselected
    changed = {n: state.active[n].indices != d.indices for n, d in new_state.active.items()}
    for name, replaced in changed.items():
        assert replaced.any()
        np.testing.assert_array_equal(new_updates[name], np.where(replaced, -values[name], updates[name]))
    resets = 0

    def check(path, leaf, plain, fresh):
        nonlocal resets
        last = path[-1].key if isinstance(path[-1], jax.tree_util.DictKey) else None
        expected = plain
        if last in changed and leaf.shape == changed[last].shape:
            expected = np.where(changed[last], fresh, plain)
            resets += np.sum(expected != plain)
        assert (leaf.shape, leaf.dtype) == (plain.shape, plain.dtype)
        np.testing.assert_array_equal(leaf, expected, err_msg=jax.tree_util.keystr(path))

    jax.tree_util.tree_map_with_path(check, new_state.inner, state.inner, fresh)
    return resets


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if name in SLOW else ()) for name in INNER]
)
def test_only_replaced_entries_are_reset(name):
    plain, reselected, fresh = both_ways(INNER[name](), TARGETS, 0.5)
    assert reselected[2].replaced == 0.5
    resets = check_reset(plain, reselected, fresh)
    assert (resets == 0) == (name == "noisy sgd")


@pytest.mark.parametrize(
    "name",
    [
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("adamw", "adagrad")),
        "adafactor, unfactored",
        "novograd, one moment per target",
    ],
)
def test_a_single_entry(name):
    """Its values have the shape (1,), which counts and placeholders may have too."""
    plain, reselected, fresh = both_ways(INNER[name](), SINGLE, 1.0)
    assert check_reset(plain, reselected, fresh) > 0


@pytest.mark.parametrize(
    "name",
    ["adamw", pytest.param("sgd, momentum", marks=pytest.mark.slow), "schedule-free adamw", "aged adam"],
)
def test_narrow_values(name):
    plain, reselected, fresh = both_ways(INNER[name](), TARGETS, 0.5, jnp.bfloat16)
    assert plain[0]["one"].dtype == jnp.bfloat16
    assert check_reset(plain, reselected, fresh) > 0


def per_layer():
    """State of the right shapes, which map_params cannot find: a list of leaves."""
    return optax.GradientTransformation(
        lambda params: [jnp.zeros_like(leaf) for leaf in jax.tree.leaves(params)],
        lambda updates, state, params=None: (updates, state),
    )


STACKED = {"w": sj.Target((8, 8), 8, stack=(4,))}
LARGE = {"w": sj.Target((256, 256), 200, stack=(130,))}
REFUSED = {
    "adafactor": (lambda: optax.adafactor(0.1, min_dim_size_to_factor=2), STACKED),
    "adafactor, large": (lambda: optax.adafactor(0.1), LARGE),
    "adafactor in a chain": (lambda: optax.chain(optax.clip(1.0), optax.adafactor(0.1)), LARGE),
    "galore": (lambda: contrib.galore(0.1, rank=2), STACKED),
    "muon": (lambda: contrib.muon(0.1), STACKED),
    "muon, on vectors": (lambda: contrib.muon(0.1), SINGLE),
    "sm3": (lambda: optax.sm3(0.1), STACKED),
    "sm3, on vectors": (lambda: optax.sm3(0.1), TARGETS),
    "lbfgs": (lambda: optax.lbfgs(0.1), TARGETS),
    "per layer": (per_layer, TARGETS),
}


@pytest.mark.parametrize("name", REFUSED)
def test_states_that_are_not_per_entry_are_refused(name):
    inner, targets = REFUSED[name]
    tx = around(inner(), targets=targets)
    with pytest.raises(TypeError, match="needs an inner optimizer whose state is per entry"):
        jax.eval_shape(lambda: tx.init(sj.zeros(targets)))
    with pytest.raises(TypeError, match="whose state is per entry"):
        jax.eval_shape(lambda: optax.chain(optax.clip(1.0), tx).init(sj.zeros(targets)))
