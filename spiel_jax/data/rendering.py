"""The program in which chat templates run, started by ``templates``: apart, so that they can be stopped.

It reads a JSON object a line, some conversations, and answers each with a line. A template is the program
of whoever made the tokenizer: transformers' sandbox keeps it from the machine, but not from running for ever
or filling the memory. Here it may do both; the process ends, and what started it goes on.
"""

import contextlib
import datetime
import json
import resource
import select
import signal
import sys
from typing import Any

IDLE = 60
"""Seconds without a request after which the program ends; it is started anew when it is needed."""
SECONDS = 10
"""What a conversation may take, some twenty times over; usual are some milliseconds."""
MEMORY = 1 << 30
"""Bytes that may be allocated beside what the program itself has."""
CHARACTERS = 50_000_000
"""What may be written of a conversation."""


def main(seconds: int, idle: int) -> None:
    """Answers requests until there are no more, or none has come for ``idle`` seconds."""
    signal.alarm(60)
    from transformers.utils import chat_template_utils as transformers

    _limit_memory()
    signal.alarm(0)
    setup: dict[str, Any] = {}
    while select.select([sys.stdin], [], [], idle)[0] and (line := sys.stdin.buffer.readline()):
        signal.alarm(seconds)  # ends the program, whatever it is in the middle of
        asked = json.loads(line)
        if "setup" in asked:
            setup = asked["setup"]
            setattr(transformers, "datetime", _clock(setup["date"]))  # noqa: B010  (`strftime_now` reads it)
        answers = []
        for request in asked["requests"]:
            signal.alarm(seconds)
            answers.append(_answer(transformers.render_jinja_template, setup, request))
        line = json.dumps(answers)
        signal.alarm(0)
        sys.stdout.write(line + "\n")
        sys.stdout.flush()


def _limit_memory() -> None:
    with contextlib.suppress(OSError, ValueError), open("/proc/self/statm") as file:  # Linux has it
        limit = int(file.read().split()[0]) * resource.getpagesize() + MEMORY
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def _clock(date: str) -> type[datetime.datetime]:
    fixed = datetime.datetime.fromisoformat(date)

    class Clock(datetime.datetime):
        @classmethod
        def now(cls, tz: Any = None) -> Any:
            return fixed

    return Clock


def _answer(render: Any, setup: dict[str, Any], request: dict[str, Any]) -> dict[str, Any]:
    rendered, written = [], 0
    for wanted in request["wanted"]:
        messages = request["messages"][: wanted["count"]]
        for index, content in wanted["contents"]:
            messages[index] = {**messages[index], "content": content}
        try:
            (text,), spans = render(
                conversations=[messages],
                tools=request["tools"],
                chat_template=setup["template"],
                add_generation_prompt=wanted["prompt"],
                return_assistant_tokens_mask=setup["marks_turns"],
                **setup["variables"],
            )
        except MemoryError:
            return {"limit": f"more than {MEMORY >> 20} MiB of memory"}
        except Exception as error:  # its own refusals, and whatever else its expressions can raise
            rendered.append({"refused": _reason(error)})
            continue
        written += len(text)
        if written > CHARACTERS:
            return {"limit": f"more than {CHARACTERS:,} characters"}
        rendered.append({"text": text, "spans": spans[0] if spans else []})
    return {"rendered": rendered}


def _reason(error: Exception) -> str:
    """What went wrong; the template's own words as they are."""
    kind, line = type(error).__name__, getattr(error, "lineno", None)
    message = str(error)[:1000]
    if kind == "TemplateError":
        return message
    return f"{kind}{'' if line is None else f' in line {line}'}: {message}"


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
