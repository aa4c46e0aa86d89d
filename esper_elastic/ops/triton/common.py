"""What Triton's ops share: types for autocast, the check that no commit came between forward and backward."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..reference import check_generation


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
