"""Values of any form, as decisions from outside bring them, in strict JSON and back.

Owns the one encoding of what JSON cannot say: numbers that are not finite, and objects that are no data at all. Writing never fails and
never runs away; reading gives back exactly what was written of strings, numbers, lists and objects.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

MAX_DEPTH = 32
MAX_VALUES = 10_000
MAX_BITS = 4096  # Python refuses to print integers of more than 4300 digits
_FLOAT = "$float"


def write_free(value: object) -> Any:
    """``value`` as strict JSON can hold it. Beyond 32 levels or 10,000 values, as in a structure that holds itself, stands ``"..."``."""
    return _write(value, 0, [MAX_VALUES])


def read_free(value: Any) -> Any:
    """What :func:`write_free` wrote.

    Raises:
        ValueError: a number that is none.
    """
    if isinstance(value, dict):
        if list(value) == [_FLOAT]:
            return float(value[_FLOAT])
        return {key.removeprefix("$"): read_free(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [read_free(entry) for entry in value]
    return value


def safe_repr(value: object, length: int = 200) -> str:
    """The ``repr`` of anything, shortened; that of its type where it has none."""
    try:
        text = hex(value) if isinstance(value, int) and value.bit_length() > MAX_BITS else repr(value)
    except Exception:
        text = f"<{type(value).__name__}>"
    return text if len(text) <= length else f"{text[: length - 3]}..."


def _write(value: object, depth: int, left: list[int]) -> Any:
    left[0] -= 1
    if value is None or isinstance(value, str | bool):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else {_FLOAT: float.__repr__(value)}
    if isinstance(value, int) and value.bit_length() <= MAX_BITS:
        return value
    if isinstance(value, Mapping | list | tuple):
        if depth >= MAX_DEPTH or left[0] <= 0:
            return "..."
        if isinstance(value, Mapping):
            return {_escaped(key): _write(entry, depth + 1, left) for key, entry in list(value.items())[: max(left[0], 0)]}
        return [_write(entry, depth + 1, left) for entry in value[: left[0]]]
    return safe_repr(value)


def _escaped(key: object) -> str:
    name = key if isinstance(key, str) else safe_repr(key)
    return f"${name}" if name.startswith("$") else name
