"""Five times as long: 300 steps of 4 × 256 tokens.

Reselection as in the paper: every 20 steps, after 5 of estimation.
"""

from dataclasses import replace

from experiments.quality.studies import chitchat
from experiments.quality.study import Candidate, Study

EVOLVING = {"spiel.every": 20, "spiel.accumulation": 5}


def get_study() -> Study:
    """The study."""
    known = chitchat.get_study()
    return replace(
        known,
        settings={**known.settings, "steps": 300, "eval_every": 100, "checkpoint_every": 0},
        candidates={
            "lora": Candidate(chitchat.LORA, (1.5e-3, 3e-3, 6e-3)),
            "random, fixed": Candidate({"method": "random", "spiel.rate": 0.0}, (2.5e-3, 5e-3, 1e-2, 2e-2)),
            "random, evolving": Candidate(
                {"method": "random", "spiel.rate": 0.2, **EVOLVING}, (2.5e-3, 5e-3, 1e-2)
            ),
            "random, evolving by age": Candidate({**chitchat.BY_AGE, **EVOLVING}, (2.5e-3, 5e-3, 1e-2)),
            "random, evolving by age, every 5": Candidate(chitchat.BY_AGE, (2.5e-3, 5e-3, 1e-2)),
            "full": Candidate({"method": "full"}, (7.5e-5, 1.5e-4, 3e-4)),
            "gradient, fixed": Candidate(
                {"method": "gradient", "spiel.accumulation": 5}, (2.5e-4, 5e-4, 1e-3, 2e-3)
            ),
            "spiel_ag": Candidate({**chitchat.SPIEL_AG, **EVOLVING}, (5e-4, 1e-3, 2e-3)),
            "spiel_ag, second moment seeded": Candidate(
                {"method": "spiel_ag", "spiel.seeds": "second", **EVOLVING}, (5e-4, 1e-3, 2e-3)
            ),
            "spiel_ma": Candidate({"method": "spiel_ma", **EVOLVING}, (1.25e-3, 2.5e-3, 5e-3, 1e-2)),
            "random + lora": Candidate(chitchat.HALVES, (1.25e-3, 2.5e-3, 5e-3), {"rosa.learning_rate": 0.8}),
        },
    )
