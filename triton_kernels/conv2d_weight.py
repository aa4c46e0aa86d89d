"""The gradient of a convolution's weight and bias over what is active of both sides.

With o over the active output channels, c over the active input channels, k over the taps and p over the positions of all outputs::

    gW[o, k, c] = sum_p gy[p, o] x[p stride - padding + k dilation, c]      zero where either is dormant
    gb[o]       = sum_p gy[p, o]                                            zero for dormant o

Images are channels_last. A fixed number of programs walks over the tiles of ``gW``, each of one tap: products for the active ones, whose
sums over p are cut into as many parts as keep all programs busy, and zeros for what is dormant. A second kernel adds the parts up, in the
same order always. The parts of all tiles that sum over the same positions run at about the same time, so that images come from memory once.
Of a segment's last tile only half is multiplied if that holds all that is active, either way. If input channels are few by capacity, the
columns of a tile run through taps and channels together. While a switch is off, no tile is active.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import Segments, num_programs, precision_of, vector_of
from .tiles import dot, in_groups, known_multiple
from .widths import count_tiles, is_active, locate_tile, switched_on
from .windows import FEW, LARGE, Windows, divide, reciprocal, within


class WeightConfig(NamedTuple):
    """Tile sizes, of which block_m is that of the reduction, and how many warps and pipeline stages work on a tile."""

    block_m: int
    block_n: int
    block_k: int
    group: int
    warps: int
    stages: int


# Not tuned yet; keys as in conv2d.py.
CONFIGS = {
    "half": WeightConfig(64, 128, 128, 8, 8, 3),
    "half, unaligned": WeightConfig(32, 64, 64, 8, 8, 3),
    "tf32": WeightConfig(32, 128, 64, 8, 8, 3),
    "tf32, unaligned": WeightConfig(32, 64, 64, 8, 8, 3),
    "ieee": WeightConfig(16, 64, 64, 8, 8, 3),
    "ieee, unaligned": WeightConfig(16, 64, 64, 8, 8, 3),
}
_WAVES: int = 4  # how many parts a program may make


@triton.jit
def _count_tiles(
    control,
    slots,
    n_size,
    k_size,
    OUT_SEGMENTS: tl.constexpr,
    IN_SEGMENTS: tl.constexpr,
    SWITCHES: tl.constexpr,
    TAPS: tl.constexpr,
    FEW: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Whether the layer is on, and its active and total tiles of rows and of columns, each column for every tap."""
    on = switched_on(control, slots, OUT_SEGMENTS + IN_SEGMENTS, SWITCHES)
    active_n, total_n = count_tiles(control, slots, on, n_size, 0, OUT_SEGMENTS, BLOCK_N)
    if FEW > 0:
        total_k = tl.cdiv(TAPS * FEW, BLOCK_K) + 0 * on
        active_k = total_k
    else:
        active_k, total_k = count_tiles(control, slots, on, k_size, OUT_SEGMENTS, IN_SEGMENTS, BLOCK_K)
        active_k *= TAPS
        total_k *= TAPS
    return on, active_n, active_k, total_n, total_k


@triton.jit
def _locate_columns(
    control,
    slots,
    on,
    tile,
    k_size,
    OUT_SEGMENTS: tl.constexpr,
    IN_SEGMENTS: tl.constexpr,
    TAPS: tl.constexpr,
    FEW: tl.constexpr,
    VECTOR: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Of a tile of columns: its tap, the first of its channels, and the edge and end of the segment."""
    if FEW > 0:
        tap = 0 * tile
        begin = tile * BLOCK_K
        edge = tap + TAPS * FEW
        end = edge
    else:
        tap = tile % TAPS
        begin, edge, end = locate_tile(control, slots, on, tile // TAPS, k_size, OUT_SEGMENTS, IN_SEGMENTS, BLOCK_K)
        begin = known_multiple(begin, VECTOR)
    return tap, begin, edge, end


@triton.jit
def _place_columns(control, slots, k, tap, edge, strides, OUT_SEGMENTS: tl.constexpr, IN_SEGMENTS: tl.constexpr, FEW: tl.constexpr):
    """Where columns lie in a row of the result, and which of them are active."""
    if FEW > 0:
        place = k % FEW * strides[1] + k // FEW * strides[2]
        awake = is_active(control, slots, k % FEW, OUT_SEGMENTS, IN_SEGMENTS) & (k < edge)
    else:
        place = k * strides[1] + tap * strides[2]
        awake = k < edge
    return place, awake


@triton.jit
def _num_splits(tiles, m, BLOCK_M: tl.constexpr, WAVES: tl.constexpr):
    """Into how many parts a sum over m is cut: as many as make WAVES items per program or fewer, and no tiny parts.

    The time that tiles take is that of the fullest program; more parts have to be worth adding them up.
    """
    most = tl.cdiv(m, 4 * BLOCK_M)
    splits = 1
    waves = tl.cdiv(tiles, tl.num_programs(0))
    for candidate in tl.static_range(1, WAVES + 1):
        parts = min(candidate * tl.num_programs(0) // max(tiles, 1), most)
        better = 10 * candidate * splits < 9 * waves * parts
        splits = tl.where(better, parts, splits)
        waves = tl.where(better, candidate, waves)
    return splits


@triton.jit
def _windows_of(p, sizes, factors, STRIDE: tl.constexpr, LARGE: tl.constexpr):
    """Image of the positions ``p`` of the output, and where their windows begin if there were no padding."""
    _, _, out_height, out_width = sizes
    if LARGE:
        line = p // out_width
        image = line // out_height
    else:
        line = divide(p, factors[2], factors[3])
        image = divide(line, factors[0], factors[1])
    return image, (line - image * out_height) * STRIDE[0], (p - line * out_width) * STRIDE[1]


@triton.jit
def _multiply_tile(
    grad,
    x,
    result,
    parts,
    control,
    slots,
    rows,
    columns,
    item,
    splits,
    first,
    last,
    sizes,
    factors,
    n_size,
    k_size,
    strides,
    OUT_SEGMENTS: tl.constexpr,
    IN_SEGMENTS: tl.constexpr,
    KERNEL: tl.constexpr,
    STRIDE: tl.constexpr,
    PADDING: tl.constexpr,
    DILATION: tl.constexpr,
    FEW: tl.constexpr,
    LARGE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """HEIGHT by WIDTH of a tile, summed over the positions ``first ... last``: its result, or one of several parts."""
    begin_n, edge_n = rows
    tap, begin_k, edge_k = columns
    n = begin_n + tl.arange(0, HEIGHT)
    k = begin_k + tl.arange(0, WIDTH)
    acc = tl.zeros((HEIGHT, WIDTH), dtype=tl.float32)
    for start in range(first, last, BLOCK_M):
        p = start + tl.arange(0, BLOCK_M)
        image, top, left = _windows_of(p, sizes, factors, STRIDE, LARGE)
        if LARGE:
            p = p.to(tl.int64)
            image = image.to(tl.int64)
        g = tl.load(grad + (p * n_size)[:, None] + n[None, :], mask=(p < last)[:, None] & (n < n_size)[None, :], other=0.0)
        if FEW > 0:
            top = top[:, None] + (k // FEW // KERNEL[1] * DILATION[0] - PADDING[0])[None, :]
            left = left[:, None] + (k // FEW % KERNEL[1] * DILATION[1] - PADDING[1])[None, :]
            inside = within(top, sizes[0]) & within(left, sizes[1]) & (p < last)[:, None] & (k < edge_k)[None, :]
            source = ((image[:, None] * sizes[0] + top) * sizes[1] + left) * FEW + (k % FEW)[None, :]
        else:
            top += tap // KERNEL[1] * DILATION[0] - PADDING[0]
            left += tap % KERNEL[1] * DILATION[1] - PADDING[1]
            inside = (within(top, sizes[0]) & within(left, sizes[1]) & (p < last))[:, None] & (k < k_size)[None, :]
            source = (((image * sizes[0] + top) * sizes[1] + left) * k_size)[:, None] + k[None, :]
        acc = dot(g.T, tl.load(x + source, mask=inside, other=0.0), acc, PRECISION)
    if splits == 1:
        column, awake = _place_columns(control, slots, k, tap, edge_k, strides, OUT_SEGMENTS, IN_SEGMENTS, FEW)
        target = result + n[:, None].to(tl.int64) * strides[0] + column[None, :]
        tl.store(target, acc.to(result.dtype.element_ty), mask=(n < edge_n)[:, None] & awake[None, :])
    else:
        part = parts + item * (BLOCK_N * BLOCK_K)
        tl.store(part + tl.arange(0, HEIGHT)[:, None] * BLOCK_K + tl.arange(0, WIDTH)[None, :], acc)


@triton.jit
def _convolution_grad_weight_kernel(
    grad,  # (m, n_size), the m positions of all outputs
    x,  # (images, height, width, k_size)
    result,
    result_bias,
    parts,  # float32, WAVES tiles per program
    parts_bias,  # float32, (programs, n_size)
    control,
    slots,
    m,
    height,
    width,
    out_height,
    out_width,
    height_factor,  # the reciprocals of out_height and out_width
    height_shift,
    width_factor,
    width_shift,
    n_size,
    k_size,
    stride_n,
    stride_c,
    stride_tap,
    OUT_SEGMENTS: tl.constexpr,
    IN_SEGMENTS: tl.constexpr,
    SWITCHES: tl.constexpr,
    OUT_VECTOR: tl.constexpr,
    IN_VECTOR: tl.constexpr,
    KERNEL: tl.constexpr,
    STRIDE: tl.constexpr,
    PADDING: tl.constexpr,
    DILATION: tl.constexpr,
    FEW: tl.constexpr,
    LARGE: tl.constexpr,
    BIAS: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
    WAVES: tl.constexpr,
):
    """``result = sum_p grad x`` and ``result_bias = sum_p grad``, or parts of these sums, which :func:`_add_parts_kernel` adds up."""
    taps: tl.constexpr = KERNEL[0] * KERNEL[1]
    n_size = known_multiple(n_size, OUT_VECTOR)
    k_size = known_multiple(k_size, IN_VECTOR)
    sizes = (height, width, out_height, out_width)
    factors = (height_factor, height_shift, width_factor, width_shift)
    strides = (stride_n, stride_c, stride_tap)
    on, active_n, active_k, total_n, total_k = _count_tiles(
        control, slots, n_size, k_size, OUT_SEGMENTS, IN_SEGMENTS, SWITCHES, taps, FEW, BLOCK_N, BLOCK_K
    )
    tiles = active_n * active_k
    splits = _num_splits(tiles, m, BLOCK_M, WAVES)
    length = tl.cdiv(tl.cdiv(m, BLOCK_M), splits) * BLOCK_M
    for item in range(tl.program_id(0), tiles * splits, tl.num_programs(0)):
        tile_n, tile_k = in_groups(item % tiles, active_n, active_k, GROUP)
        begin_n, edge_n, _ = locate_tile(control, slots, on, tile_n, n_size, 0, OUT_SEGMENTS, BLOCK_N)
        begin_n = known_multiple(begin_n, OUT_VECTOR)
        tap, begin_k, edge_k, _ = _locate_columns(
            control, slots, on, tile_k, k_size, OUT_SEGMENTS, IN_SEGMENTS, taps, FEW, IN_VECTOR, BLOCK_K
        )
        first = item // tiles * length
        last = min(first + length, m)
        for variant in tl.static_range(4):
            narrow_n = (edge_n - begin_n <= BLOCK_N // 2) == (variant // 2 == 1)
            narrow_k = (edge_k - begin_k <= BLOCK_K // 2) == (variant % 2 == 1)
            if narrow_n & narrow_k:
                _multiply_tile(
                    grad, x, result, parts, control, slots, (begin_n, edge_n), (tap, begin_k, edge_k), item, splits, first, last, sizes,
                    factors, n_size, k_size, strides, OUT_SEGMENTS, IN_SEGMENTS, KERNEL, STRIDE, PADDING, DILATION, FEW, LARGE, PRECISION,
                    BLOCK_M, BLOCK_N, BLOCK_K, BLOCK_N // (1 + variant // 2), BLOCK_K // (1 + variant % 2),
                )  # fmt: skip

    if BIAS:
        first = tl.program_id(0) * tl.cdiv(m, tl.num_programs(0))
        last = min(first + tl.cdiv(m, tl.num_programs(0)), m)
        for tile_n in range(active_n):
            begin_n, edge_n, _ = locate_tile(control, slots, on, tile_n, n_size, 0, OUT_SEGMENTS, BLOCK_N)
            n = known_multiple(begin_n, OUT_VECTOR) + tl.arange(0, BLOCK_N)
            total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
            for start in range(first, last, BLOCK_M):
                p = start + tl.arange(0, BLOCK_M)
                inside = (p < last)[:, None] & (n < n_size)[None, :]
                total += tl.load(grad + p[:, None].to(tl.int64) * n_size + n[None, :], mask=inside, other=0.0).to(tl.float32)
            tl.store(parts_bias + tl.program_id(0) * n_size + n, tl.sum(total, axis=0), mask=n < edge_n)

    for item in range(tl.program_id(0), total_n * total_k, tl.num_programs(0)):
        tile_n = item // total_k
        tile_k = item % total_k
        begin_n, edge_n, end_n = locate_tile(control, slots, on, tile_n, n_size, 0, OUT_SEGMENTS, BLOCK_N)
        tap, begin_k, edge_k, end_k = _locate_columns(
            control, slots, on, tile_k, k_size, OUT_SEGMENTS, IN_SEGMENTS, taps, FEW, IN_VECTOR, BLOCK_K
        )
        n = begin_n + tl.arange(0, BLOCK_N)
        k = begin_k + tl.arange(0, BLOCK_K)
        column, awake = _place_columns(control, slots, k, tap, edge_k, strides, OUT_SEGMENTS, IN_SEGMENTS, FEW)
        dormant = ((n >= edge_n) & (n < end_n))[:, None] & (k < end_k)[None, :] | (n < end_n)[:, None] & ((k < end_k) & (awake == 0))[
            None, :
        ]
        nothing = tl.zeros((BLOCK_N, BLOCK_K), dtype=result.dtype.element_ty)
        tl.store(result + n[:, None].to(tl.int64) * stride_n + column[None, :], nothing, mask=dormant)
        if BIAS and tile_k == 0:
            tl.store(result_bias + n, tl.zeros((BLOCK_N,), dtype=result_bias.dtype.element_ty), mask=(n >= edge_n) & (n < end_n))


@triton.jit
def _add_parts_kernel(
    result,
    result_bias,
    parts,
    parts_bias,
    control,
    slots,
    m,
    n_size,
    k_size,
    stride_n,
    stride_c,
    stride_tap,
    OUT_SEGMENTS: tl.constexpr,
    IN_SEGMENTS: tl.constexpr,
    SWITCHES: tl.constexpr,
    TAPS: tl.constexpr,
    FEW: tl.constexpr,
    BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
    WAVES: tl.constexpr,
    ROWS: tl.constexpr,
    AT_ONCE: tl.constexpr,
):
    """Add the parts of each tile in their order, ROWS rows of a tile at a time. Launched with as many programs as what made the parts."""
    on, active_n, active_k, _, _ = _count_tiles(
        control, slots, n_size, k_size, OUT_SEGMENTS, IN_SEGMENTS, SWITCHES, TAPS, FEW, BLOCK_N, BLOCK_K
    )
    tiles = active_n * active_k
    splits = _num_splits(tiles, m, BLOCK_M, WAVES)
    strips: tl.constexpr = BLOCK_N // ROWS
    for item in range(tl.program_id(0), tl.where(splits > 1, tiles * strips, 0), tl.num_programs(0)):
        tile = item // strips
        tile_n, tile_k = in_groups(tile, active_n, active_k, GROUP)
        begin_n, edge_n, _ = locate_tile(control, slots, on, tile_n, n_size, 0, OUT_SEGMENTS, BLOCK_N)
        tap, begin_k, edge_k, _ = _locate_columns(control, slots, on, tile_k, k_size, OUT_SEGMENTS, IN_SEGMENTS, TAPS, FEW, 1, BLOCK_K)
        r = item % strips * ROWS + tl.arange(0, ROWS)
        n = begin_n + r
        k = begin_k + tl.arange(0, BLOCK_K)
        column, awake = _place_columns(control, slots, k, tap, edge_k, (stride_n, stride_c, stride_tap), OUT_SEGMENTS, IN_SEGMENTS, FEW)
        inside = (n < edge_n)[:, None] & awake[None, :]
        place = r[:, None] * BLOCK_K + tl.arange(0, BLOCK_K)[None, :]
        acc = tl.zeros((ROWS, BLOCK_K), dtype=tl.float32)
        for split in range(0, splits, AT_ONCE):
            for later in tl.static_range(AT_ONCE):
                part = (split + later) * tiles + tile
                acc += tl.load(parts + part * BLOCK_N * BLOCK_K + place, mask=inside & (split + later < splits), other=0.0)
        tl.store(result + n[:, None].to(tl.int64) * stride_n + column[None, :], acc.to(result.dtype.element_ty), mask=inside)

    if BIAS:
        for tile_n in range(tl.program_id(0), active_n * strips, tl.num_programs(0)):
            begin_n, edge_n, _ = locate_tile(control, slots, on, tile_n // strips, n_size, 0, OUT_SEGMENTS, BLOCK_N)
            n = begin_n + tile_n % strips * ROWS + tl.arange(0, ROWS)
            total = tl.zeros((BLOCK_K, ROWS), dtype=tl.float32)
            for start in range(0, tl.num_programs(0), BLOCK_K):
                program = start + tl.arange(0, BLOCK_K)
                inside = (program < tl.num_programs(0))[:, None] & (n < edge_n)[None, :]
                total += tl.load(parts_bias + program[:, None] * n_size + n[None, :], mask=inside, other=0.0)
            tl.store(result_bias + n, tl.sum(total, axis=0).to(result_bias.dtype.element_ty), mask=n < edge_n)


def dense_grad_weight(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    control: Tensor,
    slots: Tensor,
    segments: Segments,
    windows: Windows,
    allow_tf32: bool,
    config: WeightConfig | None,
) -> tuple[Tensor, Tensor | None]:
    """``(gW, gb)`` in the types and memory formats of ``weight`` and ``bias``; without a bias the second is ``None``."""
    result = torch.empty_like(weight)
    result_bias = None if bias is None else torch.empty_like(bias)
    images, k_size, height, width = x.shape
    _, n_size, out_height, out_width = grad.shape
    m = images * out_height * out_width
    precision = precision_of(x.dtype, allow_tf32)
    vectors = vector_of(segments, grad), vector_of(segments, x)
    if config is None:
        kind = "half" if x.element_size() == 2 else precision
        config = CONFIGS[kind if min(vectors) * x.element_size() == 16 else kind + ", unaligned"]
    programs = num_programs(x.device)
    parts = torch.empty(programs * _WAVES * config.block_n * config.block_k, dtype=torch.float32, device=x.device)
    parts_bias = None if bias is None else torch.empty(programs * n_size, dtype=torch.float32, device=x.device)
    taps = windows.taps
    strides = (k_size * taps, taps, 1) if weight.is_contiguous() else (k_size * taps, 1, k_size)
    shared = {
        "OUT_SEGMENTS": segments.out,
        "IN_SEGMENTS": segments.inner,
        "SWITCHES": segments.switches,
        "FEW": k_size if k_size < FEW else 0,
        "BIAS": bias is not None,
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "BLOCK_K": config.block_k,
        "GROUP": config.group,
        "WAVES": _WAVES,
    }
    _convolution_grad_weight_kernel[(programs,)](
        grad,
        x,
        result,
        result_bias,
        parts,
        parts_bias,
        control,
        slots,
        m,
        height,
        width,
        out_height,
        out_width,
        *reciprocal(out_height),
        *reciprocal(out_width),
        n_size,
        k_size,
        *strides,
        OUT_VECTOR=vectors[0],
        IN_VECTOR=vectors[1],
        KERNEL=windows.kernel,
        STRIDE=windows.stride,
        PADDING=windows.padding,
        DILATION=windows.dilation,
        LARGE=max(grad.numel(), x.numel()) >= LARGE,
        PRECISION=precision,
        **shared,
        num_warps=config.warps,
        num_stages=config.stages,
    )
    _add_parts_kernel[(programs,)](
        result, result_bias, parts, parts_bias, control, slots, m, n_size, k_size, *strides, TAPS=taps, ROWS=8, AT_ONCE=4, **shared
    )
    return result, result_bias
