"""The bounds hold for noise as large as they are told, and let nothing else pass."""

from dataclasses import replace

import numpy as np
import pytest

from support.gradient_noise import AdamNoise, SM3Noise
from support.oracle import Matrix, Rules

SHAPE, STEPS, GROWTH, SAMPLES = (16, 12), 30, 10, 3
TOLERANCE = 2e-5  # of the values beside the bound, where golden trajectories are replayed
ADAM = Rules(learning_rate=1e-3, weight_decay=0.1)
SM3 = Rules(growth="ma", inner="sm3", learning_rate=1e-2, eps=1e-8, weight_decay=0.1)
RULES = {"adam": ADAM, "sm3": SM3}


def problem(smallest):
    """Gradients [steps, rows, columns] of very different sizes, and active positions of both halves."""
    rng = np.random.default_rng(0)
    sizes = np.exp(rng.uniform(np.log(smallest), np.log(1e-1), SHAPE))
    return sizes * rng.standard_normal((STEPS, *SHAPE)), rng.permutation(np.prod(SHAPE))[:80]


def follow(rules, gradients, active):
    """Yields a matrix after each update and once more when a half of its entries has been replaced."""
    matrix = Matrix(rules, SHAPE, active[:40])
    for number, gradient in enumerate(gradients, 1):
        matrix.update(gradient, rules.learning_rate)
        yield matrix, number
        if number == GROWTH:
            matrix.active[...] = False
            matrix.active.flat[active[20:60]] = True
            grown = np.zeros(SHAPE, bool)
            grown.flat[active[40:60]] = True
            matrix.candidates = grown
            matrix.observe(gradients[GROWTH - SAMPLES : GROWTH])
            matrix.steps = SAMPLES
            for array, fresh in ((matrix.value, 0), (matrix.mu, 0), (matrix.nu, 0), (matrix.age, 1)):
                array[grown] = fresh
            matrix.seed(grown)


def bounds(rules, gradients, active, noise):
    """Yields (values, their bounds, positions) after each step."""
    options = {"weight_decay": rules.weight_decay, "eps": rules.eps}
    adam = rules.inner == "adam"
    bound = AdamNoise(np.prod(SHAPE), b1=rules.b1, b2=rules.b2, **options) if adam else None
    bound = bound or SM3Noise(np.prod(SHAPE), **options)
    rows, columns = (np.zeros(size) for size in SHAPE)
    for matrix, number in follow(rules, gradients, active):
        at = np.flatnonzero(matrix.active)
        if adam:
            moments = {"mu": matrix.mu.flat[at], "nu": matrix.nu.flat[at], "age": matrix.age.flat[at] - 1}
            bound.step(at, noise, rules.learning_rate, **moments)
        else:
            known = np.minimum.outer(rows, columns).flat[at]
            gradient = gradients[number - 1].flat[at]
            bound.step(at, noise, rules.learning_rate, gradient=gradient, known=known)
            rows, columns = matrix.row.copy(), matrix.column.copy()
        yield matrix.value.flat[at].copy(), bound.value[at].copy(), at
        if number == GROWTH:
            grown = active[40:60]
            bound.grow(grown, noise, SAMPLES) if adam else bound.grow(grown)


def outside(rules, wrong, gradients, others, active, noise):
    """Share of entries, at each step, that the bound and the tolerance do not let pass."""
    run = zip(bounds(rules, gradients, active, noise), follow(wrong, others, active), strict=True)
    for (values, bound, at), (matrix, _) in run:
        error = np.abs(matrix.value.flat[at] - values)
        yield (error > bound + TOLERANCE * np.abs(values).max()).mean()


@pytest.mark.parametrize("inner", RULES)
@pytest.mark.parametrize("share", [1e-7, 1e-6, 2e-5, 1e-3])
def test_noise_of_the_size_told_is_inside(inner, share):
    """Also where it is the larger part of a gradient; at every entry it is as large as may be."""
    gradients, active = problem(1e-8)
    noise = share * np.abs(gradients).max()
    for seed in range(20):
        signs = np.random.default_rng(seed).choice([-1, 1], gradients.shape)
        for others in (gradients + noise * signs, gradients - noise * np.sign(gradients)):
            assert not any(outside(RULES[inner], RULES[inner], gradients, others, active, noise))


@pytest.mark.parametrize("inner", RULES)
def test_the_bound_is_reached_where_noise_decides(inner):
    """At gradients smaller than the noise, in its order of magnitude."""
    gradients, active = problem(1e-8)
    noise = 1e-6 * np.abs(gradients).max()
    rules, others = RULES[inner], gradients - noise * np.sign(gradients)
    run = zip(bounds(rules, gradients, active, noise), follow(rules, others, active), strict=True)
    (values, bound, at), (matrix, _) = next(run)
    decided = np.abs(gradients[0].flat[at]) < noise
    error = np.abs(matrix.value.flat[at] - values)
    assert decided.sum() > 5
    assert (error > bound / 3)[decided].all()


@pytest.mark.parametrize("inner", RULES)
def test_the_bound_is_small_where_gradients_are_not(inner):
    """With noise as it is measured, 3% of the largest gradient is enough for 2e-4 of the values."""
    gradients, active = problem(1e-8)
    gradients = np.sign(gradients) * np.sqrt(np.square(gradients).mean(0))
    large = np.abs(gradients[0]).ravel() > 3e-2 * np.abs(gradients).max()
    for values, bound, at in bounds(RULES[inner], gradients, active, 1e-6 * np.abs(gradients).max()):
        assert large[at].sum() > 5
        assert bound[large[at]].max() < 2e-4 * np.abs(values).max()


@pytest.mark.parametrize(
    ("inner", "wrong"),
    [
        ("adam", {"learning_rate": 1e-2}),
        ("adam", {"learning_rate": 1.01e-3}),
        ("adam", {"b1": 0.89}),
        ("adam", {"b2": 0.99}),
        ("adam", {"late_age": True}),
        ("adam", {"weight_decay": 0.0}),
        ("sm3", {"learning_rate": 1e-1}),
        ("sm3", {"learning_rate": 1.01e-2}),
        ("sm3", {"weight_decay": 0.0}),
        ("sm3", {"inner": "sgd"}),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(value),
)
def test_another_number_is_outside(inner, wrong):
    """At most entries, with noise as it is measured and gradients from the largest to a hundredth."""
    gradients, active = problem(1e-3)
    rules, noise = RULES[inner], 1e-6 * np.abs(gradients).max()
    shares = list(outside(rules, replace(rules, **wrong), gradients, gradients, active, noise))
    if "late_age" in wrong:  # of grown entries, half of all
        shares = [2 * share for share in shares[GROWTH:]]
    assert np.median(shares) > 0.5, shares
