"""The finalists of the study of conversations on data far from pretraining: English texts put into Finnish.

SmolLM2 was trained on English. Half as many tokens a step as for conversations. Reads
`data/gramps_fi.jsonl`, which `experiments.quality.translations` writes.
"""

from dataclasses import replace

from experiments.quality.studies import chitchat, instructions
from experiments.quality.study import Study

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
        candidates={name: known.candidates[name] for name in instructions.FINALISTS},
    )
