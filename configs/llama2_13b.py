r"""Llama 2 13B with SpIEL-AG: the paper's recipe at the size of LoRA rank 64.

    python -m spiel_jax.train --config=configs/llama2_13b.py --workdir=runs/llama2_13b \
        --config.data.sources="('flan_v2.jsonl',)"

A mixture of the paper is asked for as in ``llama2_7b.py``: ``--config=configs/llama2_13b.py:tulu_v2``;
all that the paper tried is ``experiments/quality/studies/llama2_13b.py``.

Recipe (arXiv 2401.16405, section 4): batches of 128 sequences of up to 2048 tokens, 2 epochs, linear
decay after 3% of warm-up, base in bfloat16, deltas in float32, as many tunable weights as LoRA of rank 64
(3,911,680 a rank), reselection every 20 steps after 5 of estimation, initial rate 0.2. Learning rates
tried there: SpIEL-AG 1e-4, 3e-5, 1e-5, 3e-6; SpIEL-MA 2e-3, 1e-3, 7e-4, 4e-4; weight decay 1, 3, 10, 30.

Memory: 24.2 GiB of base weights; 24 bytes a tunable weight of trainer state and 12 a candidate for
SpIEL-AG (8.4 GiB), 12 bytes for SpIEL-MA (2.8 GiB); activations of `micro_batch_size` sequences.

Reproduction record: not run yet at this size; the same program was run end to end at the size of
SmolLM2-135M (configs/smollm2_135m.py).
"""

from configs.llama2_7b import get_config as of_7b
from spiel_jax.config import Config


def get_config(mixture: str | None = None) -> Config:
    """The configuration; of a mixture of the paper as in ``llama2_7b.py``."""
    config = of_7b(mixture)
    config.model.source = "meta-llama/Llama-2-13b-hf"
    config.targets.num_tunable = 64 * 3_911_680
    return config
