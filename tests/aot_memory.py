"""Every configuration of the kernels that only move memory, for aot.py."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from kernels import Segment, widths

from esper_elastic.triton_kernels.cast import cast_active
from esper_elastic.triton_kernels.switch import select


def ahead_of_time_cases() -> Iterator[tuple[str, Callable[[], None]]]:
    at = widths([Segment(64, 512)], [Segment(64, 512)])
    weight = torch.empty(512, 512)
    yield "fp32 to bf16", lambda: cast_active(weight, torch.bfloat16, at.control, at.slots, at.segments)
    x = torch.empty(1 << 20, dtype=torch.bfloat16)
    yield "block", lambda: select(x, x, torch.empty_like(x), at.control, at.slots[0, 1:2])
    yield "branch", lambda: select(x, None, torch.empty_like(x), at.control, at.slots[0, 1:2], True)
