"""``y = norm(x) w + b`` over groups of the active channels of each image, and its gradients.

With n over the images, c over the active channels, p over the pixels; a group g has D elements in an image::

    mean[n, g] = sum_{c in g, p} x[n, c, p] / D
    rstd[n, g] = (sum_{c in g, p} (x[n, c, p] - mean[n, g])^2 / D + eps)^(-1/2)
    xhat       = (x - mean) rstd
    y          = xhat w + b                               zero for dormant c, as are all gradients
    sw[n, c]   = sum_p gy xhat
    sb[n, c]   = sum_p gy
    gx         = rstd (gy w - sum_{c in g} w sb / D - xhat sum_{c in g} w sw / D)
    gw[c]      = sum_n sw
    gb[c]      = sum_n sb

x is ``(N, C, *)`` in either memory format, and so are y and the gradients. A group has ``WIDTH`` channels; zero stands for one group of all
active ones. A group's channels lie together, or those of the one group in each segment do: in *pieces*, which are walked over in blocks.

Forward, a program takes a group of an image at a time and reads it twice, the second time from a cache if that holds it. Backward, a first
kernel makes the sums over pixels, a second one the gradient of x, and a third one adds images up, in their order.
"""

import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import Segments, num_programs
from .widths import count_active, count_tiles, is_active, locate_tile, segment_active, segment_start, switched_on


class Config(NamedTuple):
    """The elements of a block and of a tile, the warps that work on one, and programs per multiprocessor."""

    block: int
    tile: int
    warps: int
    programs: int


_CONFIG = Config(block=4096, tile=2048, warps=8, programs=2)  # not tuned yet: what leaves registers for all programs at once
_LANES: int = 32  # channels whose sums are added up at once
_IMAGES: int = 32  # of so many images


@triton.jit
def _load(source, place, mask):
    return tl.load(source + place, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _store(target, place, mask, value):
    tl.store(target + place, value.to(target.dtype.element_ty), mask=mask)


@triton.jit
def _count_groups(control, slots, on, SEGMENTS: tl.constexpr, WIDTH: tl.constexpr):
    """How many groups are active, none if ``on`` is 0; and how many channels each has."""
    channels = count_active(control, slots, 0, SEGMENTS)
    groups = on
    if WIDTH > 0:
        groups = on * (channels // WIDTH)
        channels = WIDTH
    return groups, channels


@triton.jit
def _locate_piece(control, slots, group, PIECE: tl.constexpr, SEGMENTS: tl.constexpr, WIDTH: tl.constexpr):
    """Where a piece of a group begins, and how many channels it has."""
    start = 0
    length = WIDTH
    if WIDTH > 0:
        remaining = group
        for segment in tl.static_range(SEGMENTS):
            number = segment_active(control, slots, segment) // WIDTH
            here = (remaining >= 0) & (remaining < number)
            start = tl.where(here, segment_start(slots, 0, segment) + remaining * WIDTH, start)
            remaining -= number
    else:
        start = segment_start(slots, 0, PIECE)
        length = segment_active(control, slots, PIECE)
    return start, length


@triton.jit
def _locate_elements(first, start, length, channels, pixels, CHANNELS_LAST: tl.constexpr, BLOCK: tl.constexpr):
    """Where a block of a piece's elements lies in its image, which of them exist, and of which channels they are."""
    e = first + tl.arange(0, BLOCK)
    if CHANNELS_LAST:
        c = start + e % length
        place = e // length * channels + c
    else:
        c = start + e // pixels
        place = start * pixels + e
    return place, e < length * pixels, c


@triton.jit
def _parameter(parameter, c, mask, GIVEN: tl.constexpr, otherwise: tl.constexpr):
    value = tl.full(c.shape, otherwise, tl.float32)
    if GIVEN:
        value = _load(parameter, c, mask)
    return value


@triton.jit
def _clear_dormant(
    target, control, slots, on, images, channels, pixels, SEGMENTS: tl.constexpr, CHANNELS_LAST: tl.constexpr, BLOCK: tl.constexpr
):
    """Zeros in what is dormant of each segment; all programs take part."""
    for segment in tl.static_range(SEGMENTS):
        start = segment_start(slots, 0, segment) + segment_active(control, slots, segment) * on
        stop = channels
        if segment + 1 < SEGMENTS:
            stop = segment_start(slots, 0, segment + 1)
        blocks = tl.cdiv((stop - start) * pixels, BLOCK)
        for item in range(tl.program_id(0), images * blocks, tl.num_programs(0)):
            place, exists, _ = _locate_elements(item % blocks * BLOCK, start, stop - start, channels, pixels, CHANNELS_LAST, BLOCK)
            base = tl.cast(item // blocks, tl.int64) * channels * pixels
            tl.store(target + base + place, tl.zeros((BLOCK,), dtype=target.dtype.element_ty), mask=exists)


@triton.jit
def _group_norm_forward_kernel(
    x,  # (images, channels, pixels) in the order of the format, as is y
    weight,  # (channels,)
    bias,
    y,
    mean,  # one per active group of each image
    rstd,
    control,
    slots,
    images,
    channels,
    pixels,
    eps,
    SEGMENTS: tl.constexpr,
    SWITCHES: tl.constexpr,
    WIDTH: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    WEIGHT: tl.constexpr,
    BIAS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The output, and mean and rstd of each group."""
    on = switched_on(control, slots, SEGMENTS, SWITCHES)
    groups, width = _count_groups(control, slots, on, SEGMENTS, WIDTH)
    PIECES: tl.constexpr = 1 if WIDTH > 0 else SEGMENTS
    for item in range(tl.program_id(0), images * groups, tl.num_programs(0)):
        base = tl.cast(item // groups, tl.int64) * channels * pixels
        shift = 0.0  # the mean of the first block, from which the others are counted
        centre = 0.0
        squares = 0.0
        seen = 0.0
        for piece in tl.static_range(PIECES):
            start, length = _locate_piece(control, slots, item % groups, piece, SEGMENTS, WIDTH)
            for first in range(0, length * pixels, BLOCK):
                place, exists, _ = _locate_elements(first, start, length, channels, pixels, CHANNELS_LAST, BLOCK)
                value = tl.where(exists, _load(x + base, place, exists) - shift, 0.0)
                here = tl.sum(exists.to(tl.float32))
                block = tl.sum(value) / here
                value = tl.where(exists, value - block, 0.0)
                rest = tl.sum(value) / here  # what rounding left of the mean
                shift = tl.where(seen == 0, block, shift)
                block = tl.where(seen == 0, 0.0, block) + rest
                # mean and squares of the block join those of the blocks before it (Chan, Golub and LeVeque 1979)
                share = here / (seen + here)
                squares += tl.sum(value * value) + (block - centre) * (block - centre) * seen * share
                centre += (block - centre) * share
                seen += here
        scale = 1 / tl.sqrt(squares / (width * pixels) + eps)
        tl.store(mean + item, shift + centre)
        tl.store(rstd + item, scale)
        for piece in tl.static_range(PIECES):
            start, length = _locate_piece(control, slots, item % groups, piece, SEGMENTS, WIDTH)
            for first in range(0, length * pixels, BLOCK):
                place, exists, c = _locate_elements(first, start, length, channels, pixels, CHANNELS_LAST, BLOCK)
                value = (_load(x + base, place, exists) - shift - centre) * scale
                value = value * _parameter(weight, c, exists, WEIGHT, 1.0) + _parameter(bias, c, exists, BIAS, 0.0)
                _store(y + base, place, exists, value)
    _clear_dormant(y, control, slots, on, images, channels, pixels, SEGMENTS, CHANNELS_LAST, BLOCK)


@triton.jit
def _sum_pixels_kernel(
    grad,
    x,
    mean,
    rstd,
    sums,  # float32, per image two rows of the channels: sw and sb
    control,
    slots,
    images,
    channels,
    pixels,
    SEGMENTS: tl.constexpr,
    SWITCHES: tl.constexpr,
    WIDTH: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    CHANNELS: tl.constexpr,
    PIXELS: tl.constexpr,
):
    """The sums over the pixels of each active channel of each image."""
    on = switched_on(control, slots, SEGMENTS, SWITCHES)
    groups, _ = _count_groups(control, slots, on, SEGMENTS, WIDTH)
    tiles, _ = count_tiles(control, slots, on, channels, 0, SEGMENTS, CHANNELS)
    for item in range(tl.program_id(0), images * tiles, tl.num_programs(0)):
        image = item // tiles
        base = tl.cast(image, tl.int64) * channels * pixels
        begin, edge, _ = locate_tile(control, slots, on, item % tiles, channels, 0, SEGMENTS, CHANNELS)
        c = begin + tl.arange(0, CHANNELS)
        group = tl.zeros((CHANNELS,), dtype=tl.int32)
        if WIDTH > 0:
            for segment in tl.static_range(SEGMENTS):  # how many active channels are before each
                before = tl.maximum(c - segment_start(slots, 0, segment), 0)
                group += tl.minimum(before, segment_active(control, slots, segment))
            group = group // WIDTH
        centre = _load(mean, image * groups + group, c < edge)
        scale = _load(rstd, image * groups + group, c < edge)
        sum_w = tl.zeros((CHANNELS, PIXELS), dtype=tl.float32)
        sum_b = tl.zeros((CHANNELS, PIXELS), dtype=tl.float32)
        for first in range(0, pixels, PIXELS):
            p = first + tl.arange(0, PIXELS)
            if CHANNELS_LAST:
                place = p[None, :] * channels + c[:, None]
            else:
                place = c[:, None] * pixels + p[None, :]
            mask = (c < edge)[:, None] & (p < pixels)[None, :]
            g = _load(grad + base, place, mask)
            sum_w += g * tl.where(mask, (_load(x + base, place, mask) - centre[:, None]) * scale[:, None], 0.0)
            sum_b += g
        place = tl.cast(image, tl.int64) * 2 * channels + c
        tl.store(sums + place, tl.sum(sum_w, 1), mask=c < edge)
        tl.store(sums + place + channels, tl.sum(sum_b, 1), mask=c < edge)


@triton.jit
def _group_norm_backward_kernel(
    grad,
    x,
    weight,
    mean,
    rstd,
    sums,
    grad_x,
    control,
    slots,
    images,
    channels,
    pixels,
    SEGMENTS: tl.constexpr,
    SWITCHES: tl.constexpr,
    WIDTH: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    WEIGHT: tl.constexpr,
    BLOCK: tl.constexpr,
    LANES: tl.constexpr,
):
    """The gradient of x."""
    on = switched_on(control, slots, SEGMENTS, SWITCHES)
    groups, width = _count_groups(control, slots, on, SEGMENTS, WIDTH)
    PIECES: tl.constexpr = 1 if WIDTH > 0 else SEGMENTS
    for item in range(tl.program_id(0), images * groups, tl.num_programs(0)):
        image = tl.cast(item // groups, tl.int64)
        along = tl.zeros((LANES,), dtype=tl.float32)
        shift = tl.zeros((LANES,), dtype=tl.float32)
        for piece in tl.static_range(PIECES):
            start, length = _locate_piece(control, slots, item % groups, piece, SEGMENTS, WIDTH)
            for first in range(0, length, LANES):
                lane = first + tl.arange(0, LANES)
                w = _parameter(weight, start + lane, lane < length, WEIGHT, 1.0)
                place = image * 2 * channels + start + lane
                along += w * _load(sums, place, lane < length)
                shift += w * _load(sums, place + channels, lane < length)
        centre = tl.load(mean + item)
        scale = tl.load(rstd + item)
        mean_along = tl.sum(along) / (width * pixels)
        mean_shift = tl.sum(shift) / (width * pixels)
        base = image * channels * pixels
        for piece in tl.static_range(PIECES):
            start, length = _locate_piece(control, slots, item % groups, piece, SEGMENTS, WIDTH)
            for first in range(0, length * pixels, BLOCK):
                place, exists, c = _locate_elements(first, start, length, channels, pixels, CHANNELS_LAST, BLOCK)
                xhat = (_load(x + base, place, exists) - centre) * scale
                g = _load(grad + base, place, exists) * _parameter(weight, c, exists, WEIGHT, 1.0)
                _store(grad_x + base, place, exists, (g - mean_shift - xhat * mean_along) * scale)
    _clear_dormant(grad_x, control, slots, on, images, channels, pixels, SEGMENTS, CHANNELS_LAST, BLOCK)


@triton.jit
def _add_images_kernel(
    sums,
    grad_weight,
    grad_bias,
    control,
    slots,
    images,
    channels,
    SEGMENTS: tl.constexpr,
    SWITCHES: tl.constexpr,
    WEIGHT: tl.constexpr,
    BIAS: tl.constexpr,
    LANES: tl.constexpr,
    IMAGES: tl.constexpr,
):
    """The gradients of the parameters. One program per LANES channels."""
    on = switched_on(control, slots, SEGMENTS, SWITCHES)
    c = tl.program_id(0) * LANES + tl.arange(0, LANES)
    active = is_active(control, slots, c, 0, SEGMENTS) & (on == 1)
    sum_w = tl.zeros((IMAGES, LANES), dtype=tl.float32)
    sum_b = tl.zeros((IMAGES, LANES), dtype=tl.float32)
    for first in range(0, images, IMAGES):
        n = first + tl.arange(0, IMAGES)
        place = n[:, None].to(tl.int64) * 2 * channels + c[None, :]
        mask = (n < images)[:, None] & active[None, :]
        if WEIGHT:
            sum_w += _load(sums, place, mask)
        if BIAS:
            sum_b += _load(sums, place + channels, mask)
    if WEIGHT:
        _store(grad_weight, c, c < channels, tl.sum(sum_w, 0))
    if BIAS:
        _store(grad_bias, c, c < channels, tl.sum(sum_b, 0))


def group_norm_forward(
    x: Tensor,
    width: int,
    weight: Tensor | None,
    bias: Tensor | None,
    control: Tensor,
    slots: Tensor,
    segments: Segments,
    eps: float,
    *,
    config: Config = _CONFIG,
) -> tuple[Tensor, Tensor, Tensor]:
    """``(y, mean, rstd)`` of ``x``, ``(N, C, *)``; the last two hold one number per active group of each image, in float32."""
    x, images, channels, pixels, last = _format(x)
    y = torch.empty_like(x)
    mean = torch.empty(images, channels // width if width else 1, dtype=torch.float32, device=x.device)
    rstd = torch.empty_like(mean)
    if x.numel() > 0:
        _group_norm_forward_kernel[(_num_programs(x, config),)](
            x,
            weight,
            bias,
            y,
            mean,
            rstd,
            control,
            slots,
            images,
            channels,
            pixels,
            eps,
            WIDTH=width,
            CHANNELS_LAST=last,
            BIAS=bias is not None,
            **_structure(weight, segments),
            **_blocks(width or channels, pixels, config),
        )
    return y, mean, rstd


def group_norm_backward(
    grad: Tensor,
    x: Tensor,
    width: int,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    control: Tensor,
    slots: Tensor,
    segments: Segments,
    *,
    config: Config = _CONFIG,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """``(gx, gw, gb)`` of ``gy``, in the format of ``x``; ``None`` for what was not given."""
    x, images, channels, pixels, last = _format(x)
    grad = _as(grad, last)
    grad_x = torch.empty_like(x)
    grad_weight, grad_bias = (None if t is None else torch.empty_like(t) for t in (weight, bias))
    sums = torch.empty(2 * images * channels, dtype=torch.float32, device=x.device)
    structure, at, sizes = _structure(weight, segments), (control, slots), (images, channels, pixels)
    if x.numel() > 0:
        programs = (_num_programs(x, config),)
        tile = _tile(channels, pixels, last, config)
        layout = {"SEGMENTS": segments.out, "SWITCHES": segments.switches, "WIDTH": width, "CHANNELS_LAST": last}
        _sum_pixels_kernel[programs](grad, x, mean, rstd, sums, *at, *sizes, **layout, **tile, num_warps=config.warps)
        _group_norm_backward_kernel[programs](
            grad,
            x,
            weight,
            mean,
            rstd,
            sums,
            grad_x,
            *at,
            *sizes,
            WIDTH=width,
            CHANNELS_LAST=last,
            LANES=_LANES,
            **structure,
            **_blocks(width or channels, pixels, config),
        )
    if weight is not None or bias is not None:
        _add_images_kernel[(triton.cdiv(channels, _LANES),)](
            sums,
            grad_weight,
            grad_bias,
            *at,
            images if x.numel() > 0 else 0,
            channels,
            BIAS=bias is not None,
            LANES=_LANES,
            IMAGES=_IMAGES,
            **structure,
        )
    return grad_x, grad_weight, grad_bias


def _format(x: Tensor) -> tuple[Tensor, int, int, int, bool]:
    """``x`` without gaps in memory, its images, channels and pixels, and whether the channels of a pixel lie together there."""
    last = not x.is_contiguous() and x.movedim(1, -1).is_contiguous()
    return _as(x, last), x.shape[0], x.shape[1], math.prod(x.shape[2:]), last


def _as(tensor: Tensor, last: bool) -> Tensor:
    """``tensor`` in that memory format: itself, if it already is."""
    return tensor.movedim(1, -1).contiguous().movedim(-1, 1) if last else tensor.contiguous()


def _num_programs(x: Tensor, config: Config) -> int:
    return config.programs * num_programs(x.device)


def _structure(weight: Tensor | None, segments: Segments) -> dict[str, Any]:
    return {"SEGMENTS": segments.out, "SWITCHES": segments.switches, "WEIGHT": weight is not None}


def _blocks(width: int, pixels: int, config: Config) -> dict[str, Any]:
    """Blocks no larger than a group."""
    return {"BLOCK": min(config.block, triton.next_power_of_2(width * pixels)), "num_warps": config.warps}


def _tile(channels: int, pixels: int, last: bool, config: Config) -> dict[str, Any]:
    """Tiles that are long along what lies together."""
    if last:
        across = min(64, triton.next_power_of_2(channels), config.tile)
        return {"CHANNELS": across, "PIXELS": min(config.tile // across, triton.next_power_of_2(pixels))}
    along = min(512, triton.next_power_of_2(pixels), config.tile)
    return {"CHANNELS": min(config.tile // along, triton.next_power_of_2(channels)), "PIXELS": along}
