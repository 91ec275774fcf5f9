"""The core needs JAX and Optax, and nothing of the rest of the library."""

import subprocess
import sys

CORE = [
    "spiel_jax",
    "spiel_jax.alias",
    "spiel_jax.baselines",
    "spiel_jax.blocks",
    "spiel_jax.growth",
    "spiel_jax.inner",
    "spiel_jax.loss",
    "spiel_jax.optim",
    "spiel_jax.products",
    "spiel_jax.schedules",
    "spiel_jax.selection",
    "spiel_jax.sparse",
    "spiel_jax.sparse_linear",
    "spiel_jax.targets",
    "spiel_jax.transform",
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
    program = PROGRAM.replace(repr("spiel_jax.loss"), repr("spiel_jax.models"))
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert result.returncode != 0
    assert "ModuleNotFoundError" in result.stderr
