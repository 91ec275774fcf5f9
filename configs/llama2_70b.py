r"""Llama 2 70B with SpIEL-AG: the paper's recipe for 7B and 13B at the size of LoRA rank 64.

    python -m spiel_jax.train --config=configs/llama2_70b.py --workdir=runs/llama2_70b \
        --config.data.sources="('flan_v2.jsonl',)"

Recipe (arXiv 2401.16405, section 4): batches of 128 sequences of up to 2048 tokens, 2 epochs, linear
decay after 3% of warm-up, base in bfloat16, deltas in float32, as many tunable weights as LoRA of rank 64
(12,943,360 a rank), reselection every 20 steps after 5 of estimation, initial rate 0.2. The paper stops at
13B: the learning rate is the one used there.

Memory: 128.5 GiB of base weights; 24 bytes a tunable weight of trainer state and 12 a candidate for
SpIEL-AG (27.8 GiB), 12 bytes for SpIEL-MA (9.3 GiB); activations of `micro_batch_size` sequences. What that
comes to on a mesh of devices, spiel_jax.plan finds out.

Reproduction record: not run yet at this size; the same program was run end to end at the size of
SmolLM2-135M (configs/smollm2_135m.py).
"""

from configs.llama2_7b import get_config as of_7b
from spiel_jax.config import Config


def get_config(mixture: str | None = None) -> Config:
    """The configuration; of a mixture of the paper as in ``llama2_7b.py``."""
    config = of_7b(mixture)
    config.model.source = "meta-llama/Llama-2-70b-hf"
    config.targets.num_tunable = 64 * 12_943_360
    config.mesh.data, config.mesh.fsdp = -1, 16
    return config
