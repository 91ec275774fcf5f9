"""The finalists of the study of conversations on data far from pretraining: English texts put into Finnish.

SmolLM2 was trained on English. Half as many tokens a step as for conversations. Reads
`data/gramps_fi.jsonl`, which `experiments.quality.translations` writes.
"""

from dataclasses import replace

from experiments.quality.studies import chitchat, instructions
from experiments.quality.study import Candidate, Study

RANDOM = {"method": "random", "spiel.accumulation": 3}
FASTER = {  # random entries that evolve; as a finalist it is every 10 steps, a fifth
    "every 5": {"spiel.every": 5, "spiel.rate": 0.2},
    "rate 0.4": {"spiel.every": 10, "spiel.rate": 0.4},
}
SETTINGS = {
    "data.sources": ("data/gramps_fi.jsonl",),
    "data.heldout": 500,  # texts; 16 batches choose the rate, the rest are the test
}


def get_study() -> Study:
    """The study."""
    known = chitchat.get_study()
    return replace(
        known,
        settings={**known.settings, **instructions.HALF, **SETTINGS},
        candidates={
            **{name: known.candidates[name] for name in instructions.FINALISTS},
            **{
                f"random, evolving, {what}": Candidate({**RANDOM, **settings}, (1e-2, 2e-2, 4e-2))
                for what, settings in FASTER.items()
            },
        },
    )
