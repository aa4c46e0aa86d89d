"""Every configuration of the optimizers' kernels, for aot.py."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from esper_elastic.triton_kernels.optimizer import Gradients, Table, adamw, gradient_norm, scale, sgd


def gradients(dtype: torch.dtype) -> tuple[Gradients, torch.Tensor]:
    """Gradients of one parameter under two switches, and the addresses of its tensors."""
    pieces = torch.tensor([[0, 0, 4096, 0, 1, 1, 1, 2, 3]])
    table = Table(pieces, num_params=1, num_elements=1 << 24)
    return Gradients(table, torch.zeros(1, dtype=torch.int64), torch.ones(4, dtype=torch.int32), dtype), torch.zeros(
        5, 1, dtype=torch.int64
    )


def adamw_steps(dtype: torch.dtype) -> None:
    grads, tensors = gradients(dtype)
    common = {"betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.01}
    adamw(grads, tensors, torch.int16, lr=0.1, amsgrad=False, maximize=False, **common)
    adamw(grads, tensors, torch.int32, lr=torch.ones(1), amsgrad=True, maximize=True, **common)


def sgd_steps(dtype: torch.dtype) -> None:
    grads, tensors = gradients(dtype)
    common = {"weight_decay": 0.01}
    sgd(grads, tensors, None, lr=0.1, momentum=0, dampening=0, nesterov=False, maximize=False, **common)
    sgd(grads, tensors, None, lr=torch.ones(1), momentum=0.9, dampening=0, nesterov=True, maximize=True, **common)
    sgd(grads, tensors, torch.int16, lr=0.1, momentum=0.9, dampening=0.5, nesterov=False, maximize=False, **common)


def clipping(dtype: torch.dtype) -> None:
    grads, _ = gradients(dtype)
    for kind in (0, 1, 2):
        _, factor, (tiles,) = gradient_norm([grads], 1.0, kind)
    scale(grads, tiles, factor)
    scale(grads, tiles, None)


def ahead_of_time_cases() -> Iterator[tuple[str, Callable[[], None]]]:
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        for call in (adamw_steps, sgd_steps, clipping):
            yield f"{call.__name__}, {dtype}", lambda call=call, dtype=dtype: call(dtype)
