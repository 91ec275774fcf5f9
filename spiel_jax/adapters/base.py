"""The base model of an adapter, tensor by tensor: never more of it in memory than one."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from spiel_jax.adapters.adapter import AdapterError, Origin, tensors_of
from spiel_jax.data.templates import use_template
from spiel_jax.models.config import ModelConfig
from spiel_jax.models.decoder import abstract_params
from spiel_jax.models.io.fingerprint import Fingerprinter, differing
from spiel_jax.models.io.holding import held_as_it_is, quantized_specs
from spiel_jax.models.io.loading import ModelSource, open_model
from spiel_jax.models.io.names import Placement, expected_tensors
from spiel_jax.models.io.tokenizer_places import open_tokenizer
from spiel_jax.models.storage import kind_named
from spiel_jax.models.storage.weight import Weight, kind_name
from spiel_jax.ops.stored import as_array, is_stored


@dataclass(frozen=True)
class Base:
    """A base model as a run held it.

    Attributes:
        name: What it is called.
        source: Where its weights are.
        dtype: Of the weights.
        kind: How those of the blocks' linears were held; None as arrays.
        seed: Of random weights.
        tokenizer_name: Another source that the tokenizer comes from.
        chat_template: That of the run, or several by name, where they are others than the tokenizer's.
    """

    name: str
    source: ModelSource
    dtype: Any
    kind: type[Weight] | None = None
    seed: int = 0
    tokenizer_name: str | None = None
    chat_template: str | Mapping[str, str] | None = None
    _print: Fingerprinter = field(default_factory=Fingerprinter, repr=False)
    _read_names: set[str] = field(default_factory=set, repr=False)

    @property
    def config(self) -> ModelConfig:
        """The model's shape."""
        return self.source.config

    @cached_property
    def tensors(self) -> dict[str, Placement]:
        """Its tensors by their Hugging Face names."""
        return tensors_of(self.config)

    def tokenizer(self) -> Any:
        """The tokenizer that the run used."""
        name = self.tokenizer_name
        tokenizer = self.source.tokenizer() if name is None else open_tokenizer(name)
        if self.chat_template is not None:
            use_template(tokenizer, self.chat_template)
        return tokenizer

    def tensor(self, name: str) -> np.ndarray:
        """A tensor in the run's dtype; of a quantised weight, what it dequantises to.

        Args:
            name: Its Hugging Face name.
        """
        slot = self.tensors[name]
        held = self._held(name, slot)
        if name not in self._read_names:
            self._read_names.add(name)
            self._print.add(slot.parameter, held, slot.layer or 0)
        found = np.asarray(jax.jit(as_array)(held) if is_stored(held) else held)
        return found if slot.layer is None else found[0]

    def check(self, expected: Mapping[str, str], what: str) -> None:
        """Makes sure that it is the base model that was meant, by all parameters of which something was read.

        Of these it reads what was not read yet.

        Args:
            expected: A fingerprint; empty if unknown.
            what: What was meant, for the message.

        Raises:
            AdapterError: If a weight differs; it is named.
        """
        if not expected:
            return
        begun = {self.tensors[name].parameter for name in self._read_names}
        for name, slot in self.tensors.items():
            if slot.parameter in begun and name not in self._read_names:
                self.tensor(name)
        found = self._print.found(self._specs)
        check_fingerprint({name: expected[name] for name in expected.keys() & begun}, found, what, self.name)

    def fresh(self) -> "Base":
        """The same base of which nothing has been read yet."""
        return replace(self, _print=Fingerprinter(), _read_names=set())

    @cached_property
    def _specs(self) -> dict[str, Any]:
        """The parameters as the run held them; ``jax.ShapeDtypeStruct`` in the place of arrays."""
        specs, checkpoint = (
            abstract_params(self.config, self.dtype, storage=self.kind),
            self.source.checkpoint,
        )
        if checkpoint is None or kind_name(self.kind) is None:
            return specs
        places = expected_tensors(self.config, checkpoint.naming)
        # the run has said, or not, that what is quantised otherwise may be quantised again
        return quantized_specs(checkpoint.path, checkpoint.stored, checkpoint, places, specs, True)

    def _held(self, name: str, slot: Placement) -> Any:
        """A tensor as the run held it; of a stack a layer, [1, ...]."""
        spec = self._specs[slot.parameter]
        if is_stored(spec) and self.source.checkpoint is not None:
            ready = held_as_it_is(self.source.checkpoint, self._stored_names[name], spec)
            if ready is not None:
                return jax.tree.map(lambda leaf: jnp.asarray(leaf[None]), ready)
        read = self._read(name, slot)
        array = jnp.asarray(read if slot.layer is None else read[None])
        del read
        return _held_alike(spec, array) if is_stored(spec) else array

    def _read(self, name: str, slot: Placement) -> np.ndarray:
        checkpoint = self.source.checkpoint
        if checkpoint is None:
            drawn = self._drawn(slot.parameter)
            return drawn if slot.layer is None else drawn[slot.layer]
        whole = tuple(slice(0, size) for size in slot.shape)
        (array,) = checkpoint.read(self._stored_names[name], [whole])
        if array.dtype == np.float64:  # as JAX takes it
            array = array.astype(np.float32)
        return array.astype(self.dtype, copy=False)

    @cached_property
    def _stored_names(self) -> dict[str, str]:
        checkpoint = self.source.checkpoint
        assert checkpoint is not None
        return dict(zip(self.tensors, expected_tensors(self.config, checkpoint.naming), strict=True))

    def _drawn(self, parameter: str) -> np.ndarray:
        """A parameter of a random model; the last one is kept."""
        kept = self.__dict__.setdefault("_kept", {})
        if parameter not in kept:
            kept.clear()
            kept[parameter] = np.asarray(self.source.draw(parameter, self.dtype, self.seed))
        return kept[parameter]


_held_alike = jax.jit(lambda spec, array: spec.hold_alike(array), static_argnums=0)


def open_base(name: str, origin: Origin, *, preset: str | None = None, tokenizer: str | None = None) -> Base:
    """The base model of an adapter, as the adapter's run held it.

    Args:
        name: See ``open_model``. What an adapter's file says of its base is not opened: it is anybody's.
        origin: The adapter's.
        preset: Shape of a random model.
        tokenizer: Another source that the tokenizer comes from.

    Raises:
        NotFoundError: If there is nothing to load there.
        SpielError: If what is there cannot be used.
    """
    dtype, seed = origin.dtype, origin.config.get("seed", 0)
    if dtype not in ("bfloat16", "float32"):
        raise AdapterError(f"the adapter's model.dtype is {dtype!r}: expected bfloat16 or float32")
    kind = kind_named(str(origin.quantization))
    seed = seed if isinstance(seed, int) else 0
    return Base(name, open_model(name, preset=preset), jnp.dtype(dtype), kind, seed, tokenizer)


def check_fingerprint(expected: Mapping[str, str], found: Mapping[str, str], what: str, name: str) -> None:
    """Makes sure that two fingerprints agree.

    Args:
        expected: The one; empty if unknown, and then nothing is checked.
        found: That of the base model.
        what: What the expected one is of, for the message.
        name: What the base model is called.

    Raises:
        AdapterError: If they differ.
    """
    if expected and (names := differing(expected, found)):
        lines = [f"  {one}: {expected.get(one)} then, {found.get(one)} now" for one in names[:5]]
        more = [f"  and {len(names) - 5} more"] if len(names) > 5 else []
        problem = f"{what} was trained on another base model than {name}; these tensors differ:"
        raise AdapterError("\n".join([problem, *lines, *more]))


def differing_bases(one: Origin, other: Origin) -> str:
    """Why two adapters cannot be taken for such of one base model; empty if they can.

    Fingerprints decide; where one is unknown, names do, and where one has no name either, nothing speaks
    against it.
    """
    if one.fingerprint and other.fingerprint:
        if names := differing(one.fingerprint, other.fingerprint):
            more = f" and {len(names) - 1} more tensors differ" if len(names) > 1 else " differs"
            return f"{names[0]}{more} ({one.base or 'unnamed'}, {other.base or 'unnamed'})"
    elif one.base and other.base and one.base != other.base:
        return f"{one.base} and {other.base}, and not both have a fingerprint"
    return ""
