"""``batch_norm`` by the kernels of ``triton_kernels/batch_norm.py``; second derivatives by plain ops.

Two ops: one takes the statistics of a batch and moves the running ones, which no gradient passes through; the other normalises, and its
derivative knows that in training the statistics were those of its input.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...triton_kernels.batch_norm import batch_norm_apply, batch_norm_backward, batch_norm_statistics
from ...triton_kernels.launch import Segments
from ..widths import Widths
from .common import active, differentiated, images_like, launching, save, saved, switched_on

LABEL = "ElasticBatchNorm"


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
    """See :func:`esper_elastic.ops.batch_norm.batch_norm`; in static layout."""
    where = widths.control, widths.slots, widths.segments
    if training:
        mean, spread = _statistics(input.detach(), running_mean, running_var, num_batches_tracked, *where, momentum, eps)
    else:
        assert running_mean is not None and running_var is not None
        mean, spread = running_mean, running_var
    return _apply(input, weight, bias, mean, spread, *where, training, eps)


@torch.library.custom_op("esper_elastic::triton_batch_norm_statistics", mutates_args=("running_mean", "running_var", "num_batches_tracked"))
def _statistics(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    control: Tensor,
    slots: Tensor,
    segments: list[int],
    momentum: float | None,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """Mean and one over the deviation of each active channel."""
    with launching(control):
        at = control, slots, Segments(*segments)
        return batch_norm_statistics(x, running_mean, running_var, num_batches_tracked, *at, momentum, eps)


@torch.library.custom_op("esper_elastic::triton_batch_norm", mutates_args=())
def _apply(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    spread: Tensor,
    control: Tensor,
    slots: Tensor,
    segments: list[int],
    training: bool,
    eps: float,
) -> Tensor:
    with launching(control):
        at = control, slots, Segments(*segments)
        return batch_norm_apply(x, weight, bias, None, mean, spread, *at, training, eps)


@torch.library.custom_op("esper_elastic::triton_batch_norm_backward", mutates_args=())
def _backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    spread: Tensor,
    control: Tensor,
    slots: Tensor,
    segments: list[int],
    training: bool,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """A gradient without its parameter has no elements."""
    with launching(control):
        at = control, slots, Segments(*segments)
        gx, gw, gb, _ = batch_norm_backward(grad, x, weight, bias, None, mean, spread, *at, training, eps)
        return gx, x.new_empty(0) if gw is None else gw, x.new_empty(0) if gb is None else gb


@_statistics.register_fake
def _(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    control: Tensor,
    slots: Tensor,
    segments: list[int],
    momentum: float | None,
    eps: float,
) -> tuple[Tensor, Tensor]:
    mean = x.new_empty(x.shape[1], dtype=torch.float32)
    return mean, torch.empty_like(mean)


@_apply.register_fake
def _(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    spread: Tensor,
    control: Tensor,
    slots: Tensor,
    segments: list[int],
    training: bool,
    eps: float,
) -> Tensor:
    return images_like(x)


@_backward.register_fake
def _(
    grad: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    spread: Tensor,
    control: Tensor,
    slots: Tensor,
    segments: list[int],
    training: bool,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    gw, gb = (x.new_empty(0) if p is None else torch.empty_like(p) for p in (weight, bias))
    return images_like(x), gw, gb


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, bias, mean, spread, control, slots, ctx.segments, ctx.training, ctx.eps = inputs
    save(ctx, control, LABEL, x, weight, slots, mean, spread)
    ctx.bias = bias


def _derive(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    control, x, weight, slots, mean, spread = saved(ctx)
    bias, nothing = ctx.bias, (None,) * 7
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (grad, x, weight)):

        def formula(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
            features, _, switches, _ = ctx.segments
            shape = [1, -1] + [1] * (x.dim() - 2)
            inside = active(control, slots, 0, features, x.shape[1])
            mask = inside.view(shape)
            values = torch.where(mask, x, 0)
            if ctx.training:
                axes = [axis for axis in range(x.dim()) if axis != 1]
                centred = values - values.mean(axes, keepdim=True)
                y = centred * (centred.square().mean(axes, keepdim=True) + ctx.eps).rsqrt()
            else:
                scale = (torch.where(inside, spread, 0) + ctx.eps).rsqrt()
                y = (values - torch.where(inside, mean, 0).view(shape)) * scale.view(shape)
            y = y if weight is None else y * torch.where(inside, weight, 0).view(shape)
            y = y if bias is None else y + torch.where(inside, bias, 0).view(shape)
            return torch.where(mask & switched_on(control, slots, switches), y, 0).to(x.dtype)

        return *differentiated(ctx, formula, (x, weight, bias), grad), *nothing
    gx, gw, gb = _backward(grad, x, weight, bias, mean, spread, control, slots, ctx.segments, ctx.training, ctx.eps)
    return gx, None if weight is None else gw, None if bias is None else gb, *nothing


_apply.register_autograd(_derive, setup_context=_save)
