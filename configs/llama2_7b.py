r"""Llama 2 7B with SpIEL-AG: the paper's recipe at the size of LoRA rank 64.

    python -m spiel_jax.train --config=configs/llama2_7b.py --workdir=runs/llama2_7b \
        --config.data.sources="('flan_v2.jsonl',)"

Recipe (arXiv 2401.16405, section 4): batches of 128 sequences of up to 2048 tokens, 2 epochs, linear
decay after 3% of warm-up, base in bfloat16, deltas in float32, as many tunable weights as LoRA of rank 64
(2,498,560 a rank), reselection every 20 steps after 5 of estimation, initial rate 0.2. Learning rates
tried there: SpIEL-AG 1e-4, 3e-5, 1e-5, 3e-6; SpIEL-MA 2e-3, 1e-3, 7e-4, 4e-4; weight decay 1, 3, 10, 30.
Grown entries begin with Adam's second moment; in the paper with both (``spiel.seeds``).

    python -m experiments.mixtures.prepare --mixture=flan_v2 --published=... --out=data/flan_v2.jsonl
    python -m spiel_jax.train --config=configs/llama2_7b.py:flan_v2 --workdir=runs/flan_v2

are the paper's experiments on one of its mixtures (flan_v2, gpt4_alpaca, tulu_v2): besides, examples are not
packed, grown entries begin with both of Adam's moments, and 256 examples are held out, where the paper held
none. (SpIEL-AG's eps is the paper's, 1e-6, by itself, as SpIEL-MA's is, 1e-8; LoRA has no decay there:
--config.optimizer.weight_decay=0.) The conversations are written as Tülu's, since the base model has no
template. Which rate and decay the paper took of those it tried is not published, but for a run's name that
has 1e-5 and 30 (13B, Tülu v2, SpIEL-AG). All that it tried, of all methods:

    python -m experiments.quality --study=experiments/quality/studies/llama2.py --out=runs/llama2

Memory: 12.6 GiB of base weights; 24 bytes a tunable weight of trainer state and 12 a candidate for
SpIEL-AG (5.4 GiB), 12 bytes for SpIEL-MA (1.8 GiB); activations of `micro_batch_size` sequences.

Reproduction record: not run yet on an accelerator. Compiled for 8 TPU v5e (``spiel_jax.plan``): 5.7 GiB per
device with SpIEL-AG, 4.6 with SpIEL-MA. The full size was run with random weights on 2 CPU cores, 2 steps of
2 x 96 tokens with a reselection in between, SpIEL-MA, bfloat16: 2 m 20 s, peak 17.7 GiB
(tests/methods/test_7b.py).
"""

from spiel_jax.config import Config, ConfigError, default_config

MIXTURES = ("flan_v2", "gpt4_alpaca", "tulu_v2")


def get_config(mixture: str | None = None) -> Config:
    """The configuration; of a mixture of the paper, as ``experiments.mixtures.prepare`` writes it."""
    config = default_config()
    config.model.source = "meta-llama/Llama-2-7b-hf"
    config.targets.num_tunable = 64 * 2_498_560
    config.optimizer.learning_rate = 3e-5
    config.optimizer.weight_decay = 3.0
    config.data.sources = ("train.jsonl",)
    config.data.on_malformed = "skip"
    config.micro_batch_size = 16
    config.mesh.data, config.mesh.fsdp = 1, -1
    if mixture is not None:
        if mixture not in MIXTURES:
            raise ConfigError(f"unknown mixture {mixture!r}: expected one of {', '.join(MIXTURES)}")
        config.data.sources = (f"data/{mixture}.jsonl",)
        config.data.heldout = 256
        config.data.packing = False
        config.spiel.seeds = "both"
    return config
