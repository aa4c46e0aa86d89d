"""Tensors that change size and stay the objects that they are.

A parameter whose storage is swapped keeps its identity, hooks and place in its optimizer. What does not follow by itself is done here:
the gradient, and the graph node that collects it, which remembers the old size. The rest is reported to :mod:`undo`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .. import undo

#: Copies what is kept from a tensor of the old shape to one of the new: ``write(made, old)``.
Write = Callable[[Tensor, Tensor], None]


def replace_storage(tensor: Tensor, storage: Tensor, write: Write) -> None:
    """Let a parameter or buffer hold ``storage``, of another shape.

    Args:
        tensor: that keeps its identity, ``requires_grad`` and hooks.
        storage: of the same type and on the same device, written already.
        write: how a gradient, or an optimizer's state, comes from the old shape to the new.

    Effects:
        Swaps ``tensor.data``; ``tensor.grad`` is a new tensor where there was one. A graph that was built before raises in its backward.
    """
    shape = tuple(tensor.shape)
    with torch.no_grad():
        grad = tensor.grad
        tensor.grad = None  # a gradient has the shape of its tensor at any time
        swap(tensor, storage)
        if grad is not None:
            made = zeros(grad, tuple(storage.shape))
            write(made, grad)
            tensor.grad = made
    undo.moved(tensor, shape, write)


def swap(tensor: Tensor, storage: Tensor) -> None:
    """Let a tensor without gradient hold ``storage``, and have autograd forget the size that it had."""
    if tensor.requires_grad:
        # the node that collects a gradient checks its shape against that of the day when it was made, and lives on in any graph that is
        # still alive; torch makes another when the type changes, and not when the shape does
        tensor.data = tensor.data.new_empty(0, dtype=torch.float16 if tensor.dtype != torch.float16 else torch.float32)
    tensor.data = storage


def zeros(like: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Zeros of another shape, in the memory format of ``like``."""
    return torch.zeros(shape, dtype=like.dtype, device=like.device).contiguous(memory_format=_memory_format(like))


def _memory_format(tensor: Tensor) -> torch.memory_format:
    last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(tensor.dim())
    if last is not None and tensor.is_contiguous(memory_format=last) and tensor.stride(1) == 1 and tensor.stride(-1) == tensor.size(1) > 1:
        return last
    return torch.contiguous_format
