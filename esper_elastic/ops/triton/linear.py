"""``linear`` by the kernels of ``triton_kernels/linear.py``: three ops, each of which is the derivative of the others."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...triton_kernels.cast import cast_active
from ...triton_kernels.launch import Segments
from ...triton_kernels.linear import linear_forward, linear_grad_input, linear_grad_weight
from ..widths import Widths
from .common import autocast, launching, matmul_tf32, save, saved

LABEL = "ElasticLinear"


def linear(input: Tensor, weight: Tensor, bias: Tensor | None, widths: Widths) -> Tensor:
    """See :func:`esper_elastic.ops.linear.linear`; in static layout."""
    x = autocast(input)
    y = _linear(x.reshape(-1, x.shape[-1]), weight, bias, widths.control, widths.slots, widths.segments)
    return y.view(*input.shape[:-1], weight.shape[0])


def _operand(weight: Tensor, like: Tensor, control: Tensor, slots: Tensor, segments: Segments) -> Tensor:
    """``weight`` in the type of an activation."""
    weight = weight.contiguous()
    return weight if weight.dtype == like.dtype else cast_active(weight, like.dtype, control, slots, segments)


@torch.library.custom_op("esper_elastic::triton_linear", mutates_args=())
def _linear(x: Tensor, weight: Tensor, bias: Tensor | None, control: Tensor, slots: Tensor, segments: list[int]) -> Tensor:
    with launching(control):
        at = Segments(*segments)
        w = _operand(weight, x, control, slots, at)
        y, _ = linear_forward(x.contiguous(), w, bias, control, slots, at, allow_tf32=matmul_tf32(x))
        return y


@torch.library.custom_op("esper_elastic::triton_linear_grad_input", mutates_args=())
def _grad_input(grad: Tensor, weight: Tensor, control: Tensor, slots: Tensor, segments: list[int]) -> Tensor:
    with launching(control):
        at = Segments(*segments)
        w = _operand(weight, grad, control, slots, at)
        return linear_grad_input(grad.contiguous(), w, control, slots, at, allow_tf32=matmul_tf32(grad))


@torch.library.custom_op("esper_elastic::triton_linear_grad_weight", mutates_args=())
def _grad_weight(
    grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, control: Tensor, slots: Tensor, segments: list[int]
) -> tuple[Tensor, Tensor]:
    """The second result has no elements where there is no bias. Of ``weight`` and ``bias``, shape and type alone matter."""
    with launching(control):
        operands = grad.contiguous(), x.contiguous(), weight, bias
        gw, gb = linear_grad_weight(*operands, control, slots, Segments(*segments), allow_tf32=matmul_tf32(x))
        return gw, weight.new_empty(0) if gb is None else gb


@_linear.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None, control: Tensor, slots: Tensor, segments: list[int]) -> Tensor:
    return x.new_empty((x.shape[0], weight.shape[0]))


@_grad_input.register_fake
def _(grad: Tensor, weight: Tensor, control: Tensor, slots: Tensor, segments: list[int]) -> Tensor:
    return grad.new_empty((grad.shape[0], weight.shape[1]))


@_grad_weight.register_fake
def _(
    grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, control: Tensor, slots: Tensor, segments: list[int]
) -> tuple[Tensor, Tensor]:
    return weight.new_empty(weight.shape), weight.new_empty(0) if bias is None else bias.new_empty(bias.shape)


def _save_linear(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, bias, control, slots, ctx.segments = inputs
    # Values are saved where a gradient needs them, as nn does; for the other gradients the shape of a parameter is enough.
    needs_x, *needs_parameter = ctx.needs_input_grad[:3]
    ctx.parameters = weight.detach(), None if bias is None else bias.detach()
    save(ctx, control, LABEL, x if any(needs_parameter) else None, weight if needs_x else None, slots)


def _linear_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    control, x, weight, slots = saved(ctx)
    where = (control, slots, ctx.segments)
    gx = gw = gb = None
    if ctx.needs_input_grad[0]:
        gx = _grad_input(grad, weight, *where)
    if ctx.needs_input_grad[1] or ctx.needs_input_grad[2]:
        gw, gb = _grad_weight(grad, x, *ctx.parameters, *where)
    return gx, gw if ctx.needs_input_grad[1] else None, gb if ctx.needs_input_grad[2] else None, None, None, None


def _save_grad_input(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    grad, weight, control, slots, ctx.segments = inputs
    save(ctx, control, LABEL, grad, weight, slots)


def _grad_input_backward(ctx: Any, gg: Tensor) -> tuple[Any, ...]:
    control, grad, weight, slots = saved(ctx)
    where = (control, slots, ctx.segments)
    return _linear(gg, weight, None, *where), _grad_weight(grad, gg, weight, None, *where)[0], None, None, None


def _save_grad_weight(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    grad, x, _, bias, control, slots, ctx.segments = inputs
    ctx.has_bias = bias is not None
    save(ctx, control, LABEL, grad, x, slots)


def _grad_weight_backward(ctx: Any, ggw: Tensor, ggb: Tensor) -> tuple[Any, ...]:
    control, grad, x, slots = saved(ctx)
    where = (control, slots, ctx.segments)
    return _linear(x, ggw, ggb if ctx.has_bias else None, *where), _grad_input(grad, ggw, *where), None, None, None, None, None


_linear.register_autograd(_linear_backward, setup_context=_save_linear)
_grad_input.register_autograd(_grad_input_backward, setup_context=_save_grad_input)
_grad_weight.register_autograd(_grad_weight_backward, setup_context=_save_grad_weight)
