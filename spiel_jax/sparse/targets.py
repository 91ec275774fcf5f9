"""Which weights are adapted, and how many entries of each."""

import difflib
import math
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from spiel_jax.errors import SpielError
from spiel_jax.ops.sharded import Axes
from spiel_jax.ops.stored import one_stack
from spiel_jax.ops.tree import named_leaves, parameter_name, path_name
from spiel_jax.sparse.delta import SparseDelta


@dataclass(frozen=True)
class Target:
    """One adapted weight: a matrix, or (some of) the matrices of a stack.

    Attributes:
        shape: (rows, columns) of one matrix.
        count: Slots of one matrix: its active entries, but for those that are ``spare``.
        stack: Sizes of the leading axes of the values: how many matrices are adapted.
        grid: (rows, columns) of the block grid; each block holds count / blocks entries.
        layers: Which matrices of the stack are adapted, ascending; None for all.
        axes: Mesh axes over which the rows and columns of the grid are spread; None for a grid that is not.
        spare: How many of a matrix's slots are not of its share of the budget, and begin unused: the budget
            is then one of all targets, and moves among them where entries are reselected; see ``spiel``.

    Raises:
        ValueError: If the count is out of range, the grid does not divide shape and count, or positions in a
            block do not fit int32.

    Example:
        >>> target = Target((4, 6), 8, stack=(2,), grid=(2, 1))
        >>> target.block, target.block_count, target.lead, target.total
        ((2, 6), 4, (2, 2, 1), 16)
    """

    shape: tuple[int, int]
    count: int
    stack: tuple[int, ...] = ()
    grid: tuple[int, int] = (1, 1)
    layers: tuple[int, ...] | None = None
    axes: Axes | None = None
    spare: int = 0

    def __post_init__(self):
        if self.grid == (1, 1) and self.axes is not None:
            raise ValueError(f"a grid of one block cannot be spread over the mesh axes {self.axes}")
        blocks = math.prod(self.grid)
        if any(size % cut for size, cut in zip(self.shape, self.grid, strict=True)):
            raise SpielError(f"a grid of {self.grid} blocks does not divide a weight of {self.shape}")
        if self.count % blocks or not 0 < self.count <= math.prod(self.shape):
            raise SpielError(
                f"count = {self.count}: expected a multiple of {blocks} between 1 and the number of "
                f"entries of a {self.shape} matrix"
            )
        if not 0 <= self.spare < self.count:
            raise SpielError(f"spare = {self.spare}: expected 0 to less than the count, {self.count}")
        if math.prod(self.block) > jnp.iinfo(jnp.int32).max:
            raise SpielError(
                f"a block of {self.block} has more entries than int32 positions: use a finer grid"
            )

    @property
    def block(self) -> tuple[int, int]:
        """(rows, columns) of one block."""
        return self.shape[0] // self.grid[0], self.shape[1] // self.grid[1]

    @property
    def block_count(self) -> int:
        """Slots of one block."""
        return self.count // math.prod(self.grid)

    @property
    def block_share(self) -> int:
        """Active entries of one block at the start: its slots but for the spare ones."""
        return max(1, (self.count - self.spare) // math.prod(self.grid))

    @property
    def block_size(self) -> int:
        """Entries of one block, active or not."""
        return math.prod(self.block)

    @property
    def lead(self) -> tuple[int, ...]:
        """Leading axes of the values: the stack, then the grid unless it is (1, 1)."""
        return self.stack + (() if self.grid == (1, 1) else self.grid)

    @property
    def total(self) -> int:
        """Active entries of the whole target; where the budget can move, its share at the start."""
        return (self.count - self.spare) * math.prod(self.stack)

    @property
    def slots(self) -> int:
        """Slots of the whole target, used or not."""
        return self.count * math.prod(self.stack)

    def filled(self, positions: jax.Array) -> jax.Array:
        """Positions [..., ``block_share``] and the spare slots, unused, after them: [..., ``block_count``].

        >>> Target((2, 3), 3, spare=1).filled(jnp.array([0, 4])).tolist()
        [0, 4, 6]
        """
        rest = [(0, 0)] * (positions.ndim - 1) + [(0, self.block_count - positions.shape[-1])]
        return jnp.pad(positions, rest, constant_values=self.block_size)

    def delta(self, indices: jax.Array, values: Any = None) -> SparseDelta:
        """A ``SparseDelta`` of this target's static shape."""
        return SparseDelta(indices, values, self.shape, self.grid, self.layers, self.axes)


@dataclass(frozen=True)
class Rule:
    """Says of the weights it matches whether and how densely they are adapted.

    Attributes:
        pattern: Regular expression that must match a parameter's whole name, the layer's number included
            ("model.layers.3.mlp.up_proj.weight").
        density: Share of the weight's own entries; 0 leaves the weight alone; None gives it its
            proportional share of the overall budget.

    Example:
        >>> shapes = {name: jax.ShapeDtypeStruct((8, 16), "float32") for name in ("up", "down", "head")}
        >>> rules = [Rule("up", density=0.5), Rule("down")]  # no rule matches the head: it is left alone
        >>> {name: target.count for name, target in find_targets(shapes, num_tunable=20, rules=rules).items()}
        {'down': 20, 'up': 64}
    """

    pattern: str
    density: float | None = None


def zeros(targets: Mapping[str, Target], dtype: Any = jnp.float32) -> dict[str, jax.Array]:
    """Initial values of all targets: name to zeros [*stack, ..., k].

    Example:
        >>> zeros({"w": Target((8, 16), 4, stack=(2,))})["w"].shape
        (2, 4)
    """
    return {name: jnp.zeros((*t.lead, t.block_count), dtype) for name, t in targets.items()}


def by_target(tree: Any, targets: Collection[str]) -> dict[str, Any]:
    """The leaves of a tree of values by target name, wherever they are in the tree.

    A leaf belongs to the target named by the last key of its path, so the values may be part of a larger
    tree (``optax.partition`` passes such trees). A tree without leaves, as ``optax.tree.map_params`` makes
    to learn the structure of a state, has none.

    Raises:
        ValueError: If a leaf belongs to no target, or some targets have no leaf or several.
    """
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    found = {path_name(path[-1:]): leaf for path, leaf in leaves}
    unknown = [path_name(path) for path, _ in leaves if path_name(path[-1:]) not in targets]
    missing = [name for name in targets if name not in found]
    if leaves and (unknown or missing or len(found) < len(leaves)):
        raise ValueError(
            "the tree of values does not match the targets: "
            f"no target for {unknown or 'none'}, no values for {missing or 'none'}, "
            f"{len(leaves) - len(found)} further values for the same targets"
        )
    return {name: found[name] for name in targets} if leaves else {}


def like_values(tree: Any, named: Mapping[str, Any], targets: Collection[str]) -> Any:
    """The inverse of ``by_target``: a tree like ``tree`` with the named leaves."""
    by_target(tree, targets)
    return jax.tree_util.tree_map_with_path(lambda path, _: named[path_name(path[-1:])], tree)


def adapted_matrices(params: Any, name: str, target: Target) -> Any:
    """The weight of a target as one stack of those of its matrices that are adapted, an array or stored.

    Raises:
        KeyError: If it is no leaf of ``params``.
    """
    leaves, parameter = named_leaves(params), parameter_name(name)
    if parameter not in leaves:
        raise KeyError(f"no parameter {parameter!r}: expected one of {', '.join(leaves)}")
    matrices = one_stack(leaves[parameter])
    if target.layers is None:
        return matrices
    return jax.tree.map(lambda leaf: leaf[jnp.array(target.layers)], matrices)


def _default_layer_names(name: str, stack: tuple[int, ...]) -> list[str]:
    return [f"{name}.{i}" for i in range(math.prod(stack))]


def _match(names: Sequence[str], rules: Sequence[Rule]) -> dict[str, Rule]:
    """First matching rule of each name; every rule must match something first."""
    patterns = []
    for rule in rules:
        try:
            patterns.append(re.compile(rule.pattern))
        except re.error as error:
            raise SpielError(f"rule {rule.pattern!r} is no regular expression: {error}") from None
        if rule.density is not None and not 0 <= rule.density <= 1:
            raise SpielError(f"rule {rule.pattern!r}: density {rule.density} is not between 0 and 1")
    matched: dict[str, Rule] = {}
    used = set()
    for name in names:
        for number, pattern in enumerate(patterns):
            if pattern.fullmatch(name):
                matched[name] = rules[number]
                used.add(number)
                break
    for number, rule in enumerate(rules):
        if number in used:
            continue
        if any(patterns[number].fullmatch(name) for name in names):
            raise SpielError(f"rule {rule.pattern!r} never applies: earlier rules match all it matches")
        plain = re.sub(r"\\(.)", r"\1", rule.pattern)
        near = difflib.get_close_matches(plain, names, n=5, cutoff=0.0)
        raise SpielError(f"rule {rule.pattern!r} matches no weight; near names: {', '.join(near)}")
    return matched


def find_targets(
    params: Any,
    *,
    density: float | None = None,
    num_tunable: int | None = None,
    spare: float = 0.0,
    rules: Sequence[Rule | str] = (".*",),
    grid: tuple[int, int] | Callable[[str], tuple[int, int]] = (1, 1),
    layer_names: Callable[[str, tuple[int, ...]], Sequence[str]] = _default_layer_names,
) -> dict[str, Target]:
    """Chooses what is adapted: static, from shapes alone.

    The budget is a number of tunable entries. As in the paper, ``density`` is relative to *all* parameters
    given, adapted or not (embeddings and head too); the budget is shared among the adapted matrices in
    proportion to their size, and each share is rounded down. ``num_tunable`` gives the budget itself.

    Args:
        params: Pytree of arrays, stored weights or ``jax.ShapeDtypeStruct``; leaves with at least two axes
            can be adapted, axes before the last two are a stack.
        density: Budget as a share of all parameters, in (0, 1].
        num_tunable: Budget as a number of entries. Exactly one of the two is given, or neither where
            every rule has a density of its own.
        spare: Slots of each matrix beside its share, as a share of it (rounded up), as far as it has entries:
            more than 0 make the budget one of all matrices; see ``spiel``.
        rules: ``Rule`` or its pattern, tried in order on each matrix's name, first match wins; a weight
            that no rule matches is not adapted.
        grid: Block grid of every target, or a function of a parameter's name that gives it.
        layer_names: Names of the matrices of a stacked parameter, from its name and stack axes; the
            default appends the number of the matrix.

    Returns:
        Target name to ``Target``. The name is the parameter's dotted path; where the matrices of one stack
        are adapted differently, each group is a target of its own, named with "@" and its layers.

    Raises:
        SpielError: If a rule matches nothing (near names are listed) or can never apply; if the budget is
            missing, doubled, out of range, or gives some matrix no entry; if ``spare`` is negative
            or not finite.

    Example:
        >>> shapes = {"w": jax.ShapeDtypeStruct((8, 16), "float32")}
        >>> find_targets(shapes, density=0.25)["w"].count
        32
    """
    if not 0 <= spare < math.inf:
        raise SpielError(f"spare = {spare}: expected 0 or more, and finite")
    rules = [Rule(rule) if isinstance(rule, str) else rule for rule in rules]
    leaves = named_leaves(params)
    matrices: dict[str, dict[str, int]] = {}  # parameter -> name of matrix -> its number in the stack
    shapes = {}
    for name, leaf in leaves.items():
        if len(leaf.shape) < 2:
            continue
        *stack, rows, columns = leaf.shape
        shapes[name] = tuple(stack), (rows, columns)
        names = layer_names(name, tuple(stack)) if stack else [name]
        if len(set(names)) != math.prod(stack):
            raise ValueError(f"{name}: layer_names gave {list(names)} for {math.prod(stack)} matrices")
        matrices[name] = {layer: i for i, layer in enumerate(names)}

    matched = _match([layer for layers in matrices.values() for layer in layers], rules)
    sizes = {layer: math.prod(shapes[name][1]) for name, layers in matrices.items() for layer in layers}
    sharing = sum(sizes[layer] for layer, rule in matched.items() if rule.density is None)
    if sharing:
        total = sum(math.prod(leaf.shape) for leaf in leaves.values())
        budget = _budget(density, num_tunable, total, sharing)
    else:
        budget = 0
        if density is not None or num_tunable is not None:
            raise SpielError("density or num_tunable given, but every rule has a density of its own")

    kept = {layer for layer, rule in matched.items() if rule.density != 0}
    matrices = {name: layers for name, layers in matrices.items() if kept & layers.keys()}
    grids = {name: grid(name) if callable(grid) else grid for name in matrices}  # others it may refuse

    def count(layer: str, grid: tuple[int, int]) -> int | None:
        if layer not in kept:
            return None
        rule = matched[layer]
        if rule.density is None:
            entries = int(budget * sizes[layer] / sharing)
        else:
            entries = int(rule.density * sizes[layer])
        entries -= entries % math.prod(grid)
        if entries < 1:
            raise SpielError(
                f"{layer} ({sizes[layer]} entries) would get no active entry: raise the budget, or "
                "leave it out by a rule of density 0"
            )
        return entries

    targets = {}
    for name, layers in matrices.items():
        groups: dict[int, list[int]] = {}
        for layer, number in layers.items():
            entries = count(layer, grids[name])
            if entries is not None:
                groups.setdefault(entries, []).append(number)
        stack, shape = shapes[name]
        for entries, numbers in groups.items():
            blocks = math.prod(grids[name])
            room = (math.prod(shape) - entries) // blocks
            free = min(math.ceil(spare * entries / blocks), room) * blocks
            more = {"grid": grids[name], "spare": free}
            if len(numbers) == len(layers):
                targets[name] = Target(shape, entries + free, stack, **more)
            else:
                if len(stack) != 1:
                    raise ValueError(f"{name}: only one stack axis can be adapted in part")
                chosen = tuple(numbers)
                targets[target_name(name, numbers)] = Target(
                    shape, entries + free, (len(numbers),), layers=chosen, **more
                )
    if not targets:
        raise SpielError("no weight is adapted: every matrix is left out by the rules")
    return targets


def _budget(density: float | None, num_tunable: int | None, total: int, sharing: int) -> int:
    if (density is None) == (num_tunable is None):
        raise SpielError(
            f"give density or num_tunable, one of them; got density = {density}, num_tunable = {num_tunable}"
        )
    if density is not None:
        if not 0 < density <= 1:
            raise SpielError(f"density = {density}: expected more than 0 and at most 1")
        num_tunable = int(total * density)
    assert num_tunable is not None
    if not 0 < num_tunable <= sharing:
        raise SpielError(
            f"{num_tunable} tunable entries: expected 1 to {sharing}, the entries of the matched weights"
        )
    return num_tunable


def target_name(parameter: str, layers: Sequence[int] | None) -> str:
    """Name of a target on some layers of a stacked parameter; None: on all.

    >>> target_name("w", [0, 1, 2, 5])
    'w@0-2,5'
    """
    return parameter if layers is None else f"{parameter}@{_ranges(layers)}"


def _ranges(numbers: Sequence[int]) -> str:
    """Ascending numbers, runs abbreviated: [0, 1, 2, 5] is "0-2,5"."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1] = [runs[-1][0], number]
        else:
            runs.append([number])
    return ",".join("-".join(map(str, run)) for run in runs)
