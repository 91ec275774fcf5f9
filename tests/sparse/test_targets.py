"""Targets: counts by hand, rules, budgets and trees of values."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spiel_jax.models import ModelConfig, abstract_params, layer_names
from spiel_jax.sparse.targets import Rule, Target, by_target, find_targets, like_values, zeros


def shapes(**leaves: tuple[int, ...]) -> dict[str, jax.ShapeDtypeStruct]:
    return {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in leaves.items()}


LLAMA = ModelConfig(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=64,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    max_positions=32,
)
PROJECTIONS = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"]
PROJECTIONS += ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]
BLOCKS = r"model\.layers\.\d+\.(self_attn|mlp)\.\w+_proj\.weight"


def find_llama(config: ModelConfig = LLAMA, **options):
    return find_targets(abstract_params(config), layer_names=lambda n, s: layer_names(n, s[0]), **options)


def test_budget_is_shared_in_proportion_to_size():
    # 8 * 16 + 4 * 4 + 10 = 154 parameters, of which the matrices are 144; 38 tunable
    targets = find_targets(shapes(w=(8, 16), v=(4, 4), bias=(10,)), density=0.25)
    assert targets == {"w": Target((8, 16), 33), "v": Target((4, 4), 4)}  # 38 * 128 / 144, 38 * 16 / 144


def test_num_tunable_is_the_budget_itself():
    targets = find_targets(shapes(w=(8, 16), v=(4, 4)), num_tunable=36)
    assert {name: target.count for name, target in targets.items()} == {"w": 32, "v": 4}
    assert find_targets(shapes(w=(8, 16)), num_tunable=128)["w"].count == 128


def test_counts_of_the_original_implementation():
    # the counts recorded from the original code for this model and density
    targets = find_llama(density=0.05, rules=(BLOCKS,))
    assert set(targets) == {f"model.layers.{name}.weight" for name in PROJECTIONS}
    counts = [targets[f"model.layers.{name}.weight"].count for name in PROJECTIONS]
    assert counts == [63, 31, 31, 63, 126, 126, 126]
    assert all(target.stack == (2,) and target.layers is None for target in targets.values())
    assert targets["model.layers.mlp.down_proj.weight"].shape == (32, 64)  # Hugging Face orientation


def test_counts_of_llama_2_7b_in_the_paper():
    config = ModelConfig.llama2_7b()
    rank_unit = 2_498_560  # tunable weights of one LoRA rank
    targets = find_llama(config, num_tunable=8 * rank_unit, rules=(BLOCKS,))
    total = sum(target.total for target in targets.values())
    assert 0 <= 8 * rank_unit - total < 7 * 32  # what rounding down leaves of each of 224 matrices


def test_first_matching_rule_wins():
    rules = [Rule("w", 0.5), Rule("v", 0), "[uvw]"]
    targets = find_targets(shapes(w=(4, 4), v=(4, 4), u=(4, 4), t=(4, 4)), num_tunable=7, rules=rules)
    assert {name: target.count for name, target in targets.items()} == {"u": 7, "w": 8}


def test_rules_match_whole_names():
    targets = find_targets(shapes(up=(4, 4), up_proj=(4, 4)), num_tunable=4, rules=("up",))
    assert list(targets) == ["up"]


def test_density_of_a_rule_is_rounded_down_and_needs_no_budget():
    targets = find_targets(shapes(w=(5, 5)), rules=[Rule("w", 0.31)])  # 7.75
    assert targets["w"].count == 7
    assert find_targets(shapes(w=(5, 5)), rules=[Rule("w", 1)])["w"].count == 25


def test_a_density_relates_to_all_parameters_whatever_is_adapted():
    params = shapes(w=(10, 10), embedding=(100, 9))
    assert find_targets(params, density=0.05, rules=("w",))["w"].count == 50


def test_nested_parameters_are_named_by_their_path():
    params = {"block": [{"kernel": jnp.zeros((4, 4))}, {"kernel": jnp.zeros((4, 4)), "bias": jnp.zeros(4)}]}
    targets = find_targets(params, num_tunable=8)
    assert list(targets) == ["block.0.kernel", "block.1.kernel"]


def test_layers_of_a_stack_are_chosen_by_their_names():
    targets = find_targets(shapes(w=(6, 4, 4)), num_tunable=16, rules=(r"w\.[0125]",))
    assert targets == {"w@0-2,5": Target((4, 4), 4, (4,), layers=(0, 1, 2, 5))}


def test_layers_with_different_counts_are_targets_of_their_own():
    rules = [Rule(r".*\.1\..*", 0.5), Rule(BLOCKS, 0.25)]
    targets = find_llama(rules=rules)
    assert len(targets) == 14
    first, second = (targets[f"model.layers.mlp.up_proj.weight@{layer}"] for layer in (0, 1))
    assert first == Target((64, 32), 512, (1,), layers=(0,))
    assert second == Target((64, 32), 1024, (1,), layers=(1,))


def test_equal_counts_from_different_rules_are_one_target():
    targets = find_targets(shapes(w=(2, 4, 4)), rules=[Rule(r"w\.0", 0.25), Rule(r"w\.1", 0.26)])
    assert targets == {"w": Target((4, 4), 4, (2,))}


def test_two_stack_axes_are_adapted_whole_or_not_at_all():
    assert find_targets(shapes(w=(2, 3, 4, 4)), num_tunable=24)["w"] == Target((4, 4), 4, (2, 3))
    with pytest.raises(ValueError, match="w: only one stack axis can be adapted in part"):
        find_targets(shapes(w=(2, 3, 4, 4)), num_tunable=4, rules=(r"w\.4",))


def test_block_grid():
    target = find_targets(shapes(w=(3, 4, 6)), num_tunable=3 * 11, grid=(2, 2))["w"]
    assert target == Target((4, 6), 8, (3,), (2, 2))  # 11 is rounded down to a multiple of 4
    assert (target.block, target.block_count, target.block_size) == ((2, 3), 2, 6)
    assert (target.lead, target.total) == ((3, 2, 2), 24)
    delta = target.delta(jnp.zeros((3, 2, 2, 2), jnp.int32))
    assert (delta.shape, delta.grid, delta.values) == ((4, 6), (2, 2), None)


def test_a_grid_is_asked_for_what_is_adapted_alone():
    """It may refuse others, such as a stack of norms."""
    rules = [Rule("left", 0), "w"]
    targets = find_targets(
        shapes(norm=(3, 5), w=(4, 6), left=(4, 6)),
        num_tunable=8,
        rules=rules,
        grid=lambda name: {"w": (2, 2)}[name],
    )
    assert targets == {"w": Target((4, 6), 8, (), (2, 2))}


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        (
            [r"model\.layers\.0\.mlp\.upproj\.weight"],
            r"matches no weight; near names: .*0\.mlp\.up_proj\.weight",
        ),
        (
            [".*", Rule(r".*\.q_proj\.weight", 0.5)],
            r"rule '.*q_proj.*' never applies: earlier rules match all",
        ),
        (["(", ".*"], r"rule '\(' is no regular expression"),
        ([Rule(".*", 1.5)], r"rule '\.\*': density 1.5 is not between 0 and 1"),
        ([Rule(".*", -0.1)], r"density -0.1 is not between 0 and 1"),
        ([Rule(".*", 0)], "density or num_tunable given, but every rule has a density of its own"),
    ],
)
def test_rules_that_cannot_be_meant_are_refused(rules, message):
    with pytest.raises(ValueError, match=message):
        find_llama(density=0.05, rules=rules)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "one of them; got density = None, num_tunable = None"),
        ({"density": 0.1, "num_tunable": 5}, "one of them; got density = 0.1, num_tunable = 5"),
        ({"density": 0.0}, "density = 0.0: expected more than 0 and at most 1"),
        ({"density": 1.1}, "density = 1.1"),
        ({"density": float("nan")}, "density = nan"),
        ({"num_tunable": 0}, "0 tunable entries: expected 1 to 144"),
        ({"num_tunable": 145}, "145 tunable entries: expected 1 to 144, the entries of the matched weights"),
        ({"density": 1.0}, "154 tunable entries: expected 1 to 144"),
        ({"num_tunable": 8}, r"v \(16 entries\) would get no active entry: raise the budget"),
        ({"num_tunable": 30, "grid": (2, 2)}, r"v \(16 entries\) would get no active entry"),
        (
            {"num_tunable": 40, "grid": (3, 1)},
            r"a grid of \(3, 1\) blocks does not divide a weight of \(4, 4\)",
        ),
        ({"rules": [Rule(".*", 0)]}, "no weight is adapted: every matrix is left out by the rules"),
        ({"num_tunable": 8, "rules": [Rule("v", 0.01), "w"]}, r"v \(16 entries\) would get no active entry"),
    ],
)
def test_budgets_that_cannot_be_met_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        find_targets(shapes(w=(8, 16), v=(4, 4), bias=(10,)), **options)


@pytest.mark.parametrize("names", [["w"], ["a", "a"], ["a", "b", "c"]])
def test_layer_names_must_name_each_matrix(names):
    with pytest.raises(ValueError, match=r"w: layer_names gave .* for 2 matrices"):
        find_targets(shapes(w=(2, 4, 4)), num_tunable=4, layer_names=lambda name, stack: names)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (((4, 4), 0), "count = 0: expected a multiple of 1 between 1 and"),
        (((4, 4), 17), "count = 17"),
        (((4, 4), 3, (), (2, 1)), "count = 3: expected a multiple of 2"),
        (((4, 5), 4, (), (2, 2)), r"a grid of \(2, 2\) blocks does not divide"),
        (((2**16, 2**15), 10), "has more entries than int32 positions: use a finer grid"),
    ],
)
def test_impossible_targets_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        Target(*arguments)
    assert Target((2**16, 2**15), 10, (), (2, 1)).block_size == 2**30


# ------------------------------------------------------------------------------------------ trees of values

TARGETS = {"a.w": Target((4, 4), 3, (2,)), "b.w": Target((4, 4), 4, (), (2, 2))}


def test_zeros():
    values = zeros(TARGETS)
    assert {name: v.shape for name, v in values.items()} == {"a.w": (2, 3), "b.w": (2, 2, 1)}
    assert all(v.dtype == jnp.float32 and not np.any(v) for v in values.values())
    assert zeros(TARGETS, jnp.bfloat16)["a.w"].dtype == jnp.bfloat16


def test_values_are_found_wherever_they_are_in_a_tree():
    tree = {"model": ({"b.w": 1}, {"a.w": 2, "other": None})}
    assert by_target(tree, TARGETS) == {"a.w": 2, "b.w": 1}
    assert list(by_target(tree, TARGETS)) == ["a.w", "b.w"]  # in the order of the targets
    assert like_values(tree, {"a.w": 20, "b.w": 10}, TARGETS) == {
        "model": ({"b.w": 10}, {"a.w": 20, "other": None})
    }


def test_a_tree_without_leaves_has_no_values():
    assert by_target({"model": None}, TARGETS) == {}


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"a.w": 1}, r"no target for none, no values for \['b\.w'\]"),
        ({"a.w": 1, "b.w": 2, "x": {"c.w": 3}}, r"no target for \['x\.c\.w'\], no values for none"),
        ({"x": {"a.w": 1}, "y": {"a.w": 2, "b.w": 3}}, "1 further values for the same targets"),
    ],
)
def test_other_trees_are_refused(tree, message):
    for call in (by_target, lambda tree, targets: like_values(tree, {}, targets)):
        with pytest.raises(ValueError, match=message):
            call(tree, TARGETS)
