"""What the Triton kernels of optimizers are asked: which parameters they serve, and tables of what they read, kept on the device.

No call here waits for the device, and each may be captured in a CUDA graph, which then follows widths, switches, and a learning rate that
is a tensor. A table that such a graph reads is kept for good.
"""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..control import Axis, ControlBlock, Replica, Switch
from .backend import triton_missing, triton_wanted

if TYPE_CHECKING:
    from ..triton_kernels.optimizer import Gradients, Tiles

DTYPES = (torch.float32, torch.float16, torch.bfloat16)

Pieces = tuple[tuple[int, ...], ...]
"""The rectangles of one parameter: rows of the kernels' table without the parameter's index, one slot per switch at the end."""


def triton_steps(device: torch.device) -> bool:
    """Whether Triton's kernels step parameters on ``device``."""
    return triton_wanted(device) and triton_missing(device) is None


def capturing(device: torch.device) -> bool:
    """Whether what is launched on ``device`` now becomes part of a CUDA graph."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def pieces_of(tensor: Tensor, axes: Sequence[Axis | None], switches: Sequence[Switch]) -> Pieces | None:
    """The rectangles that ``tensor`` consists of where its axes are ``axes``, under ``switches``.

    ``None`` where kernels do not serve it: its type is another, memory has gaps, or its elastic axes are not those of rows and columns.
    """
    if tensor.dtype not in DTYPES or tensor.numel() == 0:
        return None
    order = sorted((axis for axis, size in enumerate(tensor.shape) if size > 1), key=tensor.stride, reverse=True)
    sizes = [tensor.shape[axis] for axis in order]
    if [tensor.stride(axis) for axis in order] != [math.prod(sizes[place + 1 :]) for place in range(len(sizes))]:
        return None
    elastic = [place for place, axis in enumerate(order) if axes[axis] is not None]
    if len(elastic) > 2 or (len(elastic) == 2 and math.prod(sizes[: elastic[0]]) != 1):
        return None
    last = elastic[-1] if elastic else 0
    stride = math.prod(sizes[last:])
    rows = [(0, -1, math.prod(sizes[:last]))]
    if len(elastic) == 2:
        rows = _spans(axes[order[elastic[0]]], math.prod(sizes[elastic[0] + 1 : last]))
    columns = _spans(axes[order[last]], math.prod(sizes[last + 1 :])) if elastic else [(0, -1, stride)]
    slots = [switch.slot for switch in switches]
    return tuple(
        (row * stride + column, stride, *reach, *other, *slots) for (row, *reach), (column, *other) in itertools.product(rows, columns)
    )


def _spans(axis: Axis | None, unit: int) -> list[tuple[int, int, int]]:
    """First index, slot and indices per unit of each segment of an axis, each index of which takes ``unit`` rows or columns."""
    return [] if axis is None else [(s.start * unit, s.dim.slot, s.inner * unit) for s in axis.segments]


class Batch:
    """Parameters of one type on one device, which one launch serves.

    Args:
        pieces: of each parameter, see :func:`pieces_of`.
        num_elements: of all parameters, at capacity.
        device: where they are.
        dtype: their type.
    """

    def __init__(self, pieces: Sequence[Pieces], num_elements: int, device: torch.device, dtype: torch.dtype) -> None:
        self.device, self.dtype = device, dtype
        self._size = len(pieces), num_elements
        rows = [(index, *row) for index, own in enumerate(pieces) for row in own]
        self._width = max(map(len, rows))
        self._rows = [field for row in rows for field in (*row, *[-1] * (self._width - len(row)))]
        self._pieces, self._tensors, self._addresses = _Mirror(device), _Mirror(device), _Mirror(device)

    def gradients(self, block: ControlBlock | None, addresses: list[int]) -> Gradients:
        """The gradients at ``addresses`` as kernels know them; their widths are in ``block``, or fixed without one."""
        from ..triton_kernels.optimizer import Gradients, Table

        pieces = self._pieces.hold(self._rows).view(-1, self._width)
        control = pieces.view(torch.int32) if block is None else block.on(self.device)
        replica = Replica.of(control)
        if replica is not None:
            replica.note_reader()
        return Gradients(Table(pieces, *self._size), self._addresses.hold(addresses), control, self.dtype)

    def adamw(self, grads: Gradients, tensors: list[int], count_dtype: torch.dtype, **options: Any) -> None:
        """One step. ``tensors`` are the addresses of all parameters, then of each kind of state, then of the counts."""
        from ..triton_kernels.optimizer import adamw

        with _on(self.device):
            adamw(grads, self._tensors.hold(tensors), count_dtype, **{**options, "lr": self._rate(options["lr"])})

    def sgd(self, grads: Gradients, tensors: list[int], count_dtype: torch.dtype | None, **options: Any) -> None:
        """One step. ``tensors`` as for :meth:`adamw`; ``count_dtype`` is ``None`` if there are no counts."""
        from ..triton_kernels.optimizer import sgd

        with _on(self.device):
            sgd(grads, self._tensors.hold(tensors), count_dtype, **{**options, "lr": self._rate(options["lr"])})

    def _rate(self, lr: float | Tensor) -> float | Tensor:
        """A learning rate that is on the device is read there."""
        return lr if isinstance(lr, Tensor) and lr.device == self.device else float(lr)


def gradient_norm(batches: Sequence[Gradients], max_norm: float, norm_type: float) -> tuple[Tensor, Tensor, list[Tiles]]:
    """The norm of order 1, 2 or infinity of gradients on one device, and the factor that clips them; see the kernels."""
    from ..triton_kernels.optimizer import gradient_norm

    with _on(batches[0].addresses.device):
        return gradient_norm(batches, max_norm, 0 if math.isinf(norm_type) else int(norm_type))


def scale(grads: Gradients, tiles: Tiles, factor: Tensor) -> None:
    """Multiply active gradients by a factor on the device."""
    from ..triton_kernels.optimizer import scale

    with _on(factor.device):
        scale(grads, tiles, factor)


class _Mirror:
    """A table of integers on a device, sent anew only where its content changes."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._values: list[int] | None = None
        self._table: Tensor

    def hold(self, values: list[int]) -> Tensor:
        """The table with this content. While a graph is captured, new content is written by the graph, and holds at each replay."""
        if values is self._values or values == self._values:
            if capturing(self._device):
                _read_by_graphs.add(self._table)
            return self._table
        if capturing(self._device):
            table = torch.zeros(len(values), dtype=torch.int64, device=self._device)
            torch._foreach_add_(table.unbind(), values)
            return table
        staged = torch.tensor(values, dtype=torch.int64, device="cpu", pin_memory=self._device.type == "cuda")
        self._values, self._table = values, staged.to(self._device, non_blocking=True)
        return self._table


_read_by_graphs: set[Tensor] = set()


def _on(device: torch.device) -> contextlib.AbstractContextManager[None]:
    """Launch on ``device``."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
