"""A dim seen from its tensors: where its units lie in each, and whether a tensor produces, scales or consumes them.

It reads the bindings that layers report and the `newborn` table of each layer's class; it writes nothing. :mod:`esper_elastic.growth` moves
units by it, :mod:`esper_elastic.importance` scores them.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..control import ElasticDim
from ..errors import CapacityError
from ..ops.reference import active_slice


class Place(NamedTuple):
    """One tensor axis that holds units of a dim, as one layer sees it.

    Attributes:
        tensor: the parameter or buffer.
        axis: of the tensor.
        start: where the dim begins in the axis.
        outer: the number of its periods there.
        capacity: units per period.
        inner: neighbouring indices per unit.
        layer: that reports the axis.
        name: of the tensor in the layer.
        newborn: what a newborn unit gets here: ``"draw"``, ``"zero"`` or ``"one"``.
        consumes: whether the axis is the input side of a weight, so that zeros there hide a unit from the layer.
    """

    tensor: Tensor
    axis: int
    start: int
    outer: int
    capacity: int
    inner: int
    layer: Any
    name: str
    newborn: str
    consumes: bool

    def units(self, tensor: Tensor) -> Tensor:
        """A view of a tensor of this one's shape in which the units are an axis of their own, :attr:`unit_axis`.

        Shape:
            ``(..., size, ...)`` to ``(..., outer, capacity, inner, ...)``.
        """
        span = tensor.narrow(self.axis, self.start, self.outer * self.capacity * self.inner)
        return span.unflatten(self.axis, (self.outer, self.capacity, self.inner))

    @property
    def unit_axis(self) -> int:
        """The axis of :meth:`units` that counts units."""
        return self.axis + 1

    @property
    def span(self) -> tuple[int, int, int, int, int]:
        """What tells one stretch of memory from another, when two layers hold the same tensor."""
        return id(self.tensor), self.axis, self.start, self.outer, self.inner

    def rows(self, tensor: Tensor, active: int) -> Tensor:
        """What a tensor of this one's shape holds of the first ``active`` units, of every other axis only what is active.

        Shape:
            This tensor's shape to ``(active, elements per unit)``; a copy, at least float32.
        """
        for index, axis in enumerate(self.layer.tensor_axes()[self.name]):
            if axis is not None and index != self.axis:
                tensor = active_slice(tensor, index, axis)
        rows = self.units(tensor).narrow(self.unit_axis, 0, active).movedim(self.unit_axis, 0).flatten(1)
        return rows.to(torch.promote_types(rows.dtype, torch.float32))


def places(dim: ElasticDim, where: str) -> list[Place]:
    """Every place of a dim, in the order of its layers.

    Raises:
        CapacityError: a layer computes the tensor anew at each access, as parametrizations do, so that writing to it would be lost.
    """
    found = []
    for tensor, axis, outer, inner, start, layer, name in dim.bindings:
        if tensor is not layer._parameters.get(name) and tensor is not layer._buffers.get(name):
            raise CapacityError(
                f"{where}: {layer._widths.label}.{name}: expected a parameter or buffer, got a tensor that is computed at each access. "
                "Remove the parametrization first (torch.nn.utils.parametrize.remove_parametrizations)."
            )
        newborn = layer.newborn[name]
        consumes = newborn[axis] == "zero" and "draw" in newborn
        found.append(Place(tensor, axis, start, outer, dim.capacity, inner, layer, name, newborn[axis], consumes))
    return found


def blocks(dim: ElasticDim) -> list[tuple[Any, int]]:
    """Each layer over the dim, with how many neighbouring units are one to it: the channels of a group, where the dim counts channels."""
    return [
        (layer, math.lcm(segment.inner, layer.inseparable) // segment.inner)
        for layer in dim.users()
        for segment in layer._widths.axes[0].segments
        if segment.dim is dim
    ]


def distinct(found: list[Place]) -> list[Place]:
    """The places without those that another layer, which holds the same tensor, has already named."""
    return list({place.span: place for place in reversed(found)}.values())


def is_parameter(place: Place) -> bool:
    """Whether the tensor is one that optimizers step."""
    return isinstance(place.tensor, nn.Parameter)
