"""The finalists of the study of conversations on a thousand instructions with answers (Alpaca's).

Reads `data/alpaca_demo/alpaca_en_demo.json`. What the runs forget: ``spiel_jax.evaluate --forgetting`` of
their folders.
"""

from dataclasses import replace

from experiments.quality.studies import chitchat, gsm8k
from experiments.quality.study import Study


def get_study() -> Study:
    """The study."""
    known = chitchat.get_study()
    return replace(
        known,
        settings={**known.settings, "data.sources": ("data/alpaca_demo/alpaca_en_demo.json",)},
        candidates={name: known.candidates[name] for name in gsm8k.FINALISTS},
    )
