"""The paper's experiment: Llama 2 7B on Flan v2, its methods, ranks, decays and learning rates.

Settings and grids as its published scripts have them (SpIEL, arXiv 2401.16405, section 4): batches of 128, 2
epochs, reselection every 20 steps after 5 of estimation; LoRA with alpha 16, dropout 0.1 and no decay; all
weights at 2e-5. The paper chose by MMLU, which ``spiel_jax.evaluate`` measures of a run; here half of 256
conversations that are held out choose, and the others are the test. The mixture is prepared as
``configs/llama2_7b.py`` says; another one, or the 13B model, is another ``config`` (``llama2_13b.py``).
Reckon with weeks of one accelerator: 149 runs, of which --jobs or --gpus does several at a time.
"""

from experiments.quality.studies import chitchat
from experiments.quality.study import Candidate, Study

RANKS, DECAYS = (8, 16, 32, 64), (1.0, 3.0, 10.0, 30.0)
ADAM, SM3, IA3 = (1e-4, 3e-5, 1e-5, 3e-6), (2e-3, 1e-3, 7e-4, 4e-4), (3e-4, 1e-4, 3e-5, 1e-5)
SETTINGS = {
    "eval_batches": 8,  # of 16 sequences; the 8 others are the test
    "eval_every": 0,
    "checkpoint_every": 100,
    "checkpoint_keep": 1,
    "sample.prompt": None,
}


def get_study(config: str = "configs/llama2_7b.py:flan_v2", per_rank: int = 2_498_560) -> Study:
    """The study.

    Args:
        config: The model and the mixture.
        per_rank: Weights that LoRA of rank 1 trains.
    """
    plain = {"optimizer.weight_decay": 0.0}
    found = {
        "full": Candidate({"method": "full", **plain}, (2e-5,)),
        "ia3": Candidate({"method": "ia3", **plain}, IA3),
    }
    for rank in RANKS:
        size = {"targets.num_tunable": rank * per_rank}
        lora = {"method": "lora", "lora.rank": rank, "lora.alpha": 16.0, "lora.dropout": 0.1, **plain}
        found[f"lora, rank {rank}"] = Candidate(lora, ADAM)
        for decay in DECAYS:
            told, both = f"rank {rank}, decay {decay:g}", {**size, "optimizer.weight_decay": decay}
            found[f"spiel_ag, {told}"] = Candidate({**chitchat.SPIEL_AG, **both}, ADAM)
            found[f"spiel_ma, {told}"] = Candidate({"method": "spiel_ma", **both}, SM3)
    return Study(config=config, settings=SETTINGS, candidates=found, seeds=(42,))
