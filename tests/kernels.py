"""What tests of Triton kernels share: control blocks made by hand, poisoned operands, and where they run.

Without a GPU they run in Triton's interpreter, on the CPU.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from esper_elastic.triton_kernels.launch import Segments

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


class Segment(NamedTuple):
    """One dim's place in an axis."""

    active: int
    capacity: int
    inner: int = 1


class Widths(NamedTuple):
    """Axes of a layer as its kernels see them.

    Attributes:
        control: the control tensor.
        slots: the table of the layer's rows in it.
        segments: how many rows belong to what.
        active: per axis, the active indices.
        capacity: per axis, its size.
        on: whether all switches are on.
    """

    control: Tensor
    slots: Tensor
    segments: Segments
    active: list[Tensor]
    capacity: list[int]
    on: bool


def widths(*axes: list[Segment], switches: tuple[int, ...] = ()) -> Widths:
    """A control block that holds these axes, in slots of no particular order, between values that belong to nobody."""
    values, rows, active, capacity = [-7], [], [], []
    aligned = True
    for number, axis in enumerate(axes):
        start, indices = 0, []
        for segment in axis:
            aligned &= start % 8 == 0
            rows.append([number, len(values), start, segment.inner])
            values += [segment.active, -7]
            indices.append(torch.arange(start, start + segment.active * segment.inner))
            start += segment.capacity * segment.inner
        active.append(torch.cat(indices))
        capacity.append(start)
    for switch in switches:
        rows.append([-1, len(values), 0, 0])
        values += [switch, -7]
    counts = [len(axis) for axis in axes] + [0] * (2 - len(axes))
    return Widths(
        torch.tensor(values, dtype=torch.int32, device=DEVICE),
        torch.tensor(rows, dtype=torch.int32, device=DEVICE),
        Segments(*counts, len(switches), aligned),
        active,
        capacity,
        all(switches),
    )


def poisoned(part: Tensor, *places: tuple[int, Tensor, int]) -> Tensor:
    """``part`` on the device of the kernels, embedded along each ``(axis, indices, size)``, with NaN elsewhere."""
    for axis, indices, size in places:
        shape = list(part.shape)
        shape[axis] = size
        part = torch.full(shape, math.nan, dtype=part.dtype).index_copy(axis, indices, part)
    return part.to(DEVICE)


def active_part(tensor: Tensor, *places: tuple[int, Tensor, int]) -> Tensor:
    """The inverse of :func:`poisoned`; what is left out must be zero to the bit."""
    tensor = tensor.cpu()
    for axis, indices, size in places:
        assert tensor.shape[axis] == size
        outside = torch.ones(size, dtype=torch.bool).index_fill(0, indices, False).nonzero().squeeze(1)
        assert (tensor.index_select(axis, outside) == 0).all(), f"axis {axis}: what is dormant is not exactly zero"
        tensor = tensor.index_select(axis, indices)
    return tensor
