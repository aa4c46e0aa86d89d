"""Grouped convolution, the number of whose groups is elastic, and its gradients.

With g over the active groups, o and c over the output and input channels of a group, k over the taps and p over the positions::

    y[p, g, o]  = sum_k,c x[p stride - padding + k dilation, g, c] W[g, o, k, c] + b[g, o]      zero for dormant g
    gx[i, g, c] = sum_k,o gy[(i + padding - k dilation) / stride, g, o] W[g, o, k, c]           zero for dormant g
    gW[g, o, k, c] = sum_p gy[p, g, o] x[p stride - padding + k dilation, g, c]                 zero for dormant g
    gb[g, o]       = sum_p gy[p, g, o]                                                          zero for dormant g

Images are channels_last; a weight may be contiguous or channels_last. A tile is one of few channels, all of one group: those of the active
groups come first, then zeros. Sums over positions are cut into parts, each a copy of the whole gradient, which a second kernel adds up in
their order. While a switch is off, no group is active.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import Segments, num_programs, precision_of
from .tiles import dot, in_groups, known_multiple
from .widths import count_tiles, is_active, locate_tile, switched_on
from .windows import LARGE, Windows, positions, store_at, window, within

_SPLITS: int = 32  # how many parts of a sum there may be


@triton.jit
def _locate_group(control, slots, on, tile, size, FIRST: tl.constexpr, SEGMENTS: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """The group of a tile of channels, and which part of it: groups, WIDTH channels each, are cut into tiles of BLOCK."""
    parts: tl.constexpr = (WIDTH + BLOCK - 1) // BLOCK
    begin, _, _ = locate_tile(control, slots, on, tile // parts, size, FIRST, SEGMENTS, WIDTH)
    return begin // WIDTH, tile % parts * BLOCK


@triton.jit
def _grouped_kernel(
    source,  # (images, height, width, groups * RED_WIDTH)
    weight,
    bias,
    output,  # (images, out_height, out_width, groups * OUT_WIDTH)
    control,
    slots,
    images,
    height,
    width,
    out_height,
    out_width,
    groups,
    stride_out,  # of the weight: along a group's channels of the output, along those that are summed, along taps
    stride_red,
    stride_tap,
    OUT_FIRST: tl.constexpr,
    OUT_SEGMENTS: tl.constexpr,
    OUT_WIDTH: tl.constexpr,
    RED_WIDTH: tl.constexpr,
    RED_VECTOR: tl.constexpr,
    SWITCH_FIRST: tl.constexpr,
    SWITCHES: tl.constexpr,
    KERNEL: tl.constexpr,
    STRIDE: tl.constexpr,
    PADDING: tl.constexpr,
    DILATION: tl.constexpr,
    PHASES: tl.constexpr,
    UNIT: tl.constexpr,
    TAP_STEP: tl.constexpr,
    MOVE: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    LARGE: tl.constexpr,
    BIAS: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
):
    """The forward, and with TRANSPOSED the gradient of the input."""
    parts: tl.constexpr = (OUT_WIDTH + BLOCK_N - 1) // BLOCK_N
    blocks: tl.constexpr = (RED_WIDTH + BLOCK_K - 1) // BLOCK_K
    on = switched_on(control, slots, SWITCH_FIRST, SWITCHES)
    size = groups * OUT_WIDTH
    active, total = count_tiles(control, slots, on, size, OUT_FIRST, OUT_SEGMENTS, OUT_WIDTH)
    active *= parts
    total *= parts
    num_m = tl.cdiv(images * tl.cdiv(out_height, PHASES[0]) * tl.cdiv(out_width, PHASES[1]), BLOCK_M) * PHASES[0] * PHASES[1]
    for item in range(tl.program_id(0), num_m * total, tl.num_programs(0)):
        awake = item < num_m * active
        row, column = in_groups(item, num_m, active + (active == 0), GROUP)
        rest = item - num_m * active
        row = tl.where(awake, row, rest % num_m)
        column = tl.where(awake, column, active + rest // num_m)
        group, first = _locate_group(control, slots, on, column, size, OUT_FIRST, OUT_SEGMENTS, OUT_WIDTH, BLOCK_N)
        lane = first + tl.arange(0, BLOCK_N)
        acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        if awake:
            phase_h, phase_w, image, u, v, valid = positions(row, images, out_height, out_width, PHASES, LARGE, BLOCK_M)
            first_h, count_h, offset_h = window(phase_h, KERNEL[0], STRIDE[0], PADDING[0], DILATION[0], TRANSPOSED)
            first_w, count_w, offset_w = window(phase_w, KERNEL[1], STRIDE[1], PADDING[1], DILATION[1], TRANSPOSED)
            top = u * UNIT[0] + offset_h
            left = v * UNIT[1] + offset_w
            corners = ((image * height + top) * width + left) * groups + group
            top = tl.where(valid, top, -(1 << 30))
            rows = weight + group.to(tl.int64) * (KERNEL[0] * KERNEL[1] * OUT_WIDTH * RED_WIDTH)
            taps = count_h * count_w
            for step in range(taps * blocks):
                s = step % taps // count_w
                t = step % taps % count_w
                tap = (first_h + s * TAP_STEP[0]) * KERNEL[1] + first_w + t * TAP_STEP[1]
                k = step // taps * BLOCK_K + tl.arange(0, BLOCK_K)
                inside = within(top + s * MOVE[0], height) & within(left + t * MOVE[1], width)
                place = known_multiple((corners + (s * MOVE[0] * width + t * MOVE[1]) * groups) * RED_WIDTH, RED_VECTOR)
                a = tl.load(source + place[:, None] + k[None, :], mask=inside[:, None] & (k < RED_WIDTH)[None, :], other=0.0)
                line = tap * stride_tap + k[:, None] * stride_red + lane[None, :] * stride_out
                b = tl.load(rows + line, mask=(k < RED_WIDTH)[:, None] & (lane < OUT_WIDTH)[None, :], other=0.0)
                acc = dot(a, b, acc, PRECISION)
            if BIAS:
                acc += tl.load(bias + group * OUT_WIDTH + lane, mask=lane < OUT_WIDTH, other=0.0).to(tl.float32)[None, :]
        begin = group * OUT_WIDTH + first
        end = (group + 1) * OUT_WIDTH
        store_at(output, row, begin, end, acc, images, out_height, out_width, size, PHASES, LARGE, BLOCK_M, BLOCK_N)


@triton.jit
def _grouped_grad_weight_kernel(
    grad,
    x,
    parts,  # float32, copies of the weight's gradient
    parts_bias,
    control,
    slots,
    m,
    height,
    width,
    out_height,
    out_width,
    groups,
    stride_in,
    stride_tap,
    OUT_SEGMENTS: tl.constexpr,
    IN_SEGMENTS: tl.constexpr,
    OUT_WIDTH: tl.constexpr,
    IN_WIDTH: tl.constexpr,
    OUT_VECTOR: tl.constexpr,
    IN_VECTOR: tl.constexpr,
    SWITCHES: tl.constexpr,
    KERNEL: tl.constexpr,
    STRIDE: tl.constexpr,
    PADDING: tl.constexpr,
    DILATION: tl.constexpr,
    BIAS: tl.constexpr,
    PRECISION: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Parts of ``gW`` and ``gb``: each of a tile of one tap and group, summed over some of the positions."""
    taps: tl.constexpr = KERNEL[0] * KERNEL[1]
    parts_n: tl.constexpr = (OUT_WIDTH + BLOCK_N - 1) // BLOCK_N
    parts_k: tl.constexpr = (IN_WIDTH + BLOCK_K - 1) // BLOCK_K
    on = switched_on(control, slots, OUT_SEGMENTS + IN_SEGMENTS, SWITCHES)
    size = groups * OUT_WIDTH
    active, _ = count_tiles(control, slots, on, size, 0, OUT_SEGMENTS, OUT_WIDTH)
    tiles = active * parts_n * parts_k * taps
    splits = num_splits(tiles, m, BLOCK_M, SPLITS)
    length = tl.cdiv(tl.cdiv(m, BLOCK_M), splits) * BLOCK_M
    for item in range(tl.program_id(0), tiles * splits, tl.num_programs(0)):
        tile = item % tiles
        tap = tile % taps
        column = tile // taps % parts_k
        group, first_n = _locate_group(control, slots, on, tile // (taps * parts_k), size, 0, OUT_SEGMENTS, OUT_WIDTH, BLOCK_N)
        n = first_n + tl.arange(0, BLOCK_N)
        k = column * BLOCK_K + tl.arange(0, BLOCK_K)
        split = item // tiles
        acc = tl.zeros((BLOCK_N, BLOCK_K), dtype=tl.float32)
        total = tl.zeros((BLOCK_N,), dtype=tl.float32)
        for start in range(split * length, min((split + 1) * length, m), BLOCK_M):
            p = start + tl.arange(0, BLOCK_M).to(tl.int64)
            top = p // out_width % out_height * STRIDE[0] + (tap // KERNEL[1] * DILATION[0] - PADDING[0])
            left = p % out_width * STRIDE[1] + (tap % KERNEL[1] * DILATION[1] - PADDING[1])
            inside = within(top.to(tl.int32), height) & within(left.to(tl.int32), width) & (p < m)
            line = known_multiple((p * groups + group) * OUT_WIDTH, OUT_VECTOR)
            place = known_multiple((((p // out_width // out_height * height + top) * width + left) * groups + group) * IN_WIDTH, IN_VECTOR)
            g = tl.load(grad + line[:, None] + n[None, :], mask=(p < m)[:, None] & (n < OUT_WIDTH)[None, :], other=0.0)
            h = tl.load(x + place[:, None] + k[None, :], mask=inside[:, None] & (k < IN_WIDTH)[None, :], other=0.0)
            acc = dot(g.T, h, acc, PRECISION)
            if BIAS:
                total += tl.sum(g.to(tl.float32), axis=0)
        row = split.to(tl.int64) * size + group * OUT_WIDTH + n
        target = parts + row[:, None] * (IN_WIDTH * taps) + k[None, :] * stride_in + tap * stride_tap
        tl.store(target, acc, mask=(n < OUT_WIDTH)[:, None] & (k < IN_WIDTH)[None, :])
        if BIAS:
            tl.store(parts_bias + row, total, mask=(n < OUT_WIDTH) & (tap + column == 0))


@triton.jit
def num_splits(tiles, m, BLOCK_M: tl.constexpr, SPLITS: tl.constexpr):
    """Into how many parts a sum over m is cut, so that few tiles keep all programs busy; at most SPLITS, and no tiny ones."""
    return max(1, min(min(tl.num_programs(0) // max(tiles, 1), tl.cdiv(m, 4 * BLOCK_M)), SPLITS))


@triton.jit
def _add_copies_kernel(
    result,  # (size, ROW)
    parts,  # (splits, size, ROW)
    control,
    slots,
    m,
    size,
    OUT_SEGMENTS: tl.constexpr,
    IN_SEGMENTS: tl.constexpr,
    SWITCHES: tl.constexpr,
    ROW: tl.constexpr,
    TILES: tl.constexpr,
    TILE: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """``result = sum(parts)`` in the active rows, zero in the others. Launched with as many programs as what made the parts.

    Those were of ``TILES`` per ``TILE`` active rows.
    """
    on = switched_on(control, slots, OUT_SEGMENTS + IN_SEGMENTS, SWITCHES)
    active, _ = count_tiles(control, slots, on, size, 0, OUT_SEGMENTS, TILE)
    splits = num_splits(active * TILES, m, BLOCK_M, SPLITS)
    for item in range(tl.program_id(0), tl.cdiv(size * ROW, BLOCK), tl.num_programs(0)):
        place = item * BLOCK + tl.arange(0, BLOCK)
        row = place // ROW
        awake = is_active(control, slots, row, 0, OUT_SEGMENTS) & (row < size) & (on != 0)
        acc = tl.zeros((BLOCK,), dtype=tl.float32)
        part = parts
        for _ in range(splits):
            acc += tl.load(part + place, mask=awake, other=0.0)
            part += size * ROW
        tl.store(result + place, acc.to(result.dtype.element_ty), mask=row < size)


def fill_grouped(
    source: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    output: Tensor,
    control: Tensor,
    slots: Tensor,
    segments: Segments,
    windows: Windows,
    allow_tf32: bool,
    transposed: bool,
) -> None:
    """Fill ``output`` with ``y``, or with ``gx`` if ``transposed``."""
    images, _, height, width = source.shape
    out_height, out_width = output.shape[2:]
    groups, filters, in_width, stride_in, stride_tap = _layout(weight, output if transposed else source)
    constants = windows.constants(transposed)
    red, out = (filters, in_width) if transposed else (in_width, filters)
    stride_row = in_width * windows.taps
    precision = precision_of(source.dtype, allow_tf32)
    block_m, block_n, block_k = 64, _block(out), _block(red, _reduction(source, precision))
    rows = images * triton.cdiv(out_height, constants["PHASES"][0]) * triton.cdiv(out_width, constants["PHASES"][1])
    tiles = constants["PHASES"][0] * constants["PHASES"][1] * triton.cdiv(rows, block_m) * groups * triton.cdiv(out, block_n)
    _grouped_kernel[(min(tiles, 4 * num_programs(source.device)),)](
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
        groups,
        stride_in if transposed else stride_row,
        stride_row if transposed else stride_in,
        stride_tap,
        OUT_FIRST=segments.out if transposed else 0,
        OUT_SEGMENTS=segments.inner if transposed else segments.out,
        OUT_WIDTH=out,
        RED_WIDTH=red,
        RED_VECTOR=_vector(source, red),
        SWITCH_FIRST=segments.out + segments.inner,
        SWITCHES=segments.switches,
        **constants,
        TRANSPOSED=transposed,
        LARGE=max(source.numel(), output.numel()) >= LARGE,
        BIAS=bias is not None,
        PRECISION=precision,
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        BLOCK_K=block_k,
        GROUP=8,
        num_warps=4,
        num_stages=3,
    )


def grouped_grad_weight(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    control: Tensor,
    slots: Tensor,
    segments: Segments,
    windows: Windows,
    allow_tf32: bool,
) -> tuple[Tensor, Tensor | None]:
    """``(gW, gb)`` in the types and memory formats of ``weight`` and ``bias``; without a bias the second is ``None``."""
    images, _, height, width = x.shape
    _, size, out_height, out_width = grad.shape
    m = images * out_height * out_width
    groups, filters, in_width, stride_in, stride_tap = _layout(weight, x)
    precision = precision_of(x.dtype, allow_tf32)
    block_m = _reduction(x, precision)
    block_n, block_k = _block(filters, max(block_m, 32)), _block(in_width)
    tiles = triton.cdiv(filters, block_n) * triton.cdiv(in_width, block_k) * windows.taps
    programs = 4 * num_programs(x.device)
    parts = torch.empty((_SPLITS, weight.numel()), dtype=torch.float32, device=x.device)
    parts_bias = torch.empty((_SPLITS, size), dtype=torch.float32, device=x.device)
    _grouped_grad_weight_kernel[(programs,)](
        grad,
        x,
        parts,
        parts_bias,
        control,
        slots,
        m,
        height,
        width,
        out_height,
        out_width,
        groups,
        stride_in,
        stride_tap,
        OUT_SEGMENTS=segments.out,
        IN_SEGMENTS=segments.inner,
        OUT_WIDTH=filters,
        IN_WIDTH=in_width,
        OUT_VECTOR=_vector(grad, filters),
        IN_VECTOR=_vector(x, in_width),
        SWITCHES=segments.switches,
        KERNEL=windows.kernel,
        STRIDE=windows.stride,
        PADDING=windows.padding,
        DILATION=windows.dilation,
        BIAS=bias is not None,
        PRECISION=precision,
        SPLITS=_SPLITS,
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        BLOCK_K=block_k,
        num_warps=4,
        num_stages=3,
    )
    return add_copies(weight, bias, parts, parts_bias, control, slots, segments, m, tiles, filters, block_m, programs)


def add_copies(
    weight: Tensor,
    bias: Tensor | None,
    parts: Tensor,
    parts_bias: Tensor,
    control: Tensor,
    slots: Tensor,
    segments: Segments,
    m: int,
    tiles: int,
    tile: int,
    block_m: int,
    programs: int,
) -> tuple[Tensor, Tensor | None]:
    """``(gW, gb)`` of parts: ``programs`` made them, of ``tiles`` tiles per ``tile`` active rows, adding ``block_m`` positions at once."""
    results = [torch.empty_like(weight), None if bias is None else torch.empty_like(bias)]
    for result, copies in zip(results, (parts, parts_bias), strict=True):
        if result is not None:
            _add_copies_kernel[(programs,)](
                result,
                copies,
                control,
                slots,
                m,
                result.shape[0],
                OUT_SEGMENTS=segments.out,
                IN_SEGMENTS=segments.inner,
                SWITCHES=segments.switches,
                ROW=result[0].numel(),
                TILES=tiles,
                TILE=tile,
                SPLITS=copies.shape[0],
                BLOCK_M=block_m,
                BLOCK=512,
            )
    return results[0], results[1]  # type: ignore[return-value]


def _layout(weight: Tensor, x: Tensor) -> tuple[int, int, int, int, int]:
    """Groups, output and input channels of one, and how far apart a weight's input channels and its taps are."""
    out_size, in_width, height, width = weight.shape
    groups = x.shape[1] // in_width
    strides = (height * width, 1) if weight.is_contiguous() else (1, in_width)
    return groups, out_size // groups, in_width, *strides


def _block(channels: int, most: int = 64) -> int:
    return min(max(triton.next_power_of_2(channels), 16), most)


def _reduction(image: Tensor, precision: str) -> int:
    """How much is multiplied at once: what registers hold."""
    return 64 if image.element_size() == 2 else 32 if precision == "tf32" else 16


def _vector(image: Tensor, channels: int) -> int:
    return math.gcd(16 // image.element_size(), channels) if image.data_ptr() % 16 == 0 else 1
