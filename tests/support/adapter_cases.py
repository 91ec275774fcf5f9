"""A tiny model as ours and as PyTorch's, and the comparison of adapters with PEFT's."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from spiel_jax.losses.next_token import Objective
from spiel_jax.methods.parametrization import ParametrizationMethod
from spiel_jax.models import ModelConfig, abstract_params, bind, layer_names
from spiel_jax.optim.schedules import Phase


def twins():
    """A random Llama with grouped queries, biases, tied embeddings: PyTorch's, our config and parameters."""
    theirs = LlamaConfig(
        vocab_size=40,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        attention_bias=True,
    )
    model = LlamaForCausalLM(theirs).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, param in model.named_parameters():
            param.copy_(float("norm" in name) + 0.15 * torch.randn(param.shape, generator=generator))
    config = ModelConfig.from_hf(theirs.to_dict())
    state = {name: param.detach().numpy() for name, param in model.named_parameters()}
    params = {}
    for name in abstract_params(config):
        arrays = [state.pop(one) for one in layer_names(name, config.num_layers)]
        params[name] = jnp.array(np.stack(arrays) if "layers" in name else arrays[0])
    assert not state
    return model, config, params


def make_batch(seed, micro_batches=2, rows=2, length=12, vocabulary=40):
    rng = np.random.default_rng(seed)
    shape = (micro_batches, rows, length)
    tokens = rng.integers(0, vocabulary, (*shape[:2], length + 1)).astype(np.int32)
    return {
        "tokens": tokens[..., :-1],
        "labels": tokens[..., 1:],
        "weights": (rng.random(shape) < 0.7).astype(np.float32),
        "positions": np.broadcast_to(np.arange(length, dtype=np.int32), shape).copy(),
        "segment_ids": np.ones(shape, np.int32),
    }


def jitted(training):
    return jax.jit(partial(training.step, phase=Phase.PLAIN, reselect=False))


def perturbed(trainable, seed=1, size=0.1):
    """Away from the initial parameters, at which half of the gradients are zero."""
    leaves, structure = jax.tree.flatten(trainable)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    leaves = [x + size * jax.random.normal(key, x.shape) for x, key in zip(leaves, keys, strict=True)]
    return jax.tree.unflatten(structure, leaves)


def logits(config, params, tokens, kind=None, trainable=None):
    """Of the model as it is, or with adapters."""

    if kind is None:
        return _logits(config, params, tokens)

    @jax.jit
    def run(params, trainable):
        attached, adapters = kind.attach(params, trainable, None)
        return bind(config, attached)(tokens, adapters=adapters, remat="none")

    return run(params, trainable)


@partial(jax.jit, static_argnums=0)
def _logits(config, params, tokens):
    return bind(config, params)(tokens, remat="none")


def check_against_peft(model, config, params, kind, theirs):
    """Logits, gradients and three steps of AdamW.

    Args:
        model: The model with PEFT's adapters.
        config: Shape of ours.
        params: Its parameters.
        kind: Our adapters.
        theirs: Like our trainable parameters, with a ``Place`` for each array.
    """
    # at the usual eps, rounding would decide the steps of entries whose gradient is all but zero
    options = {"weight_decay": 0.1, "eps": 1e-4}
    training = ParametrizationMethod(Objective(config, loss_chunk=16), optax.adamw(1e-2, **options), kind)
    state = training.init(params)
    state = replace(state, trainable=perturbed(state.trainable))
    assert jax.tree.structure(theirs) == jax.tree.structure(state.trainable)
    places = jax.tree.leaves(theirs)
    for place, ours in zip(places, jax.tree.leaves(state.trainable), strict=True):
        place.set(ours)
    tensors = [tensor for place in places for tensor in place.tensors]
    assert {id(t) for t in tensors} == {id(p) for p in model.parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(tensors, 1e-2, **options)

    def mean_loss(trainable, batch):
        params_, adapters = kind.attach(params, trainable, None)
        return training.objective(params_, batch, adapters) / batch["weights"].sum()

    step, gradient = jitted(training), jax.jit(jax.grad(mean_loss))
    for number in range(3):
        data = make_batch(number)
        flat = {name: array.reshape(-1, array.shape[-1]) for name, array in data.items()}
        output = model(torch.tensor(flat["tokens"]).long()).logits
        ours = logits(config, params, flat["tokens"], kind, state.trainable)
        np.testing.assert_allclose(ours, output.detach(), rtol=1e-5, atol=2e-5)

        targets, weights = torch.tensor(flat["labels"]).long(), torch.tensor(flat["weights"])
        losses = torch.nn.functional.cross_entropy(output.flatten(0, 1), targets.flatten(), reduction="none")
        loss = (losses * weights.flatten()).sum() / weights.sum()
        optimizer.zero_grad()
        loss.backward()
        grads = jax.tree.leaves(gradient(state.trainable, flat))
        for place, mine in zip(places, grads, strict=True):
            expected = place.grad()
            np.testing.assert_allclose(mine, expected, rtol=1e-5, atol=2e-5 * np.abs(expected).max())

        optimizer.step()
        state, metrics = step(state, data)
        np.testing.assert_allclose(metrics["loss"], loss.item(), rtol=1e-5)
        norm = np.sqrt(sum(np.square(place.grad()).sum() for place in places))
        np.testing.assert_allclose(metrics["grad_norm"], norm, rtol=1e-5)
        for place, mine in zip(places, jax.tree.leaves(state.trainable), strict=True):
            np.testing.assert_allclose(mine, place.value(), rtol=1e-5, atol=2e-5)
            place.set(mine)  # or the next logits would tell the differences of parameters


class Place:
    """PEFT's tensors that one of our arrays stacks."""

    def __init__(self, tensors):
        self.tensors = tensors

    def set(self, array):
        for tensor, part in zip(self.tensors, np.asarray(array), strict=True):
            tensor.data = torch.tensor(part).reshape(tensor.shape)

    def value(self):
        return np.stack([t.detach().numpy().reshape(self.shape(t)) for t in self.tensors])

    def grad(self):
        return np.stack([t.grad.numpy().reshape(self.shape(t)) for t in self.tensors])

    @staticmethod
    def shape(tensor):
        """(IA)^3 keeps vectors as matrices with one row or column."""
        return [size for size in tensor.shape if size > 1]
