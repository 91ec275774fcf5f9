"""What makes a continued run the same run, besides its config and the base weights.

The checkpoint holds digests of the model's arithmetic, of the tokenizer with its chat template, and of the
encoded data. Paths are no part of it: what lies elsewhere and is the same, is the same.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from spiel_jax.data import Data
from spiel_jax.data.fingerprint import tokenizer_fingerprint
from spiel_jax.models.config import ModelConfig
from spiel_jax.models.io.fingerprint import arithmetic, differing_arithmetic

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def identity(
    model: ModelConfig, tokenizer: "PreTrainedTokenizerBase", data: Data | None = None
) -> dict[str, Any]:
    """The digests, JSON-like; without ``data`` those of what a tuned model needs to be used."""
    found = {"model": arithmetic(model), "tokenizer": tokenizer_fingerprint(tokenizer)}
    return found if data is None else found | {"data": data.fingerprint}


def other_model(stored: Mapping[str, Any], found: Mapping[str, Any]) -> list[str]:
    """What the model computes otherwise than the one that was trained; empty if nothing."""
    return differing_arithmetic(stored["model"], found["model"])


def other_tokenizer(stored: Mapping[str, Any], found: Mapping[str, Any]) -> list[str]:
    """What of the tokenizer is another than in training; empty if nothing."""
    then, now = stored["tokenizer"], found["tokenizer"]
    return [
        f"the tokenizer's {part}" if part != "chat template" else "the chat template"
        for part in now
        if part in then and then[part] != now[part]
    ]


def other_data(stored: Mapping[str, Any], found: Mapping[str, Any]) -> list[str]:
    """What of the encoded data is other than before; empty if nothing."""
    then, now = stored["data"], found["data"]
    changed = _other_sources(then["sources"], now["sources"])
    if held := _other_examples(then["heldout"], now["heldout"]):
        changed.append(f"the held-out examples: {held}")
    if not changed and then["order"] != now["order"]:
        changed.append("the order of the examples or how they are packed")
    return changed


def _other_sources(then: list[dict[str, Any]], now: list[dict[str, Any]]) -> list[str]:
    if len(then) != len(now):
        paths = [", ".join(source["path"] for source in sources) for sources in (then, now)]
        return [f"{len(then)} sources then ({paths[0]}), {len(now)} now ({paths[1]})"]
    pairs = zip(then, now, strict=True)
    return [f"{new['path']}: {what}" for old, new in pairs if (what := _other_examples(old, new))]


def _other_examples(then: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """What differs between two sets of examples; empty if nothing does."""
    if then["examples"] != now["examples"]:
        return f"{then['examples']} examples then, {now['examples']} now"
    if then["tokens"] != now["tokens"]:
        return f"{now['examples']} examples then and now, but of other tokens"
    return "other tokens of them are learnt" if then["learnt"] != now["learnt"] else ""
