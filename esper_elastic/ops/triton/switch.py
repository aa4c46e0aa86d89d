"""``switch`` by the kernel of ``triton_kernels/switch.py``; linear, and so its own derivative."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...triton_kernels.switch import select
from .common import launching, save, saved

LABEL = "ElasticBlock"


def switch(branch: Tensor, otherwise: Tensor | None, control: Tensor, slot: Tensor) -> Tensor:
    """See :func:`esper_elastic.ops.switch.switch`."""
    if otherwise is None:
        return _gate(branch, control, slot, False)
    return _select(branch, otherwise, control, slot)


@torch.library.custom_op("esper_elastic::triton_select", mutates_args=())
def _select(branch: Tensor, otherwise: Tensor, control: Tensor, slot: Tensor) -> Tensor:
    with launching(control):
        result = _dense_like(branch)
        select(_in_place_of(branch, result), _in_place_of(otherwise, result), result, control, slot)
        return result


@torch.library.custom_op("esper_elastic::triton_gate", mutates_args=())
def _gate(branch: Tensor, control: Tensor, slot: Tensor, inverted: bool) -> Tensor:
    with launching(control):
        result = _dense_like(branch)
        select(_in_place_of(branch, result), None, result, control, slot, inverted)
        return result


@_select.register_fake
def _(branch: Tensor, otherwise: Tensor, control: Tensor, slot: Tensor) -> Tensor:
    return _dense_like(branch)


@_gate.register_fake
def _(branch: Tensor, control: Tensor, slot: Tensor, inverted: bool) -> Tensor:
    return _dense_like(branch)


def _dense_like(tensor: Tensor) -> Tensor:
    """An empty tensor without gaps, in the memory order of ``tensor``."""
    return torch.empty_like(tensor, memory_format=torch.preserve_format)


def _in_place_of(tensor: Tensor, like: Tensor) -> Tensor:
    """``tensor`` with the strides of ``like``."""
    return tensor if tensor.stride() == like.stride() else torch.empty_like(like, dtype=tensor.dtype).copy_(tensor)


def _save_select(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    save(ctx, inputs[2], LABEL, inputs[3])


def _select_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    control, slot = saved(ctx)
    return _gate(grad, control, slot, False), _gate(grad, control, slot, True), None, None


def _save_gate(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.inverted = inputs[3]
    save(ctx, inputs[1], LABEL, inputs[2])


def _gate_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    control, slot = saved(ctx)
    return _gate(grad, control, slot, ctx.inverted), None, None, None


_select.register_autograd(_select_backward, setup_context=_save_select)
_gate.register_autograd(_gate_backward, setup_context=_save_gate)
