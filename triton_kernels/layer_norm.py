"""``y = act(norm(x) w + b + residual)`` over the active part of each row, and its gradients.

With i over the active units of a row, n of them, and m over the rows::

    mean[m] = sum_i x[m, i] / n
    rstd[m] = (sum_i (x[m, i] - mean[m])^2 / n + eps)^(-1/2)
    xhat    = (x - mean) rstd                             with CENTRE false (RMS norm) the mean is taken as zero
    before  = xhat w + b + residual
    y       = act(before)                                 zero for dormant i, as are all gradients
    g       = gy act'(before)                             the gradient of the residual
    gx      = rstd (g w - mean_i(g w) - xhat mean_i(g w xhat))
    gw[i]   = sum_m g xhat
    gb[i]   = sum_m g

Matrices have the sizes of the capacity, ``(rows, size)``, and are contiguous. Each unit of the elastic dims has ``FIXED`` indices of a row.

A row whose active part fits into ``BLOCK`` is held in registers, and each element moves once: x in and y out; backward, x and gy in and gx
out. How many rows a tile has follows the active width, from ``BLOCK`` down in ``LEVELS`` halvings, so that all tiles have the same number
of elements. Wider rows are read a second time forward and backward, from a cache if it holds them, and backward a third time for ``gw``
and ``gb``. These are sums of parts in float32, one part per program.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .activation import activate, slope
from .launch import Segments, num_programs
from .vectors import fill_with_zeros, find_active, find_extent, round_up, vector_of
from .widths import count_active, switched_on


class Config(NamedTuple):
    """The widest row that is held in registers, the elements of a tile, its warps and pipeline stages, and programs per multiprocessor."""

    block: int
    elements: int
    warps: int
    stages: int
    programs: int


_LEVELS: int = 4
_COLUMNS: int = 256  # of tiles that are summed over rows, where rows are wide, and of those filled with zeros


def _configure(size: int, itemsize: int) -> Config:
    """Of the forward. Not tuned yet, nor is the backward: as many elements as threads have registers for, all of a multiprocessor's."""
    stages = 3 if itemsize == 2 else 2
    if size > 4096:
        return Config(8192, 8192, 16, stages, 1)
    return Config(max(64, triton.next_power_of_2(size)), 4096, 8, stages, 2)


def _configure_backward(size: int, itemsize: int, activation: str) -> Config:
    stages = 3 if itemsize == 2 else 2
    if size > 2048:
        registers_suffice = activation == "none" and size <= 8192
        return Config(8192 if registers_suffice and size > 4096 else 4096, 4096, 16, stages, 1)
    return Config(max(64, triton.next_power_of_2(size)), 2048, 8, stages, 2)


@triton.jit
def _load(source, place, mask):
    return tl.load(source + place, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _store(target, place, mask, value):
    tl.store(target + place, value.to(target.dtype.element_ty), mask=mask)


@triton.jit
def _parameters(weight, bias, c, active, loaded, WEIGHT: tl.constexpr, BIAS: tl.constexpr):
    """Weight and bias of columns ``c``, zero where dormant; one and zero, if there are none."""
    w = tl.full(c.shape, 1.0, tl.float32)
    b = tl.full(c.shape, 0.0, tl.float32)
    if WEIGHT:
        w = tl.where(active, _load(weight, c, loaded), 0.0)
    if BIAS:
        b = tl.where(active, _load(bias, c, loaded), 0.0)
    return w, b


@triton.jit
def _finish(value, residual, place, mask, active, w, b, RESIDUAL: tl.constexpr, ACTIVATION: tl.constexpr):
    """``y`` of ``xhat``, zero where dormant."""
    value = value * w + b
    if RESIDUAL:
        value += _load(residual, place, mask)
    return tl.where(active, activate(value, ACTIVATION), 0.0)


@triton.jit
def _gradient(grad, residual, place, mask, active, xhat, w, b, RESIDUAL: tl.constexpr, ACTIVATION: tl.constexpr):
    """``g``, zero where dormant."""
    g = _load(grad, place, mask)
    if ACTIVATION != "none":
        before = xhat * w + b
        if RESIDUAL:
            before += _load(residual, place, mask)
        g *= slope(before, ACTIVATION)
    return tl.where(active, g, 0.0)


@triton.jit
def _layer_norm_forward_kernel(
    x,  # (rows, size), as are y and the residual
    weight,  # (size,)
    bias,
    residual,
    y,
    mean,  # (rows,)
    rstd,
    control,
    slots,
    rows,
    size,
    eps,
    SEGMENTS: tl.constexpr,
    SWITCHES: tl.constexpr,
    FIXED: tl.constexpr,
    VECTOR: tl.constexpr,
    CENTRE: tl.constexpr,
    WEIGHT: tl.constexpr,
    BIAS: tl.constexpr,
    RESIDUAL: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BLOCK: tl.constexpr,
    ELEMENTS: tl.constexpr,
    LEVELS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STAGES: tl.constexpr,
    WIDE: tl.constexpr,
):
    """The output, and mean and rstd of each row."""
    on = switched_on(control, slots, SEGMENTS, SWITCHES)
    size = round_up(size, VECTOR)
    extent = find_extent(control, slots, on, FIXED, SEGMENTS, VECTOR)
    count = max(count_active(control, slots, 0, SEGMENTS) * FIXED, 1)
    for level in tl.static_range(LEVELS):
        if (extent <= BLOCK >> level) & (extent > (BLOCK >> level + 1 if level + 1 < LEVELS else 0)):
            WIDTH: tl.constexpr = BLOCK >> level
            ROWS: tl.constexpr = ELEMENTS // WIDTH if ELEMENTS > WIDTH else 1
            c = tl.arange(0, WIDTH)
            active, loaded = find_active(control, slots, c, FIXED, SEGMENTS, VECTOR)
            w, b = _parameters(weight, bias, c, active, loaded, WEIGHT, BIAS)
            offset = tl.arange(0, ROWS)[:, None] * size + c[None, :]
            for tile in tl.range(tl.program_id(0), tl.cdiv(rows, ROWS), tl.num_programs(0), num_stages=STAGES):
                r = tile * ROWS + tl.arange(0, ROWS)
                base = tl.cast(tile * ROWS, tl.int64) * size
                place = base + offset
                mask = (r < rows)[:, None] & loaded[None, :]
                value = tl.where(active[None, :], _load(x, place, mask), 0.0)
                if CENTRE:
                    centre = tl.sum(value, 1) / count
                    value = tl.where(active[None, :], value - centre[:, None], 0.0)
                    tl.store(mean + r, centre, mask=r < rows)
                scale = 1 / tl.sqrt(tl.sum(value * value, 1) / count + eps)
                tl.store(rstd + r, scale, mask=r < rows)
                value = _finish(
                    value * scale[:, None], residual, place, mask, active[None, :], w[None, :], b[None, :], RESIDUAL, ACTIVATION
                )
                _store(y + base, offset, (r < rows)[:, None] & (c < extent)[None, :], value)
    if WIDE and extent > BLOCK:
        for row in range(tl.program_id(0), rows, tl.num_programs(0)):
            base = tl.cast(row, tl.int64) * size
            centre = 0.0
            squares = 0.0
            seen = 0.0
            for first in range(0, extent, BLOCK):
                c = first + tl.arange(0, BLOCK)
                active, loaded = find_active(control, slots, c, FIXED, SEGMENTS, VECTOR)
                value = tl.where(active, _load(x, base + c, loaded), 0.0)
                if CENTRE:  # mean and squares of the block join those of the blocks before it (Chan, Golub and LeVeque 1979)
                    here = tl.sum(active.to(tl.float32))
                    block = tl.sum(value) / tl.maximum(here, 1.0)
                    value = tl.where(active, value - block, 0.0)
                    share = here / tl.maximum(seen + here, 1.0)
                    squares += (block - centre) * (block - centre) * seen * share
                    centre += (block - centre) * share
                    seen += here
                squares += tl.sum(value * value)
            scale = 1 / tl.sqrt(squares / count + eps)
            if CENTRE:
                tl.store(mean + row, centre)
            tl.store(rstd + row, scale)
            for first in range(0, extent, BLOCK):
                c = first + tl.arange(0, BLOCK)
                active, loaded = find_active(control, slots, c, FIXED, SEGMENTS, VECTOR)
                w, b = _parameters(weight, bias, c, active, loaded, WEIGHT, BIAS)
                value = (_load(x, base + c, loaded) - centre) * scale
                _store(y, base + c, c < extent, _finish(value, residual, base + c, loaded, active, w, b, RESIDUAL, ACTIVATION))
    fill_with_zeros(y, rows, size, extent, ELEMENTS // COLUMNS, COLUMNS)


@triton.jit
def _num_parts(extent, rows, programs, BLOCK: tl.constexpr, COLUMNS: tl.constexpr):
    """Of how many parts ``gw`` and ``gb`` are the sums: one per program, or as many as there are programs for a block of columns."""
    splits = max(1, min(programs // max(tl.cdiv(extent, COLUMNS), 1), rows))
    return tl.where(extent <= BLOCK, programs, splits)


@triton.jit
def _layer_norm_backward_kernel(
    grad,  # (rows, size), as are x, the residual and their gradients
    x,
    weight,  # (size,)
    bias,
    residual,
    mean,  # (rows,)
    rstd,
    grad_x,
    grad_residual,
    parts,  # float32, per part two rows of the extent: of gw and of gb
    control,
    slots,
    rows,
    size,
    SEGMENTS: tl.constexpr,
    SWITCHES: tl.constexpr,
    FIXED: tl.constexpr,
    VECTOR: tl.constexpr,
    CENTRE: tl.constexpr,
    WEIGHT: tl.constexpr,
    BIAS: tl.constexpr,
    RESIDUAL: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BLOCK: tl.constexpr,
    ELEMENTS: tl.constexpr,
    LEVELS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STAGES: tl.constexpr,
    WIDE: tl.constexpr,
):
    """The gradients of x and the residual, and parts of those of the parameters, which :func:`_add_parts_kernel` adds up."""
    on = switched_on(control, slots, SEGMENTS, SWITCHES)
    size = round_up(size, VECTOR)
    extent = find_extent(control, slots, on, FIXED, SEGMENTS, VECTOR)
    share = 1.0 / max(count_active(control, slots, 0, SEGMENTS) * FIXED, 1)
    for level in tl.static_range(LEVELS):
        if (extent <= BLOCK >> level) & (extent > (BLOCK >> level + 1 if level + 1 < LEVELS else 0)):
            WIDTH: tl.constexpr = BLOCK >> level
            ROWS: tl.constexpr = ELEMENTS // WIDTH if ELEMENTS > WIDTH else 1
            c = tl.arange(0, WIDTH)
            active, loaded = find_active(control, slots, c, FIXED, SEGMENTS, VECTOR)
            w, b = _parameters(weight, bias, c, active, loaded, WEIGHT, BIAS)
            sum_w = tl.zeros((ROWS, WIDTH), dtype=tl.float32)
            sum_b = tl.zeros((ROWS, WIDTH), dtype=tl.float32)
            offset = tl.arange(0, ROWS)[:, None] * size + c[None, :]
            for tile in tl.range(tl.program_id(0), tl.cdiv(rows, ROWS), tl.num_programs(0), num_stages=STAGES):
                r = tile * ROWS + tl.arange(0, ROWS)
                base = tl.cast(tile * ROWS, tl.int64) * size
                place = base + offset
                mask = (r < rows)[:, None] & loaded[None, :]
                written = (r < rows)[:, None] & (c < extent)[None, :]
                scale = tl.load(rstd + r, mask=r < rows, other=0.0)
                value = _load(x, place, mask)
                if CENTRE:
                    value -= tl.load(mean + r, mask=r < rows, other=0.0)[:, None]
                xhat = tl.where(active[None, :], value * scale[:, None], 0.0)
                g = _gradient(grad, residual, place, mask, active[None, :], xhat, w[None, :], b[None, :], RESIDUAL, ACTIVATION)
                if RESIDUAL:
                    _store(grad_residual + base, offset, written, g)
                if WEIGHT:
                    sum_w += g * xhat
                if BIAS:
                    sum_b += g
                g *= w[None, :]
                along = tl.sum(g * xhat, 1) * share
                result = g - xhat * along[:, None]
                if CENTRE:
                    result -= (tl.sum(g, 1) * share)[:, None]
                _store(grad_x + base, offset, written, tl.where(active[None, :], result * scale[:, None], 0.0))
            part = parts + 2 * tl.program_id(0) * extent
            if WEIGHT:
                tl.store(part + c, tl.sum(sum_w, 0), mask=c < extent)
            if BIAS:
                tl.store(part + extent + c, tl.sum(sum_b, 0), mask=c < extent)
    if WIDE and extent > BLOCK:
        for row in range(tl.program_id(0), rows, tl.num_programs(0)):
            base = tl.cast(row, tl.int64) * size
            scale = tl.load(rstd + row)
            centre = 0.0
            if CENTRE:
                centre = tl.load(mean + row)
            sum_along = tl.zeros((BLOCK,), dtype=tl.float32)
            sum_g = tl.zeros((BLOCK,), dtype=tl.float32)
            for first in range(0, extent, BLOCK):
                c = first + tl.arange(0, BLOCK)
                active, loaded = find_active(control, slots, c, FIXED, SEGMENTS, VECTOR)
                w, b = _parameters(weight, bias, c, active, loaded, WEIGHT, BIAS)
                xhat = tl.where(active, (_load(x, base + c, loaded) - centre) * scale, 0.0)
                g = w * _gradient(grad, residual, base + c, loaded, active, xhat, w, b, RESIDUAL, ACTIVATION)
                sum_along += g * xhat
                sum_g += g
            along = tl.sum(sum_along) * share
            shift = 0.0
            if CENTRE:
                shift = tl.sum(sum_g) * share
            for first in range(0, extent, BLOCK):
                c = first + tl.arange(0, BLOCK)
                active, loaded = find_active(control, slots, c, FIXED, SEGMENTS, VECTOR)
                w, b = _parameters(weight, bias, c, active, loaded, WEIGHT, BIAS)
                xhat = tl.where(active, (_load(x, base + c, loaded) - centre) * scale, 0.0)
                g = _gradient(grad, residual, base + c, loaded, active, xhat, w, b, RESIDUAL, ACTIVATION)
                if RESIDUAL:
                    _store(grad_residual, base + c, c < extent, g)
                _store(grad_x, base + c, c < extent, tl.where(active, (g * w - shift - xhat * along) * scale, 0.0))
        TALL: tl.constexpr = ELEMENTS // COLUMNS
        blocks = tl.cdiv(extent, COLUMNS)
        splits = _num_parts(extent, rows, tl.num_programs(0), BLOCK, COLUMNS)
        for item in range(tl.program_id(0), tl.where(WEIGHT or BIAS, blocks * splits, 0), tl.num_programs(0)):
            c = item % blocks * COLUMNS + tl.arange(0, COLUMNS)
            active, loaded = find_active(control, slots, c, FIXED, SEGMENTS, VECTOR)
            w, b = _parameters(weight, bias, c, active, loaded, WEIGHT, BIAS)
            sum_w = tl.zeros((TALL, COLUMNS), dtype=tl.float32)
            sum_b = tl.zeros((TALL, COLUMNS), dtype=tl.float32)
            for tile in range(item // blocks, tl.cdiv(rows, TALL), splits):
                r = tile * TALL + tl.arange(0, TALL)
                place = r[:, None].to(tl.int64) * size + c[None, :]
                mask = (r < rows)[:, None] & loaded[None, :]
                scale = tl.load(rstd + r, mask=r < rows, other=0.0)
                value = _load(x, place, mask)
                if CENTRE:
                    value -= tl.load(mean + r, mask=r < rows, other=0.0)[:, None]
                xhat = tl.where(active[None, :], value * scale[:, None], 0.0)
                g = _gradient(grad, residual, place, mask, active[None, :], xhat, w[None, :], b[None, :], RESIDUAL, ACTIVATION)
                sum_w += g * xhat
                sum_b += g
            part = parts + 2 * (item // blocks) * extent
            tl.store(part + c, tl.sum(sum_w, 0), mask=c < extent)
            tl.store(part + extent + c, tl.sum(sum_b, 0), mask=c < extent)
    fill_with_zeros(grad_x, rows, size, extent, ELEMENTS // COLUMNS, COLUMNS)
    if RESIDUAL:
        fill_with_zeros(grad_residual, rows, size, extent, ELEMENTS // COLUMNS, COLUMNS)


@triton.jit
def _add_parts_kernel(
    parts,
    grad_weight,
    grad_bias,
    control,
    slots,
    rows,
    size,
    programs,  # that made the parts
    SEGMENTS: tl.constexpr,
    SWITCHES: tl.constexpr,
    FIXED: tl.constexpr,
    VECTOR: tl.constexpr,
    WEIGHT: tl.constexpr,
    BIAS: tl.constexpr,
    BLOCK: tl.constexpr,
    COLUMNS: tl.constexpr,
    STRIP: tl.constexpr,
    PARTS: tl.constexpr,
):
    """The gradients of the parameters: parts added PARTS at a time, in their order. One program per STRIP columns."""
    on = switched_on(control, slots, SEGMENTS, SWITCHES)
    extent = find_extent(control, slots, on, FIXED, SEGMENTS, VECTOR)
    first = tl.program_id(0) * STRIP
    count = tl.where(first < extent, _num_parts(extent, rows, programs, BLOCK, COLUMNS), 0)
    c = first + tl.arange(0, STRIP)
    sum_w = tl.zeros((PARTS, STRIP), dtype=tl.float32)
    sum_b = tl.zeros((PARTS, STRIP), dtype=tl.float32)
    for part in range(0, count, PARTS):
        p = part + tl.arange(0, PARTS)
        place = 2 * p[:, None] * extent + c[None, :]
        mask = (p < count)[:, None] & (c < extent)[None, :]
        if WEIGHT:
            sum_w += _load(parts, place, mask)
        if BIAS:
            sum_b += _load(parts, place + extent, mask)
    active, _ = find_active(control, slots, c, FIXED, SEGMENTS, VECTOR)
    if WEIGHT:
        _store(grad_weight, c, c < size, tl.where(active & (on == 1), tl.sum(sum_w, 0), 0.0))
    if BIAS:
        _store(grad_bias, c, c < size, tl.where(active & (on == 1), tl.sum(sum_b, 0), 0.0))


def layer_norm_forward(
    x: Tensor,
    fixed: int,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    control: Tensor,
    slots: Tensor,
    segments: Segments,
    eps: float,
    activation: str = "none",
    *,
    centre: bool = True,
    config: Config | None = None,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """``(y, mean, rstd)`` of ``x``, contiguous ``(rows, size)``; of each row the last two, in float32, without ``centre`` no mean."""
    rows, size = x.shape
    config = config or _configure(size, x.element_size())
    y = torch.empty_like(x)
    rstd = torch.empty(rows, dtype=torch.float32, device=x.device)
    mean = torch.empty_like(rstd) if centre else None
    _layer_norm_forward_kernel[(_num_programs(x, config),)](
        x,
        weight,
        bias,
        residual,
        y,
        mean,
        rstd,
        control,
        slots,
        rows,
        size,
        eps,
        CENTRE=centre,
        **_structure(size, fixed, weight, bias, segments, config),
        **_tiles(size, residual, activation, config),
    )
    return y, mean, rstd


def layer_norm_backward(
    grad: Tensor,
    x: Tensor,
    fixed: int,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    mean: Tensor | None,
    rstd: Tensor,
    control: Tensor,
    slots: Tensor,
    segments: Segments,
    activation: str = "none",
    *,
    config: Config | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """``(gx, gw, gb, gresidual)`` of ``gy``, contiguous ``(rows, size)``; ``None`` for what was not given."""
    rows, size = x.shape
    config = config or _configure_backward(size, x.element_size(), activation)
    grad_x = torch.empty_like(x)
    grad_weight, grad_bias, grad_residual = (None if t is None else torch.empty_like(t) for t in (weight, bias, residual))
    programs = _num_programs(x, config)
    parts = torch.empty(2 * max(programs * min(config.block, size), size), dtype=torch.float32, device=x.device)
    structure = _structure(size, fixed, weight, bias, segments, config)
    _layer_norm_backward_kernel[(programs,)](
        grad,
        x,
        weight,
        bias,
        residual,
        mean,
        rstd,
        grad_x,
        grad_residual,
        parts,
        control,
        slots,
        rows,
        size,
        CENTRE=mean is not None,
        **structure,
        **_tiles(size, residual, activation, config),
    )
    if weight is not None or bias is not None:
        _add_parts_kernel[(triton.cdiv(size, 32),)](
            parts, grad_weight, grad_bias, control, slots, rows, size, programs, **structure, STRIP=32, PARTS=64
        )
    return grad_x, grad_weight, grad_bias, grad_residual


def _num_programs(x: Tensor, config: Config) -> int:
    return max(1, min(triton.cdiv(x.shape[0], max(1, config.elements // config.block)), config.programs * num_programs(x.device)))


def _structure(size: int, fixed: int, weight: Tensor | None, bias: Tensor | None, segments: Segments, config: Config) -> dict[str, Any]:
    """What all kernels are specialised for."""
    return {
        "SEGMENTS": segments.out,
        "SWITCHES": segments.switches,
        "FIXED": fixed,
        "VECTOR": vector_of(size, segments.aligned != 0),
        "WEIGHT": weight is not None,
        "BIAS": bias is not None,
        "BLOCK": config.block,
        "COLUMNS": min(_COLUMNS, config.block),
    }


def _tiles(size: int, residual: Tensor | None, activation: str, config: Config) -> dict[str, Any]:
    """What those that walk over tiles are specialised for besides."""
    return {
        "RESIDUAL": residual is not None,
        "ACTIVATION": activation,
        "ELEMENTS": config.elements,
        "LEVELS": _LEVELS,
        "STAGES": config.stages,
        "WIDE": size > config.block,
        "num_warps": config.warps,
    }
