"""From an example to token ids and the mask of the tokens to learn."""

import dataclasses
import datetime
import functools
from collections.abc import Generator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from spiel_jax.data.formats import Example
from spiel_jax.data.stops import TurnEnds, stop_tokens
from spiel_jax.data.templates import MARK, ChatTemplate, Request, TemplateRefusal, adds_bos, chat_template
from spiel_jax.data.traces import is_usual, untraced
from spiel_jax.data.turns import REASONING, Message
from spiel_jax.data.writing import Answer, Rendered, TemplateMismatch, Writer
from spiel_jax.errors import SpielError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["Encoded", "Encoder", "Rendered", "TemplateMismatch", "chat_template"]


@dataclasses.dataclass(frozen=True)
class Encoded:
    """An example: ``tokens`` (int32 [n]) and which of them to learn, ``supervised`` (bool [n])."""

    tokens: np.ndarray
    supervised: np.ndarray


class Encoder:
    """Writes examples with a chat template and tokenizes them.

    Learnt are the assistant's turns with their end-of-turn token, so that the model learns to stop
    (a template that writes none teaches none). Whitespace after the end of a turn is not learnt,
    nor is the header before it: a turn begins where the generation prompt ends.

    Args:
      tokenizer: a fast tokenizer (one that knows the characters each token comes from).
      style: how rows with a prompt and a completion are written: ``chat``, as a conversation;
        ``plain``, one after the other and an end-of-sequence token; ``auto``, as a conversation if
        the tokenizer has a chat template, else plain.
      date: what a template that asks for the date is told; default: now.

    Raises:
      SpielError: the style is unknown, the tokenizer is not fast or has no end-of-sequence token.
    """

    def __init__(
        self,
        tokenizer: "PreTrainedTokenizerBase",
        style: str = "auto",
        date: datetime.datetime | None = None,
    ):
        if style not in ("auto", "chat", "plain"):
            raise SpielError(f"unknown style {style!r}: expected one of auto, chat, plain")
        if not tokenizer.is_fast:
            raise SpielError(
                f"{type(tokenizer).__name__} gives no character offsets: a fast tokenizer is needed"
            )
        self._tokenizer = tokenizer
        self._template = ChatTemplate(tokenizer, date)
        ends = TurnEnds(tokenizer)
        self._writer = Writer(self._template, ends)
        self._tool_writer = Writer(self._template.tool_use or self._template, ends)
        self._plain = style == "plain" or (style == "auto" and tokenizer.chat_template is None)
        if self._plain and tokenizer.eos_token_id is None:
            raise SpielError("plain text needs an end-of-sequence token; the tokenizer has none")
        self._adds_bos = adds_bos(tokenizer)

    @functools.cached_property
    def stops(self) -> dict[int, str]:
        """The tokens at which generation stops, and how they are written."""
        ids = sorted(stop_tokens(self._tokenizer, self._template))
        return {token: self.name(token) for token in ids}

    def name(self, token: int) -> str:
        """How a token is written."""
        return str(self._tokenizer.decode([token])) or str(self._tokenizer.convert_ids_to_tokens(token))

    def render(self, example: Example) -> list[Rendered]:
        """Writes an example as one text, or as several; see `render_all`.

        Raises:
          TemplateMismatch: the template does not take the conversation, passes over something that a message
            holds, or writes it so that the last turn cannot be located.
        """
        (texts,) = self.render_all([example])
        if isinstance(texts, TemplateMismatch):
            raise texts
        return texts

    def render_all(self, examples: Sequence[Example]) -> list[list[Rendered] | TemplateMismatch]:
        """Writes examples as texts.

        What follows the last assistant turn is left out, since no loss depends on it. The turns are
        located by the template's own ``{% generation %}`` marks if it has them. Otherwise the
        conversation is rendered a second time with a mark in place of what the assistant says: the
        text between the marks, woven with what the assistant says (as it is, or stripped), must
        give the first rendering exactly. Turns that say more than a text (thoughts, calls) are located one
        by one: a turn is what rendering up to its end adds to the generation prompt before it.

        Before every turn the text must begin with what generation writes there, the conversation and the
        generation prompt. Where it does not (Qwen3 takes reasoning out of earlier turns, Mistral moves the
        system message), an example becomes several, one for each turn: the prompt and the turn after it.

        Returns:
          The texts of each example, none if the assistant says nothing that is to be learnt; or why it
          cannot be written.

        Raises:
          TemplateError: the template exceeds its limits.
        """
        outcomes: list[list[Rendered] | TemplateMismatch] = [[] for _ in examples]
        writing = {number: self._written(example) for number, example in enumerate(examples)}
        answers: dict[int, Any] = dict.fromkeys(writing)  # a generator is started by sending it None
        while writing:
            requests = {}
            for number, steps in list(writing.items()):
                try:
                    requests[number] = steps.send(answers[number])
                except StopIteration as done:
                    outcomes[number] = done.value
                except TemplateMismatch as problem:
                    outcomes[number] = problem
                if number not in requests:
                    del writing[number]
            if requests:
                rendered = self._template.render(list(requests.values()))
                answers = dict(zip(requests, rendered, strict=True))
        return outcomes

    def _written(self, example: Example) -> Generator[Request, Answer, list[Rendered]]:
        if example.plain is not None and (self._plain or not example.messages):
            return [self._plain_text(*example.plain)]
        said = [i for i, message in enumerate(example.messages) if message["role"] == "assistant"]
        turns = said if example.learnt is None else [i for i in said if example.learnt[i]]
        if not turns:
            return []
        messages, tools = example.messages[: turns[-1] + 1], example.tools
        if not is_usual(messages, tools):
            messages = [self._with_known_names(message) for message in messages]
            try:
                called = {self._thoughts: example.thoughts}
                passed_over = untraced(self._template.write, messages, tools, called)
            except TemplateRefusal as refusal:
                raise TemplateMismatch(f"the chat template refuses it: {refusal}") from refusal
            if passed_over:
                raise TemplateMismatch(
                    f"the chat template does not write {passed_over}: remove it, or give another template"
                )
        writer = self._tool_writer if tools else self._writer
        return (yield from writer.write(messages, turns, tools))

    def _plain_text(self, prompt: str, completion: str) -> Rendered:
        if self._tokenizer.eos_token_id is None:
            raise TemplateMismatch("plain text needs an end-of-sequence token; the tokenizer has none")
        text = prompt + completion
        return Rendered(text, [(len(prompt), len(text))], framed=True)

    @functools.cached_property
    def _thoughts(self) -> str:
        """The name under which the template knows what is thought before an answer."""
        for key in REASONING:
            turn: list[Message] = [
                {"role": "user", "content": "a"},
                {"role": "assistant", "content": "b", key: MARK},
            ]
            try:
                if MARK in self._template.write(turn):
                    return key
            except TemplateRefusal:  # whatever is wrong with the template, the rows will tell
                continue
        return REASONING[0]

    def _with_known_names(self, message: Message) -> Message:
        known = REASONING[0]
        if known not in message or self._thoughts == known:
            return message
        return {self._thoughts if key == known else key: value for key, value in message.items()}

    def encode(self, rendered: Sequence[Rendered]) -> list[Encoded]:
        """Tokenizes texts, all in one call; a token is learnt if it overlaps a span."""
        if not rendered:
            return []
        encodings = self._tokenizer(
            [r.text for r in rendered],
            add_special_tokens=False,  # templates write their own
            return_offsets_mapping=True,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,  # longer than the model's context is no news here: cut later
        )
        pairs = zip(encodings["input_ids"], encodings["offset_mapping"], strict=True)
        return [self._mask(r, *pair) for r, pair in zip(rendered, pairs, strict=True)]

    def _mask(self, rendered: Rendered, ids: list[int], offsets: list[tuple[int, int]]) -> Encoded:
        tokens = np.asarray(ids, np.int32)
        start, end = np.asarray(offsets, np.int32).reshape(-1, 2).T
        learnt = np.zeros(len(rendered.text) + 1, np.int32)  # [i + 1]: character i is in a span
        for first, last in rendered.spans:
            learnt[first + 1 : last + 1] = 1
        before = np.cumsum(learnt, dtype=np.int32)  # [i]: learnt characters before i
        # Some tokenizers give special tokens no width; they stand for one character at least.
        supervised = before[np.clip(end, start + 1, len(rendered.text))] > before[start]
        if rendered.framed:
            bos = [self._tokenizer.bos_token_id] if self._adds_bos else []
            eos = [self._tokenizer.eos_token_id]
            tokens = np.concatenate([np.asarray(bos, np.int32), tokens, np.asarray(eos, np.int32)])
            supervised = np.concatenate([np.zeros(len(bos), bool), supervised, [True]])
        return Encoded(tokens, supervised)
