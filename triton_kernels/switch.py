"""``y = branch`` while all switches are on, and otherwise ``y = x``, or zero; ``gx`` and ``gbranch`` the other way round.

Of the two sources only the one that is wanted is read: a block that is off costs one copy, or one write of zeros.
"""

import triton
import triton.language as tl
from torch import Tensor

from .launch import num_programs

BLOCK = 4096


@triton.jit
def _select_kernel(
    branch,
    otherwise,
    result,
    control,
    slot,
    size,
    INVERTED: tl.constexpr,
    BRANCH: tl.constexpr,
    OTHERWISE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    on = tl.load(control + tl.load(slot)) != 0
    if INVERTED:
        on = not on
    for first in range(tl.program_id(0) * BLOCK, size, tl.num_programs(0) * BLOCK):
        place = first + tl.arange(0, BLOCK).to(tl.int64)
        inside = place < size
        value = tl.zeros((BLOCK,), dtype=result.dtype.element_ty)
        if BRANCH and on:
            value = tl.load(branch + place, mask=inside, other=0.0)
        if OTHERWISE and not on:
            value = tl.load(otherwise + place, mask=inside, other=0.0)
        tl.store(result + place, value, mask=inside)


def select(branch: Tensor | None, otherwise: Tensor | None, result: Tensor, control: Tensor, slot: Tensor, inverted: bool = False) -> None:
    """``result = branch if on else otherwise``; ``None`` stands for zeros. All lie alike in memory, without gaps."""
    size = result.numel()
    if size == 0:
        return
    _select_kernel[(min(triton.cdiv(size, BLOCK), 8 * num_programs(result.device)),)](
        branch,
        otherwise,
        result,
        control,
        slot,
        size,
        INVERTED=inverted,
        BRANCH=branch is not None,
        OTHERWISE=otherwise is not None,
        BLOCK=BLOCK,
        num_warps=8,
    )
