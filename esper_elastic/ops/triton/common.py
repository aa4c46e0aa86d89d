"""What Triton's ops share: types for autocast, the check that no commit came between forward and backward."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from ...control import Replica
from ..reference import check_generation, fence


@contextlib.contextmanager
def launching(control: Tensor) -> Iterator[None]:
    """Where kernels that read ``control`` are launched, or captured: on its device, and noted, so that commits are ordered with them."""
    replica = Replica.of(control)
    if replica is not None:
        replica.note_reader()
    with torch.cuda.device(control.device) if control.is_cuda else contextlib.nullcontext():
        yield


def autocast(input: Tensor) -> Tensor:
    """``input`` as autocast wants it; kernels cast parameters themselves, and only what is active of them."""
    kind = input.device.type
    if not torch.is_autocast_enabled(kind) or not input.is_floating_point():
        return input
    return input.to(torch.get_autocast_dtype(kind))


def matmul_tf32(input: Tensor) -> bool:
    """Whether torch's own switch lets float32 matrix products use tf32."""
    return input.is_cuda and torch.backends.cuda.matmul.allow_tf32


def save(ctx: Any, control: Tensor, label: str, *tensors: Tensor | None) -> None:
    """Keep what backward needs. The version of the control tensor is kept apart from saved tensors, which hooks may replace."""
    ctx.control, ctx.version, ctx.label = control, control._version, label
    ctx.save_for_backward(control, *tensors)


def saved(ctx: Any) -> tuple[Tensor, ...]:
    """The tensors that :func:`save` kept, the control tensor first.

    Raises:
        GenerationError: widths or switches have changed since.
    """
    check_generation(ctx.control, ctx.version, ctx.label)
    return ctx.saved_tensors


def flat(parameter: Tensor | None) -> Tensor | None:
    """A parameter as the kernels of norms take it."""
    return None if parameter is None else parameter.contiguous().view(-1)


def shaped(gradient: Tensor | None, parameter: Tensor | None, like: Tensor) -> Tensor:
    """A gradient in the shape of its parameter; without one, no elements of the kind of ``like``."""
    return like.new_empty(0) if gradient is None or parameter is None else gradient.view(parameter.shape)


def images_like(x: Tensor) -> Tensor:
    """An empty tensor in the memory format that the kernels of norms over channels write."""
    channels_last = not x.is_contiguous() and x.movedim(1, -1).is_contiguous()
    return x.movedim(1, -1).new_empty(x.movedim(1, -1).shape).movedim(-1, 1) if channels_last else x.new_empty(x.shape)


def active(control: Tensor, slots: Tensor, first: int, count: int, size: int) -> Tensor:
    """Which indices of an axis of ``size`` are active, by the ``count`` rows of ``slots`` from ``first`` on: for formulas in plain ops."""
    index = torch.arange(size, device=control.device)
    _, slot, start, inner = slots[first : first + count].unbind(1)
    stop = start + control[slot] * inner
    return ((index >= start[:, None]) & (index < stop[:, None])).any(0)


def switched_on(control: Tensor, slots: Tensor, count: int) -> Tensor:
    """Whether the switches of the last ``count`` rows are all on: bool, on the device."""
    return (control[slots[len(slots) - count :, 1]] != 0).all()


def differentiated(ctx: Any, formula: Callable[..., Tensor], inputs: tuple[Tensor | None, ...], grad: Tensor) -> tuple[Tensor | None, ...]:
    """The gradients of ``formula(*inputs)``, as often differentiable as its plain ops are: what a backward that is recorded gives."""
    wanted = [t for t, needed in zip(inputs, ctx.needs_input_grad, strict=False) if t is not None and needed]
    found = iter(torch.autograd.grad(formula(*inputs), wanted, grad, create_graph=True))
    return tuple(
        fence(next(found), ctx.control, ctx.label) if t is not None and needed else None
        for t, needed in zip(inputs, ctx.needs_input_grad, strict=False)
    )
