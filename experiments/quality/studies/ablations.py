"""What each of SpIEL's settings does, one at a time, otherwise as the study of conversations.

With half as many tokens a step as there: every 10 steps, accumulation 3, rate 0.2; SpIEL's entries are all
chosen anew at the first reselection.
"""

from dataclasses import replace

from experiments.quality.studies import chitchat, instructions
from experiments.quality.study import Candidate, Study

TWO = {"micro_batch_size": 1, "eval_batches": 2 * instructions.HALF["eval_batches"]}  # the same texts
GRADIENTS = {
    "as it is": {},
    "every 5": {"spiel.every": 5},
    "every 20": {"spiel.every": 20},
    "every 30": {"spiel.every": 30},
    "accumulation 1": {"spiel.accumulation": 1},
    "accumulation 6": {"spiel.accumulation": 6},
    "rate 0": {"spiel.rate": 0.0},
    "rate 0.05": {"spiel.rate": 0.05},
    "rate 0.1": {"spiel.rate": 0.1},
    "rate 0.4": {"spiel.rate": 0.4},
    "the second moment seeded": {"spiel.seeds": "second"},
    "nothing seeded": {"spiel.seeds": "neither"},
    "first rate as the others": {"spiel.first": -1.0},
    "candidates of the first of two": TWO,
    "candidates of the mean of two": {**TWO, "spiel.candidates": "mean"},
    "four times the candidates": {"spiel.candidate_ratio": 4.0},
    "dropped by value over age": {"spiel.drop_by": "age"},
    "dropped by value over weight": {"spiel.drop_by": "weight"},
    "reference behaviour": {"spiel.parity": "reference"},
    "deltas in bfloat16": {"spiel.delta_dtype": "bfloat16"},
    "no warm-up": {"optimizer.warmup": 0.0},
    "warm-up of 6 steps": {"optimizer.warmup": 0.1},
    "every 5, rate 0.4, by age": chitchat.OFTEN_BY_AGE,
    "balanced by rows": {"targets.balance.rows": 1},
    "one budget": {"targets.spare": 1.0},
}
SECOND = (  # of GRADIENTS, those that are asked again of the default, which seeds the second moment alone
    *("every 5", "every 20", "accumulation 1", "accumulation 6", "rate 0", "rate 0.4", "balanced by rows"),
    "every 5, rate 0.4, by age",
    *("candidates of the first of two", "candidates of the mean of two"),
)
MOMENTS = {
    "as it is": {},
    "every 20": {"spiel.every": 20},
    "rate 0.1": {"spiel.rate": 0.1},
    "the smaller of both": {"spiel.score": "minimum"},
    "warm-up of 6 steps": {"optimizer.warmup": 0.1},
    "one budget": {"targets.spare": 1.0},
}
OFTEN = {"spiel.every": 2, "spiel.accumulation": 1, "spiel.rate": 0.4}
RANDOM = {  # SET
    "as it is": {},
    "every 5": {"spiel.every": 5},
    "every 20": {"spiel.every": 20},
    "rate 0.1": {"spiel.rate": 0.1},
    "rate 0.4": {"spiel.rate": 0.4},
    "every 5, rate 0.4": {"spiel.every": 5, "spiel.rate": 0.4},
    "every 2, rate 0.4": OFTEN,
    "by age": {"spiel.drop_by": "age"},
    "every 5, rate 0.4, by age": chitchat.OFTEN_BY_AGE,
    "every 5, rate 0.8, by age": {"spiel.every": 5, "spiel.rate": 0.8, "spiel.drop_by": "age"},
    "every 2, rate 0.4, by age": {**OFTEN, "spiel.drop_by": "age"},
    "every 5, rate 0.4, by age, to the end": {**chitchat.OFTEN_BY_AGE, "spiel.schedule": "constant"},
    "every 5, rate 0.4, by age, warm-up of 6 steps": {**chitchat.OFTEN_BY_AGE, "optimizer.warmup": 0.1},
    "one budget": {"targets.spare": 1.0},
}


def get_study() -> Study:
    """The study."""
    evolving = chitchat.EVOLVING
    gradients = {
        f"spiel_ag, {what}": Candidate({**chitchat.SPIEL_AG, **evolving, **setting}, (5e-4, 1e-3))
        for what, setting in GRADIENTS.items()
    }
    seeded = {
        f"spiel_ag, the second moment seeded, {what}": Candidate(
            {"method": "spiel_ag", "spiel.seeds": "second", **evolving, **GRADIENTS[what]}, (5e-4, 1e-3)
        )
        for what in SECOND
    }
    moments = {
        f"spiel_ma, {what}": Candidate({"method": "spiel_ma", **evolving, **setting}, (1.25e-3, 2.5e-3))
        for what, setting in MOMENTS.items()
    }
    random = {
        f"random, {what}": Candidate(
            {"method": "random", "spiel.rate": 0.2, **evolving, **setting}, (2.5e-3, 5e-3, 1e-2)
        )
        for what, setting in RANDOM.items()
    }
    known = chitchat.get_study()
    mixed = "random, evolving + lora"
    halves = {
        f"{mixed}, {what}": replace(
            known.candidates[mixed], settings={**known.candidates[mixed].settings, **RANDOM[what]}
        )
        for what in ("as it is", "every 5, rate 0.4, by age")
    }
    adam = {"spiel_ma_adam": Candidate({"method": "spiel_ma_adam", **evolving}, (5e-4, 1e-3, 2e-3))}
    return replace(
        known,
        settings={**known.settings, **instructions.HALF},
        candidates={**gradients, **seeded, **moments, **random, **halves, **adam},
        seeds=(0, 1),
        against=None,
    )
