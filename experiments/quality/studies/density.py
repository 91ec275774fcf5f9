"""How many random entries: 0.2% to 5.6% of SmolLM2-135M, 60 steps of 512 tokens, beside LoRA of rank 8."""

from experiments.quality.study import Candidate, Study

OWN = 2_500_000
"""Entries of the configuration."""

RATES = {  # about as one over the share of the entries, and as its square root
    250_000: (1.6e-2, 5e-2),
    800_000: (9e-3, 1.6e-2),
    OWN: (2.5e-3, 5e-3, 1e-2),
    7_500_000: (1.7e-3, 2.9e-3),
}


def get_study() -> Study:
    """The study."""
    random = {
        f"random, {count / 1e6:g} million": Candidate(
            {"method": "random"} | ({} if count == OWN else {"targets.num_tunable": count}), rates
        )
        for count, rates in RATES.items()
    }
    lora = Candidate({"method": "lora", "lora.rank": 8, "lora.dropout": 0.0}, (3e-3,))
    return Study(
        config="configs/smollm2_135m.py",
        settings={"sample.prompt": None},
        candidates={**random, "lora, rank 8": lora},
        seeds=(0,),
    )
