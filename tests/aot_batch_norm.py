"""Every configuration of ``batch_norm``'s kernels, for aot.py."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator

import torch
from kernels import Segment, widths

from esper_elastic.triton_kernels.batch_norm import batch_norm_backward, batch_norm_eval, batch_norm_forward


def launch_all(
    dtype: torch.dtype, channels_last: bool, channels: int = 256, side: int = 28, segments: int = 1, activation: str = "relu"
) -> None:
    """Forward and backward, in training and eval mode, with everything that can be fused, and with an activation alone."""
    at = widths([Segment(8, channels // segments)] * segments, switches=(1,))
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    x = torch.empty(64, channels, side, side, dtype=dtype, memory_format=memory_format)
    weight, bias, mean, var = (torch.empty(channels) for _ in range(4))
    where = (at.control, at.slots, at.segments)
    for residual, momentum in ((None, 0.1), (x, None)):
        operands = (x, weight, bias, residual)
        _, *saved = batch_norm_forward(*operands, mean, var, torch.tensor(0), *where, momentum, 1e-5, activation)
        batch_norm_eval(*operands, mean, var, *where, 1e-5, activation)
        for training in (True, False):
            batch_norm_backward(x, *operands, *saved, *where, training, 1e-5, activation)


def ahead_of_time_cases() -> Iterator[tuple[str, Callable[[], None]]]:
    for dtype, channels_last in itertools.product((torch.bfloat16, torch.float32), (False, True)):
        name = f"{str(dtype)[6:]}, {'channels last' if channels_last else 'contiguous'}"
        yield name, lambda dtype=dtype, channels_last=channels_last: launch_all(dtype, channels_last)
    yield "gelu", lambda: launch_all(torch.bfloat16, True, activation="gelu")
    yield "small images", lambda: launch_all(torch.bfloat16, False, side=7)
    yield "large images", lambda: launch_all(torch.bfloat16, False, side=56)
    yield "concatenated", lambda: launch_all(torch.bfloat16, True, segments=2)
    yield "unaligned", lambda: launch_all(torch.bfloat16, True, channels=253)
