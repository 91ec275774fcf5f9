"""The finalists of the study of conversations on GSM8K's solutions: text with steps, numbers and symbols.

Half as many tokens a step as there. Reads `data/gsm8k/train.jsonl`; the solutions that are held out are of
that file too. Whether answers come out right is asked by ``spiel_jax.evaluate --tasks=gsm8k`` of a run's
folder.
"""

from dataclasses import replace

from experiments.quality.studies import chitchat, instructions
from experiments.quality.study import Study


def get_study() -> Study:
    """The study."""
    known = chitchat.get_study()
    settings = {**known.settings, **instructions.HALF, "data.sources": ("data/gsm8k/train.jsonl",)}
    candidates = {name: known.candidates[name] for name in instructions.FINALISTS}
    return replace(known, settings=settings, candidates=candidates)
