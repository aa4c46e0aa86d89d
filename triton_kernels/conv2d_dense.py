"""``y = W * x + b`` over the active channels of both sides of ``W``, and the gradient of ``x``.

With o over the active output channels, c over the active input channels, k over the taps and p over the positions of an image::

    y[p, o]  = sum_k,c x[p stride - padding + k dilation, c] W[o, k, c] + b[o]      zero for dormant o
    gx[i, c] = sum_k,o gy[(i + padding - k dilation) / stride, o] W[o, k, c]        zero for dormant c

Both are one product of matrices: its rows are the positions of all images, its reduction runs over taps times active channels, and its left
side is gathered as windows.py says. The gradient's reduction has only those taps that reach a position: it goes phase by phase. Images are
channels_last, so that a position's channels lie side by side. So are a weight's; one that is contiguous has its active part copied to that
order first, which is little work beside the product.

A fixed number of programs walks over the tiles of the output: products for the active ones, zeros for the others. Of a segment's last tile
only half is multiplied if that holds all that is active. Full blocks of the reduction need no mask of channels. Behind a segment's last one
come smaller blocks, which are loaded as whole vectors and cleared of what is dormant then. A convolution whose input channels are few by
capacity is reduced over taps and channels together. While a switch is off, no tile is active.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import Segments, has_copy_engine, num_programs, precision_of, vector_of
from .tiles import dot, in_groups, known_multiple
from .widths import count_tiles, is_active, locate_tile, segment_active, segment_start, switched_on
from .windows import FEW, LARGE, Windows, positions, store_at, window, within


class Config(NamedTuple):
    """Tile sizes and how many warps and pipeline stages work on a tile."""

    block_m: int
    block_n: int
    block_k: int
    tail: int
    group: int
    warps: int
    stages: int


# Not tuned yet: as large as registers and shared memory let them be. By the type of the operands (16 bits, or float32 with or without
# tf32); "+" where matrix units read shared memory themselves, which spares registers; "unaligned" where channels do not come in 16 bytes.
CONFIGS = {
    "half+": Config(256, 128, 64, 16, 8, 8, 3),
    "half": Config(128, 128, 64, 16, 8, 8, 3),
    "half, unaligned": Config(128, 64, 32, 16, 8, 8, 3),
    "tf32": Config(128, 64, 32, 16, 8, 8, 3),
    "tf32, unaligned": Config(64, 64, 32, 16, 8, 8, 3),
    "ieee": Config(64, 64, 16, 16, 8, 8, 2),
    "ieee, unaligned": Config(32, 64, 16, 16, 8, 4, 3),
}


@triton.jit
def _pack_kernel(
    weight,  # (out_size, in_size, TAPS)
    packed,  # (out_size, TAPS, in_size)
    control,
    slots,
    in_size,
    OUT_SEGMENTS: tl.constexpr,
    IN_SEGMENTS: tl.constexpr,
    SWITCHES: tl.constexpr,
    TAPS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """``packed[o, k, c] = weight[o, c, k]`` where both are active; the rest is not written, since nobody reads it."""
    on = switched_on(control, slots, OUT_SEGMENTS + IN_SEGMENTS, SWITCHES)
    o = tl.program_id(0)
    if is_active(control, slots, o, 0, OUT_SEGMENTS) & (on != 0):
        place = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        c = place // TAPS
        awake = is_active(control, slots, c, OUT_SEGMENTS, IN_SEGMENTS)
        row = o.to(tl.int64) * in_size * TAPS
        tl.store(packed + row + place % TAPS * in_size + c, tl.load(weight + row + place, mask=awake), mask=awake)


@triton.jit
def _multiply(
    acc,
    source,
    weight,
    corners,
    top,
    left,
    lines,
    in_weight,
    step,
    start,
    stop,
    window_h,
    window_w,
    height,
    width,
    channels,
    out_size,
    KERNEL: tl.constexpr,
    TAP_STEP: tl.constexpr,
    MOVE: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    LARGE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Add the product over one tap and one block of the channels ``start ... stop``. All taps of a block come before the next block."""
    first_h, count_h, _ = window_h
    first_w, count_w, _ = window_w
    taps = count_h * count_w
    k = start + step // taps * BLOCK
    s = step % taps // count_w
    t = step % taps % count_w
    tap = (first_h + s * TAP_STEP[0]) * KERNEL[1] + first_w + t * TAP_STEP[1]
    shift = (s * MOVE[0] * width + t * MOVE[1]) * channels + k
    lane = tl.arange(0, BLOCK)
    in_image = (within(top + s * MOVE[0], height) & within(left + t * MOVE[1], width))[:, None]
    in_weight = in_weight[None, :]
    if MASKED:
        in_image &= (k + lane < channels)[None, :]
        in_weight &= (k + lane < channels)[:, None]
    a = tl.load(source + (corners[:, None] + (shift + lane)[None, :]), mask=in_image, other=0.0)
    if TRANSPOSED:
        row_size = KERNEL[0] * KERNEL[1] * out_size
        place = (k.to(tl.int64) if LARGE else k) * row_size + tap * out_size + (lane * row_size)[:, None]
    else:
        place = (tap * channels + k + lane)[:, None]
    b = tl.load(weight + (lines[None, :] + place), mask=in_weight, other=0.0)
    if MASKED:
        a = tl.where((k + lane < stop)[None, :], a, 0.0)
        b = tl.where((k + lane < stop)[:, None], b, 0.0)
    return dot(a, b, acc, PRECISION)


@triton.jit
def _multiply_few(
    acc,
    source,
    weight,
    corners,
    top,
    left,
    lines,
    in_weight,
    k,
    awake,
    height,
    width,
    KERNEL: tl.constexpr,
    DILATION: tl.constexpr,
    CHANNELS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Add the product over the taps and channels ``k // CHANNELS`` and ``k % CHANNELS``."""
    y = k // CHANNELS // KERNEL[1] * DILATION[0]
    x = k // CHANNELS % KERNEL[1] * DILATION[1]
    inside = within(top[:, None] + y[None, :], height) & within(left[:, None] + x[None, :], width) & awake[None, :]
    a = tl.load(source + (corners[:, None] + ((y * width + x) * CHANNELS + k % CHANNELS)[None, :]), mask=inside, other=0.0)
    b = tl.load(weight + (lines[None, :] + k[:, None]), mask=in_weight[None, :] & awake[:, None], other=0.0)
    return dot(a, b, acc, PRECISION)


@triton.jit
def _tile(
    source,
    weight,
    bias,
    output,
    control,
    slots,
    images,
    height,
    width,
    out_height,
    out_width,
    channels,
    out_size,
    row,
    begin,
    edge,
    end,
    RED_FIRST: tl.constexpr,
    RED_SEGMENTS: tl.constexpr,
    RED_VECTOR: tl.constexpr,
    KERNEL: tl.constexpr,
    STRIDE: tl.constexpr,
    PADDING: tl.constexpr,
    DILATION: tl.constexpr,
    PHASES: tl.constexpr,
    UNIT: tl.constexpr,
    TAP_STEP: tl.constexpr,
    MOVE: tl.constexpr,
    FEW: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    LARGE: tl.constexpr,
    BIAS: tl.constexpr,
    PRECISION: tl.constexpr,
    TAIL: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """The channels ``begin ... begin + BLOCK_N`` of BLOCK_M positions of the output."""
    phase_h, phase_w, image, u, v, valid = positions(row, images, out_height, out_width, PHASES, LARGE, BLOCK_M)
    window_h = window(phase_h, KERNEL[0], STRIDE[0], PADDING[0], DILATION[0], TRANSPOSED)
    window_w = window(phase_w, KERNEL[1], STRIDE[1], PADDING[1], DILATION[1], TRANSPOSED)
    top = u * UNIT[0] + window_h[2]
    left = v * UNIT[1] + window_w[2]
    corners = ((image * height + top) * width + left) * channels
    top = tl.where(valid, top, -(1 << 30))
    n = begin + tl.arange(0, BLOCK_N)
    in_weight = n < out_size
    if LARGE:
        n = n.to(tl.int64)
    lines = n if TRANSPOSED else n * (KERNEL[0] * KERNEL[1] * channels)
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    if FEW > 0:
        for first in range(0, KERNEL[0] * KERNEL[1] * FEW, BLOCK_K):
            k = first + tl.arange(0, BLOCK_K)
            awake = is_active(control, slots, k % FEW, RED_FIRST, RED_SEGMENTS) & (k < KERNEL[0] * KERNEL[1] * FEW)
            acc = _multiply_few(
                acc, source, weight, corners, top, left, lines, in_weight, k, awake, height, width, KERNEL, DILATION, FEW, PRECISION
            )  # fmt: skip
    else:
        taps = window_h[1] * window_w[1]
        for segment in tl.static_range(RED_SEGMENTS):
            start = known_multiple(segment_start(slots, RED_FIRST, segment), RED_VECTOR)
            stop = start + segment_active(control, slots, RED_FIRST + segment)
            full = start + (stop - start) // BLOCK_K * BLOCK_K
            for step in range(taps * ((stop - start) // BLOCK_K)):
                acc = _multiply(
                    acc, source, weight, corners, top, left, lines, in_weight, step, start, stop, window_h, window_w, height, width,
                    channels, out_size, KERNEL, TAP_STEP, MOVE, TRANSPOSED, LARGE, PRECISION, BLOCK_K, False,
                )  # fmt: skip
            for step in range(taps * tl.cdiv(stop - full, TAIL)):
                acc = _multiply(
                    acc, source, weight, corners, top, left, lines, in_weight, step, full, stop, window_h, window_w, height, width,
                    channels, out_size, KERNEL, TAP_STEP, MOVE, TRANSPOSED, LARGE, PRECISION, TAIL, True,
                )  # fmt: skip
    if BIAS:
        acc += tl.load(bias + n, mask=n < edge, other=0.0).to(tl.float32)[None, :]
    acc = tl.where((n < edge)[None, :], acc, 0.0)
    store_at(output, row, begin, end, acc, images, out_height, out_width, out_size, PHASES, LARGE, BLOCK_M, BLOCK_N)


@triton.jit
def _convolution_kernel(
    source,  # (images, height, width, channels)
    weight,  # (out_size, kh, kw, channels), or (channels, kh, kw, out_size) if TRANSPOSED
    bias,
    output,  # (images, out_height, out_width, out_size)
    control,
    slots,
    images,
    height,
    width,
    out_height,
    out_width,
    channels,
    out_size,
    OUT_FIRST: tl.constexpr,
    OUT_SEGMENTS: tl.constexpr,
    OUT_VECTOR: tl.constexpr,
    RED_FIRST: tl.constexpr,
    RED_SEGMENTS: tl.constexpr,
    RED_VECTOR: tl.constexpr,
    SWITCHES: tl.constexpr,
    KERNEL: tl.constexpr,
    STRIDE: tl.constexpr,
    PADDING: tl.constexpr,
    DILATION: tl.constexpr,
    PHASES: tl.constexpr,
    UNIT: tl.constexpr,
    TAP_STEP: tl.constexpr,
    MOVE: tl.constexpr,
    FEW: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    LARGE: tl.constexpr,
    BIAS: tl.constexpr,
    PRECISION: tl.constexpr,
    TAIL: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
):
    """``output = W * source + bias``: the forward, and with TRANSPOSED the gradient of the input."""
    half: tl.constexpr = BLOCK_N // 2
    channels = known_multiple(channels, RED_VECTOR)
    out_size = known_multiple(out_size, OUT_VECTOR)
    on = switched_on(control, slots, OUT_SEGMENTS + RED_SEGMENTS, SWITCHES)
    active, total = count_tiles(control, slots, on, out_size, OUT_FIRST, OUT_SEGMENTS, BLOCK_N)
    num_m = tl.cdiv(images * tl.cdiv(out_height, PHASES[0]) * tl.cdiv(out_width, PHASES[1]), BLOCK_M) * PHASES[0] * PHASES[1]
    for item in range(tl.program_id(0), num_m * total, tl.num_programs(0)):
        awake = item < num_m * active
        row, column = in_groups(item, num_m, active + (active == 0), GROUP)
        rest = item - num_m * active
        row = tl.where(awake, row, rest % num_m)
        column = tl.where(awake, column, active + rest // num_m)
        begin, edge, end = locate_tile(control, slots, on, column, out_size, OUT_FIRST, OUT_SEGMENTS, BLOCK_N)
        begin = known_multiple(begin, OUT_VECTOR)
        end = known_multiple(end, OUT_VECTOR)
        for narrow in tl.static_range(2):
            if awake & ((edge - begin <= half) == (narrow == 1)):
                _tile(
                    source, weight, bias, output, control, slots, images, height, width, out_height, out_width, channels, out_size,
                    row, begin, edge, end, RED_FIRST, RED_SEGMENTS, RED_VECTOR, KERNEL, STRIDE, PADDING, DILATION, PHASES, UNIT,
                    TAP_STEP, MOVE, FEW, TRANSPOSED, LARGE, BIAS, PRECISION, TAIL, BLOCK_M, BLOCK_N // (1 + narrow), BLOCK_K,
                )  # fmt: skip
        nothing = tl.zeros((BLOCK_M, half), dtype=tl.float32)
        for side in tl.static_range(2):
            if begin + side * half >= edge:
                store_at(
                    output, row, begin + side * half, end, nothing, images, out_height, out_width, out_size, PHASES, LARGE, BLOCK_M, half
                )


def fill_dense(
    source: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    output: Tensor,
    control: Tensor,
    slots: Tensor,
    segments: Segments,
    windows: Windows,
    allow_tf32: bool,
    config: Config | None,
    transposed: bool,
) -> None:
    """Fill ``output`` with ``y``, or with ``gx`` if ``transposed``."""
    weight = _packed(weight, control, slots, segments, windows)
    images, channels, height, width = source.shape
    _, out_size, out_height, out_width = output.shape
    constants = windows.constants(transposed)
    rows = images * triton.cdiv(out_height, constants["PHASES"][0]) * triton.cdiv(out_width, constants["PHASES"][1])
    phases = constants["PHASES"][0] * constants["PHASES"][1]
    out_segments, red_segments = (segments.inner, segments.out) if transposed else (segments.out, segments.inner)
    precision = precision_of(source.dtype, allow_tf32)
    programs = num_programs(source.device)
    large = max(source.numel(), weight.numel(), output.numel()) >= LARGE
    vectors = [vector_of(segments, t) for t in (output, source)]
    if config is None:
        kind = "half" if source.element_size() == 2 else precision
        config = CONFIGS[kind]
        if min(vectors) * source.element_size() < 16:
            config = CONFIGS[kind + ", unaligned"]
        elif kind == "half" and has_copy_engine(source.device) and max(segments[:2]) == 1 and phases == 1 and not large:
            wide = CONFIGS["half+"]
            if triton.cdiv(rows, wide.block_m) * triton.cdiv(out_size, wide.block_n) >= 2 * programs:
                config = wide
    tiles = phases * triton.cdiv(rows, config.block_m) * (triton.cdiv(out_size, config.block_n) + out_segments)
    _convolution_kernel[(min(tiles, programs),)](
        source,
        weight,
        bias,
        output,
        control,
        slots,
        images,
        height,
        width,
        out_height,
        out_width,
        channels,
        out_size,
        OUT_FIRST=segments.out if transposed else 0,
        OUT_SEGMENTS=out_segments,
        OUT_VECTOR=vectors[0],
        RED_FIRST=0 if transposed else segments.out,
        RED_SEGMENTS=red_segments,
        RED_VECTOR=vectors[1],
        SWITCHES=segments.switches,
        **constants,
        FEW=channels if channels < FEW and not transposed else 0,
        TRANSPOSED=transposed,
        LARGE=large,
        BIAS=bias is not None,
        PRECISION=precision,
        TAIL=config.tail,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_K=config.block_k,
        GROUP=config.group,
        num_warps=config.warps,
        num_stages=config.stages,
    )


def _packed(weight: Tensor, control: Tensor, slots: Tensor, segments: Segments, windows: Windows) -> Tensor:
    """A weight in the order ``(out, kh, kw, in)``: itself if it is channels_last, else a copy of its active part."""
    if weight.is_contiguous(memory_format=torch.channels_last):
        return weight
    packed = torch.empty_like(weight, memory_format=torch.channels_last)
    out_size, in_size = weight.shape[:2]
    block = 1024
    _pack_kernel[(out_size, triton.cdiv(in_size * windows.taps, block))](
        weight,
        packed,
        control,
        slots,
        in_size,
        OUT_SEGMENTS=segments.out,
        IN_SEGMENTS=segments.inner,
        SWITCHES=segments.switches,
        TAPS=windows.taps,
        BLOCK=block,
    )
    return packed
