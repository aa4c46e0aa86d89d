"""What was inserted at a module: layers before and after it, skips that arrive, and what takes its output along to skips elsewhere.

A result may be a tensor, or tuples, mappings and dataclasses of them: what is inserted works on the first tensor in it.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

#: The name of the child that holds what was inserted at a module.
EDITS = "edits"


class Edits(nn.ModuleDict):
    """What was inserted at one module: layers before and after it, skips that arrive, and bridges in the place of removed children.

    Attributes:
        before: names of the layers that its input passes, in order.
        after: names of the layers and skips that its output passes, in order.
        taps: carriers that take its output along to skips elsewhere.
        bridges: per removed child, the name of its bridge here; ``None`` where a sequence goes on without one.
        places: of a container, the names of its children in the order that they had, removed ones included.
    """

    def __init__(self) -> None:
        super().__init__()
        self.before: list[str] = []
        self.after: list[str] = []
        self.taps: list[Carrier] = []
        self.bridges: dict[str, str | None] = {}
        self.places: list[str] = []
        self.register_forward_hook(_nothing)  # nn.TransformerEncoderLayer reads its children's weights by itself, unless a module has hooks

    def forward(self, x: Any) -> Any:
        """Pass on what is given: code that calls all children of a module in turn meets this one too."""
        return x

    def enter(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments of a call, the first tensor among them passed through the layers before."""
        if not self.before:
            return args, kwargs
        if args:
            return map_first(functools.partial(self._through, self.before), args), kwargs
        return args, map_first(functools.partial(self._through, self.before), kwargs)

    def leave(self, result: Any) -> Any:
        """The result of a call, the first tensor in it passed through the layers and skips after."""
        if self.after:
            result = map_first(functools.partial(self._through, self.after), result)
        for carrier in self.taps:
            carrier.put(first_tensor(result))
        return result

    def _through(self, names: list[str], x: Tensor) -> Tensor:
        for name in names:
            gate = self._parameters.get(gate_name(name))
            layer: Any = self._modules[name]
            made = layer(x)
            x = made if gate is None else _padded(x, made.shape) + gate * made
        return x

    def free_name(self, kind: str) -> str:
        """A name for one more layer of a kind: ``after_0``, ``after_1``, ..."""
        number = 0
        while f"{kind}_{number}" in self._modules:
            number += 1
        return f"{kind}_{number}"

    def extra_repr(self) -> str:
        """What is not seen among the children."""
        removed = f"removed: {', '.join(self.bridges)}" if self.bridges else ""
        sources = f"source of {len(self.taps)} skip{'s' if len(self.taps) > 1 else ''}" if self.taps else ""
        return "; ".join(text for text in (removed, sources) if text)

    @property
    def empty(self) -> bool:
        """Whether nothing is left of any edit."""
        return not (self._modules or self.taps or self.bridges)


def gate_name(name: str) -> str:
    """The parameter of :class:`Edits` that weighs what the layer of that name adds to its input."""
    return f"{name}_gate"


def _padded(x: Tensor, shape: torch.Size) -> Tensor:
    """``x`` at another shape: zeros behind what it has, or without what is beyond."""
    if x.shape == shape:
        return x
    missing = [(0, wanted - have) for have, wanted in zip(x.shape, shape, strict=True)]
    return nn.functional.pad(x, [n for pair in reversed(missing) for n in pair])


def _nothing(module: nn.Module, args: Any, result: Any) -> None:
    """A hook."""


class Carrier:
    """Takes a module's output along to a skip further on in the same pass through the model; each thread has its own."""

    def __init__(self) -> None:
        self._here = threading.local()  # which torch.compile knows, across breaks of its graphs too

    def put(self, value: Tensor | None) -> None:
        """Keep a value for :meth:`take`."""
        self._here.value = value

    def take(self) -> Tensor | None:
        """The value, which is let go; ``None`` if there is none."""
        value: Tensor | None = getattr(self._here, "value", None)
        self._here.value = None
        return value

    def __reduce__(self) -> Any:
        return Carrier, ()


def emptying(model: nn.Module) -> list[Callable[[], Any]]:
    """Calls after which no carrier of ``model`` holds what a run that came to no end has left; none runs a line of this package."""
    return [vars(tap._here).clear for module in model.modules() if isinstance(module, Edits) for tap in module.taps]


# First tensors


def first_tensor(result: Any) -> Tensor | None:
    """The first tensor in a result made of tuples, lists, mappings and dataclasses."""
    found: list[Tensor] = []

    def note(tensor: Tensor) -> Tensor:
        found.append(tensor)
        return tensor

    if isinstance(result, Tensor):
        return result
    map_first(note, result)
    return found[0] if found else None


def map_first(function: Callable[[Tensor], Tensor], result: Any) -> Any:
    """A result with ``function`` applied to its first tensor; the result itself if it has none."""
    made = _map_first(function, result)
    return result if made is None else made


def _map_first(function: Callable[[Tensor], Tensor], result: Any) -> Any:
    if isinstance(result, Tensor):
        return function(result)
    if isinstance(result, Mapping):
        for key, value in result.items():
            made = _map_first(function, value)
            if made is not None:
                changed: Any = copy.copy(result)
                changed[key] = made
                return changed
    elif isinstance(result, tuple | list):
        for index, value in enumerate(result):
            made = _map_first(function, value)
            if made is not None:
                items = [*result[:index], made, *result[index + 1 :]]
                if isinstance(result, list):
                    return items
                return type(result)(*items) if hasattr(result, "_fields") else tuple(items)
    elif dataclasses.is_dataclass(result) and not isinstance(result, type):
        for field in dataclasses.fields(result):
            made = _map_first(function, getattr(result, field.name))
            if made is not None:
                return dataclasses.replace(result, **{field.name: made})
    return None


def edits_inside(module: nn.Module) -> Iterator[Edits]:
    """What was inserted at a module and at those inside of it; quicker than ``modules()``, since nobody is asked for a name."""
    waiting: list[Any] = [module]
    while waiting:
        part = waiting.pop()
        if isinstance(part, Edits):
            yield part
        waiting += [child for child in part._modules.values() if child is not None]
