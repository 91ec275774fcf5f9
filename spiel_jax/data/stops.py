"""Tokens at which generation stops: the ends of the assistant's turns."""

import re
from typing import TYPE_CHECKING, Any

from spiel_jax.data.templates import MARK, ChatTemplate, TemplateRefusal

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def stop_tokens(tokenizer: "PreTrainedTokenizerBase", template: ChatTemplate | None = None) -> set[int]:
    """Tokens that end an assistant's turn: end of sequence, and what the chat template ends a turn with.

    The latter counts only if it is a token of its own, such as ``<|im_end|>``, not ordinary text.

    Args:
      tokenizer: whose tokens they are.
      template: its chat template, where that is at hand.

    Raises:
      SpielError: there is no template to be had.
    """
    template = template or ChatTemplate(tokenizer)
    eos: Any = tokenizer.eos_token_id
    stops = set() if eos is None else {eos}
    turn = [{"role": "user", "content": "a"}, {"role": "assistant", "content": MARK}]
    try:
        _, mark, after = template.write(turn).rpartition(MARK)
    except TemplateRefusal:  # it wants more of a conversation than this
        return stops
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
