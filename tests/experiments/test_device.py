"""The device benchmark: its arithmetic by hand, its budget, and that what is missing costs one part only."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from experiments.bench import device
from experiments.bench.device_worker import checks
from experiments.bench.hardware import peak_flops, settings_that_fit, stored_bytes, workspace_bytes
from experiments.bench.scopes import operation_names, scope_of, self_times, shares
from spiel_jax.models import ModelConfig

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("name", "tera"),
    [
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA A100-SXM4-40GB", 312),
        ("TPU v5 lite", 197),
        ("TPU v5p", 459),
        ("TPU v6 lite", 918),
    ],
)
def test_peaks(name, tera):
    assert peak_flops(name) == tera * 1e12


def test_no_peak_of_what_is_unknown():
    assert peak_flops("cpu") is None


def test_stored_bytes_by_hand():
    model = ModelConfig(**device.TINY)  # D 64, F 128, 4 heads of 16, 2 of keys and values, 2 layers
    assert stored_bytes(model, "full", 3, 10) == 2 * 30 * 2 * 64
    linears = 64 + 2 * 32 + 64 + 2 * 128 + 64  # q, k and v, o, gate and up, down
    attention = 64 + 32 + 64  # rotated queries, rotated keys, what is seen
    assert stored_bytes(model, "dots", 3, 10) == 2 * 30 * 2 * (64 + linears + attention)
    more = [stored_bytes(model, "none", 3, 10, scores=scores) for scores in (True, False)]
    assert more[0] - more[1] == 2 * 30 * 4 * 10 * (4 + 4 + 2)
    assert more[1] > stored_bytes(model, "dots", 3, 10)


@pytest.mark.parametrize(
    ("preset", "rows", "remat", "held", "found"),
    [
        # GiB in use beside what is held that XLA reports of an ordinary SpIEL-MA step compiled for an H100
        ("smollm2_135m", 8, "none", 0.28, 99.55),
        ("smollm2_135m", 8, "dots", 0.28, 8.51),
        ("llama3_2_1b", 8, "dots", 2.58, 23.80),
        ("llama3_2_1b", 4, "none", 2.58, 98.32),
        ("llama3_2_1b", 8, "full", 2.58, 12.27),
        ("llama2_7b", 4, "dots", 14.06, 29.24),
        ("llama2_7b", 8, "full", 14.06, 16.29),
    ],
)
def test_estimates_are_near_what_the_compiler_found(preset, rows, remat, held, found):
    model = getattr(ModelConfig, preset)()
    estimate = (stored_bytes(model, remat, rows, 2048) + workspace_bytes(model, rows, 2048)) / 2**30
    assert found < estimate < 1.27 * found


def test_settings_begin_with_the_fastest_that_fits():
    model = ModelConfig.llama2_7b()
    found = list(settings_that_fit(model, 20 * 2**30, 72 * 2**30, 2048, 8))
    assert found[0] == (4, "dots")
    assert (8, "full") in found
    assert found[-1] == (1, "full")
    assert list(settings_that_fit(model, 100, 10, 2048, 8)) == [(1, "full")]


def test_allowance_by_hand():
    assert device.allowance(100.0, 1.0, 10.0) == pytest.approx(30.0)
    assert device.allowance(100.0, 1.0, 4.0) == 50.0  # the others get something too
    assert device.allowance(100.0, 3.0, 4.0) == 75.0  # but a part that all is for gets its share
    assert device.allowance(100.0, 2.0, 2.0) == 100.0
    assert device.allowance(-1.0, 1.0, 2.0) < 0


def test_jobs():
    parts = device.jobs([], tiny=False)
    assert next(iter(parts)) == "checks"
    assert list(parts)[-1] == "smollm2_135m/spiel_ma"
    assert len(parts) == 1 + 3 * 5
    assert list(device.jobs(["llama2_7b/lora_64", "checks"], tiny=False)) == ["checks", "llama2_7b/lora_64"]
    assert all(name.startswith("tiny/") for name in device.jobs(["tiny"], tiny=True))
    assert len(device.jobs(["spiel_ag"], tiny=False)) == 3
    modules = [file.stem for file in (ROOT / "tests" / "device").glob("test_*.py")]
    assert sorted(parts["checks"][1]["modules"]) == sorted(modules)
    share, job = parts["llama2_7b/lora_64"]
    assert (share, job["part"], job["method"], job["rank"], job["shape"]) == (2.0, "steps", "lora", 64, None)
    kinds = [parts[f"llama2_7b/{name}"][1]["attention"] for name in ("spiel_ag", "spiel_ag_xla")]
    assert kinds == ["cudnn", "xla"]


def test_scopes_by_hand():
    inside = "jit(step)/transpose(jvp(layers))/while/body/checkpoint"
    assert scope_of("jit(step)/jvp(layers)/while/body/dot_general") == "layers"
    assert scope_of(f"{inside}/dot_general") == "transpose(jvp(layers))"
    assert scope_of(f"{inside}/rematted_computation/dot_general") == "layers, again"
    assert scope_of(f"{inside}/gather_gradient/gather") == "gather_gradient"
    assert scope_of("jit(step)/optimizer/cond/inner_optimizer/mul") == "inner_optimizer"
    assert scope_of("jit(step)/broadcast_in_dim") == "other"
    assert scope_of("jit(step)/emerge/layers_of_it/add") == "other"


def test_time_inside_an_operation_is_counted_once():
    events = [(0, 100, "while"), (10, 20, "dot"), (40, 30, "call"), (50, 10, "dot"), (200, 5, "dot")]
    assert self_times(events) == {"while": 50, "dot": 35, "call": 20}


def test_a_fusion_without_a_name_has_that_of_what_is_in_it():
    program = """HloModule jit_step
%fused (p: f32[4]) -> f32[4] {
  %p = f32[4] parameter(0)
  %inner = f32[4] negate(%p), metadata={op_name="jit(step)/merge/neg"}
  ROOT %last = f32[4] copy(%inner)
}
ENTRY %main (x: f32[4]) -> f32[4] {
  %x = f32[4] parameter(0)
  %fusion.1 = f32[4] fusion(%x), kind=kLoop, calls=%fused
  ROOT %out = f32[4] tanh(%fusion.1), metadata={op_name="jit(step)/layers/tanh"}
}
"""
    names = operation_names(program)
    assert names["fusion.1"] == "jit(step)/merge/neg"
    assert names["out"] == "jit(step)/layers/tanh"
    found = shares({"fusion.1": 30, "out": 60, "memcpy": 10}, names)
    assert found["scopes"] == {"layers": 0.6, "merge": 0.3, "other": 0.1}
    assert (found["unknown"], found["largest_unknown"]) == (0.1, {"memcpy": 0.1})


def test_findings_are_kept_as_they_come(tmp_path):
    record = device.Record(tmp_path, {"seconds": 1})
    record.add("machine", {"device": "GPU X/1"})
    record.add("checks", {"verdicts": {"a": "passed"}})
    record.add("checks", {"verdicts": {"b": "failed: no"}})
    (file,) = tmp_path.iterdir()
    assert file.name.startswith("GPU_X_1_")
    assert json.loads(file.read_text())["parts"]["checks"] == {"verdicts": {"a": "passed", "b": "failed: no"}}
    text = device.show(record.found)
    assert "1 of 2 passed" in text
    assert "b: failed: no" in text


def test_table_of_what_is_known():
    part = {
        **{"rows": 8, "length": 2048, "remat": "dots", "tunable": 1000, "peak_gib": 12.345},
        **{"seconds": {"ordinary": 0.5}, "amortised": 0.6, "tokens_per_second": 1e4},
        **{"flops_per_token": 2e9, "flops_done_per_token": 3e9, "seconds_to_compile": 20},
        "trace": {"scopes": {"layers": 0.7, "merge": 0.3}, "unknown": 0.05},
    }
    torch = {"seconds": {"ordinary": 1.0}, "tokens_per_second": 5e3, "problem": "stopped after 9 s"}
    parts = {"machine": {"peak_flops": 1e14}, "m/lora_64": part, "m/peft_lora_64": torch}
    text = device.show({"date": "today", "parts": parts})
    rows = {line.split()[0]: line.split() for line in text.splitlines() if line.startswith("m/")}
    assert rows["m/peft_lora_64:"] == ["m/peft_lora_64:", "stopped", "after", "9", "s"]
    speeds = next(line for line in text.splitlines() if line.startswith("m/lora_64") and "2048" in line)
    for cell in ("0.5000", "0.6000", "10,000", "20.0%", "30.0%", "12.35"):
        assert cell in speeds
    # torch's arithmetic is that of ours
    assert "10.0%" in next(line for line in text.splitlines() if line.startswith("m/peft_lora_64 "))
    assert "70.0%" in rows["m/lora_64"]


def worker(tmp_path, monkeypatch, text):
    """Lets a program stand for the parts' processes."""
    folder = tmp_path / "experiments" / "bench"
    folder.mkdir(parents=True)
    (folder / "device_worker.py").write_text(text)
    monkeypatch.setattr(device, "ROOT", tmp_path)


def test_a_part_that_takes_too_long_is_stopped_and_what_it_found_kept(tmp_path, monkeypatch):
    worker(
        tmp_path,
        monkeypatch,
        """import time
print('{"first": 1}', flush=True)
print('{"second": 2}', flush=True)
time.sleep(60)
""",
    )
    found, began = {}, time.monotonic()
    problem = device.run_part({"part": "checks", "tiny": True}, 2.0, str(tmp_path), found.update)
    assert problem == "stopped after 2 s"
    assert found == {"first": 1, "second": 2}
    assert time.monotonic() - began < 20


def test_a_part_that_fails_says_why(tmp_path, monkeypatch):
    worker(tmp_path, monkeypatch, "import flux_capacitor\n")
    problem = device.run_part({"part": "checks", "tiny": True}, 60.0, str(tmp_path), dict)
    assert problem is not None
    assert problem.endswith("No module named 'flux_capacitor'")


def test_a_setting_that_does_not_fit_is_followed_by_the_next(tmp_path, monkeypatch):
    worker(
        tmp_path,
        monkeypatch,
        """import json, sys
skip = json.loads(sys.stdin.readline())["skip"]
print(json.dumps({"did_not_fit": {str(skip): "no"}, "again": skip + 1} if skip < 2 else {"rows": skip}))
""",
    )
    record = device.Record(tmp_path / "out", {})
    job = {"part": "steps", "tiny": True, "skip": 0}
    assert device.run_settings("m/x", job, 60.0, str(tmp_path), record) is None
    assert record.found["parts"]["m/x"] == {"did_not_fit": {"0": "no", "1": "no"}, "rows": 2}


def test_the_benchmark_itself_needs_only_python():
    program = (
        "import sys\nsys.modules['jax'] = sys.modules['numpy'] = None\nimport experiments.bench.device\n"
    )
    subprocess.run([sys.executable, "-S", "-c", program], check=True, cwd=ROOT)


@pytest.mark.parametrize("platform", ["gpu", "tpu"])
def test_checks_of_a_module(platform, monkeypatch):
    """In processes of their own, and in threads."""
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.chdir(ROOT)
    found = {}
    for more in checks({"modules": ["test_attention", "test_nothing"], "platform": platform}):
        device.merge(found, more)
    names = [
        "test_a_step_with_cudnn_is_one_without",
        "test_cudnn_repeats_itself_when_told_to",
        "test_cudnn_sees_what_xla_sees",
    ]
    skipped = dict.fromkeys(names, "not run: takes an NVIDIA GPU")
    assert found["verdicts"] == {"test_nothing": "not run: No module named 'device.test_nothing'", **skipped}
    assert sorted(found["seconds"]) == names


def test_steps_need_only_jax_flax_and_optax():
    absent = ["datasets", "gguf", "grain", "huggingface_hub", "jinja2", "ml_collections", "safetensors"]
    absent += ["tensorboardX", "tokenizers", "torch", "transformers"]
    program = (
        f"import sys; sys.modules.update(dict.fromkeys({absent})); import experiments.bench.device_steps"
    )
    subprocess.run([sys.executable, "-c", program], check=True, cwd=ROOT)
