"""``y = act(norm(x) w + b + residual)`` over the active features of a batch, and its gradients.

With c over the active features, m over the M elements that a feature has (batch and pixels)::

    mean[c] = sum_m x[c, m] / M                            in eval mode, as the variance, the running one
    rstd[c] = (sum_m (x[c, m] - mean[c])^2 / M + eps)^(-1/2)
    xhat    = (x - mean) rstd
    before  = xhat w + b + residual
    y       = act(before)                                  zero for dormant c, as are all gradients
    g       = gy act'(before)                              the gradient of the residual
    gw[c]   = sum_m g xhat
    gb[c]   = sum_m g
    gx      = rstd w (g - gb / M - xhat gw / M)            in eval mode rstd w g

x is ``(N, C, *)`` in either memory format, and so are y, the residual and the gradients. A tile is ``CHANNELS`` channels by ``ELEMENTS``
elements; only the strides of these two differ between formats. The elements of a channel are cut into *steps*; the tiles of all steps of
all active channels make the work, of which each program gets one contiguous piece. Where a piece ends within a tile's steps, so does a
part of the tile's sums, and a second kernel joins the parts, in their order.

Training moves x in twice and y out once; backward x and gy in twice and gx out once. A residual comes in once more forward; backward its
gradient is written by the first pass, and read by the second one instead of gy and the residual. Second passes walk from the end of a
program's piece to its start, which the first pass left in the cache. In eval mode everything moves once.
"""

import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .activation import activate, slope
from .launch import Segments, num_programs
from .vectors import round_up, vector_of
from .widths import count_tiles, locate_tile, switched_on


class Config(NamedTuple):
    """How many elements a tile has, how many warps and pipeline stages work on it, and how many programs on a multiprocessor."""

    tile: int
    warps: int
    stages: int
    programs: int


class _Format(NamedTuple):
    """The sizes of an input as kernels see them: ``pixels`` are those of one image if they lie together, else all are rows."""

    rows: int
    channels: int
    pixels: int
    channels_last: bool


_PARTS: int = 64  # how many parts are joined at once
_LANES: int = 16  # of how many channels


def _configure(itemsize: int, many_registers: bool) -> Config:
    """Not tuned yet: what leaves registers for all programs at once, with enough bytes on their way.

    Many are needed backward, and where the elements of a tile are accessed one by one.
    """
    return Config(tile=2048 if many_registers else 4096, warps=8, stages=3 if itemsize == 2 else 2, programs=2)


@triton.jit
def _load(source, place, mask):
    return tl.load(source + place, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _store(target, place, mask, value):
    tl.store(target + place, value.to(tl.float32).to(target.dtype.element_ty), mask=mask)


@triton.jit
def _locate_step(step, rows, channels, pixels, CHANNELS_LAST: tl.constexpr, ELEMENTS: tl.constexpr, SPAN: tl.constexpr):
    """Where a step begins in memory, and which of its elements exist."""
    e = tl.arange(0, ELEMENTS)
    if CHANNELS_LAST:
        base = tl.cast(step * ELEMENTS, tl.int64) * channels
        exists = e < rows - step * ELEMENTS
    else:
        image = step // tl.cdiv(pixels, SPAN) * (ELEMENTS // SPAN)
        pixel = step % tl.cdiv(pixels, SPAN) * SPAN
        base = tl.cast(image, tl.int64) * channels * pixels + pixel
        exists = (e // SPAN < rows - image) & (e % SPAN < pixels - pixel)
    return base, exists


@triton.jit
def _count_elements(step, rows, pixels, CHANNELS_LAST: tl.constexpr, ELEMENTS: tl.constexpr, SPAN: tl.constexpr):
    """How many elements of a step exist."""
    number = min(rows - step * ELEMENTS, ELEMENTS)
    if not CHANNELS_LAST:
        images = min(rows - step // tl.cdiv(pixels, SPAN) * (ELEMENTS // SPAN), ELEMENTS // SPAN)
        number = images * min(pixels - step % tl.cdiv(pixels, SPAN) * SPAN, SPAN)
    return number


@triton.jit
def _offsets(c, channels, pixels, CHANNELS_LAST: tl.constexpr, ELEMENTS: tl.constexpr, SPAN: tl.constexpr):
    """Where the elements of a tile of channels ``c`` lie behind the beginning of a step."""
    e = tl.arange(0, ELEMENTS)
    if CHANNELS_LAST:
        offset = c[:, None] + (e * channels)[None, :]
    else:
        offset = (c * pixels)[:, None] + (e // SPAN * channels * pixels + e % SPAN)[None, :]
    return offset


@triton.jit
def _locate_channels(
    control,
    slots,
    on,
    tile,
    channels,
    SEGMENTS: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    VECTOR: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """The channels of a tile; which of them are active, which are loaded, and which belong to their segment."""
    begin, edge, end = locate_tile(control, slots, on, tile, channels, 0, SEGMENTS, CHANNELS)
    if CHANNELS_LAST:  # rounded, which changes nothing: where segments are not aligned, VECTOR is 1
        begin = begin // VECTOR * VECTOR
        end = end // VECTOR * VECTOR
    c = begin + tl.arange(0, CHANNELS)
    loaded = c < edge
    if CHANNELS_LAST:
        loaded = c < begin + round_up(edge - begin, VECTOR)
    return c, c < edge, loaded, c < end


@triton.jit
def _piece(work):
    """The piece of the work that is this program's."""
    length = tl.cdiv(work, tl.num_programs(0))
    first = min(tl.program_id(0) * length, work)
    return first, min(first + length, work)


@triton.jit
def _parts_of(tile, tiles, steps, programs):
    """Which parts are those of a tile: one for each program whose piece has some of its steps.

    The part of program p and tile t is number p + t: from one part to the next, one of the two goes up, or both.
    """
    length = max(tl.cdiv(tiles * steps, programs), 1)
    return tile * steps // length + tile, tl.cdiv((tile + 1) * steps, length) + tile


@triton.jit
def _parameters(weight, bias, c, active, WEIGHT: tl.constexpr, BIAS: tl.constexpr):
    """Weight and bias of channels ``c``; one and zero, if there are none."""
    w = tl.full(c.shape, 1.0, tl.float32)
    b = tl.full(c.shape, 0.0, tl.float32)
    if WEIGHT:
        w = _load(weight, c, active)
    if BIAS:
        b = _load(bias, c, active)
    return w[:, None], b[:, None]


@triton.jit
def _statistics(mean, spread, c, active, eps, TRAINING: tl.constexpr):
    """Mean and rstd of channels ``c``; ``spread`` is rstd in training, and the running variance in eval mode."""
    centre = _load(mean, c, active)
    scale = _load(spread, c, active)
    if not TRAINING:
        scale = 1 / tl.sqrt(scale + eps)
    return centre[:, None], scale[:, None]


@triton.jit
def _clear_dormant(
    target,
    control,
    slots,
    on,
    rows,
    channels,
    pixels,
    steps,
    SEGMENTS: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    VECTOR: tl.constexpr,
    CHANNELS: tl.constexpr,
    ELEMENTS: tl.constexpr,
    SPAN: tl.constexpr,
):
    """Zeros in the tiles that are dormant; all programs take part."""
    active, total = count_tiles(control, slots, on, channels, 0, SEGMENTS, CHANNELS)
    for item in range(tl.program_id(0), (total - active) * steps, tl.num_programs(0)):
        c, _, _, own = _locate_channels(control, slots, on, active + item // steps, channels, SEGMENTS, CHANNELS_LAST, VECTOR, CHANNELS)
        base, exists = _locate_step(item % steps, rows, channels, pixels, CHANNELS_LAST, ELEMENTS, SPAN)
        offset = _offsets(c, channels, pixels, CHANNELS_LAST, ELEMENTS, SPAN)
        nothing = tl.zeros((CHANNELS, ELEMENTS), dtype=target.dtype.element_ty)
        tl.store(target + base + offset, nothing, mask=own[:, None] & exists[None, :])


@triton.jit
def _sum_kernel(
    x,
    parts,  # float32, per part and channel: the shift, the mean distance from it, the sum of squared distances from the mean
    numbers,  # float32, per part, of how many elements
    batches,
    control,
    slots,
    rows,
    channels,
    pixels,
    steps,
    SEGMENTS: tl.constexpr,
    SWITCHES: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    VECTOR: tl.constexpr,
    CHANNELS: tl.constexpr,
    ELEMENTS: tl.constexpr,
    SPAN: tl.constexpr,
    BATCHES: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Parts of the statistics, summed relative to the mean of a part's first step; counts the batch."""
    on = switched_on(control, slots, SEGMENTS, SWITCHES)
    if BATCHES and tl.program_id(0) == 0:
        tl.store(batches, tl.load(batches) + on)
    channels, pixels = _tell_multiples(channels, pixels, CHANNELS_LAST, VECTOR)
    tiles = count_tiles(control, slots, on, channels, 0, SEGMENTS, CHANNELS)[0]
    first, last = _piece(tiles * steps)
    for tile in range(first // steps, tl.cdiv(last, steps)):
        c, _, loaded, _ = _locate_channels(control, slots, on, tile, channels, SEGMENTS, CHANNELS_LAST, VECTOR, CHANNELS)
        offset = _offsets(c, channels, pixels, CHANNELS_LAST, ELEMENTS, SPAN)
        start = max(first - tile * steps, 0)
        base, exists = _locate_step(start, rows, channels, pixels, CHANNELS_LAST, ELEMENTS, SPAN)
        number = _count_elements(start, rows, pixels, CHANNELS_LAST, ELEMENTS, SPAN)
        shift = tl.sum(_load(x, base + offset, loaded[:, None] & exists[None, :]), 1) / number
        sums = tl.zeros((CHANNELS, ELEMENTS), dtype=tl.float32)
        squares = tl.zeros((CHANNELS, ELEMENTS), dtype=tl.float32)
        total = 0
        for step in tl.range(start, min(last - tile * steps, steps), num_stages=STAGES):
            base, exists = _locate_step(step, rows, channels, pixels, CHANNELS_LAST, ELEMENTS, SPAN)
            number = _count_elements(step, rows, pixels, CHANNELS_LAST, ELEMENTS, SPAN)
            distance = _load(x, base + offset, loaded[:, None] & exists[None, :]) - shift[:, None]
            distance = tl.where(exists[None, :], distance, 0.0)
            sums += distance
            squares += distance * distance
            total += number
        beyond = tl.sum(sums, 1)
        part = tl.program_id(0) + tile
        place = part * 3 * CHANNELS + tl.arange(0, CHANNELS)
        tl.store(parts + place, shift)
        tl.store(parts + place + CHANNELS, beyond / total)
        tl.store(parts + place + 2 * CHANNELS, tl.maximum(tl.sum(squares, 1) - beyond * (beyond / total), 0.0))
        tl.store(numbers + part, tl.cast(total, tl.float32))


@triton.jit
def _tell_multiples(channels, pixels, CHANNELS_LAST: tl.constexpr, VECTOR: tl.constexpr):
    """The sizes, of which the compiler then knows that what lies together is a multiple of VECTOR."""
    if CHANNELS_LAST:
        channels = round_up(channels, VECTOR)
    else:
        pixels = round_up(pixels, VECTOR)
    return channels, pixels


@triton.jit
def _load_mean(parts, place, mask, CHANNELS: tl.constexpr):
    """The mean of a part, with more digits than float32 has: between parts it is the difference that counts."""
    return _load(parts, place, mask).to(tl.float64) + _load(parts, place + CHANNELS, mask)


@triton.jit
def _join_statistics_kernel(
    parts,
    numbers,
    mean,
    rstd,
    running_mean,
    running_var,
    batches,
    control,
    slots,
    rows,
    channels,
    pixels,
    steps,
    programs,  # that made the parts
    momentum,
    eps,
    SEGMENTS: tl.constexpr,
    SWITCHES: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    CHANNELS: tl.constexpr,
    ELEMENTS: tl.constexpr,
    SPAN: tl.constexpr,
    RUNNING: tl.constexpr,
    CUMULATIVE: tl.constexpr,
    LANES: tl.constexpr,
    PARTS: tl.constexpr,
):
    """Mean and rstd of all parts together (Chan, Golub and LeVeque 1979), in float64; moves the running statistics."""
    on = switched_on(control, slots, SEGMENTS, SWITCHES)
    tiles = count_tiles(control, slots, on, channels, 0, SEGMENTS, CHANNELS)[0]
    count = tl.cast(rows, tl.float64) * pixels
    share = momentum
    if CUMULATIVE:
        share = 1.0 / tl.load(batches).to(tl.float32)
    strips: tl.constexpr = CHANNELS // LANES
    for item in range(tl.program_id(0), tiles * strips, tl.num_programs(0)):
        tile = item // strips
        lane = item % strips * LANES + tl.arange(0, LANES)
        first, last = _parts_of(tile, tiles, steps, programs)
        sums = tl.zeros((LANES, PARTS), dtype=tl.float64)
        for part in range(first, last, PARTS):
            p = part + tl.arange(0, PARTS)
            place = p[None, :] * 3 * CHANNELS + lane[:, None]
            number = _load(numbers, p, p < last)[None, :]
            sums += _load_mean(parts, place, (p < last)[None, :], CHANNELS) * number
        centre = tl.sum(sums, 1) / count
        squares = tl.zeros((LANES, PARTS), dtype=tl.float64)
        for part in range(first, last, PARTS):
            p = part + tl.arange(0, PARTS)
            place = p[None, :] * 3 * CHANNELS + lane[:, None]
            number = _load(numbers, p, p < last)[None, :]
            distance = _load_mean(parts, place, (p < last)[None, :], CHANNELS) - centre[:, None]
            squares += distance * distance * number + _load(parts, place + 2 * CHANNELS, (p < last)[None, :])
        sum_of_squares = tl.sum(squares, 1)
        begin, edge, _ = locate_tile(control, slots, on, tile, channels, 0, SEGMENTS, CHANNELS)
        c = begin + lane
        _store(mean, c, c < edge, centre)
        _store(rstd, c, c < edge, 1 / tl.sqrt(sum_of_squares / count + eps))
        if RUNNING:
            old = _load(running_mean, c, c < edge)
            _store(running_mean, c, c < edge, old + share * (centre - old))
            old = _load(running_var, c, c < edge)
            _store(running_var, c, c < edge, old + share * (sum_of_squares / (count - 1) - old))


@triton.jit
def _normalise_kernel(
    x,
    weight,
    bias,
    residual,
    y,
    mean,
    spread,
    control,
    slots,
    rows,
    channels,
    pixels,
    steps,
    eps,
    SEGMENTS: tl.constexpr,
    SWITCHES: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    VECTOR: tl.constexpr,
    CHANNELS: tl.constexpr,
    ELEMENTS: tl.constexpr,
    SPAN: tl.constexpr,
    TRAINING: tl.constexpr,
    WEIGHT: tl.constexpr,
    BIAS: tl.constexpr,
    RESIDUAL: tl.constexpr,
    ACTIVATION: tl.constexpr,
    STAGES: tl.constexpr,
):
    """The output."""
    on = switched_on(control, slots, SEGMENTS, SWITCHES)
    channels, pixels = _tell_multiples(channels, pixels, CHANNELS_LAST, VECTOR)
    tiles = count_tiles(control, slots, on, channels, 0, SEGMENTS, CHANNELS)[0]
    first, last = _piece(tiles * steps)
    for tile in range(first // steps, tl.cdiv(last, steps)):
        c, active, loaded, own = _locate_channels(control, slots, on, tile, channels, SEGMENTS, CHANNELS_LAST, VECTOR, CHANNELS)
        offset = _offsets(c, channels, pixels, CHANNELS_LAST, ELEMENTS, SPAN)
        w, b = _parameters(weight, bias, c, active, WEIGHT, BIAS)
        centre, scale = _statistics(mean, spread, c, active, eps, TRAINING)
        start = max(first - tile * steps, 0)
        stop = min(last - tile * steps, steps)
        for back in tl.range(0, stop - start, num_stages=STAGES):
            base, exists = _locate_step(stop - 1 - back, rows, channels, pixels, CHANNELS_LAST, ELEMENTS, SPAN)
            mask = loaded[:, None] & exists[None, :]
            value = (_load(x, base + offset, mask) - centre) * (scale * w) + b
            if RESIDUAL:
                value += _load(residual, base + offset, mask)
            value = tl.where(active[:, None], activate(value, ACTIVATION), 0.0)
            _store(y + base, offset, own[:, None] & exists[None, :], value)
    _clear_dormant(y, control, slots, on, rows, channels, pixels, steps, SEGMENTS, CHANNELS_LAST, VECTOR, CHANNELS, ELEMENTS, SPAN)


@triton.jit
def _sum_gradients_kernel(
    grad,
    x,
    weight,
    bias,
    residual,
    mean,
    spread,
    grad_x,  # written in eval mode
    grad_residual,
    parts,  # float32, per part CHANNELS sums of g and CHANNELS sums of g xhat
    control,
    slots,
    rows,
    channels,
    pixels,
    steps,
    eps,
    SEGMENTS: tl.constexpr,
    SWITCHES: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    VECTOR: tl.constexpr,
    CHANNELS: tl.constexpr,
    ELEMENTS: tl.constexpr,
    SPAN: tl.constexpr,
    TRAINING: tl.constexpr,
    WEIGHT: tl.constexpr,
    BIAS: tl.constexpr,
    RESIDUAL: tl.constexpr,
    ACTIVATION: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Parts of the gradients of the parameters, the gradient of the residual, and in eval mode that of x."""
    on = switched_on(control, slots, SEGMENTS, SWITCHES)
    channels, pixels = _tell_multiples(channels, pixels, CHANNELS_LAST, VECTOR)
    tiles = count_tiles(control, slots, on, channels, 0, SEGMENTS, CHANNELS)[0]
    first, last = _piece(tiles * steps)
    for tile in range(first // steps, tl.cdiv(last, steps)):
        c, active, loaded, own = _locate_channels(control, slots, on, tile, channels, SEGMENTS, CHANNELS_LAST, VECTOR, CHANNELS)
        offset = _offsets(c, channels, pixels, CHANNELS_LAST, ELEMENTS, SPAN)
        w, b = _parameters(weight, bias, c, active, WEIGHT, BIAS)
        centre, scale = _statistics(mean, spread, c, active, eps, TRAINING)
        sums = tl.zeros((CHANNELS, ELEMENTS), dtype=tl.float32)
        products = tl.zeros((CHANNELS, ELEMENTS), dtype=tl.float32)
        for step in tl.range(max(first - tile * steps, 0), min(last - tile * steps, steps), num_stages=STAGES):
            base, exists = _locate_step(step, rows, channels, pixels, CHANNELS_LAST, ELEMENTS, SPAN)
            mask = loaded[:, None] & exists[None, :]
            written = own[:, None] & exists[None, :]
            distance = _load(x, base + offset, mask) - centre
            g = _load(grad, base + offset, mask)
            if ACTIVATION != "none":
                before = distance * (scale * w) + b
                if RESIDUAL:
                    before += _load(residual, base + offset, mask)
                g *= slope(before, ACTIVATION)
            sums += g
            products += g * distance
            if RESIDUAL:
                _store(grad_residual + base, offset, written, tl.where(active[:, None], g, 0.0))
            if not TRAINING:
                _store(grad_x + base, offset, written, tl.where(active[:, None], g * (scale * w), 0.0))
        place = (tl.program_id(0) + tile) * 2 * CHANNELS + tl.arange(0, CHANNELS)
        tl.store(parts + place, tl.sum(sums, 1))
        tl.store(parts + place + CHANNELS, tl.sum(products * scale, 1))
    if RESIDUAL:
        _clear_dormant(
            grad_residual, control, slots, on, rows, channels, pixels, steps, SEGMENTS, CHANNELS_LAST, VECTOR, CHANNELS, ELEMENTS, SPAN
        )
    if not TRAINING:
        _clear_dormant(grad_x, control, slots, on, rows, channels, pixels, steps, SEGMENTS, CHANNELS_LAST, VECTOR, CHANNELS, ELEMENTS, SPAN)


@triton.jit
def _join_gradients_kernel(
    parts,
    sums,  # float32, (2, channels): of g and of g xhat, in the active channels
    grad_weight,
    grad_bias,
    control,
    slots,
    rows,
    channels,
    pixels,
    steps,
    programs,  # that made the parts
    SEGMENTS: tl.constexpr,
    SWITCHES: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    CHANNELS: tl.constexpr,
    ELEMENTS: tl.constexpr,
    SPAN: tl.constexpr,
    WEIGHT: tl.constexpr,
    BIAS: tl.constexpr,
    LANES: tl.constexpr,
    PARTS: tl.constexpr,
):
    """The parts of the gradients of the parameters added up, LANES channels at a time."""
    on = switched_on(control, slots, SEGMENTS, SWITCHES)
    tiles, all_tiles = count_tiles(control, slots, on, channels, 0, SEGMENTS, CHANNELS)
    strips: tl.constexpr = CHANNELS // LANES
    for item in range(tl.program_id(0), all_tiles * strips, tl.num_programs(0)):
        tile = item // strips
        lane = item % strips * LANES + tl.arange(0, LANES)
        first, last = _parts_of(tile, tiles, steps, programs)
        last = tl.where(tile < tiles, last, first)
        sum_g = tl.zeros((LANES, PARTS), dtype=tl.float64)
        sum_products = tl.zeros((LANES, PARTS), dtype=tl.float64)
        for part in range(first, last, PARTS):
            p = part + tl.arange(0, PARTS)
            place = p[None, :] * 2 * CHANNELS + lane[:, None]
            sum_g += _load(parts, place, (p < last)[None, :])
            sum_products += _load(parts, place + CHANNELS, (p < last)[None, :])
        begin, edge, end = locate_tile(control, slots, on, tile, channels, 0, SEGMENTS, CHANNELS)
        c = begin + lane
        total_g = tl.where(c < edge, tl.sum(sum_g, 1), 0.0)
        total_products = tl.where(c < edge, tl.sum(sum_products, 1), 0.0)
        _store(sums, c, c < edge, total_g)
        _store(sums + channels, c, c < edge, total_products)
        if WEIGHT:
            _store(grad_weight, c, c < end, total_products)
        if BIAS:
            _store(grad_bias, c, c < end, total_g)


@triton.jit
def _grad_input_kernel(
    grad,
    x,
    weight,
    bias,
    mean,
    rstd,
    sums,
    grad_x,
    control,
    slots,
    rows,
    channels,
    pixels,
    steps,
    SEGMENTS: tl.constexpr,
    SWITCHES: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    VECTOR: tl.constexpr,
    CHANNELS: tl.constexpr,
    ELEMENTS: tl.constexpr,
    SPAN: tl.constexpr,
    WEIGHT: tl.constexpr,
    BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    STAGES: tl.constexpr,
):
    """The gradient of x in training; ``grad`` is gy, or g if it has been written, and then the activation is none."""
    on = switched_on(control, slots, SEGMENTS, SWITCHES)
    channels, pixels = _tell_multiples(channels, pixels, CHANNELS_LAST, VECTOR)
    tiles = count_tiles(control, slots, on, channels, 0, SEGMENTS, CHANNELS)[0]
    share = 1.0 / (tl.cast(rows, tl.float32) * pixels)
    first, last = _piece(tiles * steps)
    for tile in range(first // steps, tl.cdiv(last, steps)):
        c, active, loaded, own = _locate_channels(control, slots, on, tile, channels, SEGMENTS, CHANNELS_LAST, VECTOR, CHANNELS)
        offset = _offsets(c, channels, pixels, CHANNELS_LAST, ELEMENTS, SPAN)
        w, b = _parameters(weight, bias, c, active, WEIGHT, BIAS)
        centre, scale = _statistics(mean, rstd, c, active, 0.0, True)
        mean_g = (_load(sums, c, active) * share)[:, None]
        along = (_load(sums + channels, c, active) * share)[:, None]
        start = max(first - tile * steps, 0)
        stop = min(last - tile * steps, steps)
        for back in tl.range(0, stop - start, num_stages=STAGES):
            base, exists = _locate_step(stop - 1 - back, rows, channels, pixels, CHANNELS_LAST, ELEMENTS, SPAN)
            mask = loaded[:, None] & exists[None, :]
            distance = _load(x, base + offset, mask) - centre
            g = _load(grad, base + offset, mask)
            if ACTIVATION != "none":
                g *= slope(distance * (scale * w) + b, ACTIVATION)
            result = tl.where(active[:, None], (g - mean_g - distance * (scale * along)) * (scale * w), 0.0)
            _store(grad_x + base, offset, own[:, None] & exists[None, :], result)
    _clear_dormant(grad_x, control, slots, on, rows, channels, pixels, steps, SEGMENTS, CHANNELS_LAST, VECTOR, CHANNELS, ELEMENTS, SPAN)


def batch_norm_statistics(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    control: Tensor,
    slots: Tensor,
    segments: Segments,
    momentum: float | None,
    eps: float,
    *,
    config: Config | None = None,
) -> tuple[Tensor, Tensor]:
    """``(mean, rstd)`` of a batch in training, in float32; those of dormant channels are undefined.

    Moves the active part of the running statistics and counts the batch; without ``momentum``, the batch's share is one over the count.
    """
    x, form = _format(x)
    config = config or _configure(x.element_size(), _vector(form, segments) == 1)
    new = torch.empty if x.numel() > 0 else torch.zeros
    mean, rstd = (new(form.channels, dtype=torch.float32, device=x.device) for _ in range(2))
    tiles, vector = _tiles(form, segments, config)
    where, sizes = (control, slots), _sizes(form, tiles)
    programs = config.programs * num_programs(x.device)
    parts, numbers = _workspace(form, tiles, segments, programs, x.device)
    _sum_kernel[(programs,)](
        x,
        parts,
        numbers,
        num_batches_tracked,
        *where,
        *sizes,
        **tiles,
        **vector,
        BATCHES=num_batches_tracked is not None,
        STAGES=config.stages,
        num_warps=config.warps,
    )
    if x.numel() > 0:
        _join_statistics_kernel[(programs,)](
            parts,
            numbers,
            mean,
            rstd,
            running_mean,
            running_var,
            num_batches_tracked,
            *where,
            *sizes,
            programs,
            0.0 if momentum is None else momentum,
            eps,
            **tiles,
            RUNNING=running_mean is not None,
            CUMULATIVE=momentum is None,
            LANES=min(_LANES, tiles["CHANNELS"]),
            PARTS=_PARTS,
        )
    return mean, rstd


def batch_norm_apply(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    mean: Tensor,
    spread: Tensor,
    control: Tensor,
    slots: Tensor,
    segments: Segments,
    training: bool,
    eps: float,
    activation: str = "none",
    *,
    config: Config | None = None,
) -> Tensor:
    """``y``. ``mean`` and ``spread`` are mean and rstd of the batch in training, mean and variance of the running statistics otherwise."""
    x, form = _format(x)
    config = config or _configure(x.element_size(), _vector(form, segments) == 1)
    y = torch.empty_like(x)
    tiles, vector = _tiles(form, segments, config)
    _normalise_kernel[(config.programs * num_programs(x.device),)](
        x,
        weight,
        bias,
        None if residual is None else _as(residual, form),
        y,
        mean,
        spread,
        control,
        slots,
        *_sizes(form, tiles),
        eps,
        **tiles,
        **vector,
        TRAINING=training,
        WEIGHT=weight is not None,
        BIAS=bias is not None,
        RESIDUAL=residual is not None,
        ACTIVATION=activation,
        STAGES=config.stages,
        num_warps=config.warps,
    )
    return y


def batch_norm_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    mean: Tensor,
    spread: Tensor,
    control: Tensor,
    slots: Tensor,
    segments: Segments,
    training: bool,
    eps: float,
    activation: str = "none",
    *,
    config: Config | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """``(gx, gw, gb, gresidual)`` of ``gy``; ``None`` for what was not given.

    ``mean`` and ``spread`` are mean and rstd of the batch in training, mean and variance of the running statistics otherwise.
    """
    x, form = _format(x)
    config = config or _configure(x.element_size(), True)
    grad = _as(grad, form)
    grad_x = torch.empty_like(x)
    grad_weight, grad_bias = (None if t is None else torch.empty_like(t) for t in (weight, bias))
    grad_residual = None if residual is None else torch.empty_like(x)
    tiles, vector = _tiles(form, segments, config)
    where, sizes = (control, slots), _sizes(form, tiles)
    programs = config.programs * num_programs(x.device)
    parts, _ = _workspace(form, tiles, segments, programs, x.device)
    sums = torch.empty(2 * form.channels, dtype=torch.float32, device=x.device)
    parameters = {"WEIGHT": weight is not None, "BIAS": bias is not None}
    how = {"STAGES": config.stages, "num_warps": config.warps}
    _sum_gradients_kernel[(programs,)](
        grad,
        x,
        weight,
        bias,
        None if residual is None else _as(residual, form),
        mean,
        spread,
        grad_x,
        grad_residual,
        parts,
        *where,
        *sizes,
        eps,
        **tiles,
        **vector,
        **parameters,
        TRAINING=training,
        RESIDUAL=residual is not None,
        ACTIVATION=activation,
        **how,
    )
    _join_gradients_kernel[(programs,)](
        parts,
        sums,
        grad_weight,
        grad_bias,
        *where,
        *sizes,
        programs,
        **tiles,
        **parameters,
        LANES=min(_LANES, tiles["CHANNELS"]),
        PARTS=_PARTS,
    )
    if training:
        _grad_input_kernel[(programs,)](
            grad if grad_residual is None else grad_residual,
            x,
            weight,
            bias,
            mean,
            spread,
            sums,
            grad_x,
            *where,
            *sizes,
            **tiles,
            **vector,
            **parameters,
            ACTIVATION=activation if grad_residual is None else "none",
            **how,
        )
    return grad_x, grad_weight, grad_bias, grad_residual


def _format(x: Tensor) -> tuple[Tensor, _Format]:
    """``x`` without gaps in memory, and how it lies there."""
    size, channels = x.shape[:2]
    pixels = math.prod(x.shape[2:])
    channels_last = pixels == 1 or (not x.is_contiguous() and x.movedim(1, -1).is_contiguous())
    form = _Format(size * pixels if channels_last else size, channels, 1 if channels_last else pixels, channels_last)
    return _as(x, form), form


def _as(tensor: Tensor, form: _Format) -> Tensor:
    """``tensor`` in that memory format: itself, if it already is."""
    return tensor.movedim(1, -1).contiguous().movedim(-1, 1) if form.channels_last else tensor.contiguous()


def _tiles(form: _Format, segments: Segments, config: Config) -> tuple[dict[str, Any], dict[str, int]]:
    """What all kernels are specialised for, and what those are that touch activations."""
    if form.channels_last:
        channels, span = 64, 1
    else:
        span = min(triton.next_power_of_2(form.pixels), config.tile, 1024)
        channels = max(1, min(config.tile // span, 64))
    channels = min(channels, triton.next_power_of_2(form.channels))
    tiles = {
        "SEGMENTS": segments.out,
        "SWITCHES": segments.switches,
        "CHANNELS_LAST": form.channels_last,
        "CHANNELS": channels,
        "ELEMENTS": config.tile // channels,
        "SPAN": span,
    }
    return tiles, {"VECTOR": _vector(form, segments)}


def _vector(form: _Format, segments: Segments) -> int:
    return vector_of(form.channels, segments.aligned != 0) if form.channels_last else vector_of(form.pixels)


def _sizes(form: _Format, tiles: dict[str, Any]) -> tuple[int, int, int, int]:
    """Rows, channels, pixels, and into how many steps the elements of a channel are cut: of rows, or of a span of pixels of some images."""
    images = tiles["ELEMENTS"] // tiles["SPAN"]
    return form.rows, form.channels, form.pixels, max(1, triton.cdiv(form.rows, images) * triton.cdiv(form.pixels, tiles["SPAN"]))


def _workspace(form: _Format, tiles: dict[str, Any], segments: Segments, programs: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Room for the parts of all tiles at any width: three numbers per channel, and one."""
    parts = programs + triton.cdiv(form.channels, tiles["CHANNELS"]) + segments.out
    sums, numbers = (torch.empty(parts * count, dtype=torch.float32, device=device) for count in (3 * tiles["CHANNELS"], 1))
    return sums, numbers
