r"""Llama 2 13B as in ``llama2_13b.py``, on a base in NF4: qSpIEL.

    python -m spiel_jax.train --config=configs/llama2_13b_nf4.py --workdir=runs/llama2_13b_nf4 \\
        --config.data.sources="('flan_v2.jsonl',)"

Deltas in bfloat16, as in the paper's runs on quantised bases (arXiv 2401.16405); gradients and the
optimizer's statistics are float32.

Reproduction record: not run yet on an accelerator. Compiled for one H100 (``spiel_jax.plan``), one
sequence of 2048 tokens at a time: 25.1 GiB with SpIEL-AG, 13.5 with SpIEL-MA. The full size was run with
random weights on 2 CPU cores that others used too, 2 steps of 2 x 96 tokens with a reselection in between,
SpIEL-MA: 14 minutes of CPU time, peak 11.39 GiB (tests/methods/test_7b.py).
"""

from configs.llama2_13b import get_config as dense_config
from spiel_jax.config import Config


def get_config(mixture: str | None = None) -> Config:
    """The configuration; of a mixture of the paper as in ``llama2_7b.py``."""
    config = dense_config(mixture)
    config.model.quantization = "nf4"
    config.spiel.delta_dtype = "bfloat16"
    return config
