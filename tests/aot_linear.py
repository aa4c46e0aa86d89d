"""Every configuration of ``linear``'s kernels, for aot.py."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator

import torch
from kernels import Segment, widths

from esper_elastic.triton_kernels.linear import activation_backward, linear_forward, linear_grad_input, linear_grad_weight


def launch_all(dtype: torch.dtype, allow_tf32: bool = False, rows: int = 256, in_size: int = 512, segments: int = 1) -> None:
    """Forward and backward, with everything that can be fused."""
    out, inner = ([Segment(64, size // segments)] * segments for size in (512, in_size))
    at = widths(out, inner, switches=(1,))
    x, grad = (torch.empty(rows, size, dtype=dtype) for size in (in_size, 512))
    weight, bias = torch.empty(512, in_size, dtype=dtype), torch.empty(512, dtype=dtype)
    where = (at.control, at.slots, at.segments)
    for activation in ("none", "gelu"):
        linear_forward(x, weight, bias, *where, activation, activation != "none", allow_tf32=allow_tf32)
    activation_backward(grad, grad, "gelu", *where)
    linear_grad_input(grad, weight, *where, allow_tf32=allow_tf32)
    linear_grad_weight(grad, x, weight, bias, *where, allow_tf32=allow_tf32)


def ahead_of_time_cases() -> Iterator[tuple[str, Callable[[], None]]]:
    yield "bf16", lambda: launch_all(torch.bfloat16)
    yield "bf16, few rows", lambda: launch_all(torch.bfloat16, rows=32)
    yield "bf16, unaligned", lambda: launch_all(torch.bfloat16, in_size=508)
    yield "bf16, concatenated", lambda: launch_all(torch.bfloat16, segments=2)
    for dtype, allow_tf32 in itertools.product((torch.float32,), (False, True)):
        yield f"fp32, tf32 {'on' if allow_tf32 else 'off'}", lambda dtype=dtype, tf32=allow_tf32: launch_all(dtype, tf32)
