"""JSON files beside a model, which anybody may have written."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

from spiel_jax.errors import SpielError
from spiel_jax.models.io.messages import told

_MOST_JSON = 1 << 26  # bytes; an index of the largest models takes a tenth


def read_json(path: Path) -> dict[str, Any]:
    """The object that a JSON file holds.

    Raises:
        SpielError: If it is no JSON, names a key twice, or holds something else.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        # json keeps the last of two equal keys without a word
        doubled = [key for key, count in Counter(key for key, _ in pairs).items() if count > 1]
        if doubled:
            raise ValueError(f"doubled: {', '.join(map(told, doubled[:5]))}")
        return dict(pairs)

    try:
        if (size := path.stat().st_size) > _MOST_JSON:
            raise SpielError(f"{path} has {size} bytes: no more than {_MOST_JSON} are read")
        value = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=unique)
    except SpielError:
        raise
    except (ValueError, RecursionError) as error:
        raise SpielError(f"{path} is not valid JSON: {told(error)}") from error
    except OSError as error:
        raise SpielError(f"{path} cannot be read: {error}") from error
    if not isinstance(value, dict):
        raise SpielError(f"{path} must hold a JSON object, got {type(value).__name__}")
    return value
