"""How the windows of a convolution lie: which positions of one image a position of the other is made of.

Along an axis, output ``o`` is made of inputs ``i = o stride - padding + k dilation`` for all taps ``k``. Seen from the other side, input
``i`` reaches the outputs ``o = (i + padding - k dilation) / stride`` for those taps where that is whole. Which they are depends on nothing
but the *phase* of ``i``, its remainder by the stride. So both ways position ``u`` of a phase has a window of evenly spaced taps::

    i = u phases + phase                     the position itself; an output has one phase
    tap(s) = first + s tap_step              for s in 0 ... count - 1
    position(s) = u unit + offset + s move   where the window finds what it multiplies
"""

import math
from typing import Any, NamedTuple

import triton
import triton.language as tl

Pair = tuple[int, int]
LARGE: int = 2**30  # elements of a tensor from which on its indices are wide
FEW: int = 16  # input channels that are reduced together with the taps are fewer


class Windows(NamedTuple):
    """A convolution's geometry along height and width; padding is that of each side."""

    kernel: Pair
    stride: Pair
    padding: Pair
    dilation: Pair

    @property
    def taps(self) -> int:
        """How many taps a window of the input has."""
        return self.kernel[0] * self.kernel[1]

    @property
    def pointwise(self) -> bool:
        """Whether an output position is made of the same position of the input alone."""
        return self.kernel == self.stride == (1, 1) and self.padding == (0, 0)

    def output_size(self, height: int, width: int) -> Pair:
        """Height and width of the output of an image of this size."""
        h, w = ((i + 2 * p - d * (k - 1) - 1) // s + 1 for i, k, s, p, d in zip((height, width), *self, strict=True))
        return h, w

    def constants(self, transposed: bool) -> dict[str, Any]:
        """What kernels are compiled for: the windows of outputs, or those of inputs if ``transposed``."""
        step = tuple(s // math.gcd(s, d) if transposed else 1 for s, d in zip(self.stride, self.dilation, strict=True))
        move = tuple(-d * f // s if transposed else d for s, d, f in zip(self.stride, self.dilation, step, strict=True))
        return {
            "KERNEL": self.kernel,
            "STRIDE": self.stride,
            "PADDING": self.padding,
            "DILATION": self.dilation,
            "PHASES": self.stride if transposed else (1, 1),
            "UNIT": (1, 1) if transposed else self.stride,
            "TAP_STEP": step,
            "MOVE": move,
        }


@triton.jit
def window(phase, KERNEL: tl.constexpr, STRIDE: tl.constexpr, PADDING: tl.constexpr, DILATION: tl.constexpr, TRANSPOSED: tl.constexpr):
    """``(first, count, offset)`` of the windows of a phase, along one axis."""
    first = 0
    count = KERNEL
    offset = -PADDING
    if TRANSPOSED:
        count = 0
        for k in tl.static_range(KERNEL):
            hit = (phase + PADDING + k * (STRIDE - DILATION % STRIDE)) % STRIDE == 0
            first = tl.where(hit & (count == 0), k, first)
            count += tl.where(hit, 1, 0)
        offset = (phase + PADDING - first * DILATION) // STRIDE
    return first, count, offset


@triton.jit
def positions(row, images, height, width, PHASES: tl.constexpr, LARGE: tl.constexpr, BLOCK_M: tl.constexpr):
    """A tile's positions in an image of ``height`` and ``width``: phase, image, number within the phase, and which of them there are."""
    rows_h = tl.cdiv(height, PHASES[0])
    rows_w = tl.cdiv(width, PHASES[1])
    if PHASES[0] * PHASES[1] == 1:
        phase_h = 0
        phase_w = 0
        tile = row
    else:
        per_phase = tl.cdiv(images * rows_h * rows_w, BLOCK_M)
        phase_h = row // per_phase // PHASES[1]
        phase_w = row // per_phase % PHASES[1]
        tile = row % per_phase
    m = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    image = m // (rows_h * rows_w)
    u = m // rows_w % rows_h
    v = m % rows_w
    if LARGE:
        image = image.to(tl.int64)
    valid = (image < images) & (u * PHASES[0] + phase_h < height) & (v * PHASES[1] + phase_w < width)
    return phase_h, phase_w, image, u, v, valid


@triton.jit
def store_at(
    output,
    row,
    begin,
    end,
    y,
    images,
    height,
    width,
    size,
    PHASES: tl.constexpr,
    LARGE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Write the channels ``begin ... begin + BLOCK_N``, those before ``end``, of a tile's positions."""
    phase_h, phase_w, image, u, v, valid = positions(row, images, height, width, PHASES, LARGE, BLOCK_M)
    place = (image * height + u * PHASES[0] + phase_h) * width + v * PHASES[1] + phase_w
    n = begin + tl.arange(0, BLOCK_N)
    inside = valid[:, None] & (n < end)[None, :]
    tl.store(output + (place * size)[:, None] + n[None, :], y.to(output.dtype.element_ty), mask=inside)


@triton.jit
def within(index, size):
    """Which indices lie in ``range(size)``: as unsigned numbers, negative ones are too large."""
    return index.to(tl.uint32, bitcast=True) < size.to(tl.uint32, bitcast=True)


def reciprocal(divisor: int) -> tuple[int, int]:
    """What :func:`divide` multiplies by and shifts by."""
    shift = 30 + (divisor - 1).bit_length()
    return -(-(1 << shift) // divisor), shift


@triton.jit
def divide(number, factor, shift):
    """A number below LARGE by a divisor whose reciprocal is given: in an inner loop, a division is what takes longest."""
    return ((number.to(tl.int64) * factor) >> shift).to(tl.int32)
