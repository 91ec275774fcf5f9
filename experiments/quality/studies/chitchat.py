"""Sparse sets beside LoRA of rank 8: SmolLM2-135M on conversations, 60 steps of 4 × 256 tokens."""

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
LORA = {"method": "lora", "lora.alpha": 16.0, "lora.dropout": 0.0}
FIXED = {"spiel.rate": 0.0, "spiel.first": 0.0}


def get_study() -> Study:
    """The study."""
    return Study(
        config="configs/smollm2_135m.py",
        settings=SETTINGS,
        budgets={"": {"targets.num_tunable": ENTRIES, "lora.rank": 8}},
        candidates={
            "lora": Candidate(LORA, (1.5e-3, 3e-3, 6e-3, 1.2e-2)),
            "random, fixed": Candidate({"method": "random", **FIXED}, (2.5e-3, 5e-3, 1e-2, 2e-2)),
        },
        against="lora",
    )
