"""From an example to token ids and the mask of the tokens to learn."""

import dataclasses
import functools
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import jinja2
import numpy as np

from spiel_jax.data.formats import Example
from spiel_jax.data.traces import is_usual, untraced
from spiel_jax.data.turns import REASONING, Message
from spiel_jax.errors import SpielError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# The format of Tülu and of the SpIEL paper's runs (github.com/allenai/open-instruct).
_TULU = (
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>\n' + message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}"
    "{% if not loop.last or add_generation_prompt %}{{ '\n' }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
_GENERATION_TAG = re.compile(r"\{%-?\s*generation\s*-?%\}")
# A noncharacter, which Unicode reserves for uses such as this one: no text contains it.
_MARK = "\ufdd0"


class TemplateMismatch(SpielError):
    """The chat template does not let an example's assistant turns be told apart."""


def chat_template(tokenizer: "PreTrainedTokenizerBase") -> str:
    r"""The template that conversations are written with: the tokenizer's own, else Tülu's.

    Tülu's is ``<|user|>\n...\n<|assistant|>\n...`` and the end-of-sequence token after each
    assistant turn, behind a beginning-of-sequence token where the tokenizer would add one. Give it
    to ``tokenizer.apply_chat_template(..., chat_template=...)`` for prompts as in training.

    Raises:
      SpielError: there is no template and no end-of-sequence token to build Tülu's with.
    """
    if tokenizer.chat_template is not None:
        return tokenizer.get_chat_template()
    if tokenizer.eos_token is None:
        raise SpielError("the tokenizer has neither a chat template nor an end-of-sequence token")
    return ("{{ bos_token }}" if _adds_bos(tokenizer) else "") + _TULU


def _adds_bos(tokenizer: "PreTrainedTokenizerBase") -> bool:
    bos = tokenizer.bos_token_id
    return bos is not None and tokenizer("a")["input_ids"][0] == bos


@dataclasses.dataclass(frozen=True)
class Rendered:
    """An example as text.

    Attributes:
      text: what the tokenizer reads.
      spans: the parts of it to learn, as [start, end) in characters.
      framed: plain text, which gets the tokenizer's beginning-of-sequence token if it has the habit
        and an end-of-sequence token (to learn).
      last_turn_only: earlier assistant turns could not be located and are not learnt.
    """

    text: str
    spans: Sequence[tuple[int, int]]
    framed: bool = False
    last_turn_only: bool = False


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

    Raises:
      SpielError: the style is unknown, the tokenizer is not fast or has no end-of-sequence token.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", style: str = "auto"):
        if style not in ("auto", "chat", "plain"):
            raise SpielError(f"unknown style {style!r}: expected one of auto, chat, plain")
        if not tokenizer.is_fast:
            raise SpielError(
                f"{type(tokenizer).__name__} gives no character offsets: a fast tokenizer is needed"
            )
        self._tokenizer = tokenizer
        self._template = chat_template(tokenizer)
        self._tracks_turns = _GENERATION_TAG.search(self._template) is not None
        self._plain = style == "plain" or (style == "auto" and tokenizer.chat_template is None)
        if self._plain and tokenizer.eos_token_id is None:
            raise SpielError("plain text needs an end-of-sequence token; the tokenizer has none")
        self._adds_bos = _adds_bos(tokenizer)

    def render(self, example: Example) -> Rendered | None:
        """Writes an example as text.

        What follows the last assistant turn is left out, since no loss depends on it. The turns are
        located by the template's own ``{% generation %}`` marks if it has them. Otherwise the
        conversation is rendered a second time with a mark in place of what the assistant says: the
        text between the marks, woven with what the assistant says (as it is, or stripped), must
        give the first rendering exactly. A template that rewrites turns fails that test (Qwen3
        moves reasoning, and takes it out of earlier turns); then only the last turn is learnt,
        which is what comes after the generation prompt.

        Turns that say more than a text (thoughts, calls) are located one by one: a turn is what rendering
        up to its end adds to rendering up to the generation prompt before it.

        Returns:
          The text, or ``None`` if the assistant says nothing that is to be learnt.

        Raises:
          TemplateMismatch: the template fails both tests, passes over something that a message holds, or
            does not accept the conversation (some want user and assistant to alternate).
        """
        if example.plain is not None and (self._plain or not example.messages):
            return self._plain_text(*example.plain)
        said = [i for i, message in enumerate(example.messages) if message["role"] == "assistant"]
        turns = said if example.learnt is None else [i for i in said if example.learnt[i]]
        if not turns:
            return None
        messages, tools = example.messages[: turns[-1] + 1], example.tools
        try:
            if is_usual(messages, tools):
                return self._usual(messages, turns)
            messages = [self._with_known_names(message) for message in messages]
            if passed_over := untraced(self._apply, messages, tools):
                raise TemplateMismatch(
                    f"the chat template does not write {passed_over}: remove it, or give another template"
                )
            return self._one_by_one(self._apply(messages, tools), messages, turns, tools)
        except jinja2.TemplateError as error:
            raise TemplateMismatch(f"the chat template refuses it: {error}") from error
        except (TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RecursionError) as error:
            if isinstance(error, SpielError):
                raise
            raise TemplateMismatch(
                f"the chat template fails on it: {type(error).__name__}: {error}"
            ) from error

    def _plain_text(self, prompt: str, completion: str) -> Rendered:
        if self._tokenizer.eos_token_id is None:
            raise TemplateMismatch("plain text needs an end-of-sequence token; the tokenizer has none")
        text = prompt + completion
        return Rendered(text, [(len(prompt), len(text))], framed=True)

    def _usual(self, messages: list[Message], turns: list[int]) -> Rendered:
        """A conversation of texts alone, of which some turns are learnt, the last one among them."""
        said = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        text = self._apply(messages)
        if self._tracks_turns:
            rendered = Rendered(text, self._tracked_spans(messages))
            return rendered if turns == said else self._only(rendered, messages, turns)
        rendered = self._locate(text, messages, said)
        if len(turns) == len(said) or rendered.last_turn_only:
            return rendered
        spans = [span for i, span in zip(said, rendered.spans, strict=True) if i in turns]
        return dataclasses.replace(rendered, spans=spans)

    def _only(self, rendered: Rendered, messages: list[Message], turns: list[int]) -> Rendered:
        """The same with no more to learn than these turns."""
        places = self._one_by_one(rendered.text, messages, turns, None).spans
        spans = [s for s in rendered.spans if any(a <= s[0] and s[1] <= b for a, b in places)]
        return dataclasses.replace(rendered, spans=spans)

    def _one_by_one(
        self, text: str, messages: list[Message], turns: list[int], tools: list[Message] | None
    ) -> Rendered:
        spans = []
        for i in turns:
            before = self._apply(messages[:i], tools, prompt=True) if i else ""
            through = self._apply(messages[: i + 1], tools).rstrip()
            if text.startswith(through) and through.startswith(before):
                spans.append((len(before), len(through)))
            elif i == turns[-1]:
                raise TemplateMismatch("the chat template rewrites the turns of the conversation")
        return Rendered(text, spans, last_turn_only=len(spans) < len(turns))

    @functools.cached_property
    def _thoughts(self) -> str:
        """The name under which the template knows what is thought before an answer."""
        for key in REASONING:
            turn: list[Message] = [
                {"role": "user", "content": "a"},
                {"role": "assistant", "content": "b", key: _MARK},
            ]
            try:
                if _MARK in self._apply(turn):
                    return key
            except Exception:  # whatever is wrong with the template, the rows will tell
                continue
        return REASONING[0]

    def _with_known_names(self, message: Message) -> Message:
        known = REASONING[0]
        if known not in message or self._thoughts == known:
            return message
        return {self._thoughts if key == known else key: value for key, value in message.items()}

    def _apply(
        self, messages: Sequence[Message], tools: list[Message] | None = None, prompt: bool = False
    ) -> str:
        text = self._tokenizer.apply_chat_template(
            list(messages),
            tools=tools,  # type: ignore[arg-type]
            chat_template=self._template,
            tokenize=False,
            add_generation_prompt=prompt,
        )
        assert isinstance(text, str)
        return text

    def _tracked_spans(self, messages: list[Message]) -> list[tuple[int, int]]:
        encoding: Any = self._tokenizer.apply_chat_template(
            messages,
            chat_template=self._template,
            return_dict=True,
            return_assistant_tokens_mask=True,
            tokenizer_kwargs={"return_offsets_mapping": True},
        )
        masks, offsets = encoding["assistant_masks"], encoding["offset_mapping"]
        return [span for span, learnt in zip(offsets, masks, strict=True) if learnt]

    def _locate(self, text: str, messages: list[Message], turns: list[int]) -> Rendered:
        said = [messages[i]["content"] for i in turns]
        marked = [
            {**message, "content": _MARK} if message["role"] == "assistant" else message
            for message in messages
        ]
        between = self._apply(marked).split(_MARK)
        # The last turn may begin before what the assistant says, with an empty block of thoughts.
        prompt = self._apply(messages[:-1], prompt=True) if len(messages) > 1 else ""
        opening = len(prompt) if prompt and text.startswith(prompt) else None

        for shown in (said, [content.strip() for content in said]):
            if len(between) == len(said) + 1 and text == _weave(between, shown):
                break
        else:
            if opening is None:
                raise TemplateMismatch("the chat template rewrites the turns of the conversation")
            span = (opening, len(text.rstrip()))
            return Rendered(text, [span], last_turn_only=len(turns) > 1)

        end_of_turn = between[-1].rstrip()
        if not all(part.startswith(end_of_turn) for part in between[1:]):
            raise TemplateMismatch("the chat template ends the last turn unlike the others")
        spans, position = [], 0
        for part, content in zip(between, shown, strict=False):
            start = position + len(part)
            position = start + len(content)
            spans.append((start, position + len(end_of_turn)))
        if opening is not None:
            spans[-1] = (min(opening, spans[-1][0]), spans[-1][1])
        return Rendered(text, spans)

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


def _weave(between: Sequence[str], shown: Sequence[str]) -> str:
    """``between[0] shown[0] between[1] shown[1] ... between[-1]``, with one ``between`` more."""
    parts = [part for pair in zip(between, shown, strict=False) for part in pair]
    return "".join([*parts, between[-1]])
