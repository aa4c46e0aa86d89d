"""``result[n, k] = weight[n, k]`` in another type, for active n and k; what is dormant is not written, since no kernel reads it."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import Segments, num_programs
from .widths import count_tiles, locate_tile


@triton.jit
def _cast_kernel(
    weight,
    result,
    control,
    slots,
    n_size,
    k_size,
    OUT_SEGMENTS: tl.constexpr,
    IN_SEGMENTS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    active_n, _ = count_tiles(control, slots, 1, n_size, 0, OUT_SEGMENTS, BLOCK_N)
    active_k, _ = count_tiles(control, slots, 1, k_size, OUT_SEGMENTS, IN_SEGMENTS, BLOCK_K)
    for item in range(tl.program_id(0), active_n * active_k, tl.num_programs(0)):
        begin_n, edge_n, _ = locate_tile(control, slots, 1, item // active_k, n_size, 0, OUT_SEGMENTS, BLOCK_N)
        begin_k, edge_k, _ = locate_tile(control, slots, 1, item % active_k, k_size, OUT_SEGMENTS, IN_SEGMENTS, BLOCK_K)
        n = begin_n + tl.arange(0, BLOCK_N)
        k = begin_k + tl.arange(0, BLOCK_K)
        place = n[:, None].to(tl.int64) * k_size + k[None, :]
        inside = (n < edge_n)[:, None] & (k < edge_k)[None, :]
        tl.store(result + place, tl.load(weight + place, mask=inside, other=0.0).to(result.dtype.element_ty), mask=inside)


def cast_active(weight: Tensor, dtype: torch.dtype, control: Tensor, slots: Tensor, segments: Segments) -> Tensor:
    """The active part of ``weight_NK`` in ``dtype``, at its place in a matrix whose other elements are undefined."""
    result = torch.empty_like(weight, dtype=dtype)
    n, k = weight.shape
    block_n, block_k = 8, 512
    tiles = (triton.cdiv(n, block_n) + segments.out) * (triton.cdiv(k, block_k) + segments.inner)
    _cast_kernel[(min(tiles, 8 * num_programs(weight.device)),)](
        weight,
        result,
        control,
        slots,
        n,
        k,
        OUT_SEGMENTS=segments.out,
        IN_SEGMENTS=segments.inner,
        BLOCK_N=block_n,
        BLOCK_K=block_k,
    )
    return result
