"""Tokenizers from GGUF metadata.

transformers can read them only with torch installed, and splits text for some vocabularies
(SmolLM's digits among them) otherwise than the original tokenizer does.
"""

from collections.abc import Mapping
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.tokenization_utils_base import generate_merges

from spiel_jax.errors import SpielError

_CONTROL, _USER_DEFINED = 3, 4  # llama.cpp's token types

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
    kind = fields.get("tokenizer.ggml.model")
    if kind == "gpt2":
        tokenizer = _byte_level(fields)
    elif kind == "llama":
        tokenizer = _sentencepiece(fields)
    else:
        raise SpielError(f"unknown GGUF tokenizer model {kind!r}: expected one of gpt2, llama")

    tokens = fields["tokenizer.ggml.tokens"]
    for token, token_type in zip(tokens, fields.get("tokenizer.ggml.token_type", ()), strict=False):
        if token_type == _CONTROL:
            tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True)])
        elif token_type == _USER_DEFINED:
            tokenizer.add_tokens([AddedToken(token, normalized=False)])
    if tokenizer.get_vocab_size() != len(tokens):
        raise SpielError(
            f"the GGUF vocabulary has {len(tokens)} tokens, {tokenizer.get_vocab_size()} of them different"
        )

    options = {}
    for ours, theirs in {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}.items():
        if (index := fields.get(f"tokenizer.ggml.{theirs}_token_id")) is not None:
            options[f"{ours}_token"] = tokens[index]
    # llama.cpp's defaults where old files say nothing
    adds_bos = kind == "llama" or fields.get("tokenizer.ggml.pre") == "llama-bpe"
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        add_bos_token=fields.get("tokenizer.ggml.add_bos_token", adds_bos),
        add_eos_token=fields.get("tokenizer.ggml.add_eos_token", False),
        chat_template=fields.get("tokenizer.chat_template"),
        model_max_length=fields[f"{fields['general.architecture']}.context_length"],
        clean_up_tokenization_spaces=False,
        **options,
    )


def _byte_level(fields: Mapping[str, Any]) -> Tokenizer:
    pre = fields.get("tokenizer.ggml.pre", "default")
    if pre not in _PRE_TOKENIZERS:
        raise SpielError(f"unknown GGUF pre-tokenizer {pre!r}: expected one of {', '.join(_PRE_TOKENIZERS)}")
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE(_vocabulary(fields), merges, ignore_merges=pre == "llama-bpe"))
    if pre == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = _PRE_TOKENIZERS[pre]()
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _sentencepiece(fields: Mapping[str, Any]) -> Tokenizer:
    vocabulary = _vocabulary(fields)
    scores = dict(zip(vocabulary, fields["tokenizer.ggml.scores"], strict=True))
    unknown = fields["tokenizer.ggml.tokens"][fields.get("tokenizer.ggml.unknown_token_id", 0)]
    tokenizer = Tokenizer(
        models.BPE(
            vocabulary,
            generate_merges(vocabulary, scores),
            unk_token=unknown,
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    prefixed = fields.get("tokenizer.ggml.add_space_prefix", True)
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁")] * prefixed + [normalizers.Replace(" ", "▁")]
    )
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
        + [decoders.Strip(" ", 1, 0)] * prefixed
    )
    return tokenizer


def _vocabulary(fields: Mapping[str, Any]) -> dict[str, int]:
    return {token: index for index, token in enumerate(fields["tokenizer.ggml.tokens"])}
