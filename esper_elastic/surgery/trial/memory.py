"""What surgery remembers of a model, weakly and by its structure: calls, derived inputs, modules that were once registered.

Every entry carries the stamp of the structure that it was found for: a change asks for another stamp, and a rollback for the old one again.
"""

from __future__ import annotations

import weakref
from typing import Any, NamedTuple

import torch
from torch import nn

from ...layers import ElasticLayer, Switchable
from .calls import Calls

_SCALARS = frozenset((int, float, bool, str, type(None), torch.dtype))
_KEPT = 4  # structures of a model whose calls are remembered


class Derived(NamedTuple):
    """Inputs that were found by trying: for which structure, made for which layer; ``None`` where none was found."""

    stamp: Any
    entry: Any
    inputs: tuple[tuple[Any, ...], dict[str, Any]] | None


class Memory:
    """What is remembered of one model.

    Attributes:
        derived: the inputs that were derived last.
        seen: every module that was part of the tree when surgery looked.
        ties: groups of names of one parameter, when surgery first looked.
    """

    def __init__(self) -> None:
        self.derived: Derived | None = None
        self.seen: weakref.WeakSet[nn.Module] = weakref.WeakSet()
        self.ties: set[frozenset[str]] | None = None
        self._calls: list[tuple[Any, Any, Calls]] = []

    def calls(self, stamp: Any, key: Any) -> Calls | None:
        """The calls on inputs of these specs, of a model of this stamp."""
        return next((calls for known, specs, calls in self._calls if specs == key and known == stamp), None)

    def keep_calls(self, stamp: Any, key: Any, calls: Calls) -> None:
        """Remember calls; the oldest of several structures are forgotten."""
        others = [entry for entry in self._calls if not (entry[1] == key and entry[0] == stamp)]
        self._calls = [(stamp, key, calls), *others][:_KEPT]


_memories: weakref.WeakKeyDictionary[nn.Module, Memory] = weakref.WeakKeyDictionary()


def memory_of(model: nn.Module) -> Memory:
    """What is remembered of ``model``."""
    found = _memories.get(model)
    if found is None:
        found = _memories[model] = Memory()
    return found


def stamp_of(model: nn.Module) -> Any:
    """A value that is equal for two looks at a model only while nothing has changed that sizes depend on.

    It holds every module's path, identity, class, mode, plain attributes and hooks, tensors by identity, shape, type and device, and the
    widths of elastic layers; it keeps nothing alive.
    """
    parts: list[Any] = []
    for path, module in model.named_modules():
        attributes = module.__dict__
        tensors = [
            (name, id(tensor), tensor.shape, tensor.dtype, tensor.device)
            for table in (attributes.get("_parameters", {}), attributes.get("_buffers", {}))
            for name, tensor in table.items()
            if tensor is not None
        ]
        hooks = [tuple(attributes[name]) for name in ("_forward_hooks", "_forward_pre_hooks") if attributes.get(name)]
        parts.append((path, weakref.ref(module), weakref.ref(type(module)), module.training, settings_of(module), tensors, hooks))
        if isinstance(module, ElasticLayer):
            parts.append((id(module._widths.block), module._widths.block.generation, module._widths.static))
        if isinstance(module, Switchable):
            parts.append((module.switch.on, module.static))
    return parts


def settings_of(module: nn.Module) -> list[Any]:
    """The plain attributes of a module but for its mode: what its code may decide by. They keep nothing alive."""
    return [
        _hashable(value)
        for name, value in module.__dict__.items()
        if (type(value) in _SCALARS or type(value) is tuple or _is_plain_list(value)) and name != "training"
    ]


def _is_plain_list(value: Any) -> bool:
    return type(value) is list and len(value) <= 64 and all(type(item) in _SCALARS for item in value)


def _hashable(value: Any) -> Any:
    """A plain value as it is now; of a tuple, what in it is plain."""
    if type(value) is list:
        return tuple(value)
    if type(value) is tuple:
        return tuple(item if type(item) in _SCALARS else type(item).__name__ for item in value)
    return value
