"""What looks at weights, gradients or activations sees, on a quantised base, those of the dense one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.mesh_cases import CONFIG, ROWS, batch

from spiel_jax.config import check_config, default_config
from spiel_jax.methods.registry import build
from spiel_jax.models import init_params
from spiel_jax.models.storage import Int8
from spiel_jax.ops.stored import as_array, is_stored

NAMES = ("lift", "gem", "talos", "wanda", "migu", "structured", "rosa")


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_a_run_is_the_run_on_what_the_base_stands_for(name):
    config = default_config()
    config.method, config.model.source, config.data.sources = name, "random", ("chat.jsonl",)
    config.targets.num_tunable, config.targets.rules = 600, (r".*\.(o|up)_proj\.weight",)
    config.targets.grid.update({"fsdp": 1, "tensor": 1})
    config.spiel.update({"every": 2, "accumulation": 2, "filter_rank": 4, "drop_by": "value"})
    config.spiel.tile.columns, config.spiel.tile.by = 1, "weights"
    config.rosa.warmup, config.lora.rank = 1, 2
    config.optimizer.learning_rate, config.batch_size, config.steps = 1e-2, ROWS, 6
    check_config(config)
    method = build(config, CONFIG, 6)
    held = init_params(CONFIG, jax.random.key(0), jnp.float32, storage=Int8)
    dense = {weight: jax.jit(as_array)(param) for weight, param in held.items()}
    found = []
    for params in (held, dense):
        step = jax.jit(
            lambda s, b, phase, reselect: method.step(s, b, phase=phase, reselect=reselect),
            static_argnames=("phase", "reselect"),
        )
        state, losses = jax.jit(method.init)(params), []
        for number in range(1, 4):
            phase, reselect = method.step_kind(number)
            state, metrics = step(state, batch(number, 2), phase=phase, reselect=reselect)
            losses.append(metrics["loss"])
        trained = next(iter(method.items(state).values()))
        found.append(jax.device_get((losses, trained)))
        assert any(map(is_stored, state.params.values())) == (params is held)
    jax.tree.map(np.testing.assert_array_equal, *found)
