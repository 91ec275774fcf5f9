"""The finalists of the study of conversations on a thousand instructions with answers (Alpaca's).

Half as many tokens a step as there, as in `configs/smollm2_135m.py`. Reads
`data/alpaca_demo/alpaca_en_demo.json`. What the runs forget: `--elsewhere`.
"""

from dataclasses import replace

from experiments.quality.studies import chitchat
from experiments.quality.study import Study

FINALISTS = (
    *("lora", "random, fixed", "random, evolving", "full", "spiel_ag", "spiel_ag, second moment seeded"),
    *("random, evolving by age", "spiel_ag, evolving often by age", "gradient, fixed", "random + lora"),
)
HALF = {
    "batch_size": 2,
    "data.heldout": 128,  # 16 batches choose the rate, the rest are the test
    "eval_batches": 16,
}


def get_study() -> Study:
    """The study."""
    known = chitchat.get_study()
    source = "data/alpaca_demo/alpaca_en_demo.json"
    return replace(
        known,
        settings={**known.settings, **HALF, "data.sources": (source,)},
        candidates={name: known.candidates[name] for name in FINALISTS},
    )
