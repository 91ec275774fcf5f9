"""The core needs JAX and Optax only, and imports run one way over the rooms."""

import ast
import graphlib
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import spiel_jax

FOLDER = Path(spiel_jax.__file__).parent
ROOT = FOLDER.parent

FLOORS = (
    "errors",
    "ops",
    "sparse",
    "optim",
    "__init__",
    "places",
    "data",
    "models",
    "losses",
    "distributed",
    "methods",
    "config",
    "checkpoint",
    "inference",
    "adapters",
    "evaluation",
    "training",
    "reporting",
    "planning",
    "cli",
    "adapters.__main__",
    "evaluation.__main__",
    "evaluate",
    "export",
    "generate",
    "plan",
    "regrid",
    "report",
    "train",
)
"""The rooms and the modules beside them, from the bottom up: each imports none but those before it."""
COMMANDS = FLOORS[FLOORS.index("cli") + 1 :]
CORE = ("errors", "ops", "sparse", "optim", "__init__")
LIGHT = ("jax", "numpy", "optax", "typing_extensions")  # the last for a type checker only


def module_name(file, root=ROOT):
    return ".".join(file.relative_to(root).with_suffix("").parts).removesuffix(".__init__")


def imports(file):
    """Names of the modules that a file imports, also inside functions and for types only."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: a relative import"
            whole = node.module == "spiel_jax"
            yield from (f"spiel_jax.{alias.name}" for alias in node.names) if whole else (node.module,)


def room(module):
    """The room of a module of the library; None for another's."""
    package, *rest = module.split(".")
    if package != "spiel_jax":
        return None
    if rest[-1:] == ["__main__"]:  # a command that has the name of its room
        return ".".join(rest)
    return rest[0] if rest else "__init__"


def allowed(here, imported):
    """Whether a module of one room may import a module."""
    there = room(imported)
    if there is None:
        package = imported.partition(".")[0]
        return here not in CORE or package in LIGHT or package in sys.stdlib_module_names
    if there == here:
        return True
    if there in COMMANDS or (here == "models" and there in ("sparse", "optim")):
        return False
    return FLOORS.index(there) < FLOORS.index(here)


def broken_walls(folder):
    """What a package's modules import and should not, as "importer: imported"."""
    for file in sorted(folder.rglob("*.py")):
        module = module_name(file, folder.parent)
        yield from (f"{module}: {name}" for name in imports(file) if not allowed(room(module), name))


def imported_modules(folder):
    """Module of a package to those of the package's modules that it imports, also inside functions."""
    files = {module_name(file, folder.parent): file for file in folder.rglob("*.py")}
    found = {}
    for module, file in files.items():
        found[module] = set()
        for node in ast.walk(ast.parse(file.read_text())):
            names = [alias.name for alias in getattr(node, "names", [])]
            if isinstance(node, ast.ImportFrom):
                parts = [f"{node.module}.{name}" for name in names]  # a module, or a name in it
                names = [part if part in files else node.module for part in parts]
            elif not isinstance(node, ast.Import):
                continue
            found[module].update(name for name in names if name in files and name != module)
    return found


def test_imports_run_one_way():
    assert list(broken_walls(FOLDER)) == []


def test_no_modules_import_each_other():
    graphlib.TopologicalSorter(imported_modules(FOLDER)).prepare()


def test_two_that_do_are_found(tmp_path):
    (tmp_path / "a.py").write_text(f"from {tmp_path.name}.b import x")
    (tmp_path / "b.py").write_text(f"def f():\n    from {tmp_path.name} import a")
    with pytest.raises(graphlib.CycleError):
        graphlib.TopologicalSorter(imported_modules(tmp_path)).prepare()


def test_every_room_has_its_floor():
    found = {room(module_name(file)) for file in FOLDER.rglob("*.py")}
    assert found == set(FLOORS)


@pytest.mark.parametrize(
    ("file", "line"),
    [
        ("optim/block_grid.py", "from spiel_jax.checkpoint import CheckpointError"),
        ("ops/tree.py", "import flax.nnx"),
        ("sparse/delta.py", "def f():\n    from ml_collections import ConfigDict"),
        ("ops/tree.py", "from spiel_jax.sparse.delta import merge"),
        ("sparse/delta.py", "from spiel_jax.optim import spiel"),
        ("models/decoder.py", "from spiel_jax.sparse.delta import merge"),
        ("models/io/names.py", "import spiel_jax.methods.lora"),
        ("losses/next_token.py", "from spiel_jax.training.run import run"),
        ("planning/run.py", "from spiel_jax import train"),
        ("generate.py", "from spiel_jax.plan import main"),
        ("errors.py", "from spiel_jax.config import ConfigError"),
        ("cli.py", "from spiel_jax.train import main"),
    ],
)
def test_the_check_would_fail(tmp_path, file, line):
    (tmp_path / "spiel_jax" / file).parent.mkdir(parents=True)
    (tmp_path / "spiel_jax" / file).write_text(line)
    assert len(list(broken_walls(tmp_path / "spiel_jax"))) == 1


MODULES = sorted(module_name(file) for file in FOLDER.rglob("*.py") if room(module_name(file)) in CORE)
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
    "typing_extensions",
]
PROGRAM = f"""
import importlib, sys
for name in {ABSENT}:
    sys.modules[name] = None  # importing it raises
for name in {MODULES}:
    importlib.import_module(name)
for name in sys.modules["spiel_jax"].__all__:
    getattr(sys.modules["spiel_jax"], name)
print(*sorted(name for name in sys.modules if name.startswith("spiel_jax")))
"""


def test_the_core_imports_only_jax_and_optax():
    result = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == MODULES  # and none of the other modules


def test_the_program_would_fail_for_a_module_that_needs_more():
    program = PROGRAM.replace(repr("spiel_jax.ops.matmul"), repr("spiel_jax.models"))
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert result.returncode != 0
    assert "ModuleNotFoundError" in result.stderr


CRITERION = """
import jax, jax.numpy as jnp, optax
import spiel_jax as sj

targets = sj.find_targets({"w": jnp.ones((16, 24))}, num_tunable=40)
schedule = sj.Reselection(2, every=2, accumulation=1, rate=sj.constant(0.5), first=None)
tx = sj.spiel(optax.adam(0.1), targets, growth=sj.RandomGrowth(), schedule=schedule)
values = sj.zeros(targets)
state = tx.init(values)
before = set(sj.deltas(values, state)["w"].indices.tolist())
for _ in range(2):
    updates, state = tx.update(jax.tree.map(jnp.ones_like, values), state, values)
    values = optax.apply_updates(values, updates)
grown = set(sj.deltas(values, state)["w"].indices.tolist()) - before
print(len(grown))
"""


@pytest.mark.slow
@pytest.mark.network
def test_the_core_works_in_an_environment_with_jax_and_optax_alone(tmp_path):
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(FOLDER, tmp_path / "spiel_jax", ignore=shutil.ignore_patterns("__pycache__"))
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    python = tmp_path / "venv" / "bin" / "python"
    (elsewhere := tmp_path / "elsewhere").mkdir()

    def run(*arguments):
        done = subprocess.run(arguments, capture_output=True, text=True, env=environment, cwd=elsewhere)
        return done.returncode, done.stdout, done.stderr

    for command in (
        (sys.executable, "-m", "venv", tmp_path / "venv"),
        (python, "-m", "pip", "install", "-q", "jax", "optax"),
        (python, "-m", "pip", "install", "-q", "--no-deps", tmp_path),
    ):
        status, _, problem = run(*command)
        assert status == 0, problem
    listed = run(python, "-m", "pip", "list", "--format=freeze")[1]
    packages = {line.partition("==")[0] for line in listed.splitlines()}
    assert {"jax", "optax", "spiel_jax"} <= packages
    assert packages.isdisjoint(ABSENT)

    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    code = next(block for block in blocks if "optax" in block)
    status, shown, problem = run(python, "-c", code)
    assert status == 0, problem
    before, after = map(float, shown.split(" -> "))
    assert after < before / 5
    assert run(python, "-c", CRITERION) == (0, "20\n", "")
    needs = "error: this needs flax, which is not installed: pip install spiel_jax\n"
    assert run(python, "-m", "spiel_jax.train", "--config=x.py") == (1, "", needs)
    assert run(python, "-m", "spiel_jax.plan", "--topology=cpu:1", "--config=x.py") == (2, "", needs)
    status, shown, problem = run(python, "-m", "spiel_jax.generate", "--model=random", "--prompt=Hi")
    assert (status, shown, problem.count("\n")) == (1, "", 1)
    assert problem.endswith("which is not installed: pip install spiel_jax\n")
