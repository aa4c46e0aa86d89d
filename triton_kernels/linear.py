"""``y = act(x W^T + b)`` over the active rows and columns of ``W``, and its gradients.

With n over the active outputs, k over the active inputs and m over all rows of a batch::

    y[m, n]  = act(sum_k x[m, k] W[n, k] + b[n])        zero for dormant n
    gx[m, k] = sum_n gy[m, n] W[n, k]                   zero for dormant k
    gW[n, k] = sum_m gy[m, n] x[m, k]                   zero where either is dormant
    gb[n]    = sum_m gy[m, n]                           zero for dormant n

Matrices have the sizes of the capacity, ``x_MK``, ``W_NK``, ``y_MN``, and a contiguous last axis. A fixed number of programs walks over
the tiles of the output: products for the active ones, zeros for the others. Full blocks of the reduction need no mask; the last one of a
segment is masked, since what lies behind it may be anything. While a switch is off, no tile is active.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .activation import activate, slope
from .launch import Segments, can_describe, describe, num_programs, precision_of
from .tiles import dot, in_groups, load_tile, store_tile
from .widths import count_tiles, locate_tile, segment_active, segment_start, switched_on


class Config(NamedTuple):
    """Tile sizes and how many warps and pipeline stages work on a tile."""

    block_m: int
    block_n: int
    block_k: int
    group: int
    warps: int
    stages: int


# Not tuned yet: what public matrix kernels use on these generations, within their registers and shared memory. By the type of the operands
# (16 bits, or float32 with or without tf32), with "+" where tiles go through the copy engine.
CONFIGS = {
    "half+": Config(128, 256, 64, 8, 8, 3),
    "half": Config(128, 128, 32, 8, 8, 4),
    "few rows+": Config(64, 128, 64, 8, 4, 4),
    "few rows": Config(64, 64, 64, 8, 4, 4),
    "tf32+": Config(128, 128, 32, 8, 8, 3),
    "tf32": Config(128, 64, 32, 8, 8, 3),
    "ieee+": Config(64, 64, 16, 8, 4, 3),
    "ieee": Config(64, 64, 16, 8, 4, 3),
}
GRAD_WEIGHT_CONFIGS = {
    "half+": Config(64, 128, 256, 8, 8, 3),
    "half": Config(32, 128, 128, 8, 8, 4),
    "tf32+": Config(32, 128, 128, 8, 8, 3),
    "tf32": Config(32, 128, 64, 8, 8, 3),
    "ieee+": Config(16, 64, 64, 8, 4, 3),
    "ieee": Config(16, 64, 64, 8, 4, 3),
}
_TAIL: int = 16  # the smallest block that the matrix units multiply


@triton.jit
def _product_kernel(
    x,  # (m, red_size)
    weight,  # (out_size, red_size), or (red_size, out_size) if TRANSPOSED
    bias,
    output,  # (m, out_size)
    before,  # as output: what the activation is applied to
    x_tiles,  # x, or its descriptor; so are the others
    weight_tiles,
    output_tiles,
    before_tiles,
    control,
    slots,
    m,
    out_size,
    red_size,
    stride_x,
    stride_weight,
    stride_output,
    OUT_FIRST: tl.constexpr,
    OUT_SEGMENTS: tl.constexpr,
    RED_FIRST: tl.constexpr,
    RED_SEGMENTS: tl.constexpr,
    SWITCHES: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    KEEP: tl.constexpr,
    PRECISION: tl.constexpr,
    TMA: tl.constexpr,
    TAIL: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
):
    """``output = act(x op(weight) + bias)``: the forward, and with TRANSPOSED the gradient of the input."""
    on = switched_on(control, slots, OUT_SEGMENTS + RED_SEGMENTS, SWITCHES)
    active, total = count_tiles(control, slots, on, out_size, OUT_FIRST, OUT_SEGMENTS, BLOCK_N)
    num_m = tl.cdiv(m, BLOCK_M)
    for item in range(tl.program_id(0), num_m * total, tl.num_programs(0)):
        awake = item < num_m * active
        row, column = in_groups(item, num_m, active + (active == 0), GROUP)
        rest = item - num_m * active
        row = tl.where(awake, row, rest % num_m) * BLOCK_M
        column = tl.where(awake, column, active + rest // num_m)
        begin, edge, end = locate_tile(control, slots, on, column, out_size, OUT_FIRST, OUT_SEGMENTS, BLOCK_N)

        acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        for segment in tl.static_range(RED_SEGMENTS):
            start = segment_start(slots, RED_FIRST, segment)
            stop = start + tl.where(awake, segment_active(control, slots, RED_FIRST + segment), 0)
            full = start + (stop - start) // BLOCK_K * BLOCK_K
            for k in range(start, full, BLOCK_K):
                a = load_tile(x_tiles, row, k, m, red_size, stride_x, BLOCK_M, BLOCK_K, TMA)
                if TRANSPOSED:
                    b = load_tile(weight_tiles, k, begin, red_size, out_size, stride_weight, BLOCK_K, BLOCK_N, TMA)
                else:
                    b = load_tile(weight_tiles, begin, k, out_size, red_size, stride_weight, BLOCK_N, BLOCK_K, TMA).T
                acc = dot(a, b, acc, PRECISION)
            for k in tl.range(full, stop, TAIL, num_stages=1):
                a = load_tile(x, row, k, m, stop, stride_x, BLOCK_M, TAIL, False)
                if TRANSPOSED:
                    b = load_tile(weight, k, begin, stop, out_size, stride_weight, TAIL, BLOCK_N, False)
                else:
                    b = load_tile(weight, begin, k, out_size, stop, stride_weight, BLOCK_N, TAIL, False).T
                acc = dot(a, b, acc, PRECISION)

        half: tl.constexpr = BLOCK_N // 2
        left, right = tl.split(tl.permute(tl.reshape(acc, (BLOCK_M, 2, half)), (0, 2, 1)))
        for side in tl.static_range(2):
            first = begin + side * half
            n = first + tl.arange(0, half)
            y = left if side == 0 else right
            if BIAS:
                y += tl.load(bias + n, mask=n < edge, other=0.0).to(tl.float32)[None, :]
            y = tl.where((n < edge)[None, :], y, 0.0)
            if KEEP:
                store_tile(before, before_tiles, row, first, m, end, stride_output, y, BLOCK_M, half, TMA and OUT_SEGMENTS == 1)
            y = activate(y, ACTIVATION)
            store_tile(output, output_tiles, row, first, m, end, stride_output, y, BLOCK_M, half, TMA and OUT_SEGMENTS == 1)


@triton.jit
def _activation_backward_kernel(
    grad,
    before,
    result,
    control,
    slots,
    m,
    size,
    OUT_SEGMENTS: tl.constexpr,
    SWITCH_FIRST: tl.constexpr,
    SWITCHES: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """``result = grad * act'(before)`` in the active columns; the others are not written, since nobody reads them."""
    on = switched_on(control, slots, SWITCH_FIRST, SWITCHES)
    active, _ = count_tiles(control, slots, on, size, 0, OUT_SEGMENTS, BLOCK_N)
    num_m = tl.cdiv(m, BLOCK_M)
    for item in range(tl.program_id(0), num_m * active, tl.num_programs(0)):
        begin, edge, _ = locate_tile(control, slots, on, item % active, size, 0, OUT_SEGMENTS, BLOCK_N)
        n = begin + tl.arange(0, BLOCK_N)
        r = item // active * BLOCK_M + tl.arange(0, BLOCK_M)
        place = r[:, None].to(tl.int64) * size + n[None, :]
        inside = (r < m)[:, None] & (n < edge)[None, :]
        x = tl.load(before + place, mask=inside, other=0.0).to(tl.float32)
        g = tl.load(grad + place, mask=inside, other=0.0).to(tl.float32)
        tl.store(result + place, (g * slope(x, ACTIVATION)).to(result.dtype.element_ty), mask=inside)


@triton.jit
def _num_splits(tiles, m, BLOCK_M: tl.constexpr):
    """Into how many parts a sum over m is cut, so that few tiles keep all programs busy: at most one item each, and no tiny parts."""
    return max(1, min(tl.num_programs(0) // max(tiles, 1), tl.cdiv(m, 4 * BLOCK_M)))


@triton.jit
def _grad_weight_kernel(
    grad,  # (m, n_size), or a descriptor of (BLOCK_M, BLOCK_N)
    x,  # (m, k_size), or a descriptor of (BLOCK_M, BLOCK_K)
    result,  # (n_size, k_size)
    result_bias,  # (n_size,)
    parts,  # float32, one tile per program
    parts_bias,  # float32, one row of BLOCK_N per program
    control,
    slots,
    m,
    n_size,
    k_size,
    stride_grad,
    stride_x,
    stride_result,
    OUT_SEGMENTS: tl.constexpr,
    IN_SEGMENTS: tl.constexpr,
    SWITCHES: tl.constexpr,
    BIAS: tl.constexpr,
    PRECISION: tl.constexpr,
    TMA: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
):
    """``result = grad^T x`` and ``result_bias = sum(grad)``, or parts of these sums, which :func:`_add_parts_kernel` adds up."""
    on = switched_on(control, slots, OUT_SEGMENTS + IN_SEGMENTS, SWITCHES)
    active_n, total_n = count_tiles(control, slots, on, n_size, 0, OUT_SEGMENTS, BLOCK_N)
    active_k, total_k = count_tiles(control, slots, on, k_size, OUT_SEGMENTS, IN_SEGMENTS, BLOCK_K)
    tiles = active_n * active_k
    splits = _num_splits(tiles, m, BLOCK_M)
    length = tl.cdiv(tl.cdiv(m, BLOCK_M), splits) * BLOCK_M
    for item in range(tl.program_id(0), tiles * splits, tl.num_programs(0)):
        tile_n, tile_k = in_groups(item // splits, active_n, active_k, GROUP)
        begin_n, edge_n, end_n = locate_tile(control, slots, on, tile_n, n_size, 0, OUT_SEGMENTS, BLOCK_N)
        begin_k, edge_k, end_k = locate_tile(control, slots, on, tile_k, k_size, OUT_SEGMENTS, IN_SEGMENTS, BLOCK_K)
        first = item % splits * length
        last = min(first + length, m)
        acc = tl.zeros((BLOCK_N, BLOCK_K), dtype=tl.float32)
        total = tl.zeros((BLOCK_N,), dtype=tl.float32)
        if BIAS and tile_k == 0:
            for row in range(first, last, BLOCK_M):
                g = load_tile(grad, row, begin_n, m, n_size, stride_grad, BLOCK_M, BLOCK_N, TMA)
                h = load_tile(x, row, begin_k, m, k_size, stride_x, BLOCK_M, BLOCK_K, TMA)
                total += tl.sum(g.to(tl.float32), axis=0)
                acc = dot(g.T, h, acc, PRECISION)
        else:
            for row in range(first, last, BLOCK_M):
                g = load_tile(grad, row, begin_n, m, n_size, stride_grad, BLOCK_M, BLOCK_N, TMA)
                h = load_tile(x, row, begin_k, m, k_size, stride_x, BLOCK_M, BLOCK_K, TMA)
                acc = dot(g.T, h, acc, PRECISION)
        n = begin_n + tl.arange(0, BLOCK_N)
        k = begin_k + tl.arange(0, BLOCK_K)
        if splits == 1:
            inside = (n < end_n)[:, None] & (k < end_k)[None, :]
            acc = tl.where((n < edge_n)[:, None] & (k < edge_k)[None, :], acc, 0.0)
            tl.store(result + n[:, None].to(tl.int64) * stride_result + k[None, :], acc.to(result.dtype.element_ty), mask=inside)
            if BIAS and tile_k == 0:
                total = tl.where(n < edge_n, total, 0.0)
                tl.store(result_bias + n, total.to(result_bias.dtype.element_ty), mask=n < end_n)
        else:
            place = tl.arange(0, BLOCK_N)[:, None] * BLOCK_K + tl.arange(0, BLOCK_K)[None, :]
            tl.store(parts + item * BLOCK_N * BLOCK_K + place, acc)
            if BIAS and tile_k == 0:
                tl.store(parts_bias + item * BLOCK_N + tl.arange(0, BLOCK_N), total)

    for item in range(tl.program_id(0), total_n * total_k, tl.num_programs(0)):
        tile_n = item // total_k
        tile_k = item % total_k
        if (tile_n >= active_n) | (tile_k >= active_k):
            begin_n, _, end_n = locate_tile(control, slots, on, tile_n, n_size, 0, OUT_SEGMENTS, BLOCK_N)
            begin_k, _, end_k = locate_tile(control, slots, on, tile_k, k_size, OUT_SEGMENTS, IN_SEGMENTS, BLOCK_K)
            n = begin_n + tl.arange(0, BLOCK_N)
            k = begin_k + tl.arange(0, BLOCK_K)
            inside = (n < end_n)[:, None] & (k < end_k)[None, :]
            nothing = tl.zeros((BLOCK_N, BLOCK_K), dtype=result.dtype.element_ty)
            tl.store(result + n[:, None].to(tl.int64) * stride_result + k[None, :], nothing, mask=inside)
            if BIAS and (tile_k == 0) & (tile_n >= active_n):
                tl.store(result_bias + n, tl.zeros((BLOCK_N,), dtype=result_bias.dtype.element_ty), mask=n < end_n)


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
    stride_result,
    OUT_SEGMENTS: tl.constexpr,
    IN_SEGMENTS: tl.constexpr,
    SWITCHES: tl.constexpr,
    BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Add the parts of each tile in their order, ROWS rows of a tile at a time. Launched with as many programs as what made the parts."""
    on = switched_on(control, slots, OUT_SEGMENTS + IN_SEGMENTS, SWITCHES)
    active_n, _ = count_tiles(control, slots, on, n_size, 0, OUT_SEGMENTS, BLOCK_N)
    active_k, _ = count_tiles(control, slots, on, k_size, OUT_SEGMENTS, IN_SEGMENTS, BLOCK_K)
    tiles = active_n * active_k
    splits = _num_splits(tiles, m, BLOCK_M)
    strips: tl.constexpr = BLOCK_N // ROWS
    for item in range(tl.program_id(0), tl.where(splits > 1, tiles * strips, 0), tl.num_programs(0)):
        tile = item // strips
        tile_n, tile_k = in_groups(tile, active_n, active_k, GROUP)
        begin_n, edge_n, end_n = locate_tile(control, slots, on, tile_n, n_size, 0, OUT_SEGMENTS, BLOCK_N)
        begin_k, edge_k, end_k = locate_tile(control, slots, on, tile_k, k_size, OUT_SEGMENTS, IN_SEGMENTS, BLOCK_K)
        r = item % strips * ROWS + tl.arange(0, ROWS)
        n = begin_n + r
        k = begin_k + tl.arange(0, BLOCK_K)
        acc = tl.zeros((ROWS, BLOCK_K), dtype=tl.float32)
        total = tl.zeros((ROWS,), dtype=tl.float32)
        for split in range(splits):
            part = tile * splits + split
            acc += tl.load(parts + part * BLOCK_N * BLOCK_K + r[:, None] * BLOCK_K + tl.arange(0, BLOCK_K)[None, :])
            if BIAS and tile_k == 0:
                total += tl.load(parts_bias + part * BLOCK_N + r)
        inside = (n < end_n)[:, None] & (k < end_k)[None, :]
        acc = tl.where((n < edge_n)[:, None] & (k < edge_k)[None, :], acc, 0.0)
        tl.store(result + n[:, None].to(tl.int64) * stride_result + k[None, :], acc.to(result.dtype.element_ty), mask=inside)
        if BIAS and tile_k == 0:
            total = tl.where(n < edge_n, total, 0.0)
            tl.store(result_bias + n, total.to(result_bias.dtype.element_ty), mask=n < end_n)


def linear_forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    control: Tensor,
    slots: Tensor,
    segments: Segments,
    activation: str = "none",
    keep: bool = False,
    *,
    allow_tf32: bool = False,
    config: Config | None = None,
) -> tuple[Tensor, Tensor | None]:
    """``(y_MN, before_MN)`` of ``x_MK``; ``before`` is what the activation was applied to, if it is to be kept."""
    m, n = x.shape[0], weight.shape[0]
    output = torch.empty((m, n), dtype=x.dtype, device=x.device)
    before = torch.empty_like(output) if keep else None
    _product(x, weight, bias, output, before, control, slots, segments, activation, allow_tf32, config, transposed=False)
    return output, before


def linear_grad_input(
    grad: Tensor,
    weight: Tensor,
    control: Tensor,
    slots: Tensor,
    segments: Segments,
    *,
    allow_tf32: bool = False,
    config: Config | None = None,
) -> Tensor:
    """``gx_MK`` of ``gy_MN``."""
    output = torch.empty((grad.shape[0], weight.shape[1]), dtype=grad.dtype, device=grad.device)
    _product(grad, weight, None, output, None, control, slots, segments, "none", allow_tf32, config, transposed=True)
    return output


def _product(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    output: Tensor,
    before: Tensor | None,
    control: Tensor,
    slots: Tensor,
    segments: Segments,
    activation: str,
    allow_tf32: bool,
    config: Config | None,
    transposed: bool,
) -> None:
    m, out_size = output.shape
    if m == 0:
        return
    precision = precision_of(x.dtype, allow_tf32)
    tma = can_describe(segments, x, weight, output)
    out_segments, red_segments = (segments.inner, segments.out) if transposed else (segments.out, segments.inner)
    if config is None:
        half = "few rows" if m <= 64 else "half"
        config = CONFIGS[(half if x.element_size() == 2 else precision) + "+" * tma]
        if out_segments > 1:  # tiles that end with their segment are not stored by the copy engine, which takes registers
            config = config._replace(block_n=config.block_n // 2)
    tiles = triton.cdiv(m, config.block_m) * (triton.cdiv(out_size, config.block_n) + out_segments)
    block_w = (config.block_k, config.block_n) if transposed else (config.block_n, config.block_k)
    block_y = (config.block_m, config.block_n // 2)
    _product_kernel[(min(tiles, num_programs(x.device)),)](
        x,
        weight,
        bias,
        output,
        before,
        describe(x, (config.block_m, config.block_k), tma),
        describe(weight, block_w, tma),
        describe(output, block_y, tma),
        None if before is None else describe(before, block_y, tma),
        control,
        slots,
        m,
        out_size,
        x.shape[1],
        x.stride(0),
        weight.stride(0),
        output.stride(0),
        OUT_FIRST=segments.out if transposed else 0,
        OUT_SEGMENTS=out_segments,
        RED_FIRST=0 if transposed else segments.out,
        RED_SEGMENTS=red_segments,
        SWITCHES=segments.switches,
        TRANSPOSED=transposed,
        BIAS=bias is not None,
        ACTIVATION=activation,
        KEEP=before is not None,
        PRECISION=precision,
        TMA=tma,
        TAIL=_TAIL,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_K=config.block_k,
        GROUP=config.group,
        num_warps=config.warps,
        num_stages=config.stages,
    )


def activation_backward(grad: Tensor, before: Tensor, activation: str, control: Tensor, slots: Tensor, segments: Segments) -> Tensor:
    """``gy * act'(before)`` in the active columns; the dormant ones are not written."""
    result = torch.empty_like(grad)
    m, size = grad.shape
    block_m, block_n = 16, 128
    tiles = triton.cdiv(m, block_m) * triton.cdiv(size, block_n)
    if m > 0:
        _activation_backward_kernel[(min(tiles, 8 * num_programs(grad.device)),)](
            grad,
            before,
            result,
            control,
            slots,
            m,
            size,
            OUT_SEGMENTS=segments.out,
            SWITCH_FIRST=segments.out + segments.inner,
            SWITCHES=segments.switches,
            ACTIVATION=activation,
            BLOCK_M=block_m,
            BLOCK_N=block_n,
        )
    return result


def linear_grad_weight(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    control: Tensor,
    slots: Tensor,
    segments: Segments,
    *,
    allow_tf32: bool = False,
    config: Config | None = None,
) -> tuple[Tensor, Tensor | None]:
    """``(gW_NK, gb_N)`` of ``gy_MN`` and ``x_MK``, in the types of ``weight`` and ``bias``; without a bias the second is ``None``."""
    result = torch.empty(weight.shape, dtype=weight.dtype, device=weight.device)
    result_bias = None if bias is None else torch.empty_like(bias)
    m, (n, k) = x.shape[0], weight.shape
    precision = precision_of(x.dtype, allow_tf32)
    tma = can_describe(segments, grad, x)
    if config is None:
        config = GRAD_WEIGHT_CONFIGS[("half" if x.element_size() == 2 else precision) + "+" * tma]
        if max(segments.out, segments.inner) > 1:
            config = config._replace(block_k=config.block_k // 2)
    programs = num_programs(x.device)
    parts = torch.empty(programs * config.block_n * config.block_k, dtype=torch.float32, device=x.device)
    parts_bias = torch.empty(programs * config.block_n, dtype=torch.float32, device=x.device)
    shared = {
        "OUT_SEGMENTS": segments.out,
        "IN_SEGMENTS": segments.inner,
        "SWITCHES": segments.switches,
        "BIAS": bias is not None,
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "BLOCK_K": config.block_k,
        "GROUP": config.group,
    }
    _grad_weight_kernel[(programs,)](
        describe(grad, (config.block_m, config.block_n), tma),
        describe(x, (config.block_m, config.block_k), tma),
        result,
        result_bias,
        parts,
        parts_bias,
        control,
        slots,
        m,
        n,
        k,
        grad.stride(0),
        x.stride(0),
        result.stride(0),
        PRECISION=precision,
        TMA=tma,
        **shared,
        num_warps=config.warps,
        num_stages=config.stages,
    )
    _add_parts_kernel[(programs,)](
        result, result_bias, parts, parts_bias, control, slots, m, n, k, result.stride(0), ROWS=min(16, config.block_n), **shared
    )
    return result, result_bias
