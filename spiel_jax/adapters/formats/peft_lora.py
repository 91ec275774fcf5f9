"""PEFT's LORA, which vLLM serves too."""

import math
import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np

from spiel_jax.adapters.adapter import Adapter, AdapterError
from spiel_jax.adapters.formats.format import Export, register
from spiel_jax.adapters.formats.peft import About, PeftFormat, matrix
from spiel_jax.adapters.parametrized import LoraAdapter, LowRank

_A, _B = "lora_A.weight", "lora_B.weight"


@register
class Lora(PeftFormat):
    """Plain LoRA, rank-stabilised or not; what other kinds of it need is refused."""

    name = "peft_lora"
    kinds = ("lora",)
    peft_type = "LORA"
    parts = (_A, _B)
    neutral = frozenset({"lora_dropout", "qalora_group_size"})
    read_keys = frozenset(
        {"r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "init_lora_weights", "bias"}
    )

    def contents(self, export: Export) -> tuple[dict[str, Any], dict[str, dict[str, np.ndarray]]]:
        """See ``PeftFormat``."""
        adapter = export.adapter
        assert isinstance(adapter, LoraAdapter)
        ranks = {name: term.rank for name, term in adapter.matrices.items()}
        alphas = {name: term.alpha for name, term in adapter.matrices.items()}
        keys = {
            "alpha_pattern": _pattern(alphas),
            "bias": "none",
            "fan_in_fan_out": False,
            "init_lora_weights": True,
            "lora_alpha": _usual(alphas),
            "lora_dropout": adapter.origin.config.get("lora.dropout", 0.0),
            "modules_to_save": None,
            "r": _usual(ranks),
            "rank_pattern": _pattern(ranks),
            "use_dora": False,
            "use_rslora": adapter.rslora,
        }
        return keys, {name: {_A: term.a, _B: term.b} for name, term in adapter.matrices.items()}

    def meaning(self, adapter: Adapter) -> Any:
        """See ``PeftFormat``: the scales."""
        return {name: adapter.scale(name) for name in sorted(adapter.matrices)}  # pyright: ignore

    def adapter(
        self, config: Mapping[str, Any], weights: Mapping[str, dict[str, np.ndarray]], about: About
    ) -> Adapter:
        """See ``PeftFormat``."""
        if config.get("bias", "none") != "none":
            raise AdapterError(f"bias = {config['bias']!r} is not supported: expected 'none'")
        if config.get("init_lora_weights", True) not in (True, False, "gaussian", "eva"):
            start = config["init_lora_weights"]
            raise AdapterError(
                f"init_lora_weights = {start!r} changes the base weights, which is not supported"
            )
        matrices = {}
        for name, parts in weights.items():
            a, b = (matrix(name, parts[part]) for part in (_A, _B))
            if a.ndim != 2 or a.shape[0] != _of(config, "r", "rank_pattern", name, 8):
                raise AdapterError(
                    f"{name}: lora_A is {list(a.shape)}, which contradicts the rank of the config"
                )
            matrices[name] = LowRank(a, b, float(_of(config, "lora_alpha", "alpha_pattern", name, 8)))
        rslora = config.get("use_rslora", False)
        if not isinstance(rslora, bool):
            raise AdapterError(f"use_rslora = {rslora!r}: expected true or false")
        adapter = LoraAdapter(matrices, rslora, about.origin)
        for name, shape in adapter.shapes.items():
            about.known(name, shape)
        return adapter


def _usual(numbers: Mapping[str, float]) -> float:
    """The most frequent one."""
    usual = Counter(numbers.values()).most_common(1)[0][0]
    return int(usual) if float(usual).is_integer() else usual


def _pattern(numbers: Mapping[str, float]) -> dict[str, float]:
    """Those that are not the usual one, by module."""
    usual = _usual(numbers)
    return {n.removesuffix(".weight"): number for n, number in sorted(numbers.items()) if number != usual}


def _of(config: Mapping[str, Any], key: str, pattern: str, weight: str, default: float) -> float:
    """A number for one weight: of the first name in a pattern that ends its module's, or the key's."""
    module, found = weight.removesuffix(".weight"), config.get(key, default)
    patterns = config.get(pattern) or {}
    if not isinstance(patterns, dict):
        raise AdapterError(f"{pattern} = {str(patterns)[:100]}: expected an object")
    for name in patterns:
        if not re.fullmatch(r"\^?\w+(\.\w+)*", name):
            raise AdapterError(f"{pattern}: {name[:100]!r} is not supported, expected names of modules")
    for name, number in patterns.items():
        if module == name.removeprefix("^") or (name[0] != "^" and module.endswith(f".{name}")):
            found = number
            break
    if type(found) not in (int, float) or not math.isfinite(found) or not abs(found) < 2**31:
        raise AdapterError(f"{key} = {str(found)[:100]}: expected a number")
    return found
