"""A pruned base, tuned and taken out: the zeros are there."""

import shutil

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from support.pruning import scored, smallest, two_of_four
from support.run_cases import chat_file, run, tiny_config

from spiel_jax.adapters import adapter_of_run, base_of_run, merge_into, read_adapter, write_adapter
from spiel_jax.checkpoint import restore_trained
from spiel_jax.models import open_model

PRUNED = {
    "2:4": two_of_four,
    "unstructured": lambda weight: smallest(weight, 0.6),
    "wanda": lambda weight: scored(weight, np.linspace(0.5, 2.0, weight.shape[1]), 0.5),
}


def pruned_folder(folder, out, prune):
    shutil.copytree(folder, out)
    tensors = load_file(folder / "model.safetensors")
    found = {n: prune(t) if n.endswith("_proj.weight") else t for n, t in tensors.items()}
    save_file(found, out / "model.safetensors", metadata={"format": "pt"})
    return out, found


@pytest.mark.slow
@pytest.mark.parametrize(
    ("pattern", "method", "dtype", "merge"),
    [
        ("2:4", "spiel_ag", "float32", "resident"),
        ("unstructured", "spiel_ma", "bfloat16", "resident"),
        ("wanda", "random", "float32", "per_use"),
    ],
)
def test_an_export_has_the_zeros_of_the_base(llama_folder, tmp_path, pattern, method, dtype, merge):
    model, base = pruned_folder(llama_folder, tmp_path / "model", PRUNED[pattern])
    config = tiny_config(model, chat_file(tmp_path), method)
    config.spiel.keep_zeros, config.spiel.merge = True, merge
    config.model.dtype, config.checkpoint_every = dtype, 3
    run(config, tmp_path / "run")
    shutil.copytree(tmp_path / "run", tmp_path / "parts")
    run(config, tmp_path / "parts", resume_from=3)
    one, other = (restore_trained(tmp_path / part) for part in ("run", "parts"))
    jax.tree.map(np.testing.assert_array_equal, one, other)

    adapter = adapter_of_run(tmp_path / "run")
    source = open_model(str(model))
    write_adapter(adapter, tmp_path / "merged", "merged", base=base_of_run(tmp_path / "run"))
    write_adapter(adapter, tmp_path / "native", "native")
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    native = merge_into(dict(base), read_adapter(tmp_path / "native", source.config))
    for name, before in base.items():
        if name.endswith("_proj.weight"):
            for after in (merged[name], native[name]):
                zero = np.asarray(after, np.float32) == 0
                assert np.all(zero[before == 0])
                assert zero.mean() == pytest.approx((before == 0).mean(), abs=1e-3)
                if pattern == "2:4":
                    assert zero.reshape(-1, 4).sum(-1).min() >= 2
    assert any(np.any(native[name] != base[name]) for name in base)
