"""Every configuration of ``group_norm``'s kernels, for aot.py."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from kernels import Segment, widths

from esper_elastic.triton_kernels.group_norm import group_norm_backward, group_norm_forward


def launch_all(
    dtype: torch.dtype, channels: int, width: int, pixels: int, last: bool, parameter_dtype: torch.dtype | None = None, segments: int = 1
) -> None:
    """Forward and backward."""
    at = widths([Segment(32, channels // segments)] * segments, switches=(1,))
    x, grad = (torch.empty(8, channels, pixels, pixels, dtype=dtype) for _ in range(2))
    if last:
        x, grad = (t.contiguous(memory_format=torch.channels_last) for t in (x, grad))
    weight, bias = (torch.empty(channels, dtype=parameter_dtype or dtype) for _ in range(2))
    where = (at.control, at.slots, at.segments)
    _, mean, rstd = group_norm_forward(x, width, weight, bias, *where, 1e-5)
    group_norm_backward(grad, x, width, weight, bias, mean, rstd, *where)


def ahead_of_time_cases() -> Iterator[tuple[str, Callable[[], None]]]:
    for last in (False, True):
        form = "channels last" if last else "contiguous"
        yield f"bf16, {form}", lambda last=last: launch_all(torch.bfloat16, 256, 8, 32, last)
        yield f"fp32, one group, {form}", lambda last=last: launch_all(torch.float32, 256, 0, 14, last)
    yield "bf16, fp32 parameters, concatenated", lambda: launch_all(torch.bfloat16, 256, 16, 7, False, torch.float32, segments=2)
    yield "fp32, one group, concatenated", lambda: launch_all(torch.float32, 256, 0, 16, True, segments=2)
    yield "bf16, one by one", lambda: launch_all(torch.bfloat16, 256, 8, 1, False)
