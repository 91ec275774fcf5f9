"""Chat templates: which one is used, and conversations as the text that it makes of them.

All that is rendered anywhere is rendered here. A template comes with a model and is a program: it runs in
transformers' sandbox, in a process of its own (``rendering``) with limits of time, memory and output.
"""

import atexit
import contextlib
import dataclasses
import datetime
import json
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spiel_jax.data import rendering
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
_LONGEST = 1_000_000  # characters of a template; the longest in use have some 30,000

MARK = "\ufdd0"
"""A noncharacter, which Unicode reserves for uses such as this one: no text contains it."""


class TemplateError(SpielError):
    """A chat template cannot be used: it is not there, or does not end within its limits."""


class TemplateRefusal(SpielError):
    """A chat template does not take a conversation; the message is the template's own, or what went wrong."""


_TOOL_USE = "tool_use"
"""The name under which transformers looks for the template of conversations with tools."""


def chat_template(tokenizer: "PreTrainedTokenizerBase") -> str:
    r"""The template that conversations are written with: the tokenizer's own, else Tülu's.

    Of several that have names it is ``default``; `ChatTemplate` writes conversations with tools by
    ``tool_use``, where there is one, as transformers does.

    Tülu's is ``<|user|>\n...\n<|assistant|>\n...`` and the end-of-sequence token after each
    assistant turn, behind a beginning-of-sequence token where the tokenizer would add one. Give it
    to ``tokenizer.apply_chat_template(..., chat_template=...)`` for prompts as in training.

    Raises:
      SpielError: there is no template and no end-of-sequence token to build Tülu's with; or what
        the tokenizer has in its place is none.
    """
    template: Any = tokenizer.chat_template
    if isinstance(template, Mapping):
        if "default" not in template:
            names = ", ".join(map(repr, template)) or "nothing"
            raise TemplateError(
                f"the tokenizer's chat templates are called {names}, and none 'default': give one "
                "(data.chat_template=FILE)"
            )
        return _text(template["default"], " 'default'")
    if template is not None:
        return _text(template)
    if tokenizer.eos_token is None:
        raise SpielError("the tokenizer has neither a chat template nor an end-of-sequence token")
    return ("{{ bos_token }}" if adds_bos(tokenizer) else "") + _TULU


def _text(template: object, name: str = "") -> str:
    if not isinstance(template, str):
        raise TemplateError(
            f"the tokenizer's chat template{name} must be a string, not {type(template).__name__}: mend it, "
            "or give another (data.chat_template=FILE)"
        )
    return template


def templates_of(tokenizer: "PreTrainedTokenizerBase") -> str | dict[str, str]:
    """All that conversations are written with, as `use_template` takes it: a template, or several by name."""
    default, template = chat_template(tokenizer), tokenizer.chat_template
    if not isinstance(template, Mapping) or _TOOL_USE not in template:
        return default
    return {"default": default, _TOOL_USE: _text(template[_TOOL_USE], f" {_TOOL_USE!r}")}


def adds_bos(tokenizer: "PreTrainedTokenizerBase") -> bool:
    """Whether the tokenizer puts a beginning-of-sequence token before what it reads."""
    bos = tokenizer.bos_token_id
    return bos is not None and tokenizer("a")["input_ids"][0] == bos


def read_template(path: str | Path) -> str:
    """The text of a template in a file.

    Raises:
      TemplateError: it cannot be read.
    """
    try:
        text = Path(path).expanduser().read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise TemplateError(f"no chat template can be read from {path}: {error}") from error
    if not text.strip():
        raise TemplateError(f"the chat template in {path} is empty")
    return text.removesuffix("\n")  # which an editor adds, and the template would write


def use_template(tokenizer: "PreTrainedTokenizerBase", template: str | Mapping[str, str]) -> None:
    """Makes a tokenizer write with a template, or with several by their names.

    One that has none and writes with Tülu's already is left as it is: it stays one for plain text.
    """
    plain = tokenizer.chat_template is None and tokenizer.eos_token is not None
    if not (plain and chat_template(tokenizer) == template):
        tokenizer.chat_template = template if isinstance(template, str) else dict(template)


@dataclasses.dataclass(frozen=True)
class Wanted:
    """A rendering of a conversation.

    Attributes:
      count: of its first messages.
      prompt: with the generation prompt at the end.
      contents: what is put in place of the contents of some messages, by their number from 0.
    """

    count: int
    prompt: bool = False
    contents: Mapping[int, str] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Request:
    """A conversation, the ways in which to render it, and what the assistant may call."""

    messages: Sequence[Mapping[str, Any]]
    wanted: Sequence[Wanted]
    tools: Sequence[Mapping[str, Any]] | None = None

    def as_json(self) -> dict[str, Any]:
        """As the program that renders reads it."""
        wanted = [
            {"count": w.count, "prompt": w.prompt, "contents": list(w.contents.items())} for w in self.wanted
        ]
        return {"messages": self.messages, "tools": self.tools, "wanted": wanted}


@dataclasses.dataclass(frozen=True)
class Written:
    """A conversation as text; ``spans`` are what lies between the template's own marks of turns."""

    text: str
    spans: Sequence[tuple[int, int]] = ()


class ChatTemplate:
    """The chat template of a tokenizer, ready to write conversations.

    Args:
      tokenizer: whose template and special tokens they are; Tülu's without one (see `chat_template`).
      date: what templates that ask for the date are told; default: now.
      text: the template, if it is not one of the tokenizer's.

    Attributes:
      text: the template.
      marks_turns: it tells by ``{% generation %}`` what the assistant says.
      tool_use: what writes conversations with tools in its place; ``None``: itself.

    Raises:
      SpielError: there is no template to be had (see `chat_template`).
    """

    def __init__(
        self,
        tokenizer: "PreTrainedTokenizerBase",
        date: datetime.datetime | None = None,
        text: str | None = None,
    ):
        date = date or datetime.datetime.now()
        texts = templates_of(tokenizer) if text is None else text
        self.text = texts if isinstance(texts, str) else texts["default"]
        self.tool_use: ChatTemplate | None = None
        if not isinstance(texts, str):
            self.tool_use = ChatTemplate(tokenizer, date, texts[_TOOL_USE])
        if len(self.text) > _LONGEST:
            raise TemplateError(
                f"the chat template has {len(self.text):,} characters, more than {_LONGEST:,}: give another "
                "(data.chat_template=FILE)"
            )
        self.marks_turns = _GENERATION_TAG.search(self.text) is not None
        self._setup = {
            "template": self.text,
            "marks_turns": self.marks_turns,
            "variables": {k: v for k, v in tokenizer.special_tokens_map.items() if v is not None},
            "date": date.isoformat(),
        }

    def render(self, requests: Sequence["Request"]) -> list[list["Written | TemplateRefusal"]]:
        """Renders conversations, each in the ways that are wanted; many at once are cheaper.

        Raises:
          TemplateError: the template exceeds its limits.
        """
        if self.tool_use is None:
            return self._render(requests)
        own = iter(self._render([request for request in requests if not request.tools]))
        others = iter(self.tool_use._render([request for request in requests if request.tools]))
        return [next(others if request.tools else own) for request in requests]

    def _render(self, requests: Sequence["Request"]) -> list[list["Written | TemplateRefusal"]]:
        """The same with this template."""
        answers = _process.ask(self._setup, [request.as_json() for request in requests]) if requests else []
        return [
            [
                TemplateRefusal(one["refused"])
                if "refused" in one
                else Written(one["text"], [(start, end) for start, end in one["spans"]])
                for one in answer
            ]
            for answer in answers
        ]

    def write(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        *,
        prompt: bool = False,
    ) -> str:
        """A conversation as text, with the generation prompt at its end if that is asked for.

        Raises:
          TemplateRefusal: the template does not take it.
          TemplateError: as `render`.
        """
        ((written,),) = self.render([Request(messages, [Wanted(len(messages), prompt)], tools)])
        if isinstance(written, TemplateRefusal):
            raise written
        return written.text


class _Process:
    """The program that renders: started when it is needed, and again after it had to be stopped."""

    def __init__(self):
        self._program: subprocess.Popen[bytes] | None = None
        self._setup: dict[str, Any] | None = None  # what it was told last
        self._status: int | None = None  # that it ended with
        self._lock = threading.Lock()

    def ask(self, setup: dict[str, Any], requests: list[dict[str, Any]]) -> list[list[Any]]:
        answers: Any
        with self._lock:
            answers = self._exchange(setup, requests)
            if answers is None and self._status == 0:  # it has gone for want of work
                answers = self._exchange(setup, requests)
        if answers is None:
            late = self._status == -signal.SIGALRM
            limit = f"more than {rendering.SECONDS} s" if late else "more than the system gives"
            answers = [{"limit": limit}]
        for answer in answers:
            if "limit" in answer:
                raise TemplateError(
                    f"the chat template was stopped: it takes {answer['limit']} for one conversation. It is "
                    "broken, or hostile: give another (data.chat_template=FILE)"
                )
        return [answer["rendered"] for answer in answers]

    def _exchange(self, setup: dict[str, Any], requests: list[dict[str, Any]]) -> list[Any] | None:
        """The answers; None, and ``_status``, if the program ended instead."""
        program = self._running()
        asked: dict[str, Any] = {"requests": requests}
        if self._setup != setup:
            asked["setup"] = setup
        line = json.dumps(asked, default=_placeholder).encode() + b"\n"
        assert program.stdin is not None
        assert program.stdout is not None
        try:
            program.stdin.write(line)
            program.stdin.flush()
        except BrokenPipeError:
            answer = b""
        else:
            answer = program.stdout.readline()
        if not answer.endswith(b"\n"):
            self._status = self.close()
            return None
        self._setup = setup
        return json.loads(answer)

    def _running(self) -> subprocess.Popen[bytes]:
        if self._program is None or self._program.poll() is not None:
            self.close()
            self._program = subprocess.Popen(
                # -P: the folder of the program is no place to import from
                [sys.executable, "-P", rendering.__file__, str(rendering.SECONDS), str(rendering.IDLE)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                start_new_session=True,  # Ctrl-C is for the run
            )
        return self._program

    def close(self) -> int | None:
        """Ends the program; its status."""
        program, self._program, self._setup = self._program, None, None
        if program is None:
            return None
        assert program.stdin is not None
        assert program.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            program.stdin.close()
        program.stdout.close()
        try:
            return program.wait(timeout=rendering.SECONDS)  # what it does, it does not do longer
        except subprocess.TimeoutExpired:
            program.kill()
            return program.wait()


_process = _Process()
atexit.register(_process.close)


def _placeholder(value: object) -> str:
    """What stands for a value that JSON does not know, such as a date of a Parquet file."""
    return f"<{type(value).__name__}>"
