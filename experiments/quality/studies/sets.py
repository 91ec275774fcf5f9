"""Ways to choose the entries that the other studies leave out, otherwise as the study of SpIEL's settings.

60 steps of 2 × 256 tokens of conversations. Whole columns, rows and squares at random force what balanced
sets forbid; squares by gradients are SMT's. Scores that need a phase have one of 3 steps and four times the
candidates, so that all of it decides.
"""

from dataclasses import replace

from experiments.quality.studies import chitchat, instructions
from experiments.quality.study import Candidate, Study

LOW, HIGH = (5e-4, 1e-3, 2e-3), (2.5e-3, 5e-3, 1e-2)  # what gradients bear, and what random entries do
WIDE = (6.25e-4, 1.25e-3, 2.5e-3, 5e-3)
SQUARE = {"spiel.tile.rows": 32, "spiel.tile.columns": 32}


def get_study() -> Study:
    """The study."""
    phase = chitchat.THREE_BATCHES
    found = {
        "columns at random": Candidate({"method": "structured", "spiel.tile.columns": 1}, HIGH),
        "rows at random": Candidate({"method": "structured", "spiel.tile.rows": 1}, HIGH),
        "squares at random": Candidate({"method": "structured", **SQUARE}, HIGH),
        "squares by gradients (SMT)": Candidate({"method": "smt", "spiel.accumulation": 3, **SQUARE}, LOW),
        "gradient of one batch": Candidate({"method": "gradient", "spiel.accumulation": 1}, LOW),
        "gradient of three": Candidate({"method": "gradient", **phase}, LOW),
        "gradient over weight (GEM)": Candidate({"method": "gem", **phase}, (*LOW, 4e-3)),
        "low sensitivity (TaLoS)": Candidate({"method": "talos", **phase}, HIGH),
        "weight times activation": Candidate({"method": "wanda", "spiel.accumulation": 3}, WIDE),
        "output magnitude (MIGU)": Candidate({"method": "migu", "spiel.accumulation": 3}, WIDE),
    }
    known = chitchat.get_study()
    settings = {**known.settings, **instructions.HALF}
    return replace(known, settings=settings, candidates=found, seeds=(0,), against=None)
