"""Damaged and hostile files, made of good ones by a seeded draw."""

import copy
import json

VALUES = (
    0, -1, 1, 1.5, 10**6, 10**9, 2**63, 10**400, "", "x", "8", True, False, None, [], {}, [1], {"a": {}},
    float("nan"), float("inf"), "\ud800", "../x", "/etc/passwd", "x" * 10_000, [["full_attention"]],
)  # fmt: skip
NUMBERS = (0, 1, 2, 7, 9, 255, 2**31, 2**32 - 1, 2**32, 2**60, 2**63, 2**64 - 1)


def bytes_mutated(draw, data, end):
    """One to three places of the first ``end`` bytes changed, taken away, doubled, or the rest cut off."""
    data = bytearray(data)
    for _ in range(draw.randint(1, 3)):
        at, size = draw.randrange(end), draw.randint(1, 16)
        kind = draw.randrange(7)
        if kind == 0 and data:
            data[at % len(data)] ^= 1 << draw.randrange(8)
        elif kind == 1:
            data[at : at + size] = draw.randbytes(size)
        elif kind == 2:
            del data[at : at + size]
        elif kind == 3:
            data[at:at] = data[at : at + size]
        elif kind == 4:
            width = draw.choice((4, 8))
            data[at : at + width] = (draw.choice(NUMBERS) % 256**width).to_bytes(width, "little")
        elif kind == 5:
            data[at : at + 1] = b"9" * size
        elif draw.random() < 0.3:
            del data[draw.randrange(len(data) or 1) :]
    return bytes(data)


def places(value, path=()):
    """Every place in parsed JSON, as its path."""
    if path:
        yield path
    for key, below in value.items() if isinstance(value, dict) else enumerate(value):
        if isinstance(below, dict | list):
            yield from places(below, (*path, key))
        else:
            yield (*path, key)


def json_mutated(draw, data):
    """A value replaced or taken away, a key doubled, nesting too deep, or bytes changed."""
    kind = draw.random()
    if kind < 0.25:
        return bytes_mutated(draw, data, len(data))
    value = json.loads(data)
    if kind < 0.28:
        return b"[" * 100_000
    if kind < 0.31:
        return data.replace(b'"', b'"a": 1, "a": 2, "', 1)
    for _ in range(draw.randint(1, 2)):
        if not value:
            break
        *path, key = draw.choice(list(places(value)))
        parent = value
        for step in path:
            parent = parent[step]
        if draw.random() < 0.2:
            del parent[key]
        else:
            parent[key] = copy.deepcopy(draw.choice(VALUES))
    return json.dumps(value).encode()
