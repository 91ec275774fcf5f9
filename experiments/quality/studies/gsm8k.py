"""The finalists of the study of conversations on GSM8K's solutions: text with steps, numbers and symbols.

Reads `data/gsm8k/train.jsonl`; the solutions that are held out are of that file too. Whether answers come out
right is asked by ``spiel_jax.evaluate --tasks=gsm8k`` of a run's folder.
"""

from dataclasses import replace

from experiments.quality.studies import chitchat
from experiments.quality.study import Study

FINALISTS = ("lora", "random, fixed", "full", "spiel_ag", "random + lora")


def get_study() -> Study:
    """The study."""
    known = chitchat.get_study()
    return replace(
        known,
        settings={**known.settings, "data.sources": ("data/gsm8k/train.jsonl",)},
        candidates={name: known.candidates[name] for name in FINALISTS},
    )
