"""How an edit sits in a live model: the module that it serves stays the object that it was, and its class becomes a subclass of its own.

An edited module computes: the layers inserted before it, its own ``__call__`` with its hooks, the layers inserted after it and the skips
that arrive at it. What was inserted lives in a child of the name ``edits``, so that no key of ``state_dict`` shifts. A removed child
leaves its parent; where the parent's code still calls it, it finds the bridge.
"""

from __future__ import annotations

import copy
import copyreg
import dataclasses
import functools
import operator
import threading
import types
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import TopologyError

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
