"""What methods make of a configuration alike: learning rate, optimizer, and what is adapted."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import optax
from jax.sharding import Mesh

from spiel_jax.distributed.mesh import check_mesh
from spiel_jax.errors import SpielError
from spiel_jax.models.axes import weight_axes, weight_grid
from spiel_jax.models.config import ModelConfig
from spiel_jax.models.decoder import abstract_params, layer_names
from spiel_jax.models.fused_attention import check_attention
from spiel_jax.models.storage import kind_named
from spiel_jax.ops.tree import parameter_name
from spiel_jax.sparse.targets import Target, find_targets

OF_SPARSE = (
    "targets.density",
    "targets.num_tunable",
    "targets.spare",
    "targets.grid.*",
    "targets.balance.*",
    "spiel.*",
    "rosa.*",
)
"""Keys that mean nothing to a method without sparse deltas."""


def learning_rate(config: Any, steps: int) -> optax.Schedule:
    """Warm-up to the peak over a share of the steps, then the chosen decay.

    The first step already has ``peak / warmup_steps``: a rate of 0 would waste it.
    """
    settings = config.optimizer
    peak, warmup = settings.learning_rate, round(settings.warmup * steps)
    rest = max(steps - warmup, 1)
    after = {
        "linear": lambda: optax.linear_schedule(peak, 0.0, rest),
        "cosine": lambda: optax.cosine_decay_schedule(peak, rest),
        "constant": lambda: optax.constant_schedule(peak),
    }[settings.schedule]()
    if warmup == 0:
        return after
    rise = optax.linear_schedule(peak / warmup, peak, max(warmup - 1, 1))
    return optax.join_schedules([rise, after], [warmup])


def configured_adamw(config: Any, steps: int) -> optax.GradientTransformation:
    """AdamW on all that is trained, behind a clipping of its gradients where there is one."""
    settings = config.optimizer
    eps: dict[str, Any] = {} if settings.eps is None else {"eps": settings.eps}
    clip = [] if settings.clip_norm is None else [optax.clip_by_global_norm(settings.clip_norm)]
    rate = learning_rate(config, steps)
    return optax.chain(
        *clip, optax.adamw(rate, settings.b1, settings.b2, weight_decay=settings.weight_decay, **eps)
    )


def configured_grid(config: Any, model: ModelConfig) -> Callable[[str], tuple[int, int]]:
    """The block grid of a parameter, by its name: along the mesh, and cut further where sets are balanced.

    What the function raises is a SpielError: the parts do not divide a block of the weight.
    """
    blocks = {axis: number or 1 for axis, number in config.targets.grid.items()}
    parts, shapes = config.targets.balance, abstract_params(model)

    def grid(name: str) -> tuple[int, int]:
        along, shape = weight_grid(name, blocks), shapes[name].shape[-2:]
        cut = list(along)
        for axis, key in enumerate(("rows", "columns")):
            size, whole = parts[key], shape[axis] // along[axis]
            if size is None or shape[axis] % along[axis]:  # what does not divide is told with the target
                continue
            if whole % size:
                fits = " or ".join(str(n) for n in range(1, whole + 1) if whole % n == 0)
                raise SpielError(
                    f"balance.{key} = {size} does not divide the {whole} {key} of {name}: expected {fits}"
                )
            cut[axis] = shape[axis] // size
        return cut[0], cut[1]

    return grid


def configured_targets(config: Any, model: ModelConfig) -> dict[str, Target]:
    """What has sparse deltas, without mesh axes.

    Raises:
        SpielError: If a rule matches nothing, or the budget does not fit.
    """
    try:
        return find_targets(
            abstract_params(model),
            density=config.targets.density,
            num_tunable=config.targets.num_tunable,
            spare=config.targets.spare,
            rules=tuple(config.targets.rules),
            grid=configured_grid(config, model),
            layer_names=lambda name, stack: layer_names(name, stack[0]),
        )
    except SpielError as error:
        raise SpielError(f"config.targets: {error}") from error


def with_axes(targets: Mapping[str, Target]) -> dict[str, Target]:
    """The targets with the mesh axes of their weights, where they have a block grid."""
    return {
        name: target if target.grid == (1, 1) else replace(target, axes=weight_axes(parameter_name(name)))
        for name, target in targets.items()
    }


def check_layout(config: Any, model: ModelConfig, mesh: Mesh, *, has_deltas: bool) -> None:
    """Makes sure that a mesh divides the model, and the block grid where the method has sparse deltas.

    And that its devices compute attention as the configuration asks for it.

    Args:
        config: With its block grid filled in.
        model: Shape of the model.
        mesh: From ``make_mesh``.
        has_deltas: See ``Method``.

    Raises:
        SpielError: See ``check_mesh`` and ``check_attention``.
    """
    blocks = config.targets.grid if has_deltas else mesh.shape
    check_mesh(model, mesh, blocks, kind_named(config.model.quantization))
    device, length = mesh.devices.flat[0], config.data.sequence_length
    check_attention(config.model.attention, model, config.model.dtype, length, device.platform)
