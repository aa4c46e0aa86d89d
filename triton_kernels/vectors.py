"""Loads and stores as wide as memory has them, of rows whose active part ends anywhere.

The compiler joins masked accesses into one wide access only where it can prove that their mask is constant. So masks of loads reach a
little farther than what is active, up to the next multiple of ``VECTOR``; what they load there may be anything, and is replaced once it is
in registers.
"""

import math

import triton
import triton.language as tl

from .widths import segment_active, segment_start


def vector_of(size: int, aligned: bool = True) -> int:
    """How many neighbours along an axis of ``size`` are accessed together: at most 8, 16 bytes of a 16-bit type."""
    return math.gcd(size, 8) if aligned else 1


@triton.jit
def round_up(length, VECTOR: tl.constexpr):
    """The next multiple of ``VECTOR``, which the compiler then knows to be one."""
    return tl.cdiv(length, VECTOR) * VECTOR


@triton.jit
def find_extent(control, slots, on, FIXED: tl.constexpr, SEGMENTS: tl.constexpr, VECTOR: tl.constexpr):
    """The index behind the last active one, rounded up: none is active from there on. Zero, if ``on`` is."""
    extent = 0
    for segment in tl.static_range(SEGMENTS):
        stop = (segment_start(slots, 0, segment) + segment_active(control, slots, segment)) * FIXED
        extent = max(extent, stop * on)
    return round_up(extent, VECTOR)


@triton.jit
def find_active(control, slots, index, FIXED: tl.constexpr, SEGMENTS: tl.constexpr, VECTOR: tl.constexpr):
    """Which indices of an axis are active, and which are to be loaded; each unit of its dims has ``FIXED`` indices."""
    active = index < 0
    loaded = index < 0
    for segment in tl.static_range(SEGMENTS):
        # rounded down, which changes nothing: where segments are not aligned, VECTOR is 1
        start = segment_start(slots, 0, segment) * FIXED // VECTOR * VECTOR
        length = segment_active(control, slots, segment) * FIXED
        active |= (index >= start) & (index < start + length)
        loaded |= (index >= start) & (index < start + round_up(length, VECTOR))
    return active, loaded


@triton.jit
def fill_with_zeros(target, rows, size, first, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Zeros in the columns from ``first`` on of a matrix; all programs take part."""
    blocks = tl.cdiv(size - first, COLUMNS)
    for item in range(tl.program_id(0), tl.cdiv(rows, ROWS) * blocks, tl.num_programs(0)):
        r = item // blocks * ROWS + tl.arange(0, ROWS)
        c = first + item % blocks * COLUMNS + tl.arange(0, COLUMNS)
        nothing = tl.zeros((ROWS, COLUMNS), dtype=target.dtype.element_ty)
        tl.store(target + r[:, None].to(tl.int64) * size + c[None, :], nothing, mask=(r < rows)[:, None] & (c < size)[None, :])
