"""Values that mean harm or are merely wrong, for whoever reads data from outside."""

from __future__ import annotations

import random
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import Any

import numpy
import torch


class Trap(Exception):
    """A method of a hostile value was called."""


def spring(*_: Any, **__: Any) -> Any:
    raise Trap


_METHODS = "repr str eq hash lt le gt ge bool len iter getitem contains int index float format add mul getattr"
_TRAPS = {f"__{name}__": spring for name in _METHODS.split()} | dict.fromkeys(("keys", "items", "values", "get"), spring)


class Spiteful(type):
    """A metaclass whose classes will not even say their name."""

    __name__ = property(spring)  # type: ignore[assignment]
    __repr__ = __str__ = __instancecheck__ = __subclasscheck__ = spring


def trapped(base: type) -> type:
    """A subclass of ``base`` all methods of which raise, as does asking an object of it for its class."""
    return Spiteful("Trapped", (base,), _TRAPS | {"__class__": property(spring)})


TrappedInt, TrappedStr, TrappedDict, TrappedList, TrappedTuple, TrappedFloat, TrappedObject = map(
    trapped, (int, str, dict, list, tuple, float, object)
)


class TrappedMapping(Mapping[str, Any]):
    """A mapping that raises whatever it is asked."""

    __getitem__ = __iter__ = __len__ = keys = items = __repr__ = spring  # type: ignore[assignment]


def cycle() -> dict[str, Any]:
    content: dict[str, Any] = {"kind": "Sequential", "arguments": {}}
    content["layers"] = [content, content]
    return content


def nested(depth: int) -> dict[str, Any]:
    content: dict[str, Any] = {"kind": "ReLU", "arguments": {}}
    for _ in range(depth):
        content = {"kind": "Sequential", "arguments": {}, "layers": [content]}
    return content


def wide(depth: int, copies: int) -> dict[str, Any]:
    """A structure of few objects that stands for ``copies ** depth`` layers."""
    content: dict[str, Any] = {"kind": "ReLU"}
    for _ in range(depth):
        content = {"kind": "Sequential", "layers": [content] * copies}
    return content


def endless_list() -> list[Any]:
    made: list[Any] = []
    made.append(made)
    return made


MAKERS: list[Callable[[random.Random], Any]] = [
    lambda rng: rng.choice([0, 1, 2, 3, 4, 7, 8, 16, -1, -2, 10**3, 10**6, 2**28, 2**31, 2**63, -(2**63), 10**30, 10**400, 7**9000]),
    lambda rng: rng.randint(1, 8),
    lambda rng: rng.choice([0.0, 0.5, -0.0, 1.0, 3.0, 1e-5, 1e300, float("nan"), float("inf"), float("-inf")]),
    lambda rng: rng.choice([True, False, None, ..., NotImplemented]),
    lambda rng: rng.choice(
        ["", "same", "valid", "zeros", "reflect", "tanh", "nearest", "bilinear", "1", "\ud800", "a\0b", "x" * 10**5, "é"]
    ),
    lambda rng: tuple(rng.randint(0, 5) for _ in range(rng.randint(0, 7))),
    lambda rng: [MAKERS[rng.randrange(5)](rng) for _ in range(rng.randint(0, 4))],
    lambda rng: [0] * 10**4,
    lambda rng: rng.choice([TrappedInt(3), TrappedFloat(0.5), TrappedStr("same"), TrappedTuple((1, 2)), TrappedList([3]), TrappedObject()]),
    lambda rng: rng.choice([numpy.int64(3), numpy.float64(0.5), numpy.bool_(True), numpy.arange(2), torch.tensor(3), torch.Size([2, 3])]),
    lambda rng: rng.choice([b"3", 3j, {3}, object(), int, len, range(3), {"a": 1}, TrappedMapping(), TrappedDict(a=1), endless_list()]),
]


def value(rng: random.Random) -> Any:
    """Some value: mostly of the wrong type, out of bounds, or hostile; small integers often."""
    return MAKERS[rng.choice([1, 1, 1, *range(len(MAKERS))])](rng)


def mappings(items: dict[Any, Any]) -> Iterator[Any]:
    """What may be handed in for a dict of ``items``."""
    yield from (
        OrderedDict(items),
        MappingProxyType(items),
        MappingProxyType(TrappedMapping()),
        TrappedDict(items),
        TrappedMapping(),
        list(items),
    )
