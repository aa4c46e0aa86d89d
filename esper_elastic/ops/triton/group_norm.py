"""``group_norm`` by the kernels of ``triton_kernels/group_norm.py``; second derivatives by plain ops."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...triton_kernels.group_norm import group_norm_backward, group_norm_forward
from ...triton_kernels.launch import Segments
from ..widths import Widths
from .common import active, differentiated, images_like, launching, save, saved, switched_on

LABEL = "ElasticGroupNorm"


def group_norm(input: Tensor, group_width: int | None, weight: Tensor | None, bias: Tensor | None, widths: Widths, eps: float) -> Tensor:
    """See :func:`esper_elastic.ops.group_norm.group_norm`; in static layout."""
    if input.is_cuda and torch.is_autocast_enabled("cuda"):
        input = input.float()  # autocast on CUDA normalises in float32
    y, _, _ = _group_norm(input, weight, bias, widths.control, widths.slots, widths.segments, group_width or 0, eps)
    return y


@torch.library.custom_op("esper_elastic::triton_group_norm", mutates_args=())
def _group_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, control: Tensor, slots: Tensor, segments: list[int], width: int, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    with launching(control):
        return group_norm_forward(x, width, weight, bias, control, slots, Segments(*segments), eps)


@torch.library.custom_op("esper_elastic::triton_group_norm_backward", mutates_args=())
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
    width: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """A gradient without its parameter has no elements. Of ``bias``, shape and type alone matter."""
    with launching(control):
        gx, gw, gb = group_norm_backward(grad, x, width, weight, bias, mean, rstd, control, slots, Segments(*segments))
        return gx, x.new_empty(0) if gw is None else gw, x.new_empty(0) if gb is None else gb


@_group_norm.register_fake
def _(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, control: Tensor, slots: Tensor, segments: list[int], width: int, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    mean = x.new_empty((x.shape[0], x.shape[1] // width if width else 1), dtype=torch.float32)
    return images_like(x), mean, torch.empty_like(mean)


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
    width: int,
) -> tuple[Tensor, Tensor, Tensor]:
    gw, gb = (x.new_empty(0) if p is None else p.new_empty(p.shape) for p in (weight, bias))
    return images_like(x), gw, gb


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    x, weight, bias, control, slots, ctx.segments, ctx.width, ctx.eps = inputs
    save(ctx, control, LABEL, x, weight, slots, *output[1:])
    ctx.bias = bias


def _derive(ctx: Any, grad: Tensor, *_: Any) -> tuple[Any, ...]:
    control, x, weight, slots, mean, rstd = saved(ctx)
    bias, nothing = ctx.bias, (None,) * 5
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (grad, x, weight)):

        def formula(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
            units, _, switches, _ = ctx.segments
            images, channels = x.shape[:2]
            inside = active(control, slots, 0, units, channels)[:, None]
            values = torch.where(inside, x.reshape(images, channels, -1), 0)
            groups = channels // ctx.width if ctx.width else 1
            size = values.shape[2] * (ctx.width or inside.sum())

            def over_groups(t: Tensor) -> Tensor:
                """What each channel's group has on average."""
                sums = t.reshape(images, groups, -1).sum(2) / size
                return sums.repeat_interleave(channels // groups, 1)[:, :, None]

            centred = torch.where(inside, values - over_groups(values), 0)
            y = centred * (over_groups(centred.square()) + ctx.eps).rsqrt()
            y = y if weight is None else y * torch.where(inside, weight[:, None], 0)
            y = y if bias is None else y + torch.where(inside, bias[:, None], 0)
            return torch.where(switched_on(control, slots, switches), y, 0).to(x.dtype).reshape(x.shape)

        return *differentiated(ctx, formula, (x, weight, bias), grad), *nothing
    gx, gw, gb = _backward(grad, x, weight, bias, mean, rstd, control, slots, ctx.segments, ctx.width)
    return gx, None if weight is None else gw, None if bias is None else gb, *nothing


_group_norm.register_autograd(_derive, setup_context=_save)
