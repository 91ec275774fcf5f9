"""Rows of JSON lines that a script prepares."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any


def write_rows(rows: Iterable[Mapping[str, Any]], out: Path) -> int:
    """Writes a file of them, and its folder; as a whole, or not at all. How many there are."""
    out.parent.mkdir(parents=True, exist_ok=True)
    beside, count = out.with_name(out.name + ".part"), 0
    with beside.open("w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
            count += 1
    beside.replace(out)
    return count
