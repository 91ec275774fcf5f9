"""What is asked of cuDNN, and what is refused before; tests/device compares its numbers on a GPU."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.decoders import CONFIG

from spiel_jax.errors import SpielError
from spiel_jax.models import bind, init_params
from spiel_jax.models.attention_masks import visible, within
from spiel_jax.models.fused_attention import attend, check_attention


@pytest.fixture
def asked(monkeypatch):
    """What cuDNN is asked for; XLA answers, given the same."""
    calls = []
    original = jax.nn.dot_product_attention

    def answer(*arrays, implementation=None, **options):
        if implementation is not None:
            calls.append((implementation, options))
        return original(*arrays, **options)

    monkeypatch.setattr(jax.nn, "dot_product_attention", answer)
    return calls


def arrays(heads=4, kv_heads=2, length=12):
    rng = np.random.default_rng(0)
    shapes = [(2, length, count, 8) for count in (heads, kv_heads, kv_heads)]
    return [jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes]


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("packed", [False, True])
def test_cudnn_is_asked_for_the_same_attention(asked, packed, window):
    queries, keys, values = arrays()
    mask = None
    if packed:
        segments = jnp.asarray([[1] * 5 + [2] * 7, [1] * 9 + [0] * 3])
        mask = visible(segments, segments)
        mask = mask if window is None else mask & within(window, 12, 12)
    one, other = (attend(queries, keys, values, mask, window, kind) for kind in ("cudnn", "xla"))
    np.testing.assert_allclose(one, other, rtol=1e-6, atol=1e-6)
    ((implementation, options),) = asked
    assert implementation == "cudnn"
    assert options["is_causal"]  # without it half of its tiles are for nothing


def test_a_model_is_told_which(asked):
    model = bind(CONFIG, init_params(CONFIG, jax.random.key(0), jnp.float32))
    tokens = jnp.arange(12)[None]
    segments = jnp.asarray([[1] * 5 + [2] * 7])
    plain, _ = model.hidden(tokens, segment_ids=segments)
    assert not asked
    fused, _ = model.hidden(tokens, segment_ids=segments, attention="cudnn")
    assert {kind for kind, _ in asked} == {"cudnn"}
    np.testing.assert_allclose(fused, plain, rtol=1e-5, atol=1e-5)


def test_another_kind_is_refused():
    with pytest.raises(ValueError, match="unknown attention 'flash': expected one of xla, cudnn"):
        attend(*arrays(), None, None, "flash")


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"dtype": "float32"}, "model.dtype is float32"),
        ({"head_dim": 20}, "this model's have 20"),
        ({"head_dim": 256}, "128 at most"),
        ({"length": 255}, "data.sequence_length is 255"),
        ({"platform": "cpu"}, "platform 'cpu'"),
        ({"platform": "tpu"}, "NVIDIA GPU"),
    ],
)
def test_what_it_cannot_do_is_refused(changes, named, asked):
    settings = {"dtype": "bfloat16", "head_dim": 64, "length": 256, "platform": "gpu"}
    good = settings | changes
    model = replace(CONFIG, head_dim=good["head_dim"])
    with pytest.raises(SpielError, match=named):
        check_attention("cudnn", model, good["dtype"], good["length"], good["platform"])
    check_attention("xla", model, good["dtype"], good["length"], good["platform"])
    fine = replace(model, head_dim=64)
    check_attention("cudnn", fine, settings["dtype"], settings["length"], settings["platform"])
    assert asked


def test_that_cudnn_is_missing_is_told_before_any_work(monkeypatch):
    def missing(*arrays, **options):
        raise RuntimeError("cuDNN not found.")

    monkeypatch.setattr(jax.nn, "dot_product_attention", missing)
    with pytest.raises(SpielError, match=r"cuDNN not found.*pip install nvidia-cudnn-cu12"):
        check_attention("cudnn", replace(CONFIG, head_dim=64), "bfloat16", 256, "gpu")
