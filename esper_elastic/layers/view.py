"""``ElasticView``: a module with code of its own, which sees the active part of its tensors and the sizes that go with it.

Its own ``forward`` runs unchanged. Reading one of its parameters or buffers gives the active slice, in static layout the whole with
zeros for what sleeps; reading a size that it keeps gives the present one. Both are properties of a class made for the purpose
(:mod:`esper_elastic.convert.dynamic`), whoever reads them: the module, its parent, a hook. The parameters themselves stay where they were,
at capacity, for optimizers and ``state_dict``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from ..control import Axis, ControlBlock, ElasticDim
from ..ops import Widths
from ..ops.reference import active_slice, fence_operands
from . import state
from .base import ElasticLayer, private_generator, write_active

Axes = tuple[Axis | None, ...]


class Size(NamedTuple):
    """A size that a module keeps: that of an axis, or the number of groups of ``over`` indices in it."""

    axis: Axis
    over: int


class ElasticView(ElasticLayer):
    """Base of the classes of such modules; mixed in before the module's own class."""

    newborn: ClassVar = {}
    _axes: dict[str, Axes]
    _sizes: dict[str, Any]
    _mixed: bool

    @classmethod
    def needs(cls, axes: Mapping[str, Axes]) -> bool:
        """Whether any of the axes is elastic."""
        return any(axis is not None for own in axes.values() for axis in own)

    def become_view(self, axes: Mapping[str, Axes], sizes: Mapping[str, Any], newborn: Mapping[str, tuple[str, ...]], mixed: bool) -> None:
        """Take up the axes of one's tensors, on a module that is whole already.

        Args:
            axes: of each own parameter and buffer; ``None`` where a size is fixed.
            sizes: attribute -> what it follows, or a tuple of that and plain values.
            newborn: what ``grow`` writes to newborn units, per tensor and axis.
            mixed: whether newborn units change what the module gives, whatever they are.
        """
        state.wrap_module_methods()
        self._axes = dict(axes)
        self._sizes = dict(sizes)
        self.newborn = dict(newborn)  # type: ignore[misc]
        self._mixed = mixed
        every = {id(axis): axis for axis in self._every_axis()}
        self._widths = Widths(type(self).__name__, tuple(every.values()))
        roots = {id(dim): dim for axis in every.values() for dim in axis.dims}
        ControlBlock.merge(dim.block for dim in roots.values())
        for dim in roots.values():
            dim.attach(self)
        self.bind_control()

    def _every_axis(self) -> Iterator[Axis]:
        for own in self._axes.values():
            yield from (axis for axis in own if axis is not None)
        for size in self._sizes.values():
            items = size if type(size) is tuple else (size,)
            yield from (item.axis for item in items if isinstance(item, Size))

    # What an elastic layer says of itself

    def tensor_axes(self) -> dict[str, Axes]:
        return self._axes

    def storage(self, name: str) -> Tensor | None:
        return self._parameters.get(name, self._buffers.get(name))

    def named_axes(self) -> Iterator[tuple[str, Axis]]:
        for name, own in self._axes.items():
            for index, axis in enumerate(own):
                if axis is not None:
                    yield f"{name}.{index}", axis

    @property
    def mixes_units(self) -> bool:
        return self._mixed

    @property
    def produced(self) -> list[ElasticDim]:
        found: dict[int, ElasticDim] = {}
        for name, own in self._axes.items():
            for axis, birth in zip(own, self.newborn.get(name, ()), strict=False):
                if axis is not None and birth != "zero":
                    found.update((id(dim), dim) for dim in axis.dims)
        return list(found.values())

    def name_of(self, dim: ElasticDim) -> str:
        return next(name for name, own in self._axes.items() if any(axis is not None and dim in axis.dims for axis in own))

    def bind_control(self) -> None:
        super().bind_control()
        self._masks: dict[str, list[tuple[int, Tensor, Tensor]]] = {}

    def _init_bound(self) -> float:
        """That of a uniform law as wide as the largest matrix is now."""
        weights = [self.active(name) for name, own in self._axes.items() if len(own) > 1 and name in self._parameters]
        largest = max(weights, key=lambda weight: weight.numel(), default=None)
        return 0.0 if largest is None or largest.is_meta else float(largest.detach().float().std(correction=0)) * 3**0.5

    # Reading

    def visible_tensor(self, name: str) -> Tensor | None:
        """What code sees of a tensor: the active slice, or in static layout the whole with zeros for what sleeps."""
        tensor = self.storage(name)
        axes = self._axes.get(name)
        if tensor is None or axes is None or all(axis is None for axis in axes):
            return tensor
        if tensor.requires_grad and torch.is_grad_enabled():
            (tensor,) = fence_operands(self._widths, tensor)
        return self._masked(name, tensor) if self._widths.static else self._sliced(tensor, axes)

    @staticmethod
    def _sliced(tensor: Tensor, axes: Axes) -> Tensor:
        for index, axis in enumerate(axes):
            if axis is not None and axis.active < axis.capacity:
                tensor = active_slice(tensor, index, axis)
        return tensor

    def _masked(self, name: str, tensor: Tensor) -> Tensor:
        """``tensor`` with zeros for what sleeps, as the control block says at the time when the op runs."""
        mask: Any = None
        for index, slots, units in self._mask(name, tensor):
            here = (self._widths.control[slots] > units).view([-1 if i == index else 1 for i in range(tensor.dim())])
            mask = here if mask is None else mask & here
        return torch.where(mask, tensor, tensor.new_zeros(()))

    def _mask(self, name: str, tensor: Tensor) -> list[tuple[int, Tensor, Tensor]]:
        """Per elastic axis: which slot speaks of each index, and which unit the index belongs to."""
        found = self._masks.get(name)
        if found is None:
            found = []
            for index, axis in enumerate(self._axes[name]):
                if axis is None:
                    continue
                slots = [s.dim.slot for s in axis.segments for _ in range(s.dim.capacity * s.inner)]
                units = [i // s.inner for s in axis.segments for i in range(s.dim.capacity * s.inner)]
                found.append((index, torch.tensor(slots, device=tensor.device), torch.tensor(units, device=tensor.device)))
            self._masks[name] = found
        return found

    def visible_size(self, name: str) -> Any:
        """What code sees of a size that the module keeps."""
        kept = self._sizes[name]
        if type(kept) is tuple:
            return type(self.__dict__[name])(self._size_of(item) for item in kept)
        return self._size_of(kept)

    def active_size(self, name: str) -> Any:
        """A size that the module keeps, in active units."""
        kept = self._sizes[name]
        if type(kept) is tuple:
            return type(self.__dict__[name])(item.axis.active // item.over if isinstance(item, Size) else item for item in kept)
        return kept.axis.active // kept.over

    def _size_of(self, kept: Any) -> Any:
        if not isinstance(kept, Size):
            return kept
        return (kept.axis.capacity if self._widths.static else kept.axis.active) // kept.over

    # Writing

    def __setattr__(self, name: str, value: Any) -> None:
        axes = self.__dict__.get("_axes", {}).get(name)
        storage = self._buffers.get(name) if axes is not None and isinstance(value, Tensor) else None
        if storage is not None and value is not storage and value.shape != storage.shape:
            with torch.no_grad():
                write_active(storage, axes, value)  # code that keeps running statistics replaces them at their present size
            return
        super().__setattr__(name, value)

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in super().__getstate__().items() if key != "_masks"}

    def _fill_dormant(self, name: str, storage: Tensor) -> None:
        fill_like(storage, self.active(name))

    def to_dense(self) -> nn.Module:
        raise NotImplementedError(f"{type(self).__name__}: export the model that it is part of: ee.export(model).")


@torch.no_grad()
def fill_like(storage: Tensor, present: Tensor) -> None:
    """Give ``storage`` finite values: of the law of ``present`` for a matrix, their mean for a vector."""
    if not storage.is_floating_point() or storage.is_meta or present.is_meta or not present.numel():
        return
    values = present.detach().float()
    spread = float(values.std(correction=0)) * 3**0.5 if values.dim() > 1 else 0.0
    storage.uniform_(-spread, spread, generator=private_generator(storage.device)).add_(float(values.mean()))
