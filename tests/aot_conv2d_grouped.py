"""Every configuration of the kernels of grouped convolution, for aot.py."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from kernels import Segment, widths

from esper_elastic.triton_kernels.conv2d import conv2d_forward, conv2d_grad_input, conv2d_grad_weight


def launch_all(dtype: torch.dtype, width: int, allow_tf32: bool = False, kernel: int = 3, stride: int = 1) -> None:
    """Forward and backward of groups of ``width`` channels, with a bias."""
    at = widths([Segment(5, 32, width)], [Segment(5, 32, width)], switches=(1,))
    x = torch.empty(16, 32 * width, 56, 56, dtype=dtype).contiguous(memory_format=torch.channels_last)
    weight, bias = torch.empty(32 * width, width, kernel, kernel, dtype=dtype), torch.empty(32 * width, dtype=dtype)
    where = (at.control, at.slots, at.segments, (stride, stride), (1, 1), (1, 1), True)
    y = conv2d_forward(x, weight, bias, *where, allow_tf32=allow_tf32)
    conv2d_grad_input(y, weight, tuple(x.shape), *where, allow_tf32=allow_tf32)
    conv2d_grad_weight(y, x, weight, bias, *where, allow_tf32=allow_tf32)


def ahead_of_time_cases() -> Iterator[tuple[str, Callable[[], None]]]:
    for name, width in {"narrow": 4, "odd": 6, "wide": 72, "depthwise": 1}.items():
        yield f"bf16, {name}", lambda width=width: launch_all(torch.bfloat16, width)
    yield "bf16, depthwise, large windows", lambda: launch_all(torch.bfloat16, 1, kernel=7, stride=2)
    yield "fp32, tf32 on", lambda: launch_all(torch.float32, 64, True)
    yield "fp32, tf32 off", lambda: launch_all(torch.float32, 64)
    yield "fp32, depthwise", lambda: launch_all(torch.float32, 1)
