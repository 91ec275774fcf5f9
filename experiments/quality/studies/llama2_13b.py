"""The paper's experiment with Llama 2 13B, otherwise as ``llama2.py``."""

from experiments.quality.studies import llama2
from experiments.quality.study import Study


def get_study() -> Study:
    """The study."""
    return llama2.get_study("configs/llama2_13b.py:flan_v2", 3_911_680)
