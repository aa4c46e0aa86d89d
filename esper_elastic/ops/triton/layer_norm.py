"""``layer_norm`` by the kernels of ``triton_kernels/layer_norm.py``; second derivatives by plain ops."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ...triton_kernels.launch import Segments
from ...triton_kernels.layer_norm import layer_norm_backward, layer_norm_forward
from ..widths import Widths
from .common import active, differentiated, flat, launching, save, saved, shaped, switched_on

LABEL = "ElasticLayerNorm"


def layer_norm(
    input: Tensor, fixed_shape: tuple[int, ...], weight: Tensor | None, bias: Tensor | None, widths: Widths, eps: float
) -> Tensor:
    """See :func:`esper_elastic.ops.layer_norm.layer_norm`; in static layout."""
    fixed = math.prod(fixed_shape)
    x = input.reshape(-1, widths.axes[0].capacity * fixed)
    if x.is_cuda and torch.is_autocast_enabled("cuda"):
        x = x.float()  # autocast on CUDA normalises in float32
    y, _, _ = _layer_norm(x, weight, bias, widths.control, widths.slots, widths.segments, fixed, eps)
    return y.view(input.shape)


@torch.library.custom_op("esper_elastic::triton_layer_norm", mutates_args=())
def _layer_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, control: Tensor, slots: Tensor, segments: list[int], fixed: int, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    with launching(control):
        y, mean, rstd = layer_norm_forward(x.contiguous(), fixed, flat(weight), flat(bias), None, control, slots, Segments(*segments), eps)
        assert mean is not None
        return y, mean, rstd


@torch.library.custom_op("esper_elastic::triton_layer_norm_backward", mutates_args=())
def _backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    control: Tensor,
    slots: Tensor,
    segments: list[int],
    fixed: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """A gradient without its parameter has no elements. Of ``bias``, shape and type alone matter."""
    with launching(control):
        gx, gw, gb, _ = layer_norm_backward(
            grad.contiguous(), x.contiguous(), fixed, flat(weight), flat(bias), None, mean, rstd, control, slots, Segments(*segments)
        )
        return gx, shaped(gw, weight, x), shaped(gb, bias, x)


@_layer_norm.register_fake
def _(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, control: Tensor, slots: Tensor, segments: list[int], fixed: int, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    rows = x.new_empty(x.shape[0], dtype=torch.float32)
    return x.new_empty(x.shape), rows, torch.empty_like(rows)


@_backward.register_fake
def _(
    grad: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    control: Tensor,
    slots: Tensor,
    segments: list[int],
    fixed: int,
) -> tuple[Tensor, Tensor, Tensor]:
    gw, gb = (x.new_empty(0) if p is None else p.new_empty(p.shape) for p in (weight, bias))
    return x.new_empty(x.shape), gw, gb


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    x, weight, bias, control, slots, ctx.segments, ctx.fixed, ctx.eps = inputs
    save(ctx, control, LABEL, x, weight, slots, *output[1:])
    ctx.bias = bias


def _derive(ctx: Any, grad: Tensor, *_: Any) -> tuple[Any, ...]:
    control, x, weight, slots, mean, rstd = saved(ctx)
    bias, nothing = ctx.bias, (None,) * 5
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (grad, x, weight)):

        def formula(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
            units, _, switches, _ = ctx.segments
            inside = active(control, slots, 0, units, x.shape[1] // ctx.fixed).repeat_interleave(ctx.fixed)
            values = torch.where(inside, x, 0)
            size = inside.sum()
            centred = torch.where(inside, values - values.sum(1, keepdim=True) / size, 0)
            y = centred * (centred.square().sum(1, keepdim=True) / size + ctx.eps).rsqrt()
            y = y if weight is None else y * torch.where(inside, weight.view(-1), 0)
            y = y if bias is None else y + torch.where(inside, bias.view(-1), 0)
            return torch.where(switched_on(control, slots, switches), y, 0).to(x.dtype)

        return *differentiated(ctx, formula, (x, weight, bias), grad), *nothing
    gx, gw, gb = _backward(grad, x, weight, bias, mean, rstd, control, slots, ctx.segments, ctx.fixed)
    return gx, None if weight is None else gw, None if bias is None else gb, *nothing


_layer_norm.register_autograd(_derive, setup_context=_save)
