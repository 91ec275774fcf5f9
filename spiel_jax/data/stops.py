"""Tokens at which generation stops: the ends of the assistant's turns."""

import re
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from spiel_jax.data.templates import MARK, ChatTemplate, TemplateRefusal

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


_SAID = "generation_stops"


def add_stops(tokenizer: "PreTrainedTokenizerBase", tokens: Iterable[int]) -> None:
    """Notes on a tokenizer at what generation stops besides, as ``generation_config.json`` says.

    Args:
        tokenizer: Which keeps it as an attribute.
        tokens: Numbers; those that no token of it has are left out.
    """
    setattr(tokenizer, _SAID, frozenset(token for token in tokens if 0 <= token < len(tokenizer)))


def stop_tokens(tokenizer: "PreTrainedTokenizerBase", template: ChatTemplate | None = None) -> set[int]:
    """Tokens that end an assistant's turn: end of sequence, and what the chat template ends a turn with.

    The latter counts only if it is a token of its own, such as ``<|im_end|>``, not ordinary text. End of
    sequence are those that the tokenizer names, and its model's ``generation_config.json`` (see `add_stops`).

    Args:
      tokenizer: whose tokens they are.
      template: its chat template, where that is at hand.

    Raises:
      SpielError: there is no template to be had.
    """
    template = template or ChatTemplate(tokenizer)
    eos: Any = tokenizer.eos_token_id
    stops = set(getattr(tokenizer, _SAID, ())) | (set() if eos is None else {eos})
    turn = [{"role": "user", "content": "a"}, {"role": "assistant", "content": MARK}]
    for one in (template, template.tool_use):
        try:
            _, mark, after = ("" if one is None else one.write(turn)).rpartition(MARK)
        except TemplateRefusal:  # it wants more of a conversation than this
            continue
        if mark:
            first = tokenizer.encode(after.strip(), add_special_tokens=False)[:1]
            stops.update(token for token in first if token in tokenizer.added_tokens_decoder)
    return stops


class TurnEnds:
    """Finds the token that ends a turn in what a template writes after it."""

    def __init__(self, tokenizer: "PreTrainedTokenizerBase"):
        added = sorted((t.content for t in tokenizer.added_tokens_decoder.values()), key=len, reverse=True)
        self._tokens = re.compile("|".join(map(re.escape, added)) or "(?!)")

    def first(self, text: str) -> str | None:
        """The text up to the end of its first token that is one of its own; None if it has none."""
        found = self._tokens.search(text)
        return None if found is None else text[: found.end()]
