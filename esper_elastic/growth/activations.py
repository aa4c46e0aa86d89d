"""Where the units of a dim lie in the activations that elastic layers take and give."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from ..control import Axis, ElasticDim
from ..layers import ElasticLayer

#: Layers whose units lie on the last axis of what they take and give.
_LAST = (nn.Linear, nn.Embedding, nn.LayerNorm, nn.RMSNorm)


def unit_axis(layer: ElasticLayer, activation: Tensor) -> int | None:
    """The axis of an activation that units lie on; ``None`` for a layer with code of its own."""
    if isinstance(layer, _LAST):
        return activation.dim() - 1
    if isinstance(layer, _ConvNd):
        return activation.dim() - 1 - len(layer.kernel_size)
    return 1 if isinstance(layer, _BatchNorm | nn.GroupNorm) else None


def consumes(layer: ElasticLayer, dim: ElasticDim) -> bool:
    """Whether a layer takes the units of a dim in and mixes them by a weight."""
    grouped = getattr(layer, "_group_width", None) is not None
    return not grouped and any(dim is known for known in getattr(layer, "in_dim", _NOTHING).dims)


class _Nothing(Axis):
    segments = ()


_NOTHING = _Nothing()


def per_unit(values: Tensor, axis: Axis, dim: ElasticDim, static: bool) -> Tensor:
    """The sums over all indices of each active unit, wherever the dim has its places in the axis.

    Shape:
        ``(..., axis)``, of active size or in static layout of capacity, to ``(..., active)``.
    """
    total: Tensor | None = None
    offset = 0
    for segment in axis.segments:
        length = segment.dim.active * segment.inner
        if segment.dim is dim:
            here = values.narrow(-1, segment.start if static else offset, length)
            here = here.unflatten(-1, (segment.dim.active, segment.inner)).sum(-1)
            total = here if total is None else total + here
        offset += length
    assert total is not None
    return total


def places_of(axis: Axis, dim: ElasticDim) -> int:
    """How many indices of an axis belong to one unit of a dim."""
    return sum(segment.inner for segment in axis.segments if segment.dim is dim)


def inner_of(axis: Axis) -> int:
    """How many neighbouring indices of an axis belong to one unit, where all its dims agree; else 1."""
    found = {segment.inner for segment in axis.segments}
    return found.pop() if len(found) == 1 else 1


def by_example(values: Tensor, index: int) -> Tensor:
    """The sums over positions, which are all axes but the first, that of examples, and ``index``, that of units.

    Shape:
        ``(N, ..., units, ...)`` or ``(units, ...)`` to ``(N, units)``.
    """
    if index == 0:
        return values.flatten(1).sum(1)[None] if values.dim() > 1 else values[None]
    return values.movedim(index, 1).flatten(2).sum(2) if values.dim() > 2 else values
