"""Depthwise convolution, where every channel has a filter of its own, and its gradients.

With c over the active channels, k over the taps and p over the positions of an image::

    y[p, c]  = sum_k x[p stride - padding + k dilation, c] W[c, k] + b[c]        zero for dormant c
    gx[i, c] = sum_k gy[(i + padding - k dilation) / stride, c] W[c, k]          zero for dormant c
    gW[c, k] = sum_p gy[p, c] x[p stride - padding + k dilation, c]              zero for dormant c
    gb[c]    = sum_p gy[p, c]                                                    zero for dormant c

Images are channels_last, and a tile has neighbouring channels side by side. There is no product of matrices in it: what counts is to read
an image from memory once, and again, for a window's other taps, from the cache. While a switch is off, no tile is active.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .conv2d_grouped import add_copies, num_splits
from .launch import Segments, num_programs, vector_of
from .tiles import known_multiple
from .widths import count_tiles, locate_tile, switched_on
from .windows import LARGE, Windows, positions, store_at, window, within

_SPLITS: int = 256  # how many parts of a sum there may be
_BLOCK_M: int = 32
_BLOCK_C: int = 64
_LANES: int = 128  # taps times positions that are summed at once


@triton.jit
def _depthwise_kernel(
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
    size,
    OUT_FIRST: tl.constexpr,
    OUT_SEGMENTS: tl.constexpr,
    VECTOR: tl.constexpr,
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
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """The forward, and with TRANSPOSED the gradient of the input."""
    on = switched_on(control, slots, SWITCH_FIRST, SWITCHES)
    size = known_multiple(size, VECTOR)
    active, total = count_tiles(control, slots, on, size, OUT_FIRST, OUT_SEGMENTS, BLOCK_C)
    num_m = tl.cdiv(images * tl.cdiv(out_height, PHASES[0]) * tl.cdiv(out_width, PHASES[1]), BLOCK_M) * PHASES[0] * PHASES[1]
    for item in range(tl.program_id(0), num_m * total, tl.num_programs(0)):
        awake = item < num_m * active
        rest = item - num_m * active
        row = tl.where(awake, item // max(active, 1), rest % num_m)
        column = tl.where(awake, item % max(active, 1), active + rest // num_m)
        begin, edge, end = locate_tile(control, slots, on, column, size, OUT_FIRST, OUT_SEGMENTS, BLOCK_C)
        begin = known_multiple(begin, VECTOR)
        end = known_multiple(end, VECTOR)
        acc = tl.zeros((BLOCK_M, BLOCK_C), dtype=tl.float32)
        if awake:
            c = begin + tl.arange(0, BLOCK_C)
            phase_h, phase_w, image, u, v, valid = positions(row, images, out_height, out_width, PHASES, LARGE, BLOCK_M)
            first_h, count_h, offset_h = window(phase_h, KERNEL[0], STRIDE[0], PADDING[0], DILATION[0], TRANSPOSED)
            first_w, count_w, offset_w = window(phase_w, KERNEL[1], STRIDE[1], PADDING[1], DILATION[1], TRANSPOSED)
            top = u * UNIT[0] + offset_h
            left = v * UNIT[1] + offset_w
            corners = ((image * height + top) * width + left) * size
            top = tl.where(valid, top, -(1 << 30))
            for step in range(count_h * count_w):
                s = step // count_w
                t = step % count_w
                tap = (first_h + s * TAP_STEP[0]) * KERNEL[1] + first_w + t * TAP_STEP[1]
                inside = within(top + s * MOVE[0], height) & within(left + t * MOVE[1], width)
                place = corners + (s * MOVE[0] * width + t * MOVE[1]) * size
                a = tl.load(source + place[:, None] + c[None, :], mask=inside[:, None] & (c < size)[None, :], other=0.0)
                w = tl.load(weight + c * (KERNEL[0] * KERNEL[1]) + tap, mask=c < edge, other=0.0)
                acc += a.to(tl.float32) * w.to(tl.float32)[None, :]
            if BIAS:
                acc += tl.load(bias + c, mask=c < edge, other=0.0).to(tl.float32)[None, :]
            acc = tl.where((c < edge)[None, :], acc, 0.0)
        store_at(output, row, begin, end, acc, images, out_height, out_width, size, PHASES, LARGE, BLOCK_M, BLOCK_C)


@triton.jit
def _depthwise_grad_weight_kernel(
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
    size,
    OUT_SEGMENTS: tl.constexpr,
    IN_SEGMENTS: tl.constexpr,
    VECTOR: tl.constexpr,
    SWITCHES: tl.constexpr,
    KERNEL: tl.constexpr,
    STRIDE: tl.constexpr,
    PADDING: tl.constexpr,
    DILATION: tl.constexpr,
    BIAS: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Parts of ``gW`` and ``gb``, BLOCK_T taps at a time, each summed over some of the positions."""
    taps: tl.constexpr = KERNEL[0] * KERNEL[1]
    tap_tiles: tl.constexpr = (taps + BLOCK_T - 1) // BLOCK_T
    on = switched_on(control, slots, OUT_SEGMENTS + IN_SEGMENTS, SWITCHES)
    size = known_multiple(size, VECTOR)
    active, _ = count_tiles(control, slots, on, size, 0, OUT_SEGMENTS, BLOCK_C)
    tiles = active * tap_tiles
    splits = num_splits(tiles, m, BLOCK_M, SPLITS)
    length = tl.cdiv(tl.cdiv(m, BLOCK_M), splits) * BLOCK_M
    for item in range(tl.program_id(0), tiles * splits, tl.num_programs(0)):
        tile = item % tiles
        begin, edge, _ = locate_tile(control, slots, on, tile // tap_tiles, size, 0, OUT_SEGMENTS, BLOCK_C)
        c = known_multiple(begin, VECTOR) + tl.arange(0, BLOCK_C)
        tap = tile % tap_tiles * BLOCK_T + tl.arange(0, BLOCK_T)
        split = item // tiles
        acc = tl.zeros((BLOCK_M, BLOCK_T, BLOCK_C), dtype=tl.float32)
        total = tl.zeros((BLOCK_M, BLOCK_C), dtype=tl.float32)
        for start in range(split * length, min((split + 1) * length, m), BLOCK_M):
            p = start + tl.arange(0, BLOCK_M)
            y = (p // out_width % out_height * STRIDE[0])[:, None] + (tap // KERNEL[1] * DILATION[0] - PADDING[0])[None, :]
            z = (p % out_width * STRIDE[1])[:, None] + (tap % KERNEL[1] * DILATION[1] - PADDING[1])[None, :]
            inside = within(y, height) & within(z, width) & (p < m)[:, None] & (tap < taps)[None, :]
            place = (((p // out_width // out_height).to(tl.int64)[:, None] * height + y) * width + z) * size
            in_grad = (p < m)[:, None] & (c < size)[None, :]
            g = tl.load(grad + p[:, None].to(tl.int64) * size + c[None, :], mask=in_grad, other=0.0).to(tl.float32)
            h = tl.load(x + place[:, :, None] + c[None, None, :], mask=inside[:, :, None] & (c < size)[None, None, :], other=0.0)
            acc += g[:, None, :] * h.to(tl.float32)
            if BIAS:
                total += g
        row = split.to(tl.int64) * size + c
        target = parts + row[None, :] * taps + tap[:, None]
        tl.store(target, tl.sum(acc, axis=0), mask=(tap < taps)[:, None] & (c < edge)[None, :])
        if BIAS:
            tl.store(parts_bias + row, tl.sum(total, axis=0), mask=(c < edge) & (tile % tap_tiles == 0))


def fill_depthwise(
    source: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    output: Tensor,
    control: Tensor,
    slots: Tensor,
    segments: Segments,
    windows: Windows,
    transposed: bool,
) -> None:
    """Fill ``output`` with ``y``, or with ``gx`` if ``transposed``."""
    images, size, height, width = source.shape
    _, _, out_height, out_width = output.shape
    constants = windows.constants(transposed)
    rows = images * triton.cdiv(out_height, constants["PHASES"][0]) * triton.cdiv(out_width, constants["PHASES"][1])
    tiles = constants["PHASES"][0] * constants["PHASES"][1] * triton.cdiv(rows, _BLOCK_M) * triton.cdiv(size, _BLOCK_C)
    _depthwise_kernel[(min(tiles, 8 * num_programs(source.device)),)](
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
        size,
        OUT_FIRST=segments.out if transposed else 0,
        OUT_SEGMENTS=segments.inner if transposed else segments.out,
        VECTOR=vector_of(segments, source),
        SWITCH_FIRST=segments.out + segments.inner,
        SWITCHES=segments.switches,
        **constants,
        TRANSPOSED=transposed,
        LARGE=max(source.numel(), output.numel()) >= LARGE,
        BIAS=bias is not None,
        BLOCK_M=_BLOCK_M,
        BLOCK_C=_BLOCK_C,
    )


def depthwise_grad_weight(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    control: Tensor,
    slots: Tensor,
    segments: Segments,
    windows: Windows,
) -> tuple[Tensor, Tensor | None]:
    """``(gW, gb)`` in the types and memory formats of ``weight`` and ``bias``; without a bias the second is ``None``."""
    images, size, height, width = x.shape
    _, _, out_height, out_width = grad.shape
    m = images * out_height * out_width
    block_t = min(triton.next_power_of_2(windows.taps), 16)
    block_m = _LANES // block_t
    programs = 4 * num_programs(x.device)
    splits = max(1, min(_SPLITS, programs, triton.cdiv(m, 4 * block_m)))
    parts = torch.empty((splits, weight.numel()), dtype=torch.float32, device=x.device)
    parts_bias = torch.empty((splits, size), dtype=torch.float32, device=x.device)
    _depthwise_grad_weight_kernel[(programs,)](
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
        size,
        OUT_SEGMENTS=segments.out,
        IN_SEGMENTS=segments.inner,
        VECTOR=vector_of(segments, x),
        SWITCHES=segments.switches,
        KERNEL=windows.kernel,
        STRIDE=windows.stride,
        PADDING=windows.padding,
        DILATION=windows.dilation,
        BIAS=bias is not None,
        SPLITS=splits,
        BLOCK_M=block_m,
        BLOCK_T=block_t,
        BLOCK_C=_BLOCK_C,
    )
    tiles = triton.cdiv(windows.taps, block_t)
    return add_copies(weight, bias, parts, parts_bias, control, slots, segments, m, tiles, _BLOCK_C, block_m, programs)
