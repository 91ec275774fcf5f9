"""The finalists of the study of conversations on data far from pretraining: English texts put into Finnish.

SmolLM2 was trained on English. Half as many tokens a step as for conversations. Reads
`data/gramps_fi.jsonl`, which `experiments.quality.translations` writes.
"""

from dataclasses import replace

from experiments.quality.studies import chitchat, instructions
from experiments.quality.study import Candidate, Study

RATES = {  # twice to four times those of conversations; LoRA bears few
    "lora": (3e-3, 4e-3, 6e-3, 8e-3, 1.2e-2),
    "random, fixed": (5e-3, 1e-2, 2e-2, 4e-2),
    "random, evolving": (1e-2, 2e-2, 4e-2),
    "random, evolving by age": (1e-2, 2e-2, 4e-2),
    "full": (1.5e-4, 3e-4, 6e-4),
    "spiel_ag": (1e-3, 2e-3, 4e-3),
    "spiel_ag, second moment seeded": (2e-3, 4e-3, 8e-3),
    "spiel_ag, evolving often by age": (2e-3, 4e-3, 8e-3),
    "gradient, fixed": (5e-4, 1e-3, 2e-3, 4e-3),
    "random + lora": (2.5e-3, 5e-3, 1e-2),
}
FASTER = {  # random entries that evolve; as a finalist it is every 10 steps, a fifth
    "every 5": {"spiel.every": 5},
    "rate 0.4": {"spiel.rate": 0.4},
}
SLOWER = {"warm-up of 6 steps": {"optimizer.warmup": 0.1}}  # not 2: LoRA's first losses are high
SETTINGS = {
    "data.sources": ("data/gramps_fi.jsonl",),
    "data.heldout": 500,  # texts; 16 batches choose the rate, the rest are the test
}


def get_study() -> Study:
    """The study."""
    known = chitchat.get_study()
    candidates = {name: replace(known.candidates[name], rates=RATES[name]) for name in instructions.FINALISTS}
    for name, rates, changes in (
        ("random, evolving", RATES["random, evolving"], FASTER | SLOWER),
        ("lora", (6e-3, 1.2e-2), SLOWER),
        ("spiel_ag, second moment seeded", (2e-3, 4e-3), {"rate 0": {"spiel.rate": 0.0}}),
    ):
        for what, settings in changes.items():
            candidates[f"{name}, {what}"] = Candidate({**candidates[name].settings, **settings}, rates)
    return replace(known, settings={**known.settings, **instructions.HALF, **SETTINGS}, candidates=candidates)
