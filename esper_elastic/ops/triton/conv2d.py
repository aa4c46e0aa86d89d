"""``conv2d`` by the kernels of ``triton_kernels/conv2d.py``: three ops, each of which is the derivative of the others."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...triton_kernels.conv2d import conv2d_forward, conv2d_grad_input, conv2d_grad_weight
from ...triton_kernels.launch import Segments
from ..widths import Widths
from .common import autocast, launching, save, saved

LABEL = "elastic convolution"


def conv2d(
    batch: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    widths: Widths,
    stride: tuple[int, ...],
    padding: tuple[int, ...],
    dilation: tuple[int, ...],
    grouped: bool,
) -> Tensor:
    """See :func:`esper_elastic.ops.conv2d.conv2d`; of a batch, in static layout. The output is channels_last."""
    geometry = [*stride, *padding, *dilation, int(grouped)]
    return _conv2d(autocast(batch), weight, bias, widths.control, widths.slots, widths.segments, geometry)


def _operand(weight: Tensor, like: Tensor) -> Tensor:
    """``weight`` in the type of an activation, in one of the two memory formats that kernels read."""
    weight = weight.to(like.dtype)
    return weight if weight.is_contiguous(memory_format=torch.channels_last) else weight.contiguous()


def _last(image: Tensor) -> Tensor:
    return image.contiguous(memory_format=torch.channels_last)


def _split(geometry: list[int]) -> tuple[tuple[int, int], tuple[int, int], tuple[int, int], bool]:
    """Stride, padding, dilation, and whether groups are what is elastic."""
    a, b, c, d, e, f, grouped = geometry
    return (a, b), (c, d), (e, f), bool(grouped)


def _tf32(image: Tensor) -> bool:
    """Whether torch's own switch lets float32 convolutions use tf32."""
    return image.is_cuda and torch.backends.cudnn.allow_tf32


@torch.library.custom_op("esper_elastic::triton_conv2d", mutates_args=())
def _conv2d(
    x: Tensor, weight: Tensor, bias: Tensor | None, control: Tensor, slots: Tensor, segments: list[int], geometry: list[int]
) -> Tensor:
    with launching(control):
        at = control, slots, Segments(*segments), *_split(geometry)
        return conv2d_forward(_last(x), _operand(weight, x), bias, *at, allow_tf32=_tf32(x))


@torch.library.custom_op("esper_elastic::triton_conv2d_grad_input", mutates_args=())
def _grad_input(
    grad: Tensor, weight: Tensor, size: list[int], control: Tensor, slots: Tensor, segments: list[int], geometry: list[int]
) -> Tensor:
    with launching(control):
        n, c, h, w = size
        at = control, slots, Segments(*segments), *_split(geometry)
        return conv2d_grad_input(_last(grad), _operand(weight, grad), (n, c, h, w), *at, allow_tf32=_tf32(grad))


@torch.library.custom_op("esper_elastic::triton_conv2d_grad_weight", mutates_args=())
def _grad_weight(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    control: Tensor,
    slots: Tensor,
    segments: list[int],
    geometry: list[int],
) -> tuple[Tensor, Tensor]:
    """The second result has no elements where there is no bias. Of ``weight`` and ``bias``, shape, format and type alone matter."""
    with launching(control):
        at = control, slots, Segments(*segments), *_split(geometry)
        gw, gb = conv2d_grad_weight(_last(grad), _last(x), weight, bias, *at, allow_tf32=_tf32(x))
        return gw, weight.new_empty(0) if gb is None else gb


@_conv2d.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None, control: Tensor, slots: Tensor, segments: list[int], geometry: list[int]) -> Tensor:
    size = [x.shape[0], weight.shape[0]]
    for axis, (stride, padding, dilation) in enumerate(zip(*_split(geometry)[:3], strict=True), 2):
        size.append((x.shape[axis] + 2 * padding - dilation * (weight.shape[axis] - 1) - 1) // stride + 1)
    return torch.empty(size, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


@_grad_input.register_fake
def _(grad: Tensor, weight: Tensor, size: list[int], control: Tensor, slots: Tensor, segments: list[int], geometry: list[int]) -> Tensor:
    return torch.empty(size, dtype=grad.dtype, device=grad.device, memory_format=torch.channels_last)


@_grad_weight.register_fake
def _(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    control: Tensor,
    slots: Tensor,
    segments: list[int],
    geometry: list[int],
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(weight), weight.new_empty(0) if bias is None else bias.new_empty(bias.shape)


def _save_conv2d(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, bias, control, slots, ctx.segments, ctx.geometry = inputs
    # Values are saved where a gradient needs them, as nn does; for the other gradients the shape of a parameter is enough.
    needs_x, *needs_parameter = ctx.needs_input_grad[:3]
    ctx.size, ctx.parameters = x.shape, (weight.detach(), None if bias is None else bias.detach())
    save(ctx, control, LABEL, x if any(needs_parameter) else None, weight if needs_x else None, slots)


def _conv2d_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    control, x, weight, slots = saved(ctx)
    where = control, slots, ctx.segments, ctx.geometry
    gx = gw = gb = None
    if ctx.needs_input_grad[0]:
        gx = _grad_input(grad, weight, ctx.size, *where)
    if ctx.needs_input_grad[1] or ctx.needs_input_grad[2]:
        gw, gb = _grad_weight(grad, x, *ctx.parameters, *where)
    return gx, gw if ctx.needs_input_grad[1] else None, gb if ctx.needs_input_grad[2] else None, *(None,) * 4


def _save_grad_input(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    grad, weight, _, control, slots, ctx.segments, ctx.geometry = inputs
    save(ctx, control, LABEL, grad, weight, slots)


def _grad_input_backward(ctx: Any, gg: Tensor) -> tuple[Any, ...]:
    control, grad, weight, slots = saved(ctx)
    where = control, slots, ctx.segments, ctx.geometry
    return _conv2d(gg, weight, None, *where), _grad_weight(grad, gg, weight, None, *where)[0], *(None,) * 5


def _save_grad_weight(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    grad, x, _, bias, control, slots, ctx.segments, ctx.geometry = inputs
    ctx.has_bias = bias is not None
    save(ctx, control, LABEL, grad, x, slots)


def _grad_weight_backward(ctx: Any, ggw: Tensor, ggb: Tensor) -> tuple[Any, ...]:
    control, grad, x, slots = saved(ctx)
    where = control, slots, ctx.segments, ctx.geometry
    return _conv2d(x, ggw, ggb if ctx.has_bias else None, *where), _grad_input(grad, ggw, x.shape, *where), *(None,) * 6


_conv2d.register_autograd(_conv2d_backward, setup_context=_save_conv2d)
_grad_input.register_autograd(_grad_input_backward, setup_context=_save_grad_input)
_grad_weight.register_autograd(_grad_weight_backward, setup_context=_save_grad_weight)
