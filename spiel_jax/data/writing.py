"""Conversations as the texts to learn from: what is trained is what generation will ask.

Generation writes a conversation up to the assistant's turn, and the generation prompt; the model continues.
So a training text must begin with that prompt before every turn that is learnt in it. One rendering of the
whole conversation does so with most templates. Some write earlier turns otherwise than the last one (they
take thoughts out, put the system message into the last question); then each turn is a text of its own.
"""

import dataclasses
import re
from collections.abc import Generator, Mapping, Sequence
from typing import Any

from spiel_jax.data.locating import Span, around, difference, left_out, woven_spans
from spiel_jax.data.stops import TurnEnds
from spiel_jax.data.templates import MARK, ChatTemplate, Request, TemplateRefusal, Wanted, Written
from spiel_jax.errors import SpielError

Message = Mapping[str, Any]
Answer = list[Written | TemplateRefusal]

# Characters of a conversation's prompts that are rendered, or so: each turn's is as long as what precedes it.
_PROMPTS = 20_000_000
# What a prompt may open and close again before the reply: an empty block of thoughts.
_CLOSED = re.compile(r"\s*<(\w+)>\s*</\1>\s*")


class TemplateMismatch(SpielError):
    """The chat template does not let an example's assistant turns be told apart."""


@dataclasses.dataclass(frozen=True)
class Rendered:
    """An example as text.

    Attributes:
      text: what the tokenizer reads.
      spans: the parts of it to learn, as [start, end) in characters.
      framed: plain text, which gets the tokenizer's beginning-of-sequence token if it has the habit
        and an end-of-sequence token (to learn).
      last_turn_only: earlier assistant turns could not be written and are not learnt.
      mismatch: how generation would ask otherwise than this text teaches; ``None``: it would not.
    """

    text: str
    spans: Sequence[Span]
    framed: bool = False
    last_turn_only: bool = False
    mismatch: str | None = None


class Writer:
    """Writes conversations with a template.

    What it does are generators that yield what is to be rendered and are sent it, so that many conversations
    can be rendered at once.

    Args:
      template: what writes.
      ends: finds the ends of turns.
    """

    def __init__(self, template: ChatTemplate, ends: TurnEnds):
        self._template = template
        self._ends = ends

    def write(
        self, messages: Sequence[Message], turns: Sequence[int], tools: Sequence[Message] | None
    ) -> Generator[Request, Answer, list[Rendered]]:
        """The texts in which some turns are learnt: one of all, or one of each.

        Args:
          messages: a conversation that ends with a turn to learn.
          turns: numbers from 0 of the messages to learn, in their order.
          tools: what the assistant may call.

        Raises:
          TemplateMismatch: the last turn cannot be located, or the template refuses the conversation.
        """
        whole, failing = yield from self._together(messages, turns, tools)
        if whole is not None and not failing:
            return [whole]
        if whole is not None:
            # Is there a turn that would be asked for as it is taught if it had a text of its own?
            for turn in failing:
                alone = yield from self._alone(messages[: turn + 1], tools)
                if alone is not None and alone.mismatch is None:
                    break
            else:
                return [dataclasses.replace(whole, mismatch=failing[min(failing)])]
        texts = []
        for turn in turns:
            texts.append((yield from self._alone(messages[: turn + 1], tools)))
        if texts[-1] is None:
            raise TemplateMismatch("the chat template rewrites the turns of the conversation")
        kept = [text for text in texts if text is not None]
        kept[-1] = dataclasses.replace(kept[-1], last_turn_only=len(kept) < len(texts))
        return kept

    def _together(
        self, messages: Sequence[Message], turns: Sequence[int], tools: Sequence[Message] | None
    ) -> Generator[Request, Answer, tuple[Rendered | None, dict[int, str]]]:
        """All turns in one text, if they can be located; and how those differ that are not asked for so."""
        said = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        partly = self._template.marks_turns and len(turns) < len(said)
        asked = said if partly else _asked(messages, turns)
        asked = [i for i in asked if i]  # nothing is asked before the first message
        marks = (
            [] if self._template.marks_turns else [Wanted(len(messages), contents=dict.fromkeys(said, MARK))]
        )
        answer = yield Request(
            messages, [Wanted(len(messages)), *marks, *[Wanted(i, prompt=True) for i in asked]], tools
        )
        text, *rest = _accepted(answer[: 1 + len(marks)])
        prompts = dict(zip(asked, answer[1 + len(marks) :], strict=True))
        starts = {
            i: len(prompt.text)
            for i, prompt in prompts.items()
            if isinstance(prompt, Written) and text.text.startswith(prompt.text)
        }
        if self._template.marks_turns:
            spans = _chosen(text.spans, said, turns, starts) if partly else text.spans
        else:
            spans = yield from self._spans(text.text, rest[0], messages, turns, starts, tools)
        failing = {i: _unlike(prompts[i], text.text) for i in turns if i in prompts and i not in starts}
        if spans is None:
            return None, failing
        rendered = Rendered(text.text, spans)
        return self._checked(rendered, messages, starts.get(turns[-1])), failing

    def _spans(
        self,
        text: str,
        marked: Written,
        messages: Sequence[Message],
        turns: Sequence[int],
        starts: Mapping[int, int],
        tools: Sequence[Message] | None,
    ) -> Generator[Request, Answer, list[Span] | None]:
        """The spans of turns in a text, if they can be located."""
        said = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        last = turns[-1]
        if all(len(messages[i]) == 2 for i in turns):  # they say no more than a text
            shown = [messages[i]["content"] for i in said]
            between = marked.text.split(MARK)
            spans = woven_spans(text, between, shown, starts.get(last), self._ends.first)
            if spans is not None:
                return [span for i, span in zip(said, spans, strict=True) if i in turns]
        if len(turns) == 1:
            return [(starts[last], len(text.rstrip()))] if last in starts else None
        # A turn is what rendering up to its end adds to the prompt before it.
        wanted = [Wanted(i, prompt=True) for i in turns] + [Wanted(i + 1) for i in turns[:-1]]
        answer = yield Request(messages, [w for w in wanted if w.count], tools)
        before: list[Any] = answer[: len(turns)] if turns[0] else [Written(""), *answer[: len(turns) - 1]]
        through = [*answer[1 - len(turns) :], Written(text)]
        spans = []
        for start, end in zip(before, through, strict=True):
            if isinstance(start, TemplateRefusal) or isinstance(end, TemplateRefusal):
                return None
            ended = end.text.rstrip()
            if not (text.startswith(ended) and ended.startswith(start.text)):
                return None
            spans.append((len(start.text), len(ended)))
        return spans

    def _alone(
        self, messages: Sequence[Message], tools: Sequence[Message] | None
    ) -> Generator[Request, Answer, Rendered | None]:
        """The last turn in a text of its own, as generation asks for it; ``None`` if it cannot be located."""
        last, count = len(messages) - 1, len(messages)
        wanted = [Wanted(count), Wanted(count, contents={last: MARK})]
        answer = yield Request(messages, [*wanted, *([Wanted(last, prompt=True)] if last else [])], tools)
        whole, marked, *asked = answer
        if isinstance(whole, TemplateRefusal) or isinstance(marked, TemplateRefusal):
            return None
        text, prompt = whole.text, asked[0] if asked else None
        if isinstance(prompt, Written) and text.startswith(prompt.text):
            start, end = len(prompt.text), len(text.rstrip())
            spans = [(max(a, start), b) for a, b in whole.spans if b > start]
            if not self._template.marks_turns:
                spans = [(start, end)] if start < end else []
            return self._checked(Rendered(text, spans), messages, start) if spans else None
        if isinstance(prompt, Written):
            mended = yield from self._continued(prompt.text, text, marked.text, messages, tools)
            if mended is not None:
                return self._checked(mended, messages, len(prompt.text))
        said = [messages[last]["content"]]
        spans = woven_spans(text, marked.text.split(MARK), said, None, self._ends.first)
        if self._template.marks_turns:
            spans = whole.spans[-1:]
        problem = None if prompt is None else _unlike(prompt, text)
        return Rendered(text, spans, mismatch=problem) if spans else None

    def _continued(
        self,
        prompt: str,
        text: str,
        marked: str,
        messages: Sequence[Message],
        tools: Sequence[Message] | None,
    ) -> Generator[Request, Answer, Rendered | None]:
        """The prompt, and what the template writes of the turn after it.

        The text does not begin with the prompt. If both have the same between the message before the turn
        and the turn (its header), a message was dropped or moved in one of them, and the turn can follow
        the prompt. If the prompt has more there, it opens what the turn must go on with: thoughts.
        """
        last, before = len(messages) - 1, len(messages) - 2
        answer = yield Request(
            messages,
            [
                Wanted(last, prompt=True, contents={before: MARK}),
                Wanted(last + 1, contents={before: MARK, last: MARK}),
            ],
            tools,
        )
        if any(isinstance(one, TemplateRefusal) for one in answer):
            return None
        prompted, written = (one.text.rsplit(MARK, 2) for one in answer if isinstance(one, Written))
        upto, _, end = marked.rpartition(MARK)
        if len(prompted) < 2 or len(written) < 3 or not upto.endswith(written[-2]):
            return None
        asked, header = prompted[-1], written[-2]
        if not prompt.endswith(asked):
            return None
        begins = len(upto) - len(header) + len(asked)
        if header.startswith(asked) and text.startswith(upto[:begins]):
            rest = text[begins:]
        elif asked.startswith(header):
            said = _after(asked[len(header) :], messages[last]["content"])
            if said is None:
                return None
            rest = said + end
        else:
            return None
        whole = prompt + rest
        return Rendered(whole, [(len(prompt), len(whole.rstrip()))]) if rest.strip() else None

    def _checked(self, rendered: Rendered, messages: Sequence[Message], start: int | None) -> Rendered:
        """With what is not as generation will ask; ``start`` is the end of the last turn's prompt."""
        problem = left_out(rendered.text, messages)
        if problem is None and start is not None and rendered.spans:
            learnt = [a for a, b in rendered.spans if b > start]
            gap = rendered.text[start : learnt[0]] if learnt else ""
            if gap.strip():
                problem = f"the model must write {around(gap, 0)} after the prompt, which is not learnt"
        return rendered if problem is None else dataclasses.replace(rendered, mismatch=problem)


def _asked(messages: Sequence[Message], turns: Sequence[int]) -> Sequence[int]:
    """The turns whose prompts are rendered: all, but of a very long conversation those from each end."""
    size = sum(len(message["content"]) for message in messages)
    half = max(1, _PROMPTS // max(size, 1) // 2)
    return turns if len(turns) <= 2 * half else [*turns[:half], *turns[-half:]]


def _unlike(prompt: Written | TemplateRefusal, text: str) -> str:
    if isinstance(prompt, Written):
        return difference(prompt.text, text)
    return f"the chat template refuses to write the prompt: {prompt}"


def _accepted(answer: Answer) -> list[Written]:
    for one in answer:
        if isinstance(one, TemplateRefusal):
            raise TemplateMismatch(f"the chat template refuses it: {one}")
    return [one for one in answer if isinstance(one, Written)]


def _chosen(
    spans: Sequence[Span], said: Sequence[int], turns: Sequence[int], starts: Mapping[int, int]
) -> list[Span] | None:
    """Those of the spans of all turns that are of some turns."""
    if any(i not in starts for i in said if i):
        return None
    owner = {span: max((i for i in said if starts.get(i, 0) <= span[0]), default=None) for span in spans}
    return [span for span in spans if owner[span] in turns]


def _after(opened: str, said: str) -> str | None:
    """What is left to say after what a prompt has opened; ``None`` if it was not to be said so."""
    if _CLOSED.fullmatch(opened):
        return said.lstrip()
    word, told = opened.strip(), said.lstrip()
    if not word or not told.startswith(word):
        return None
    rest = told[len(word) :]
    return rest.lstrip() if opened[-1].isspace() else rest
