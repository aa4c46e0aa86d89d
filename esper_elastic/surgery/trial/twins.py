"""The twin of a model: modules of the same classes and attributes, with other tensors in the place of its own.

A run on the twin cannot leave a trace in the model, wherever it is interrupted: what forward writes to its modules, to containers among
their attributes, or from a hook into what the hook closes over, it writes to the twin. Objects of the user's own among the attributes are
shared, and so are scripted modules unless asked otherwise.
"""

from __future__ import annotations

import collections
import copy
import functools
import types
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..edits.holder import Carrier

#: How a call of a twin goes: ``watch(twin, call, args, kwargs)`` is to return ``call(*args, **kwargs)``.
Watch = Callable[[nn.Module, Callable[..., Any], tuple[Any, ...], dict[str, Any]], Any]

_WATCH = "_esper_elastic_watch"
_ATOMS = frozenset((int, float, bool, str, bytes, complex, type(None), type, torch.dtype, torch.device, torch.Size))
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_MANY = 256  # a container of more is a table, not a place for modules


class _Watched:
    """Has a watch look on at each call; mixed in before a module's own class."""

    def __init_subclass__(cls) -> None:
        """Says nothing to the class's own, which may keep a register."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        watch = self.__dict__.get(_WATCH)
        call = super().__call__  # type: ignore[misc]
        return call(*args, **kwargs) if watch is None else watch(self, call, args, kwargs)


class _Through(nn.Module):
    """Stands for what only wraps one module, so that that one runs as written."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return next(iter(self._modules.values()))(*args, **kwargs)  # type: ignore[misc]

    def __getattr__(self, name: str) -> Any:
        modules = self.__dict__.get("_modules", {})
        return modules[name] if name in modules else getattr(next(iter(modules.values())), name)


def unwrapped(model: nn.Module) -> nn.Module:
    """The module itself where ``torch.compile`` has wrapped it."""
    while _is_wrapper(model) and isinstance(model._modules.get("_orig_mod"), nn.Module):
        model = model._orig_mod  # type: ignore[assignment]
    return model


class Twins:
    """Makes twins, one for each module and tensor.

    Args:
        stand_in: the tensor to hold in the place of one of the model's.
        watch: of every call of a twin.
        copy_scripted: whether scripted modules are copied, tensors and all, rather than shared.
    """

    def __init__(self, stand_in: Callable[[Tensor], Tensor], watch: Watch | None = None, *, copy_scripted: bool = False) -> None:
        self._stand_in = stand_in
        self._copy_scripted = copy_scripted
        self._watch = watch
        self._made: dict[int, Any] = {}
        self._originals: list[Any] = []  # one that died could give its identity to another

    def module(self, module: nn.Module) -> nn.Module:
        """The twin of a module and of all below it."""
        found = self._made.get(id(module))
        if found is not None:
            return found
        if isinstance(module, torch.jit.ScriptModule):
            return self._note(module, _copied(module)) if self._copy_scripted else module
        through = _is_wrapper(module)
        kind: Any = _watched(_Through if through else type(module))
        try:
            twin: nn.Module = object.__new__(kind)
        except TypeError:
            twin = kind.__new__(kind)
        self._note(module, twin)
        attributes = twin.__dict__
        if through:
            nn.Module.__init__(twin)
            attributes["training"] = module.training
            attributes["_modules"].update((name, self.value(child)) for name, child in module._modules.items())
        else:
            for name, value in module.__dict__.items():
                attributes[name] = value if type(value) in _ATOMS else self._hooks(value) if name in _HOOKS else self.value(value)
            attributes.pop("_compiled_call_impl", None)
        if self._watch is not None:
            attributes[_WATCH] = self._watch
        return twin

    def value(self, value: Any) -> Any:
        """What takes the place of an attribute's value."""
        kind = type(value)
        if kind in _ATOMS:
            return value
        found = self._made.get(id(value))
        if found is not None:
            return found
        if isinstance(value, Tensor):
            return self._note(value, self._stand_in(value))
        if isinstance(value, nn.Module):
            return self.module(value)
        if isinstance(value, Carrier):
            return self._note(value, Carrier())
        if isinstance(value, dict):
            return self._dict(value)
        if isinstance(value, list | collections.deque):
            made = self._note(value, copy.copy(value))
            if len(value) <= _MANY:
                for index, item in enumerate(value):
                    if type(item) not in _ATOMS:
                        made[index] = self.value(item)
            return made
        if isinstance(value, tuple):
            if len(value) > _MANY or all(type(item) in _ATOMS for item in value):
                return value
            items = [self.value(item) for item in value]
            return kind(*items) if hasattr(value, "_fields") else tuple(items)
        if kind is set:
            return self._note(value, {self.value(item) for item in value} if len(value) <= _MANY else set(value))
        return self._callable(value)

    def _dict(self, value: Any) -> Any:
        made = self._note(value, value.copy() if type(value) in (dict, collections.OrderedDict) else copy.copy(value))
        if len(value) <= _MANY or isinstance(value, collections.OrderedDict):
            for key, item in value.items():
                if type(item) not in _ATOMS:
                    made[key] = self.value(item)
        return made

    def _callable(self, value: Any) -> Any:
        kind = type(value)
        if kind is types.MethodType:
            owner = self.value(value.__self__)
            return value if owner is value.__self__ else types.MethodType(value.__func__, owner)
        if kind is functools.partial:
            return functools.partial(
                self.value(value.func), *map(self.value, value.args), **{k: self.value(v) for k, v in value.keywords.items()}
            )
        if kind is weakref.ref:
            target = value()
            made = target if target is None else self._made.get(id(target))
            return value if made is None else weakref.ref(made)
        if kind is types.FunctionType and value.__closure__:
            return self._function(value)
        return value

    def _function(self, function: types.FunctionType) -> Any:
        """The function over cells of its own."""
        cells = tuple(types.CellType() for _ in function.__closure__ or ())
        made = types.FunctionType(function.__code__, function.__globals__, function.__name__, function.__defaults__, cells)
        made.__kwdefaults__ = function.__kwdefaults__
        made.__dict__.update(function.__dict__)
        self._note(function, made)
        for cell, kept in zip(cells, function.__closure__ or (), strict=True):
            try:
                content = kept.cell_contents
            except ValueError:  # an empty cell
                continue
            cell.cell_contents = self.value(content)
        return made

    def _hooks(self, hooks: Any) -> Any:
        """Hooks under their numbers; one that is an object notes what it notes in a copy of itself."""
        made = hooks.copy()
        for key, hook in hooks.items():
            twin = self.value(hook)
            if twin is hook and hasattr(hook, "__dict__") and not isinstance(hook, type | types.FunctionType | types.BuiltinFunctionType):
                twin = self._note(hook, self._copied(hook))
            made[key] = twin
        return made

    def _copied(self, hook: Any) -> Any:
        bound = isinstance(hook, types.MethodType)
        owner = hook.__self__ if bound else hook
        if isinstance(owner, type) or not hasattr(owner, "__dict__"):
            return hook
        made = self._made.get(id(owner))
        if made is None:
            made = self._note(owner, object.__new__(type(owner)))
            made.__dict__.update((name, self.value(item)) for name, item in vars(owner).items())
        return types.MethodType(hook.__func__, made) if bound else made

    def _note(self, original: Any, made: Any) -> Any:
        self._made[id(original)] = made
        self._originals.append(original)
        return made


_classes: weakref.WeakKeyDictionary[type, weakref.ref[type]] = weakref.WeakKeyDictionary()


def _watched(kind: type) -> type:
    """The class of a twin: that of the module, with a watch at its calls."""
    known = _classes.get(kind)
    made = None if known is None else known()
    if made is None:
        made = types.new_class(kind.__name__, (_Watched, kind), exec_body=lambda body: body.update(__module__=kind.__module__))
        _classes[kind] = weakref.ref(made)
    return made


def _copied(scripted: Any) -> Any:
    """A copy of a scripted module whose parameters are leaves, as its own are."""
    with torch.no_grad():
        made = copy.deepcopy(scripted)
    for parameter, original in zip(made.parameters(), scripted.parameters(), strict=True):
        parameter.requires_grad_(original.requires_grad)
    return made


def _is_wrapper(module: nn.Module) -> bool:
    """Whether a module only wraps another: compiles it, or spreads it over devices. Nothing is imported to find out."""
    name = f"{type(module).__module__}.{type(module).__qualname__}"
    return name in _WRAPPERS


_WRAPPERS = frozenset(
    (
        "torch._dynamo.eval_frame.OptimizedModule",
        "torch.nn.parallel.distributed.DistributedDataParallel",
        "torch.nn.parallel.data_parallel.DataParallel",
    )
)
