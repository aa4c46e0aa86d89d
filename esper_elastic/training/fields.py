"""The fields of events: each type's form in strict JSON, and the strict check of what is read back.

Owns one type at a time; which event has which fields is in ``events.py``.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, get_args, get_origin

from .free_form import read_free, write_free

_NON_FINITE = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}


@dataclass(frozen=True, slots=True)
class Field:
    """How a field of one type is written and read, and what an error says was expected.

    ``write`` takes what counts as that type too, as numbers of NumPy do; ``read`` raises TypeError, ValueError or OverflowError.
    """

    expected: str
    write: Callable[[Any], Any]
    read: Callable[[Any], Any]


def _write_float(value: float) -> float | str:
    value = float(value)
    return value if math.isfinite(value) else repr(value)


def _read_float(value: Any) -> float:
    if isinstance(value, str):
        if value not in _NON_FINITE:
            raise ValueError
        return _NON_FINITE[value]
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError
    return float(value)


def _read_int(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError
    return value


def _read_str(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError
    return value


def field_of(hint: Any) -> Field:
    """The field of a type hint."""
    if hint is int:
        return Field("an integer", operator.index, _read_int)
    if hint is float:
        return Field("a number", _write_float, _read_float)
    if hint is str:
        return Field("a string", str, _read_str)
    if hint is Any:
        return Field("a value", write_free, read_free)
    origin, parts = get_origin(hint), get_args(hint)
    if origin is Literal:
        return Field(f"one of {', '.join(parts)}", str, _choice(parts))
    if origin is dict:
        return _mapping(field_of(parts[1]))
    return _optional(field_of(parts[0]))  # `T | None` is all that is left


def _choice(allowed: tuple[str, ...]) -> Callable[[Any], Any]:
    def read(value: Any) -> Any:
        if value not in allowed:
            raise ValueError
        return value

    return read


def _mapping(item: Field) -> Field:
    if item.write is write_free:
        return Field("an object", write_free, lambda value: dict(read_free(_object(value))))
    return Field(
        f"an object of names and {item.expected.removeprefix('an ').removeprefix('a ')}s",
        lambda value: {str(key): item.write(entry) for key, entry in value.items()},
        lambda value: {key: item.read(entry) for key, entry in _object(value).items()},
    )


def _object(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        raise TypeError
    return value


def _optional(item: Field) -> Field:
    return Field(
        f"{item.expected} or null",
        lambda value: None if value is None else item.write(value),
        lambda value: None if value is None else item.read(value),
    )
