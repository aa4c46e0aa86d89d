"""Example inputs as data: the shapes and types of what a model was run on, so that an edit can be repeated where no input is at hand."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ..errors import SurgeryError

#: Elements of one tensor that is made from data.
MOST_ELEMENTS = 2**28

_TYPES = {str(t).removeprefix("torch."): t for t in (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32)}
_TYPES |= {"bool": torch.bool, "uint8": torch.uint8}
_PLAIN = (type(None), bool, int, float, str)


class _NoData(Exception):
    """Something is no data."""


def to_data(args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any] | None:
    """Arguments of a model as JSON-able data, tensors without their values; ``None`` if something among them is no data."""
    try:
        return {"args": [_encode(value) for value in args], "kwargs": {name: _encode(value) for name, value in kwargs.items()}}
    except _NoData:
        return None


def _encode(value: Any) -> Any:
    if isinstance(value, Tensor):
        name = str(value.dtype).removeprefix("torch.")
        if name not in _TYPES:
            raise _NoData
        return {"tensor": name, "shape": list(value.shape)}
    if type(value) in (list, tuple):
        return {type(value).__name__: [_encode(item) for item in value]}
    if type(value) is dict and all(type(key) is str for key in value):
        return {"dict": {key: _encode(item) for key, item in value.items()}}
    if type(value) in _PLAIN and not (type(value) is float and not math.isfinite(value)):
        return value
    raise _NoData


def from_data(content: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """What :func:`to_data` was given, with tensors of the same shapes that hold zeros.

    Raises:
        SurgeryError: it is something else, or asks for more than ``MOST_ELEMENTS``.
    """
    try:
        return tuple(_decode(value) for value in content["args"]), {str(name): _decode(value) for name, value in content["kwargs"].items()}
    except (KeyError, TypeError, AttributeError, ValueError, RecursionError) as error:
        raise SurgeryError(f"journal: inputs: expected the shapes and types of example inputs, got something else ({error!r}).") from error


def _decode(value: Any) -> Any:
    if type(value) in _PLAIN:
        return value
    if set(value) == {"tensor", "shape"}:
        shape = value["shape"]
        if any(type(n) is not int or n < 0 for n in shape) or math.prod(shape) > MOST_ELEMENTS:
            raise ValueError(f"shape {shape}")
        return torch.zeros(shape, dtype=_TYPES[value["tensor"]])
    ((kind, items),) = value.items()
    if kind == "dict":
        return {key: _decode(item) for key, item in items.items()}
    return {"list": list, "tuple": tuple}[kind](_decode(item) for item in items)
