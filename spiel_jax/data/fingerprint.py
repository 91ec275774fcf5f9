"""What a run's data and tokenizer are, in a few digests: so that a continued run trains on the same."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from spiel_jax.data.chat import chat_template
from spiel_jax.data.examples import Examples
from spiel_jax.data.packing import Plan

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_PROBE = (
    "The quick brown fox's 12345 jumps;  over\n\n\tthe LAZY dog—naïve café, Übergröße; don't! x_1+=2.50e-3 "
    "日本語の文 Привет, мир! مرحبا नमस्ते 🙂👍🏽 e\u0301 ﬁ Ⅳ \u00a0end ",
    "def f(x):\n    return x**2  # <b>&amp;</b> https://example.org/a?b=c\r\n",
)
"""Texts in which tokenizers differ: digits, spaces, case, accents, scripts, code."""


def digest(*parts: Any) -> str:
    """64 bits over arrays, texts and JSON-like values, in hexadecimal.

    Example:
        >>> digest("a", [1, 2]) == digest("a", [1, 2]) != digest("a", [2, 1])
        True
    """
    state = hashlib.blake2b(digest_size=8)
    for part in parts:
        if isinstance(part, np.ndarray):
            state.update(f"{part.dtype}{part.shape}".encode())
            state.update(np.ascontiguousarray(part).data)
        else:
            text = json.dumps(part, sort_keys=True)  # ASCII: lone surrogates can be encoded
            state.update(f"{len(text)}:{text}".encode())
    return state.hexdigest()


def examples_fingerprint(examples: Examples) -> dict[str, Any]:
    """Number, tokens and mask of examples, in their order."""
    return {
        "examples": len(examples),
        "tokens": digest(examples.offsets, examples.tokens),
        "learnt": digest(np.packbits(examples.supervised)),
    }


def data_fingerprint(
    sources: Sequence[tuple[str, Mapping[str, Any]]], heldout: Examples, first_epoch: Plan
) -> dict[str, Any]:
    """What is trained and evaluated on.

    Args:
        sources: Path of each source, and ``examples_fingerprint`` of it before any are held out.
        heldout: The held-out examples.
        first_epoch: The order of the others, and how they are packed.
    """
    return {
        "sources": [{"path": path, **found} for path, found in sources],
        "heldout": examples_fingerprint(heldout),
        "order": digest(first_epoch.examples, first_epoch.starts),
    }


def tokenizer_fingerprint(tokenizer: "PreTrainedTokenizerBase") -> dict[str, Any]:
    """What a tokenizer does, however it is stored: other versions of its library write other files.

    Its chat template is the one that conversations are written with: see ``chat_template``.
    """
    backend: Any = tokenizer.backend_tokenizer if tokenizer.is_fast else None
    model = {} if backend is None else json.loads(backend.to_str())["model"]
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model.get("merges") or ()]
    pieces = model.get("vocab")
    scores = pieces if isinstance(pieces, list) else None  # of a unigram model
    probe = [tokenizer(text)["input_ids"] for text in _PROBE]
    special = [tokenizer.bos_token, tokenizer.bos_token_id, tokenizer.eos_token, tokenizer.eos_token_id]
    return {
        "vocabulary": digest(tokenizer.get_vocab()),
        "splitting": digest(merges, scores, probe),
        "special tokens": special,
        "chat template": digest(chat_template(tokenizer)),
    }
