"""How an edit sits in a live model: the module that it serves stays the object that it was, and its class becomes a subclass of its own.

An edited module computes: the layers inserted before it, its own ``__call__`` with its hooks, the layers inserted after it and the skips
that arrive at it. What was inserted lives in a child of the name ``edits``, so that no key of ``state_dict`` shifts. A removed child
leaves its parent; where the parent's code still calls it, it finds the bridge.
"""

from __future__ import annotations

import copy
import copyreg
import functools
import operator
import types
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from ...errors import TopologyError
from .holder import EDITS, Edits

# Classes


class Edited:
    """Marks the classes of edited modules, each made for one class and the children removed from the module."""

    original: type[nn.Module]
    removed: tuple[str, ...]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        edits = self._modules.get(EDITS)  # type: ignore[attr-defined]
        if edits is None:
            return super().__call__(*args, **kwargs)  # type: ignore[misc]
        args, kwargs = edits.enter(args, kwargs)
        return edits.leave(super().__call__(*args, **kwargs))  # type: ignore[misc]

    @classmethod
    def laid_over(cls, kind: type[nn.Module]) -> Any:
        """The class of a module of class ``kind`` with edits like those of this one."""
        return edited_class(kind, cls.removed)

    def put_edits_on(self, module: nn.Module, memo: dict[int, Any]) -> None:
        """Give another module copies of the edits, as ``copy.deepcopy`` with ``memo`` makes them."""
        module._modules[EDITS] = copy.deepcopy(self._modules[EDITS], memo)  # type: ignore[attr-defined]
        module.__class__ = self.laid_over(type(module))

    def governed(self) -> Iterator[nn.Module]:
        """What a switch of the module turns off: not what runs before and after it, whether it is on or off."""
        edits: Any = self._modules[EDITS]  # type: ignore[attr-defined]
        beyond = {id(edits), *(id(part) for name in (*edits.before, *edits.after) for part in edits._modules[name].modules())}
        return (module for module in super().governed() if id(module) not in beyond)  # type: ignore[misc]

    def __reduce_ex__(self, protocol: Any) -> Any:
        recipe: Any = super().__reduce_ex__(max(2, int(protocol)))
        make, arguments, *state = recipe
        plain = tuple(self.original if argument is type(self) else argument for argument in arguments)
        return _revive, (self.removed, make, plain), *state


def _revive(removed: tuple[str, ...], make: Callable[..., nn.Module], arguments: tuple[Any, ...]) -> nn.Module:
    """An object of an edited class, for pickle and deepcopy to fill."""
    made = make(*arguments)
    made.__class__ = edited_class(type(made), removed)
    return made


def _deepcopy(self: Any, memo: dict[int, Any]) -> Any:
    """As the module's own class copies itself."""
    made = super(Edited, self).__deepcopy__(memo)
    made.__class__ = type(self)
    return made


class _Children(Edited):
    """A container of modules: what its code iterates over is its own children, with bridges in the places of removed ones."""

    def _own(self) -> dict[str, nn.Module]:
        modules: dict[str, nn.Module] = self._modules  # type: ignore[attr-defined]
        edits: Any = modules.get(EDITS)
        if edits is None or not edits.bridges:
            return {name: module for name, module in modules.items() if module is not edits}
        found = {}
        for name in (*edits.places, *(name for name in modules if name not in edits.places and name != EDITS)):
            if name in modules:
                found[name] = modules[name]
            elif edits.bridges.get(name) is not None:
                found[name] = edits._modules[edits.bridges[name]]
        return found

    def __len__(self) -> int:
        return len(self._own())

    def __delitem__(self, key: Any) -> None:
        raise TopologyError(f"{type(self).__name__}: cannot delete {key!r} from a container with edits: use ModelSurgeon.remove_layer.")

    def insert(self, index: Any, module: Any) -> Any:
        """Refused: it would rename the children."""
        raise TopologyError(f"{type(self).__name__}: cannot insert into a container with edits: use ModelSurgeon.add_layer.")

    def pop(self, key: Any) -> Any:
        """Refused: it would rename the children."""
        raise TopologyError(f"{type(self).__name__}: cannot pop {key!r} from a container with edits: use ModelSurgeon.remove_layer.")


class _Sequence(_Children):
    """:class:`nn.Sequential` and :class:`nn.ModuleList`."""

    def __iter__(self) -> Iterator[nn.Module]:
        return iter(list(self._own().values()))

    def __getitem__(self, index: Any) -> Any:
        own = self._own()
        if not isinstance(index, slice):
            return list(own.values())[operator.index(index)]
        if issubclass(self.original, nn.ModuleList):
            return self.original(list(own.values())[index])
        return self.original(OrderedDict(list(own.items())[index]))

    def append(self, module: nn.Module) -> Any:
        """Append a module, under a number of its own."""
        numbers = [int(name) for name in (*self._modules, *self._modules[EDITS].places) if name.isdigit()]  # type: ignore[attr-defined]
        self.add_module(str(max(numbers, default=-1) + 1), module)  # type: ignore[attr-defined]
        return self

    def extend(self, modules: Any) -> Any:
        """Append several."""
        for module in modules:
            self.append(module)
        return self

    __iadd__ = extend


class _Dictionary(_Children):
    """:class:`nn.ModuleDict`."""

    def __iter__(self) -> Iterator[str]:
        return iter(list(self._own()))

    def __contains__(self, key: object) -> bool:
        return key in self._own()

    def __getitem__(self, key: str) -> nn.Module:
        return self._own()[key]

    def keys(self) -> Any:
        """Names of the children."""
        return self._own().keys()

    def values(self) -> Any:
        """The children."""
        return self._own().values()

    def items(self) -> Any:
        """The children by name."""
        return self._own().items()


class _Kind(type):
    """Lets pickle name an edited class by what it was made of."""


def _reduce_class(kind: Any) -> Any:
    return edited_class, (kind.original, kind.removed)


copyreg.pickle(_Kind, _reduce_class)


@functools.cache
def _kind_for(kind: Any) -> Any:
    if kind is type:
        return _Kind
    made = type(_Kind.__name__, (_Kind, kind), {})
    copyreg.pickle(made, _reduce_class)
    return made


def edited_class(original: type[nn.Module], removed: tuple[str, ...] = ()) -> Any:
    """The class of a module of class ``original`` that is edited; ``removed`` are the children that its code finds bridges for."""
    for known in original.__subclasses__():
        if isinstance(known, _Kind) and known.__dict__["removed"] == removed and known.__dict__["original"] is original:
            return known
    base: type = Edited
    if issubclass(original, nn.Sequential | nn.ModuleList):
        base = _Sequence
    elif issubclass(original, nn.ModuleDict):
        base = _Dictionary
    body: dict[str, Any] = {"original": original, "removed": removed, "__module__": original.__module__, "__doc__": original.__doc__}
    body["__call__"] = _own_code(Edited.__call__)
    if hasattr(original, "__deepcopy__"):
        body["__deepcopy__"] = _deepcopy
    if base is Edited:
        body |= {name: _bridge(name) for name in removed}
    metaclass: Any = type(original)
    made = _kind_for(metaclass)(original.__name__, (base, original), body)
    made.__qualname__ = original.__qualname__
    return made


def _own_code(function: Any) -> Any:
    """The same function with a code object to itself: ``torch.compile`` keeps count of what it compiles by these."""
    return types.FunctionType(function.__code__.replace(), function.__globals__, function.__name__, None, function.__closure__)


def _bridge(name: str) -> property:
    def get(self: Any) -> Any:
        modules = self._modules
        if name in modules:  # somebody has assigned a module to the name since
            return modules[name]
        edits = modules[EDITS]
        return edits._modules[edits.bridges[name]]

    return property(get)


def original_of(module: nn.Module) -> type[nn.Module]:
    """The class that a module had before its first edit."""
    return module.original if isinstance(module, Edited) else type(module)


# Changes


def edits_of(module: nn.Module, path: str) -> Edits:
    """The edits of a module; one without any becomes an edited module.

    Raises:
        TopologyError: the name ``edits`` is taken, or the module's class cannot be changed.
    """
    if isinstance(module, Edited):
        found: Any = module._modules[EDITS]
        return found
    where = path or type(module).__name__
    if isinstance(module, torch.jit.ScriptModule):
        raise TopologyError(f"{where}: cannot edit a scripted module ({type(module).__name__}): edit the model before it is scripted.")
    if hasattr(module, EDITS):
        raise TopologyError(
            f"{where}: expected the name {EDITS!r} to be free, as edits are kept under it, but {type(module).__name__} uses it."
        )
    edits = Edits()
    edits.training = module.training
    module._modules[EDITS] = edits
    _become(module, edited_class(type(module)), where)
    return edits


def set_removed(module: nn.Module, path: str) -> None:
    """Let a module's class offer bridges for the children that its edits say are removed."""
    edits = edits_of(module, path)
    assert isinstance(module, Edited)
    _become(module, edited_class(module.original, tuple(sorted(edits.bridges))), path)


def release(module: nn.Module) -> None:
    """Let a module be of its own class again if nothing is left of its edits."""
    edits = module._modules.get(EDITS)
    if isinstance(module, Edited) and isinstance(edits, Edits) and edits.empty:
        del module._modules[EDITS]
        module.__class__ = module.original  # type: ignore[assignment]


def _become(module: Any, kind: Any, where: str) -> None:
    try:
        module.__class__ = kind
    except TypeError as error:
        raise TopologyError(f"{where}: the class of {type(module).__name__} cannot be changed ({error}); it cannot be edited.") from error
