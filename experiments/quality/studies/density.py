"""How much is trained: as many weights as LoRA of rank 1 to 32 has, and a third of the least.

Of the weights of the linear layers 0.1% to 9.2%. Otherwise as the study of SpIEL's settings, which has as
many as rank 8.
"""

from dataclasses import replace

from experiments.quality.studies import chitchat, instructions
from experiments.quality.study import Candidate, Study

PER_RANK = chitchat.ENTRIES // 8
BUDGETS = {"0.1%": PER_RANK // 3} | {f"as rank {rank}": rank * PER_RANK for rank in (1, 2, 4, 8, 16, 32)}


def get_study() -> Study:
    """The study."""
    found = {}
    for name, entries in BUDGETS.items():
        share, size = entries / chitchat.ENTRIES, {"targets.num_tunable": entries}
        rank = entries // PER_RANK
        if rank:
            lora = {**chitchat.LORA, "lora.rank": rank, "lora.alpha": 2.0 * rank}
            found[f"lora, {name}"] = Candidate(lora, (1.5e-3, 3e-3, 6e-3, 1.2e-2))
        random = [float(f"{5e-3 * factor * share**-0.6:.2g}") for factor in (0.5, 1, 2, 4)]
        found[f"random, {name}"] = Candidate({"method": "random", **size}, random)
        found[f"random, by age, {name}"] = Candidate({**chitchat.BY_AGE, **size}, random)
        grown = [float(f"{5e-4 * factor * share**-0.3:.2g}") for factor in (0.5, 1, 2)]
        found[f"spiel_ag, {name}"] = Candidate({**chitchat.SPIEL_AG, **chitchat.EVOLVING, **size}, grown)
        twice = tuple(2 * rate for rate in grown)
        second = {"method": "spiel_ag", "spiel.seeds": "second", **chitchat.EVOLVING, **size}
        found[f"spiel_ag, second moment seeded, {name}"] = Candidate(second, twice)
        found[f"gradient, {name}"] = Candidate({"method": "gradient", "spiel.accumulation": 3, **size}, twice)
    known = chitchat.get_study()
    settings = {**known.settings, **instructions.HALF}
    return replace(known, settings=settings, candidates=found, seeds=(0,), against=None)
