"""Every configuration of ``layer_norm``'s kernels, for aot.py."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from kernels import Segment, widths

from esper_elastic.triton_kernels.layer_norm import layer_norm_backward, layer_norm_forward


def launch_all(
    dtype: torch.dtype, size: int, parameter_dtype: torch.dtype | None = None, segments: int = 1, activation: str = "none"
) -> None:
    """Forward and backward; with an activation also a residual."""
    at = widths([Segment(8, size // segments)] * segments, switches=(1,))
    x, grad, add = (torch.empty(256, size, dtype=dtype) for _ in range(3))
    weight, bias = (torch.empty(size, dtype=parameter_dtype or dtype) for _ in range(2))
    operands = (x, 1, weight, bias, None if activation == "none" else add)
    where = (at.control, at.slots, at.segments)
    _, mean, rstd = layer_norm_forward(*operands, *where, 1e-5, activation)
    layer_norm_backward(grad, *operands, mean, rstd, *where, activation)


def ahead_of_time_cases() -> Iterator[tuple[str, Callable[[], None]]]:
    for size in (768, 4096, 8192, 16384):
        yield f"bf16, {size}", lambda size=size: launch_all(torch.bfloat16, size)
    yield "bf16, fp32 parameters, gelu, residual, 8192", lambda: launch_all(torch.bfloat16, 8192, torch.float32, activation="gelu")
    yield "fp32, gelu, residual, 4096", lambda: launch_all(torch.float32, 4096, activation="gelu")
    yield "fp32, gelu, residual, 16384", lambda: launch_all(torch.float32, 16384, activation="gelu")
    yield "bf16, concatenated, 1024", lambda: launch_all(torch.bfloat16, 1024, segments=2)
    yield "bf16, unaligned, 1001", lambda: launch_all(torch.bfloat16, 1001)
