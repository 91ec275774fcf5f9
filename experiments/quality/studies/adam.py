"""AdamW's other settings, for random entries and for LoRA alike.

Otherwise as the study of conversations, with half as many tokens a step.
"""

from dataclasses import replace

from experiments.quality.studies import chitchat, instructions
from experiments.quality.study import Candidate, Study

OPTIMIZERS = {
    "as it is": {},
    "b2 0.99": {"optimizer.b2": 0.99},
    "b2 0.95": {"optimizer.b2": 0.95},
    "b1 0.8": {"optimizer.b1": 0.8},
    "b1 0.95": {"optimizer.b1": 0.95},
    "no warm-up": {"optimizer.warmup": 0.0},
    "warm-up of 6 steps": {"optimizer.warmup": 0.1},
    "warm-up of 12 steps": {"optimizer.warmup": 0.2},
    "cosine": {"optimizer.schedule": "cosine"},
    "gradients clipped to 1": {"optimizer.clip_norm": 1.0},
}


def get_study() -> Study:
    """The study."""
    methods = {
        "random, fixed": Candidate({"method": "random"}, (5e-3, 1e-2)),
        "lora": Candidate(chitchat.LORA, (3e-3, 6e-3)),
    }
    known = chitchat.get_study()
    return replace(
        known,
        settings={**known.settings, **instructions.HALF},
        candidates={
            f"{name}, {what}": Candidate({**one.settings, **optimizer}, one.rates)
            for what, optimizer in OPTIMIZERS.items()
            for name, one in methods.items()
        },
        seeds=(0, 1),
        against=None,
    )
