"""Models: decoders of the Llama family in Flax NNX."""

from spiel_jax.models.cache import KVCache, init_cache
from spiel_jax.models.config import ModelConfig
from spiel_jax.models.decoder import CausalLM, abstract_params, bind, init_params, layer_names
from spiel_jax.models.io.fingerprint import differing, fingerprint
from spiel_jax.models.io.loading import ModelSource, open_model
from spiel_jax.models.io.tokenizer_places import open_tokenizer
from spiel_jax.models.layers import AdaptedLinear, Adapter
from spiel_jax.models.rope import RopeScaling

__all__ = [
    "AdaptedLinear",
    "Adapter",
    "CausalLM",
    "KVCache",
    "ModelConfig",
    "ModelSource",
    "RopeScaling",
    "abstract_params",
    "bind",
    "differing",
    "fingerprint",
    "init_cache",
    "init_params",
    "layer_names",
    "open_model",
    "open_tokenizer",
]
