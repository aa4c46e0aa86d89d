"""What a change of a dim's size makes of each tensor and attribute, prepared before anything is written."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ...errors import TopologyError
from . import newborn
from .coupling import Scope
from .tensors import Write, zeros

#: An axis as ``(True, indices per unit)`` where the dim lies and ``(False, indices)`` elsewhere, in order.
Stretches = tuple[tuple[bool, int], ...]


class Change(NamedTuple):
    """A tensor, what it is to hold, and how tensors beside it follow."""

    tensor: Tensor
    storage: Tensor
    write: Write


def check_owners(scope: Scope) -> None:
    """Refuse tensors that another's code has more to say of than their shape.

    Raises:
        TopologyError: one is parametrized, of a class of its own, elastic, or has a sparse gradient.
    """
    held = {id(tensor) for _, tensor in scope.coupled()}
    for path, module in scope.module.named_modules():
        for key, tensor in (*module._parameters.items(), *module._buffers.items()):
            if id(tensor) in held:
                assert tensor is not None
                why = _why_kept(module, key, tensor)
                if why is not None:
                    raise TopologyError(f"{f'{scope.path}.{path}.{key}'.replace('..', '.').strip('.')}: its size cannot change: {why}.")


def _why_kept(module: nn.Module, key: str, tensor: Tensor) -> str | None:
    kind = type(module)
    if isinstance(module, nn.utils.parametrize.ParametrizationList) or nn.utils.parametrize.is_parametrized(module):
        return "its module is parametrized. Remove the parametrization first (torch.nn.utils.parametrize.remove_parametrizations)"
    hooks = [hook for hook in module._forward_pre_hooks.values() if hasattr(type(hook), "remove") or hasattr(type(hook), "apply")]
    if hooks and "weight" not in module._parameters and isinstance(vars(module).get("weight"), Tensor):
        return f"{type(hooks[0]).__name__}, a hook, computes the weight. Remove it first, as by torch.nn.utils.remove_weight_norm"
    if hasattr(kind, "speaks_of_widths"):
        return f"{kind.__name__} is elastic: resize its dim (ee.dims)"
    if type(tensor) not in (Tensor, nn.Parameter):
        return f"it is a {type(tensor).__name__}"
    if tensor.grad is not None and tensor.grad.layout != torch.strided:
        return "its gradient is sparse. Clear it first (zero_grad)"
    return None


def changes_of(scope: Scope, before: int, after: int, kept: Sequence[int] | None, generator: torch.Generator | None) -> list[Change]:
    """What each tensor is to hold when the dim goes from ``before`` to ``after`` units.

    Raises:
        TopologyError: nobody knows what a tensor is to hold for new units.
    """
    jobs = [_Job(scope, name, tensor, before, after, kept) for name, tensor in scope.coupled()]
    if after > before:
        for job in jobs:
            job.check()
        wanted: dict[nn.Module, dict[str, tuple[int, ...]]] = {}
        for job in jobs:
            if job.drawn:
                wanted.setdefault(job.module, {})[job.key] = job.drawn_shape()
        drawn = {module: newborn.fresh(module, shapes, generator) for module, shapes in wanted.items()}
        for job in jobs:
            job.fill(drawn.get(job.module, {}).get(job.key))
    return [job.change() for job in jobs]


def attributes_of(scope: Scope, units: int) -> list[tuple[nn.Module, str, Any]]:
    """The attributes that follow the dim, and their values at ``units`` units."""
    found: dict[tuple[nn.Module, str], Any] = {}
    for (module, name, index), axis in scope.trial.follows.items():
        if not scope.has(axis):
            continue
        value: Any = scope.length(axis, units)
        if index is not None:
            items = list(found.get((module, name), vars(module)[name]))
            items[index] = value
            kind: Any = type(vars(module)[name])
            value = kind(*items) if hasattr(kind, "_fields") else kind(items)
        found[module, name] = value
    return [(module, name, value) for (module, name), value in found.items()]


class _Job:
    """One tensor at its new size."""

    def __init__(self, scope: Scope, name: str, tensor: Tensor, before: int, after: int, kept: Sequence[int] | None) -> None:
        path, _, self.key = name.rpartition(".")
        self.module = scope.module.get_submodule(path)
        self.name = f"{scope.path}.{name}".lstrip(".")
        self.tensor = tensor
        structures = scope.axes.tensors[name]
        stretches = {index: scope.stretches(axis) for index, axis in enumerate(structures) if scope.has(axis)}
        self.shape = tuple(scope.length(axis, after) for axis in structures)
        self.storage = zeros(tensor.detach(), self.shape)
        own: Sequence[int] = range(before)
        if after > before:
            self.write = _Write({}, {index: _places(each, after, own) for index, each in stretches.items()})
            self.new = {index: _others(self.shape[index], place) for index, place in self.write.target.items()}
            self.drawn = [index for index in stretches if (name, index) not in scope.axes.consumed]
        else:
            own = range(after) if kept is None else kept
            self.write = _Write({index: _places(each, before, own) for index, each in stretches.items()}, {})

    def check(self) -> None:
        if not (self.tensor.is_floating_point() or self.tensor.is_complex()):
            raise TopologyError(
                f"{self.name}: its size cannot grow: nobody knows what a tensor of {self.tensor.dtype} holds for new units."
            )

    def _alone(self) -> int | None:
        """The axis of which new indices can be drawn without the old ones."""
        if len(self.drawn) == 1:
            index = self.drawn[0]
            if isinstance(self.module, nn.Embedding) or (index == 0 and not newborn.depends_on_first_axis(self.module)):
                return index
        return None

    def drawn_shape(self) -> tuple[int, ...]:
        alone = self._alone()
        return tuple(_count(self.new[i]) if i == alone else n for i, n in enumerate(self.shape))

    def fill(self, drawn: Tensor | None) -> None:
        """Give new units what they begin with."""
        if drawn is None:
            return
        alone = self._alone()
        if alone is None:
            self.storage.copy_(drawn)
        else:
            _put(self.storage, {alone: self.new[alone]}, drawn)
        for index, place in self.new.items():
            if index not in self.drawn:
                self.storage.index_fill_(index, _numbered(place).to(self.storage.device), 0)

    def change(self) -> Change:
        with torch.no_grad():
            self.write(self.storage, self.tensor.detach())
        return Change(self.tensor, self.storage, self.write)


#: Indices of an axis: a run of them, or one by one.
Places = slice | Tensor


@dataclasses.dataclass(frozen=True)
class _Write:
    """Copies what is kept: indices of some axes that it is taken from, or that it is put at."""

    source: dict[int, Places]
    target: dict[int, Places]

    def __call__(self, made: Tensor, old: Tensor) -> None:
        for axis, place in self.source.items():
            if isinstance(place, slice):
                old = old.narrow(axis, place.start, place.stop - place.start)
            else:
                old = old.index_select(axis, place.to(old.device))
        _put(made, self.target, old)


def _put(made: Tensor, target: dict[int, Places], values: Tensor) -> None:
    scattered = {}
    for axis, place in target.items():
        if isinstance(place, slice):
            made = made.narrow(axis, place.start, place.stop - place.start)
        else:
            scattered[axis] = place.to(made.device)
    values = values.to(made.dtype)
    if not scattered:
        made.copy_(values)
    elif len(scattered) == 1:
        ((axis, place),) = scattered.items()
        made.index_copy_(axis, place, values.to(made.device))
    else:
        every = [scattered.get(axis, torch.arange(n, device=made.device)) for axis, n in enumerate(made.shape)]
        made[torch.meshgrid(*every, indexing="ij")] = values.to(made.device)


def _places(stretches: Stretches, units: int, chosen: Sequence[int]) -> Places:
    """Where the ``chosen`` of ``units`` units, and what is not of the dim, lie on an axis."""
    found, start = [], 0
    numbers = torch.tensor(list(chosen), dtype=torch.int64)
    for ours, length in stretches:
        if ours:
            found.append((start + numbers[:, None] * length + torch.arange(length)).flatten())
            start += units * length
        else:
            found.append(torch.arange(start, start + length))
            start += length
    places = torch.cat(found)
    first = int(places[0])
    if torch.equal(places, torch.arange(first, first + len(places))):
        return slice(first, first + len(places))
    return places


def _others(length: int, places: Places) -> Places:
    """The indices of an axis that are not among ``places``."""
    if isinstance(places, slice) and places.start == 0:
        return slice(places.stop, length)
    rest = torch.ones(length, dtype=torch.bool)
    rest[places] = False
    return rest.nonzero().flatten()


def _count(places: Places) -> int:
    return places.stop - places.start if isinstance(places, slice) else len(places)


def _numbered(places: Places) -> Tensor:
    return torch.arange(places.start, places.stop) if isinstance(places, slice) else places
