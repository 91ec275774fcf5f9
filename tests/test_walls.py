"""The core needs JAX and Optax, and nothing of the rest of the library."""

import subprocess
import sys

CORE = [
    "spiel_jax",
    "spiel_jax.ops",
    "spiel_jax.ops.cross_entropy",
    "spiel_jax.ops.matmul",
    "spiel_jax.ops.selection",
    "spiel_jax.ops.sharded",
    "spiel_jax.ops.stored",
    "spiel_jax.ops.tree",
    "spiel_jax.optim",
    "spiel_jax.optim.alias",
    "spiel_jax.optim.block_grid",
    "spiel_jax.optim.criteria",
    "spiel_jax.optim.criteria.accumulated_gradients",
    "spiel_jax.optim.criteria.criterion",
    "spiel_jax.optim.criteria.moment_approximation",
    "spiel_jax.optim.criteria.random",
    "spiel_jax.optim.criteria.static",
    "spiel_jax.optim.entry_state",
    "spiel_jax.optim.inner_optimizers",
    "spiel_jax.optim.parity",
    "spiel_jax.optim.schedules",
    "spiel_jax.optim.spiel",
    "spiel_jax.sparse",
    "spiel_jax.sparse.delta",
    "spiel_jax.sparse.linear",
    "spiel_jax.sparse.targets",
]
# all other packages that the library depends on, and the largest of theirs
ABSENT = [
    "chex",
    "datasets",
    "flax",
    "gguf",
    "grain",
    "huggingface_hub",
    "jinja2",
    "matplotlib",
    "ml_collections",
    "orbax",
    "pandas",
    "pyarrow",
    "safetensors",
    "tensorboardX",
    "tokenizers",
    "torch",
    "tqdm",
    "transformers",
]
PROGRAM = f"""
import importlib, sys
for name in {ABSENT}:
    sys.modules[name] = None  # importing it raises
for name in {CORE}:
    importlib.import_module(name)
for name in sys.modules["spiel_jax"].__all__:
    getattr(sys.modules["spiel_jax"], name)
print(*sorted(name for name in sys.modules if name.startswith("spiel_jax")))
"""


def test_the_core_imports_only_jax_and_optax():
    result = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == CORE  # and none of the other modules


def test_the_check_would_fail_for_a_module_that_needs_more():
    program = PROGRAM.replace(repr("spiel_jax.ops.matmul"), repr("spiel_jax.models"))
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert result.returncode != 0
    assert "ModuleNotFoundError" in result.stderr
