"""Every configuration of ``conv2d``'s kernels, for aot.py."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from kernels import Segment, widths

from esper_elastic.triton_kernels.conv2d import conv2d_forward, conv2d_grad_input, conv2d_grad_weight


def launch_all(dtype, allow_tf32=False, images=16, channels=256, out_channels=256, segments=1, stride=(1, 1), kernel=(3, 3)) -> None:
    """Forward and backward, with a bias."""
    out, inner = ([Segment(64, size // segments)] * segments for size in (out_channels, channels))
    at = widths(out, inner, switches=(1,))
    x = torch.empty(images, channels, 56, 56, dtype=dtype, memory_format=torch.channels_last)
    weight = torch.empty(out_channels, channels, *kernel, dtype=dtype)
    bias = torch.empty(out_channels, dtype=dtype)
    where = (at.control, at.slots, at.segments, stride, (1, 1), (1, 1), False)
    y = conv2d_forward(x, weight, bias, *where, allow_tf32=allow_tf32)
    conv2d_grad_input(y, weight, tuple(x.shape), *where, allow_tf32=allow_tf32)
    conv2d_grad_weight(y, x, weight, bias, *where, allow_tf32=allow_tf32)


def ahead_of_time_cases() -> Iterator[tuple[str, Callable[[], None]]]:
    yield "bf16", lambda: launch_all(torch.bfloat16)
    yield "bf16, few rows", lambda: launch_all(torch.bfloat16, images=1)
    yield "bf16, stride", lambda: launch_all(torch.bfloat16, stride=(2, 2))
    yield "bf16, unaligned", lambda: launch_all(torch.bfloat16, channels=250)
    yield "bf16, concatenated", lambda: launch_all(torch.bfloat16, segments=2)
    yield "bf16, few channels", lambda: launch_all(torch.bfloat16, channels=3, kernel=(7, 7), stride=(2, 2))
    yield "fp32, tf32 on", lambda: launch_all(torch.float32, True)
    yield "fp32, tf32 on, unaligned", lambda: launch_all(torch.float32, True, channels=250)
    yield "fp32, tf32 off", lambda: launch_all(torch.float32)
    yield "fp32, tf32 off, unaligned", lambda: launch_all(torch.float32, channels=250)
