"""The decoder against Transformers in PyTorch: tiny random models of every supported variant."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from spiel_jax.models import ModelConfig, abstract_params, bind, init_cache, layer_names

SIZES = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
VARIANTS = {
    "llama2": ("llama", {"num_key_value_heads": 6}),
    "tied": ("llama", {"tie_word_embeddings": True}),
    "linear": (
        "llama",
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 4.0}},
    ),
    "llama3": ("llama", {"rope_parameters": LLAMA3}),
    "llama_bias": ("llama", {"attention_bias": True}),
    "mistral": ("mistral", {"sliding_window": 5}),
    "qwen2": ("qwen2", {"tie_word_embeddings": True}),
    "qwen2_mixed": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
    ),
    "qwen3": ("qwen3", {"head_dim": 16}),
}
TOKENS = np.random.default_rng(1).integers(0, SIZES["vocab_size"], (2, 24))


def torch_model(variant):
    """A PyTorch model with every parameter random, norms and biases included."""
    model_type, options = VARIANTS[variant]
    config = transformers.AutoConfig.for_model(model_type, **SIZES | options, attn_implementation="eager")
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, param in model.named_parameters():
            mean = 1.0 if "norm" in name else 0.0
            param.copy_(mean + 0.15 * torch.randn(param.shape, generator=generator))
    return model


def stacked(config, state):
    """Flat parameters from a PyTorch state dict or dict of gradients; every tensor is used."""
    state = {name: np.asarray(tensor.detach()) for name, tensor in state.items()}
    if config.tie_embeddings:
        state.pop("lm_head.weight", None)
    params = {}
    for name in abstract_params(config):
        tensors = [state.pop(one) for one in layer_names(name, config.num_layers)]
        params[name] = jnp.array(np.stack(tensors) if "layers" in name else tensors[0])
    assert not state
    return params


@pytest.fixture(scope="module", params=VARIANTS)
def pair(request):
    """A PyTorch model as a function from one row of tokens to logits, and ours with its weights."""
    theirs = torch_model(request.param)
    config = ModelConfig.from_hf(theirs.config.to_dict())

    def run(row):
        with torch.no_grad():
            return theirs(torch.tensor(row)[None]).logits[0].numpy()

    return run, bind(config, stacked(config, theirs.state_dict()))


def assert_close(actual, expected):
    assert np.max(np.abs(np.asarray(actual) - expected)) < 1e-5 * np.max(np.abs(expected))


def test_logits(pair):
    theirs, ours = pair
    logits = jax.jit(ours)(TOKENS)
    assert logits.dtype == jnp.float32
    for row, expected in zip(logits, map(theirs, TOKENS), strict=True):
        assert_close(row, expected)


def test_packed_rows(pair):
    """Segments of one row equal the sequences alone, whatever their numbers; 0 pads."""
    theirs, ours = pair
    lengths, numbers = (9, 3, 7, 5), (2, 1, 3, 0)
    segments = jnp.array([np.repeat(numbers, lengths)])
    packed = jax.jit(ours)(TOKENS[:1], segment_ids=segments)[0]
    start = 0
    for length in lengths[:-1]:
        part = slice(start, start + length)
        assert_close(packed[part], theirs(TOKENS[0, part]))
        start += length
    assert np.isfinite(packed).all()


def test_left_padded_generation(pair):
    """Prefill two prompts of different length, then decode token by token."""
    theirs, ours = pair
    pads, prompt = np.array([0, 6]), 10
    segments = (np.arange(prompt)[None] >= pads[:, None]).astype(np.int32)

    @jax.jit
    def forward(tokens, segments, cache):
        hidden, cache = ours.hidden(tokens, segment_ids=segments, cache=cache)
        return ours.logits(hidden), cache

    cache = init_cache(ours.config, batch=2, length=30, dtype=jnp.float32)
    logits, cache = forward(TOKENS[:, :prompt], segments, cache)
    steps = [logits]
    for t in range(prompt, TOKENS.shape[1]):
        logits, cache = forward(TOKENS[:, t : t + 1], np.ones((2, 1), np.int32), cache)
        steps.append(logits)
    together = np.concatenate(steps, axis=1)
    for row, pad in enumerate(pads):
        assert_close(together[row, pad:], theirs(TOKENS[row, pad:]))


@pytest.mark.parametrize(("variant", "remat"), [("tied", "none"), ("qwen2_mixed", "dots"), ("qwen3", "full")])
def test_gradients(variant, remat):
    model = torch_model(variant)
    config = ModelConfig.from_hf(model.config.to_dict())
    params = stacked(config, model.state_dict())
    model(torch.tensor(TOKENS), labels=torch.tensor(TOKENS)).loss.backward()
    expected = stacked(config, {name: p.grad for name, p in model.named_parameters()})

    def loss(params):
        logits = bind(config, params)(TOKENS[:, :-1], remat=remat)
        target = jnp.array(TOKENS[:, 1:, None])
        return -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(logits), target, axis=-1))

    gradients = jax.jit(jax.grad(loss))(params)
    for name, gradient in gradients.items():
        error = np.max(np.abs(gradient - expected[name]))
        assert error < 1e-5 * np.max(np.abs(expected[name])), name
