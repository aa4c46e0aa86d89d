"""The meaning of every op, in plain PyTorch: slice what is active, call the ``torch.nn.functional`` op, put the result in its place.

Differentiable as often as wanted, and what runs under ``torch.func``. Widths come from the host mirror. The other backends are tested
against this file.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._prims_common import suggest_memory_format

from ..control import Axis, Runs
from ..errors import GenerationError
from .widths import Widths


def linear(input: Tensor, weight: Tensor, bias: Tensor | None, widths: Widths) -> Tensor:
    """``output[r] = sum_c input[c] weight[r, c]^T + bias[r]`` over active rows r and columns c."""
    rows, columns = widths.axes
    x, w, b = fence_operands(widths, input, weight, bias)
    w = active_slice(active_slice(w, 0, rows), 1, columns)
    b = None if b is None else active_slice(b, 0, rows)
    output = leave(F.linear(enter(x, -1, columns, widths), w, b), -1, rows, widths)
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
    x, w, b = fence_operands(widths, input, weight, bias)
    w = active_slice(w, 0, rows)
    w, groups = (w, columns.active // weight.shape[1]) if grouped else (active_slice(w, 1, columns), 1)
    b = None if b is None else active_slice(b, 0, rows)
    output = leave(F.conv2d(enter(x, -3, columns, widths), w, b, stride, padding, dilation, groups), -3, rows, widths)
    return fence(output, widths.control, widths.label)


def conv_transpose2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    widths: Widths,
    stride: tuple[int, ...],
    padding: tuple[int, ...],
    output_padding: tuple[int, ...],
    dilation: tuple[int, ...],
    grouped: bool,
) -> Tensor:
    """``output[r] = sum_c weight[c, r] * input[c] + bias[r]``, ``*`` the transpose of that of :func:`conv2d`, over active r and c."""
    rows, columns = widths.axes
    x, w, b = fence_operands(widths, input, weight, bias)
    w = active_slice(w, 0, columns)
    w, groups = (w, rows.active // weight.shape[1]) if grouped else (active_slice(w, 1, rows), 1)
    b = None if b is None else active_slice(b, 0, rows)
    x = enter(x, -3, columns, widths)
    output = F.conv_transpose2d(x, w, b, stride, padding, output_padding, groups, dilation)
    return fence(leave(output, -3, rows, widths), widths.control, widths.label)


def batch_norm(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    widths: Widths,
    training: bool,
    momentum: float | None,
    eps: float,
) -> Tensor:
    """``F.batch_norm`` of the active features; in training the active slices of the running statistics move.

    With ``momentum=None`` they are the mean over all batches: this batch's share is one over the count, which stays on its device.
    """
    (features,) = widths.axes
    if asleep(widths):
        return _silent(input, 1)
    x, *fenced = fence_operands(widths, input, weight, bias)
    x = _dense_in_memory(enter(x, 1, features, widths))
    w, b, mean, var = (None if t is None else active_slice(t, 0, features) for t in (*fenced, running_mean, running_var))
    if num_batches_tracked is not None:
        num_batches_tracked.add_(1)
    runs = features.runs()
    if training and running_mean is not None and running_var is not None and (momentum is None or len(runs) > 1):
        share = momentum if num_batches_tracked is None or momentum is not None else num_batches_tracked.double().reciprocal()
        _move_statistics(x, running_mean, running_var, runs, share)
        mean = var = None
    output = F.batch_norm(x, mean, var, w, b, training, momentum or 0.0, eps)
    return fence(leave(output, 1, features, widths), widths.control, widths.label)


def layer_norm(
    input: Tensor, fixed_shape: tuple[int, ...], weight: Tensor | None, bias: Tensor | None, widths: Widths, eps: float
) -> Tensor:
    """``F.layer_norm`` of the active units, which alone enter mean and variance."""
    (units,) = widths.axes
    axis = input.dim() - 1 - len(fixed_shape)
    if asleep(widths):
        return _silent(input, axis)
    x, *fenced = fence_operands(widths, input, weight, bias)
    x = enter(x, axis, units, widths)
    w, b = (None if t is None else active_slice(t, 0, units) for t in fenced)
    output = F.layer_norm(x, (x.shape[axis], *fixed_shape), w, b, eps)
    return fence(leave(output, axis, units, widths), widths.control, widths.label)


def rms_norm(input: Tensor, fixed_shape: tuple[int, ...], weight: Tensor | None, widths: Widths, eps: float | None) -> Tensor:
    """``F.rms_norm`` of the active units, which alone enter the mean square."""
    (units,) = widths.axes
    axis = input.dim() - 1 - len(fixed_shape)
    if asleep(widths):
        return _silent(input, axis)
    x, w = fence_operands(widths, input, weight)
    x = enter(x, axis, units, widths)
    w = None if w is None else active_slice(w, 0, units)
    output = F.rms_norm(x, [x.shape[axis], *fixed_shape], w, eps)
    return fence(leave(output, axis, units, widths), widths.control, widths.label)


def group_norm(input: Tensor, group_width: int | None, weight: Tensor | None, bias: Tensor | None, widths: Widths, eps: float) -> Tensor:
    """``F.group_norm`` of the active channels, in groups of ``group_width``, or as one group."""
    (channels,) = widths.axes
    if asleep(widths):
        return _silent(input, 1)
    x, *fenced = fence_operands(widths, input, weight, bias)
    x = enter(x, 1, channels, widths)
    w, b = (None if t is None else active_slice(t, 0, channels) for t in fenced)
    output = F.group_norm(x, 1 if group_width is None else x.shape[1] // group_width, w, b, eps)
    return fence(leave(output, 1, channels, widths), widths.control, widths.label)


def embedding(
    indices: Tensor,
    weight: Tensor,
    widths: Widths,
    padding_idx: int | None,
    max_norm: float | None,
    norm_type: float,
    scale_grad_by_freq: bool,
) -> Tensor:
    """``output = weight[indices]`` over active rows and columns; with ``max_norm`` the rows looked up are first made no longer."""
    columns, rows = widths.axes
    padding_idx = padding_idx if padding_idx is not None and padding_idx < rows.active else None
    if max_norm is not None and not asleep(widths):
        _renormalise(indices, weight, widths, max_norm, norm_type)
    (w,) = fence_operands(widths, weight)
    w = active_slice(active_slice(w, 0, rows), 1, columns)
    output = F.embedding(indices, w, padding_idx, scale_grad_by_freq=scale_grad_by_freq)
    return fence(leave(output, -1, columns, widths), widths.control, widths.label)


@torch.no_grad()
def _renormalise(indices: Tensor, weight: Tensor, widths: Widths, max_norm: float, norm_type: float) -> None:
    """Shorten the active part of the rows looked up, in place."""
    columns, rows = widths.axes
    runs = columns.runs()
    part = take(active_slice(weight.detach(), 0, rows), 1, runs)
    torch.embedding_renorm_(part, indices.contiguous(), max_norm, norm_type)
    if len(runs) > 1:  # a copy, not a view
        found, offset = indices.unique(), 0
        for start, length in runs:
            weight.detach().narrow(1, start, length).index_copy_(0, found, part.narrow(1, offset, length).index_select(0, found))
            offset += length


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


def _silent(input: Tensor, index: int) -> Tensor:
    """Zeros like ``input`` for a layer that is asleep: none of its units enters, so that its gradient is zero as well."""
    return torch.cat([input.narrow(index, 0, 0), torch.zeros_like(input)], index)


def _dense_in_memory(x: Tensor) -> Tensor:
    """``x`` without gaps, in its memory format: for strided input PyTorch's batch norm sums several times less exactly."""
    if x.is_contiguous() or torch._C._are_functorch_transforms_active():
        return x
    return x.contiguous(memory_format=suggest_memory_format(x))


@torch.no_grad()
def _move_statistics(x: Tensor, running_mean: Tensor, running_var: Tensor, runs: Runs, share: Any) -> None:
    """Take ``share`` of the running statistics at ``runs`` from the batch ``x``.

    Comes before whatever autograd saves: a checkpointed forward that is run again stops at the last tensor saved.
    """
    mean, var = (torch.zeros(x.shape[1], dtype=t.dtype, device=t.device) for t in (running_mean, running_var))
    F.batch_norm(x.detach(), mean, var, None, None, True, 1.0)
    for storage, batch in ((running_mean, mean), (running_var, var)):
        store(storage, take(storage, 0, runs).double().lerp(batch.double(), share), runs)


def store(storage: Tensor, part: Tensor, runs: Runs) -> None:
    """Write ``part`` into the runs of a vector: :func:`take` turned round."""
    offset = 0
    for start, length in runs:
        storage.narrow(0, start, length).copy_(part.narrow(0, offset, length))
        offset += length


def asleep(widths: Widths) -> bool:
    """Whether a static layer gives zeros because a switch above it is off."""
    return widths.static and any(not switch.on for switch in widths.switches)


def enter(input: Tensor, index: int, axis: Axis, widths: Widths) -> Tensor:
    """The active part of an activation; in compact layout that is all of it."""
    return active_slice(input, index, axis) if widths.static else input


def leave(output: Tensor, index: int, axis: Axis, widths: Widths) -> Tensor:
    """An activation of active size, as the layout wants it; all zero in static layout while a switch above is off."""
    if not widths.static:
        return output
    if asleep(widths):
        output = torch.zeros_like(output)
    return put(output, index, axis.runs(), axis.capacity)


class _Fence(torch.autograd.Function):
    """The identity, whose backward refuses to cross a commit, and so does every derivative of that."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, control: Tensor, label: str) -> Tensor:
        ctx.control, ctx.version, ctx.label = control, control._version, label
        return input.view_as(input)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        check_generation(ctx.control, ctx.version, ctx.label)
        grad = grads[0]
        return _Fence.apply(grad, ctx.control, ctx.label) if grad.requires_grad else grad, None, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor:
        return tangents[0].view_as(tangents[0])


def check_generation(control: Tensor, version: int, label: str) -> None:
    commits = control._version - version
    if commits:
        raise GenerationError(
            f"{label}: cannot run this backward: widths or switches changed after the forward that built the graph "
            f"({commits} commit{'s' * (commits > 1)} since). Run the forward again, or change widths between steps."
        )


@torch.library.custom_op("esper_elastic::fence", mutates_args=())
def _compiled_fence(tensor: Tensor, control: Tensor) -> Tensor:
    return tensor.clone()


@_compiled_fence.register_fake
def _(tensor: Tensor, control: Tensor) -> Tensor:
    return torch.empty_like(tensor)


def _save_control(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(inputs[1])  # autograd compares its version with the present one


def _fence_gradient(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
    return _compiled_fence(grad, ctx.saved_tensors[0]), None


_compiled_fence.register_autograd(_fence_gradient, setup_context=_save_control)


def fence_operands(widths: Widths, *operands: Tensor | None) -> list[Any]:
    """Make the gradients of ``operands``, and all derivatives of those, raise after a commit. For eager graphs."""
    if torch._C._are_functorch_transforms_active() or torch.compiler.is_compiling():
        return list(operands)
    return [t if t is None or not t.requires_grad else _Fence.apply(t, widths.control, widths.label) for t in operands]


def fence(output: Tensor, control: Tensor, label: str) -> Tensor:
    """Make the backward of ``output`` raise after a commit; it may be modified in place. A functional transform holds its own graph."""
    if not output.requires_grad or torch._C._are_functorch_transforms_active():
        return output
    if torch.compiler.is_compiling():
        return _compiled_fence(output, control)
    if output.grad_fn is None:
        return _Fence.apply(output, control, label)
    version = control._version
    output.grad_fn.register_prehook(lambda grads: check_generation(control, version, label))
    return output
