"""In which weights random entries should lie: 2.44 million, otherwise as the study of conversations."""

from dataclasses import replace

from experiments.quality.studies import chitchat
from experiments.quality.study import Candidate, Study

PLACES = {
    "attention": r"model\.layers\.\d+\.self_attn\.[a-z]+_proj\.weight",
    "mlp": r"model\.layers\.\d+\.mlp\.[a-z]+_proj\.weight",
    "values and outputs": r"model\.layers\.\d+\.self_attn\.[vo]_proj\.weight",
    "down": r"model\.layers\.\d+\.mlp\.down_proj\.weight",
    "writing": r"model\.layers\.\d+\.(self_attn\.o|mlp\.down)_proj\.weight",  # into the residual stream
    "layers 0 to 14": r"model\.layers\.(\d|1[0-4])\.(self_attn|mlp)\.[a-z]+_proj\.weight",
    "layers 15 to 29": r"model\.layers\.(1[5-9]|2\d)\.(self_attn|mlp)\.[a-z]+_proj\.weight",
}


def get_study() -> Study:
    """The study."""
    return replace(
        chitchat.get_study(),
        candidates={
            place: Candidate({"method": "random", "targets.rules": (rule,)}, (2.5e-3, 5e-3, 1e-2))
            for place, rule in PLACES.items()
        },
        seeds=(0, 1),
        against=None,
    )
