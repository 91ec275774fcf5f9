"""Tokenizers from GGUF metadata.

transformers can read them only with torch installed, and splits text for some vocabularies
(SmolLM's digits among them) otherwise than the original tokenizer does.
"""

from collections.abc import Mapping
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.tokenization_utils_base import generate_merges

from spiel_jax.data.stops import add_stops
from spiel_jax.errors import SpielError
from spiel_jax.models.config_keys import Keys, one_of, shown
from spiel_jax.models.io.messages import told

_CONTROL, _USER_DEFINED = 3, 4  # llama.cpp's token types
_LONGEST = 4096  # merges are sought at every place of a token, in time that grows with its square

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def _split(numbers: str) -> pre_tokenizers.PreTokenizer:
    regex = Regex(f"{_CONTRACTIONS}|{_WORDS}|{numbers}|{_REST}")
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(regex, behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def _gpt2() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)


def _smollm() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), _gpt2()])


# How text is cut before byte-pair merging, by the metadata's "tokenizer.ggml.pre".
_PRE_TOKENIZERS = {
    "default": _gpt2,
    "gpt-2": _gpt2,
    "smollm": _smollm,
    "llama-bpe": lambda: _split(r"\p{N}{1,3}"),
    "qwen2": lambda: _split(r"\p{N}"),
}


def build_tokenizer(fields: Mapping[str, Any]) -> PreTrainedTokenizerBase:
    """The tokenizer of a GGUF file, with its special tokens and chat template.

    Args:
        fields: The metadata as plain Python values, keyed as in the file.

    Raises:
        SpielError: If there is no vocabulary, or one of a kind that is not supported.
    """
    keys = Keys(fields)
    kind = fields.get("tokenizer.ggml.model")
    one_of("GGUF tokenizer model", kind, ("gpt2", "llama"))
    tokens = _strings(keys, "tokens")
    try:
        tokenizer = _byte_level(keys, tokens) if kind == "gpt2" else _sentencepiece(keys, tokens)
    except SpielError:
        raise
    except Exception as error:  # what tokenizers raises has no other type
        raise SpielError(f"the GGUF vocabulary does not fit its merges: {told(error)}") from error

    for token, token_type in zip(tokens, keys.items("tokenizer.ggml.token_type", ()), strict=False):
        if token_type == _CONTROL:
            tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True)])
        elif token_type == _USER_DEFINED:
            tokenizer.add_tokens([AddedToken(token, normalized=False)])

    options = {}
    for ours, theirs in {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}.items():
        if (index := _token_id(keys, theirs, tokens)) is not None:
            options[f"{ours}_token"] = tokens[index]
    # llama.cpp's defaults where old files say nothing
    adds_bos = kind == "llama" or fields.get("tokenizer.ggml.pre") == "llama-bpe"
    template = fields.get("tokenizer.chat_template")
    if not isinstance(template, str | None):
        raise SpielError(f"tokenizer.chat_template must be a string, got {shown(template)}")
    found = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        add_bos_token=keys.flag("tokenizer.ggml.add_bos_token", adds_bos),
        add_eos_token=keys.flag("tokenizer.ggml.add_eos_token", False),
        chat_template=template,
        model_max_length=keys.integer(f"{fields.get('general.architecture')}.context_length"),
        clean_up_tokenization_spaces=False,
        **options,
    )
    ends = (_token_id(keys, name, tokens) for name in ("eot", "eom"))  # llama.cpp stops at them
    add_stops(found, [token for token in ends if token is not None])
    return found


def _byte_level(keys: Keys, tokens: list[str]) -> Tokenizer:
    pre = keys.values.get("tokenizer.ggml.pre", "default")
    one_of("GGUF pre-tokenizer", pre, tuple(_PRE_TOKENIZERS))
    merges = [_pair(merge) for merge in _strings(keys, "merges")]
    tokenizer = Tokenizer(models.BPE(_vocabulary(tokens), merges, ignore_merges=pre == "llama-bpe"))
    if pre == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = _PRE_TOKENIZERS[pre]()
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _sentencepiece(keys: Keys, tokens: list[str]) -> Tokenizer:
    vocabulary = _vocabulary(tokens)
    scores = keys.items("tokenizer.ggml.scores")
    if len(scores) != len(tokens) or not all(type(score) in (int, float) for score in scores):
        raise SpielError(f"tokenizer.ggml.scores must be a number for each of {len(tokens)} tokens")
    if (longest := max(map(len, tokens), default=0)) > _LONGEST:
        raise SpielError(
            f"tokenizer.ggml.tokens has a token of {longest} characters: at most {_LONGEST} can be"
        )
    unknown = _token_id(keys, "unknown", tokens)
    tokenizer = Tokenizer(
        models.BPE(
            vocabulary,
            generate_merges(vocabulary, dict(zip(tokens, scores, strict=True))),
            unk_token=tokens[unknown or 0],
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    prefixed = keys.flag("tokenizer.ggml.add_space_prefix", True)
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁")] * prefixed + [normalizers.Replace(" ", "▁")]
    )
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
        + [decoders.Strip(" ", 1, 0)] * prefixed
    )
    return tokenizer


def _vocabulary(tokens: list[str]) -> dict[str, int]:
    vocabulary = {token: index for index, token in enumerate(tokens)}
    if len(vocabulary) != len(tokens):
        raise SpielError(f"the GGUF vocabulary has {len(tokens)} tokens, {len(vocabulary)} of them different")
    return vocabulary


def _strings(keys: Keys, name: str) -> list[str]:
    """A list of strings."""
    found = keys.items(f"tokenizer.ggml.{name}")
    if not all(type(item) is str for item in found):
        raise SpielError(f"tokenizer.ggml.{name} must be a list of strings")
    return found


def _pair(merge: str) -> tuple[str, str]:
    first, space, second = merge.partition(" ")
    if not space or " " in second:
        raise SpielError(f"tokenizer.ggml.merges must be pairs of tokens, got {shown(merge)}")
    return first, second


def _token_id(keys: Keys, name: str, tokens: list[str]) -> int | None:
    """The number of a special token; None if there is none."""
    return keys.integer(f"tokenizer.ggml.{name}_token_id", None, least=0, most=len(tokens) - 1)
