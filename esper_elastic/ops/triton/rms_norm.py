"""``rms_norm`` by the kernels of ``triton_kernels/rms_norm.py``; second derivatives by plain ops."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ...triton_kernels.launch import Segments
from ...triton_kernels.rms_norm import rms_norm_backward, rms_norm_forward
from ..widths import Widths
from .common import active, differentiated, flat, launching, save, saved, shaped, switched_on

LABEL = "ElasticRMSNorm"


def rms_norm(input: Tensor, fixed_shape: tuple[int, ...], weight: Tensor | None, widths: Widths, eps: float) -> Tensor:
    """See :func:`esper_elastic.ops.rms_norm.rms_norm`; in static layout."""
    fixed = math.prod(fixed_shape)
    x = input.reshape(-1, widths.axes[0].capacity * fixed)
    if x.is_cuda and torch.is_autocast_enabled("cuda"):
        x = x.float()  # autocast on CUDA normalises in float32
    y, _ = _rms_norm(x, weight, widths.control, widths.slots, widths.segments, fixed, eps)
    return y.view(input.shape)


@torch.library.custom_op("esper_elastic::triton_rms_norm", mutates_args=())
def _rms_norm(
    x: Tensor, weight: Tensor | None, control: Tensor, slots: Tensor, segments: list[int], fixed: int, eps: float
) -> tuple[Tensor, Tensor]:
    with launching(control):
        return rms_norm_forward(x.contiguous(), fixed, flat(weight), None, control, slots, Segments(*segments), eps)


@torch.library.custom_op("esper_elastic::triton_rms_norm_backward", mutates_args=())
def _backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor | None,
    rstd: Tensor,
    control: Tensor,
    slots: Tensor,
    segments: list[int],
    fixed: int,
) -> tuple[Tensor, Tensor]:
    """The gradient of a weight that is not there has no elements."""
    with launching(control):
        gx, gw, _ = rms_norm_backward(
            grad.contiguous(), x.contiguous(), fixed, flat(weight), None, rstd, control, slots, Segments(*segments)
        )
        return gx, shaped(gw, weight, x)


@_rms_norm.register_fake
def _(
    x: Tensor, weight: Tensor | None, control: Tensor, slots: Tensor, segments: list[int], fixed: int, eps: float
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape[0], dtype=torch.float32)


@_backward.register_fake
def _(
    grad: Tensor,
    x: Tensor,
    weight: Tensor | None,
    rstd: Tensor,
    control: Tensor,
    slots: Tensor,
    segments: list[int],
    fixed: int,
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(0) if weight is None else weight.new_empty(weight.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight, control, slots, ctx.segments, ctx.fixed, ctx.eps = inputs
    ctx.weight = weight  # its values are saved where a gradient needs them, as nn does
    save(ctx, control, LABEL, x, weight if ctx.needs_input_grad[0] else None, slots, output[1])


def _derive(ctx: Any, grad: Tensor, *_: Any) -> tuple[Any, ...]:
    control, x, weight, slots, rstd = saved(ctx)
    weight, nothing = ctx.weight if weight is None else weight, (None,) * 5
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (grad, x, weight)):

        def formula(x: Tensor, weight: Tensor | None) -> Tensor:
            units, _, switches, _ = ctx.segments
            inside = active(control, slots, 0, units, x.shape[1] // ctx.fixed).repeat_interleave(ctx.fixed)
            values = torch.where(inside, x, 0)
            y = values * (values.square().sum(1, keepdim=True) / inside.sum() + ctx.eps).rsqrt()
            y = y if weight is None else y * torch.where(inside, weight.view(-1), 0)
            return torch.where(switched_on(control, slots, switches), y, 0).to(x.dtype)

        return *differentiated(ctx, formula, (x, weight), grad), *nothing
    gx, gw = _backward(grad, x, weight, rstd, control, slots, ctx.segments, ctx.fixed)
    return gx, None if weight is None else gw, *nothing


_rms_norm.register_autograd(_derive, setup_context=_save)
