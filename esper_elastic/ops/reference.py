"""The meaning of every op, in plain PyTorch: slice what is active, call the ``torch.nn.functional`` op, put the result in its place.

Differentiable as often as wanted, and what runs under ``torch.func``. Widths come from the host mirror. The other backends are tested
against this file.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..control import Axis, Runs
from ..errors import GenerationError
from .widths import Widths


def linear(input: Tensor, weight: Tensor, bias: Tensor | None, widths: Widths) -> Tensor:
    """``output[r] = sum_c input[c] weight[r, c]^T + bias[r]`` over active rows r and columns c."""
    rows, columns = widths.axes
    w = active_slice(active_slice(weight, 0, rows), 1, columns)
    b = None if bias is None else active_slice(bias, 0, rows)
    output = leave(F.linear(enter(input, -1, columns, widths), w, b), -1, rows, widths)
    return fence(output, widths.control, widths.label)


def conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    widths: Widths,
    stride: tuple[int, ...],
    padding: str | tuple[int, ...],
    dilation: tuple[int, ...],
    grouped: bool,
) -> Tensor:
    """``output[r] = sum_c weight[r, c] * input[c] + bias[r]`` over active rows r and columns c; grouped, over those of r's group."""
    rows, columns = widths.axes
    w = active_slice(weight, 0, rows)
    w, groups = (w, columns.active // weight.shape[1]) if grouped else (active_slice(w, 1, columns), 1)
    b = None if bias is None else active_slice(bias, 0, rows)
    x = enter(input, -3, columns, widths)
    return fence(leave(F.conv2d(x, w, b, stride, padding, dilation, groups), -3, rows, widths), widths)


def active_slice(tensor: Tensor, index: int, axis: Axis) -> Tensor:
    """The active part of a capacity-sized tensor along one axis: a view for a single run."""
    return take(tensor, index, axis.runs())


def take(tensor: Tensor, index: int, runs: Runs) -> Tensor:
    """``tensor`` at ``runs`` of one axis."""
    parts = [tensor.narrow(index, start, length) for start, length in runs]
    return parts[0] if len(parts) == 1 else torch.cat(parts, index)


def put(part: Tensor, index: int, runs: Runs, size: int) -> Tensor:
    """``part`` at ``runs`` of an axis of ``size``, zero elsewhere: the transpose of :func:`take`."""
    if sum(length for _, length in runs) == size:
        return part
    pieces, end, offset = [], 0, 0

    def gap(length: int) -> None:
        if length:
            shape = list(part.shape)
            shape[index] = length
            pieces.append(part.new_zeros(shape))

    for start, length in runs:
        gap(start - end)
        pieces.append(part.narrow(index, offset, length))
        offset += length
        end = start + length
    gap(size - end)
    return torch.cat(pieces, index)


def enter(input: Tensor, index: int, axis: Axis, widths: Widths) -> Tensor:
    """The active part of an activation; in compact layout that is all of it."""
    return active_slice(input, index, axis) if widths.static else input


def leave(output: Tensor, index: int, axis: Axis, widths: Widths) -> Tensor:
    """An activation of active size, as the layout wants it; all zero in static layout while a switch above is off."""
    if not widths.static:
        return output
    if any(not switch.on for switch in widths.switches):
        output = torch.zeros_like(output)
    return put(output, index, axis.runs(), axis.capacity)


class _Fence(torch.autograd.Function):
    """The identity, whose backward refuses to cross a commit."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, control: Tensor, label: str) -> Tensor:
        ctx.control, ctx.version, ctx.label = control, control._version, label
        return input.view_as(input)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        commits = ctx.control._version - ctx.version
        if commits:
            raise GenerationError(
                f"{ctx.label}: cannot run this backward: widths or switches changed after the forward that built the graph "
                f"({commits} commit{'s' * (commits > 1)} since). Run the forward again, or change widths between steps."
            )
        return grads[0], None, None


def fence(output: Tensor, control: Tensor, label: str) -> Tensor:
    """Make the backward of ``output`` raise after a commit. Inside a traced or functional transform that holds the graph."""
    if not output.requires_grad or torch._C._are_functorch_transforms_active() or torch.compiler.is_compiling():
        return output
    return _Fence.apply(output, control, label)
