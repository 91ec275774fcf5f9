"""PEFT's IA3."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from spiel_jax.adapters.adapter import Adapter, AdapterError
from spiel_jax.adapters.formats.format import Export, register
from spiel_jax.adapters.formats.peft import About, PeftFormat
from spiel_jax.adapters.parametrized import Factors, IA3Adapter

_FACTORS = "ia3_l"


@register
class IA3(PeftFormat):
    """Factors [out, 1] of outputs, [1, in] of inputs; the latter are PEFT's feed-forward modules."""

    name = "peft_ia3"
    kinds = ("ia3",)
    peft_type = "IA3"
    parts = (_FACTORS,)
    neutral = frozenset({"init_ia3_weights", "feedforward_modules"})

    def contents(self, export: Export) -> tuple[dict[str, Any], dict[str, dict[str, np.ndarray]]]:
        """See ``PeftFormat``."""
        adapter = export.adapter
        assert isinstance(adapter, IA3Adapter)
        inner = sorted(n.removesuffix(".weight") for n, one in adapter.factors.items() if one.inputs)
        keys = {
            "fan_in_fan_out": False,
            "feedforward_modules": inner,
            "init_ia3_weights": True,
            "modules_to_save": None,
        }
        return keys, {
            name: {_FACTORS: np.expand_dims(one.values, 0 if one.inputs else 1)}
            for name, one in adapter.factors.items()
        }

    def adapter(
        self, config: Mapping[str, Any], weights: Mapping[str, dict[str, np.ndarray]], about: About
    ) -> Adapter:
        """See ``PeftFormat``."""
        factors = {}
        for name, parts in weights.items():
            tensor, shape = parts[_FACTORS], about.shape(name)
            for inputs, expected in ((True, (1, shape[1])), (False, (shape[0], 1))):
                if tensor.shape == expected and tensor.dtype.kind in "fV":
                    factors[name] = Factors(tensor.astype(np.float32).reshape(-1), inputs, shape)
                    break
            else:
                raise AdapterError(
                    f"{name}: {_FACTORS} is {tensor.dtype} {list(tensor.shape)}, expected floating-point "
                    f"[{shape[0]}, 1] or [1, {shape[1]}]"
                )
        return IA3Adapter(factors, about.origin)
