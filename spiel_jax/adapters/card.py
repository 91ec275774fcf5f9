"""The README.md of what is exported: what it is and how it is loaded."""

import re
from pathlib import Path
from typing import Any

from spiel_jax.adapters.adapter import Adapter

_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+", re.ASCII)

_PEFT = """```python
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

base = AutoModelForCausalLM.from_pretrained({base!r}, dtype="{dtype}")
model = PeftModel.from_pretrained(base, "THIS_FOLDER")
```

`model.merge_and_unload()` gives a plain model."""

_MERGED = """```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("THIS_FOLDER")
tokenizer = AutoTokenizer.from_pretrained("THIS_FOLDER")
```

`vllm serve THIS_FOLDER` serves it."""


def write_card(folder: Path, adapter: Adapter, library: str, **facts: Any) -> None:
    """Writes the README.md of an export.

    Args:
        folder: Where to.
        adapter: What was exported.
        library: What loads it, ``"peft"`` or ``"transformers"``.
        **facts: To list, name to value.
    """
    origin = adapter.origin
    known = _HUB_ID.fullmatch(origin.base) and not Path(origin.base).exists()
    front = ["---", f"library_name: {library}"]
    front += [f"base_model: {origin.base}"] if known else []
    front += ["tags:", "- spiel_jax", "---", ""]
    base = origin.base if known else "THE_BASE_MODEL"
    how = _PEFT.format(base=base, dtype=origin.dtype) if library == "peft" else _MERGED
    held = origin.dtype if origin.quantization == "none" else f"{origin.dtype}, held as {origin.quantization}"
    facts = {
        "method": origin.config.get("method"),
        "steps": origin.step,
        "base weights": held if origin.config else None,
        **facts,
    }
    listed = [f"- {name}: {_plain(value)}" for name, value in facts.items() if value is not None]
    title = "Adapter" if library == "peft" else "Model"
    text = [*front, f"# {title} trained with spiel_jax", "", *listed, "", "Load it:", "", how, ""]
    (folder / "README.md").write_text("\n".join(text), encoding="utf-8")


def _plain(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) else re.sub(r"[^\w.,%+ -]", "", str(value))[:100]
