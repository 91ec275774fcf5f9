"""Every method beside LoRA of rank 8 and all weights: SmolLM2-135M, 60 steps of 4 × 256 tokens."""

from experiments.quality.study import Candidate, Study

ENTRIES = 30 * 8 * 10_176  # of LoRA of rank 8: 30 layers, rows and columns of a layer's linears

SETTINGS = {
    "steps": 60,
    "batch_size": 4,
    "data.heldout": 256,  # 12 batches choose the rate, the rest are the test
    "eval_batches": 12,
    "eval_every": 0,  # at the ends
    "checkpoint_every": 20,
    "checkpoint_keep": 1,
    "sample.prompt": None,
}
EVOLVING = {"spiel.every": 10, "spiel.accumulation": 3}
OFTEN_BY_AGE = {  # what moved least of what it had time for is dropped, early and often
    "spiel.rate": 0.4,
    "spiel.every": 5,
    "spiel.accumulation": 3,
    "spiel.drop_by": "age",
}
BY_AGE = {"method": "random", **OFTEN_BY_AGE}
SPIEL_AG = {"method": "spiel_ag", "spiel.seeds": "both"}  # as in the paper
THREE_BATCHES = {"spiel.accumulation": 3, "spiel.candidate_ratio": 4.0}  # all three decide, not the first
LORA = {"method": "lora", "lora.alpha": 16.0, "lora.dropout": 0.0}
HALVES = {  # of the budget: random entries, and LoRA on the same weights from the first step on
    "method": "rosa",
    "rosa.entries": "random",
    "rosa.warmup": 0,
    "spiel.rate": 0.0,
    "targets.num_tunable": ENTRIES // 2,
    "lora.rank": 4,
    "lora.alpha": 16.0,
    "lora.dropout": 0.0,
}
HALF_LORA = {key: value for key, value in HALVES.items() if key != "spiel.rate"}  # with other entries


def get_study() -> Study:
    """The study."""
    return Study(
        config="configs/smollm2_135m.py:random",  # nothing of it evolves but where it is said
        settings=SETTINGS,
        budgets={"": {"targets.num_tunable": ENTRIES, "lora.rank": 8}},
        candidates={
            "lora": Candidate(LORA, (1.5e-3, 3e-3, 6e-3, 1.2e-2)),
            "random, fixed": Candidate({"method": "random", "spiel.rate": 0.0}, (2.5e-3, 5e-3, 1e-2, 2e-2)),
            "random, evolving": Candidate(
                {"method": "random", "spiel.rate": 0.2, **EVOLVING}, (2.5e-3, 5e-3, 1e-2)
            ),
            "random, evolving by age": Candidate(BY_AGE, (2.5e-3, 5e-3, 1e-2)),
            "full": Candidate({"method": "full"}, (7.5e-5, 1.5e-4, 3e-4)),
            "gradient, fixed": Candidate({"method": "gradient", "spiel.accumulation": 3}, (5e-4, 1e-3, 2e-3)),
            "gradient of three batches, fixed": Candidate(
                {"method": "gradient", **THREE_BATCHES}, (5e-4, 1e-3, 2e-3)
            ),
            "spiel_ag": Candidate({**SPIEL_AG, **EVOLVING}, (2.5e-4, 5e-4, 1e-3)),
            "spiel_ag, second moment seeded": Candidate(
                {"method": "spiel_ag", "spiel.seeds": "second", **EVOLVING}, (5e-4, 1e-3, 2e-3)
            ),
            "spiel_ag, evolving often by age": Candidate(
                {"method": "spiel_ag", "spiel.seeds": "second", **OFTEN_BY_AGE}, (2.5e-4, 5e-4, 1e-3)
            ),
            "spiel_ma": Candidate({"method": "spiel_ma", **EVOLVING}, (1.25e-3, 2.5e-3, 5e-3, 1e-2)),
            "random + lora": Candidate(HALVES, (1.25e-3, 2.5e-3, 5e-3), {"rosa.learning_rate": 0.8}),
            "random, evolving + lora": Candidate(
                {**HALVES, "spiel.rate": 0.2, **EVOLVING},
                (1.25e-3, 2.5e-3, 5e-3),
                {"rosa.learning_rate": 0.8},
            ),
            "lift, fixed": Candidate(  # not looked for again within the run
                {"method": "lift", "spiel.every": 1000, "spiel.filter_rank": 32}, (2.5e-3, 5e-3, 1e-2)
            ),
            "lift, every 10": Candidate(
                {"method": "lift", "spiel.every": 10, "spiel.filter_rank": 32}, (2.5e-3, 5e-3, 1e-2)
            ),
            "rosa": Candidate(  # as its paper: a warm-up of LoRA, then its gradients choose the entries
                {**HALF_LORA, "rosa.entries": "gradient", "rosa.warmup": 6, **THREE_BATCHES},
                (2.5e-4, 5e-4, 1e-3, 2e-3),
                {"rosa.learning_rate": 3.0},
            ),
            "supra": Candidate(  # largest weights and LoRA
                {**HALF_LORA, "rosa.entries": "magnitude"},
                (1.25e-3, 2.5e-3, 5e-3),
                {"rosa.learning_rate": 0.8},
            ),
            "magnitude, fixed": Candidate({"method": "magnitude"}, (2.5e-3, 5e-3, 1e-2)),
            "gradient, balanced by rows": Candidate(
                {"method": "gradient", "spiel.accumulation": 3, "targets.balance.rows": 1}, (5e-4, 1e-3, 2e-3)
            ),
            "rslora": Candidate({**LORA, "lora.rslora": True}, (1e-3, 2e-3, 4e-3)),
            "ia3": Candidate({"method": "ia3"}, (1e-2, 2e-2, 4e-2)),
            # what the other half of "random + lora" adds
            "lora, rank 4": Candidate({**LORA, "lora.rank": 4}, (1.5e-3, 3e-3, 6e-3)),
        },
        against="lora",
    )
