"""AdamW, SGD and the clipping of gradients over the active elements of many parameters at once; the others are neither read nor written.

With g the gradient (plus ``w p`` in SGD), t how often an element was updated, this update included, and all of it per element::

    AdamW   m = b1 m + (1 - b1) g         v = b2 v + (1 - b2) g^2
            p = p (1 - lr w) - lr / (1 - b1^t) m / (sqrt(v) / sqrt(1 - b2^t) + eps)
    SGD     b = momentum b + (1 - dampening) g, at t = 1 b = g         p = p - lr b, or with Nesterov p - lr (g + momentum b)
    norm    |g|_k over all parameters         clip    g = g min(1, max_norm / (norm + 1e-6))

A parameter is seen as rows of ``stride`` elements. What is active of it is a set of rectangles, one per pair of segments of its two axes;
a *piece* is one rectangle, of which a table (int64) says where it begins and which slots of the control block say how far it reaches::

    [parameter, first element, stride, slot of rows, rows per unit, slot of columns, columns per unit, slots of the switches ...]

A slot of -1 stands for a size that is fixed. The addresses of all tensors are a table too, so one launch serves all parameters of a dtype.

One program first counts the tiles of each piece, ``TILE`` active elements each, from the widths of the moment; under a switch that is off
there are none. Then a fixed number of programs walks over the tiles and finds the piece of each by bisection. So work follows the active
size whatever the capacity, for the price of one more launch; the other way, a program for every tile of the capacity, starts most of them
for nothing in a wide layer with few active units. Within a piece its active elements are numbered through, so that no lane of a tile is
idle because rows are short. Where groups of ``VECTOR`` of them lie in one row and begin at multiples of their size, they move in one
access; elsewhere elements move one by one.

Arithmetic is float32, state has the type of the parameter, each element is rounded once. Counts are int32, or the bits of an unsigned
16-bit number in int16; both stop at their largest value.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import num_programs
from .widths import entry_value

TYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}
FIELDS = 7

# Not tuned yet: eight blocks of four warps are what a multiprocessor holds of kernels with up to 64 registers.
_TILE = 512
_VECTOR = 4
_WARPS = 4
_PROGRAMS_PER_MULTIPROCESSOR = 8
_PIECES = 1024  # that are counted at a time


class Table(NamedTuple):
    """The pieces of a list of parameters on the device, how many parameters that are, and how many elements they have at capacity."""

    pieces: Tensor
    num_params: int
    num_elements: int


class Tiles(NamedTuple):
    """What is active at the moment: where the tiles of each piece begin, and their total; how many rows and columns each has."""

    begins: Tensor
    extents: Tensor


class Gradients(NamedTuple):
    """Gradients of one type, their addresses (int64), and the control tensor that says what is active of them."""

    table: Table
    addresses: Tensor
    control: Tensor
    dtype: torch.dtype


@triton.jit(do_not_specialize=["num_pieces"])
def _count_kernel(
    pieces,
    control,
    begins,
    extents,
    num_pieces,
    SWITCHES: tl.constexpr,
    FIELDS: tl.constexpr,
    TILE: tl.constexpr,
    PIECES: tl.constexpr,
):
    total = tl.zeros((), tl.int32)
    for first in range(0, num_pieces, PIECES):
        piece = first + tl.arange(0, PIECES)
        inside = piece < num_pieces
        fields = pieces + piece * (FIELDS + SWITCHES)
        on = inside
        for switch in tl.static_range(SWITCHES):
            on = on & (entry_value(control, tl.load(fields + FIELDS + switch, mask=inside, other=-1), inside) != 0)
        rows = entry_value(control, tl.load(fields + 3, mask=on, other=-1), on) * tl.load(fields + 4, mask=on, other=0)
        columns = entry_value(control, tl.load(fields + 5, mask=on, other=-1), on) * tl.load(fields + 6, mask=on, other=0)
        tiles = tl.cdiv(rows * columns, TILE).to(tl.int32)
        tl.store(begins + piece, total + tl.cumsum(tiles, 0) - tiles, mask=inside)
        tl.store(extents + 2 * piece, rows, mask=inside)
        tl.store(extents + 2 * piece + 1, columns, mask=inside)
        total += tl.sum(tiles, 0)
    tl.store(begins + num_pieces, total)


@triton.jit
def _locate(item, pieces, begins, extents, num_pieces, WIDTH: tl.constexpr, TILE: tl.constexpr, VECTOR: tl.constexpr):
    """Of which parameter a tile is and where it lies, and whether its groups lie within rows and begin at multiples of ``VECTOR``.

    The place is where the row of its first element begins, the column of that, how many columns of a row are active, the stride of rows,
    and how many elements the tile has. A rectangle without gaps is one row.
    """
    low = tl.zeros((), tl.int32)
    high = low + num_pieces - 1
    while low < high:
        middle = (low + high + 1) // 2
        past = tl.load(begins + middle) <= item
        low = tl.where(past, middle, low)
        high = tl.where(past, high, middle - 1)
    fields = pieces + low.to(tl.int64) * WIDTH
    param = tl.load(fields)
    start = tl.load(fields + 1)
    stride = tl.load(fields + 2)
    rows = tl.load(extents + 2 * low)
    columns = tl.load(extents + 2 * low + 1)

    first = (item - tl.load(begins + low)).to(tl.int64) * TILE
    num = tl.minimum(rows * columns - first, TILE).to(tl.int32)
    in_one_run = (rows == 1) | (columns == stride)
    row = tl.where(in_one_run, 0, first // columns)
    origin = start + tl.where(in_one_run, first, row * stride)
    column = tl.where(in_one_run, 0, first - row * columns).to(tl.int32)
    aligned = (start % VECTOR == 0) & (num % VECTOR == 0) & (in_one_run | ((columns % VECTOR == 0) & (stride % VECTOR == 0)))
    width = tl.where(in_one_run, TILE, columns).to(tl.int32)
    return param, (origin, column, width, stride, num), aligned


@triton.jit
def _elements(place, TILE: tl.constexpr, VECTOR: tl.constexpr):
    """The elements of a tile in groups of ``VECTOR`` neighbours, and which of them there are."""
    origin, column, width, stride, num = place
    first = tl.arange(0, TILE // VECTOR) * VECTOR
    row = (column + first) // width
    group = tl.multiple_of(origin + row.to(tl.int64) * stride + (column + first - row * width), VECTOR)
    return group[:, None] + tl.arange(0, VECTOR)[None, :], (first < num)[:, None]


@triton.jit
def _pointer(address, TYPE: tl.constexpr, VECTOR: tl.constexpr):
    """An address as a pointer; where groups are moved, it is a multiple of 16 bytes."""
    pointer = address.to(tl.pointer_type(TYPE))
    if VECTOR > 1:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@triton.jit
def _one_minus_power(t, decay):
    """``1 - exp(-decay t)``, to float32's precision also where that is small: by its series there."""
    x = t * decay
    series = 1 - x * 0.125
    for n in tl.static_range(7, 1, -1):
        series = 1 - x * series * (1.0 / n)
    return tl.where(x < 0.5, x * series, 1 - tl.exp(-x))


@triton.jit
def _advance(counts, inside, LARGEST: tl.constexpr):
    """Count this update of each element, as far as the type reaches; returns the counts."""
    t = tl.load(counts, mask=inside, other=0).to(tl.int32)
    if LARGEST == 65535:
        t = t & LARGEST
    t = tl.where(t == LARGEST, t, t + 1)
    tl.store(counts, t.to(counts.dtype.element_ty), mask=inside)
    return t


@triton.jit
def _adamw_tile(
    addresses,
    place,
    rates,
    AMSGRAD: tl.constexpr,
    MAXIMIZE: tl.constexpr,
    TYPE: tl.constexpr,
    COUNT_TYPE: tl.constexpr,
    LARGEST: tl.constexpr,
    TILE: tl.constexpr,
    VECTOR: tl.constexpr,
):
    lr, keep_1, take_1, keep_2, take_2, decay_1, decay_2, eps, weight_decay = rates
    at, inside = _elements(place, TILE, VECTOR)
    param = _pointer(addresses[0], TYPE, VECTOR) + at
    exp_avg = _pointer(addresses[1], TYPE, VECTOR) + at
    exp_avg_sq = _pointer(addresses[2], TYPE, VECTOR) + at
    counts = _pointer(addresses[3], COUNT_TYPE, VECTOR) + at
    g = tl.load(_pointer(addresses[4], TYPE, VECTOR) + at, mask=inside, other=0.0).to(tl.float32)
    p = tl.load(param, mask=inside, other=0.0).to(tl.float32)
    m = tl.load(exp_avg, mask=inside, other=0.0).to(tl.float32)
    v = tl.load(exp_avg_sq, mask=inside, other=0.0).to(tl.float32)
    t = _advance(counts, inside, LARGEST)
    if MAXIMIZE:
        g = -g
    m = tl.where(take_1 >= 0.5, g - (g - m) * keep_1, m + take_1 * (g - m))
    v = v * keep_2 + take_2 * g * g
    tl.store(exp_avg, m.to(TYPE), mask=inside)
    tl.store(exp_avg_sq, v.to(TYPE), mask=inside)
    if AMSGRAD:
        largest = _pointer(addresses[5], TYPE, VECTOR) + at
        before = tl.load(largest, mask=inside, other=0.0).to(tl.float32)
        v = tl.where(before > v, before, v)
        tl.store(largest, v.to(TYPE), mask=inside)
    root = tl.div_rn(tl.sqrt_rn(v), tl.sqrt_rn(_one_minus_power(t, decay_2)))
    step = tl.div_rn(lr, _one_minus_power(t, decay_1)) * m
    p = p * (1 - lr * weight_decay) - tl.div_rn(step, root + eps)
    tl.store(param, p.to(TYPE), mask=inside)


@triton.jit(do_not_specialize=["num_pieces", "num_params"])
def _adamw_kernel(
    pieces,
    tensors,  # addresses: parameters, exp_avg, exp_avg_sq, with AMSGRAD max_exp_avg_sq, and counts
    grads,
    begins,
    extents,
    lr_tensor,
    num_pieces,
    num_params,
    lr,
    keep_1,  # beta1
    take_1,  # 1 - beta1
    keep_2,
    take_2,
    decay_1,  # -log beta1
    decay_2,
    eps,
    weight_decay,
    AMSGRAD: tl.constexpr,
    MAXIMIZE: tl.constexpr,
    TYPE: tl.constexpr,
    COUNT_TYPE: tl.constexpr,
    LARGEST: tl.constexpr,
    WIDTH: tl.constexpr,
    TILE: tl.constexpr,
    VECTOR: tl.constexpr,
):
    if lr_tensor is not None:
        lr = tl.load(lr_tensor).to(tl.float32)
    rates = (lr, keep_1, take_1, keep_2, take_2, decay_1, decay_2, eps, weight_decay)
    total = tl.load(begins + num_pieces)
    for item in range(tl.program_id(0), total, tl.num_programs(0)):
        index, place, aligned = _locate(item, pieces, begins, extents, num_pieces, WIDTH, TILE, VECTOR)
        param = tl.load(tensors + index)
        exp_avg = tl.load(tensors + num_params + index)
        exp_avg_sq = tl.load(tensors + 2 * num_params + index)
        largest = tl.load(tensors + 3 * num_params + index) if AMSGRAD else param
        counts = tl.load(tensors + (4 if AMSGRAD else 3) * num_params + index)
        grad = tl.load(grads + index)
        addresses = (param, exp_avg, exp_avg_sq, counts, grad, largest)
        if aligned & ((param | exp_avg | exp_avg_sq | counts | grad | largest) % 16 == 0):
            _adamw_tile(addresses, place, rates, AMSGRAD, MAXIMIZE, TYPE, COUNT_TYPE, LARGEST, TILE, VECTOR)
        else:
            _adamw_tile(addresses, place, rates, AMSGRAD, MAXIMIZE, TYPE, COUNT_TYPE, LARGEST, TILE, 1)


@triton.jit
def _sgd_tile(
    addresses,
    place,
    rates,
    MOMENTUM: tl.constexpr,
    COUNTED: tl.constexpr,
    NESTEROV: tl.constexpr,
    MAXIMIZE: tl.constexpr,
    TYPE: tl.constexpr,
    COUNT_TYPE: tl.constexpr,
    LARGEST: tl.constexpr,
    TILE: tl.constexpr,
    VECTOR: tl.constexpr,
):
    lr, momentum, take, weight_decay = rates
    at, inside = _elements(place, TILE, VECTOR)
    param = _pointer(addresses[0], TYPE, VECTOR) + at
    p = tl.load(param, mask=inside, other=0.0).to(tl.float32)
    g = tl.load(_pointer(addresses[3], TYPE, VECTOR) + at, mask=inside, other=0.0).to(tl.float32)
    if MAXIMIZE:
        g = -g
    g += weight_decay * p
    if MOMENTUM:
        buffer = _pointer(addresses[1], TYPE, VECTOR) + at
        b = momentum * tl.load(buffer, mask=inside, other=0.0).to(tl.float32) + take * g
        if COUNTED:
            t = _advance(_pointer(addresses[2], COUNT_TYPE, VECTOR) + at, inside, LARGEST)
            b = tl.where(t == 1, g, b)
        tl.store(buffer, b.to(TYPE), mask=inside)
        g = g + momentum * b if NESTEROV else b
    tl.store(param, (p - lr * g).to(TYPE), mask=inside)


@triton.jit(do_not_specialize=["num_pieces", "num_params"])
def _sgd_kernel(
    pieces,
    tensors,  # addresses: parameters, with MOMENTUM their buffers, and with COUNTED the counts
    grads,
    begins,
    extents,
    lr_tensor,
    num_pieces,
    num_params,
    lr,
    momentum,
    take,  # 1 - dampening
    weight_decay,
    MOMENTUM: tl.constexpr,
    COUNTED: tl.constexpr,
    NESTEROV: tl.constexpr,
    MAXIMIZE: tl.constexpr,
    TYPE: tl.constexpr,
    COUNT_TYPE: tl.constexpr,
    LARGEST: tl.constexpr,
    WIDTH: tl.constexpr,
    TILE: tl.constexpr,
    VECTOR: tl.constexpr,
):
    if lr_tensor is not None:
        lr = tl.load(lr_tensor).to(tl.float32)
    rates = (lr, momentum, take, weight_decay)
    total = tl.load(begins + num_pieces)
    for item in range(tl.program_id(0), total, tl.num_programs(0)):
        index, place, aligned = _locate(item, pieces, begins, extents, num_pieces, WIDTH, TILE, VECTOR)
        param = tl.load(tensors + index)
        grad = tl.load(grads + index)
        buffer = tl.load(tensors + num_params + index) if MOMENTUM else param
        counts = tl.load(tensors + 2 * num_params + index) if COUNTED else param
        addresses = (param, buffer, counts, grad)
        if aligned & ((param | grad | buffer | counts) % 16 == 0):
            _sgd_tile(addresses, place, rates, MOMENTUM, COUNTED, NESTEROV, MAXIMIZE, TYPE, COUNT_TYPE, LARGEST, TILE, VECTOR)
        else:
            _sgd_tile(addresses, place, rates, MOMENTUM, COUNTED, NESTEROV, MAXIMIZE, TYPE, COUNT_TYPE, LARGEST, TILE, 1)


@triton.jit
def _norm_tile(grad, place, KIND: tl.constexpr, TYPE: tl.constexpr, TILE: tl.constexpr, VECTOR: tl.constexpr):
    at, inside = _elements(place, TILE, VECTOR)
    g = tl.load(_pointer(grad, TYPE, VECTOR) + at, mask=inside, other=0.0).to(tl.float32)
    return _gather(g * g if KIND == 2 else tl.abs(g), KIND)


@triton.jit
def _gather(values, KIND: tl.constexpr):
    """The sum, or for the norm of order infinity the maximum, of values that are not negative; NaN if one of them is."""
    values = tl.reshape(values, (values.numel,))
    if KIND == 0:  # as integers, the bits of such values are in order, and NaN is the largest
        gathered = tl.max(values.to(tl.int32, bitcast=True), 0).to(tl.float32, bitcast=True)
    else:
        gathered = tl.sum(values, 0)
    return gathered


@triton.jit(do_not_specialize=["num_pieces"])
def _norm_kernel(
    pieces,
    grads,
    begins,
    extents,
    parts,
    num_pieces,
    KIND: tl.constexpr,
    TYPE: tl.constexpr,
    WIDTH: tl.constexpr,
    TILE: tl.constexpr,
    VECTOR: tl.constexpr,
):
    total = tl.load(begins + num_pieces)
    norm = tl.zeros((), tl.float32)
    for item in range(tl.program_id(0), total, tl.num_programs(0)):
        index, place, aligned = _locate(item, pieces, begins, extents, num_pieces, WIDTH, TILE, VECTOR)
        grad = tl.load(grads + index)
        if aligned & (grad % 16 == 0):
            part = _norm_tile(grad, place, KIND, TYPE, TILE, VECTOR)
        else:
            part = _norm_tile(grad, place, KIND, TYPE, TILE, 1)
        if KIND == 0:
            norm = tl.maximum(norm, part, propagate_nan=tl.PropagateNan.ALL)
        else:
            norm += part
    tl.store(parts + tl.program_id(0), norm)


@triton.jit(do_not_specialize=["num_parts"])
def _factor_kernel(parts, norm, factor, max_norm, num_parts, KIND: tl.constexpr, PARTS: tl.constexpr):
    """The norm of what the programs have gathered, and the factor that brings it down to ``max_norm``."""
    gathered = tl.zeros((PARTS,), tl.float32)
    for first in range(0, num_parts, PARTS):
        part = first + tl.arange(0, PARTS)
        found = tl.load(parts + part, mask=part < num_parts, other=0.0)
        if KIND == 0:
            gathered = tl.maximum(gathered, found, propagate_nan=tl.PropagateNan.ALL)
        else:
            gathered += found
    result = _gather(gathered, KIND)
    if KIND == 2:
        result = tl.sqrt_rn(result)
    tl.store(norm, result)
    tl.store(factor, tl.minimum(tl.div_rn(max_norm, result + 1e-6), 1.0, propagate_nan=tl.PropagateNan.ALL))


@triton.jit
def _scale_tile(grad, place, factor, ZERO: tl.constexpr, TYPE: tl.constexpr, TILE: tl.constexpr, VECTOR: tl.constexpr):
    at, inside = _elements(place, TILE, VECTOR)
    pointer = _pointer(grad, TYPE, VECTOR) + at
    if ZERO:
        scaled = tl.zeros(at.shape, TYPE)
    else:
        scaled = (tl.load(pointer, mask=inside, other=0.0).to(tl.float32) * factor).to(TYPE)
    tl.store(pointer, scaled, mask=inside)


@triton.jit(do_not_specialize=["num_pieces"])
def _scale_kernel(
    pieces,
    grads,
    begins,
    extents,
    factor,
    num_pieces,
    ZERO: tl.constexpr,
    TYPE: tl.constexpr,
    WIDTH: tl.constexpr,
    TILE: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """``g = factor g``, for which nothing need be touched where the factor is 1; or ``g = 0``, whatever it was."""
    total = tl.load(begins + num_pieces)
    scale = 0.0
    if not ZERO:
        scale = tl.load(factor)
        total = tl.where(scale == 1.0, 0, total)
    for item in range(tl.program_id(0), total, tl.num_programs(0)):
        index, place, aligned = _locate(item, pieces, begins, extents, num_pieces, WIDTH, TILE, VECTOR)
        grad = tl.load(grads + index)
        if aligned & (grad % 16 == 0):
            _scale_tile(grad, place, scale, ZERO, TYPE, TILE, VECTOR)
        else:
            _scale_tile(grad, place, scale, ZERO, TYPE, TILE, 1)


def count_tiles(grads: Gradients) -> Tiles:
    """Find out what is active now."""
    num_pieces, width = grads.table.pieces.shape
    device = grads.addresses.device
    begins = torch.empty(num_pieces + 1, dtype=torch.int32, device=device)
    extents = torch.empty(num_pieces, 2, dtype=torch.int64, device=device)
    _count_kernel[(1,)](
        grads.table.pieces,
        grads.control,
        begins,
        extents,
        num_pieces,
        SWITCHES=width - FIELDS,
        FIELDS=FIELDS,
        TILE=_TILE,
        PIECES=min(_PIECES, triton.next_power_of_2(num_pieces)),
    )
    return Tiles(begins, extents)


def adamw(
    grads: Gradients,
    tensors: Tensor,
    count_dtype: torch.dtype,
    *,
    lr: float | Tensor,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    amsgrad: bool,
    maximize: bool,
) -> None:
    """One step.

    Args:
        grads: the gradients; parameters and state are of their type.
        tensors: int64 (4 or 5, parameters): addresses of parameters, exp_avg, exp_avg_sq, with ``amsgrad`` max_exp_avg_sq, and counts.
        count_dtype: of the counts, int16 or int32.
        lr: a number, or a tensor of one element on the device.
        betas: decay rates of the moments.
        eps: added to the denominator.
        weight_decay: decoupled.
        amsgrad: divide by the largest second moment so far.
        maximize: ascend.
    """
    rate, lr_tensor = (0.0, lr) if isinstance(lr, Tensor) else (lr, None)
    _adamw_kernel[_grid(grads)](
        grads.table.pieces,
        tensors,
        grads.addresses,
        *count_tiles(grads),
        lr_tensor,
        grads.table.pieces.shape[0],
        grads.table.num_params,
        float(rate),
        betas[0],
        1 - betas[0],
        betas[1],
        1 - betas[1],
        _decay(betas[0]),
        _decay(betas[1]),
        float(eps),
        float(weight_decay),
        AMSGRAD=amsgrad,
        MAXIMIZE=maximize,
        **_counts(count_dtype),
        **_shape(grads),
    )


def sgd(
    grads: Gradients,
    tensors: Tensor,
    count_dtype: torch.dtype | None,
    *,
    lr: float | Tensor,
    momentum: float,
    dampening: float,
    weight_decay: float,
    nesterov: bool,
    maximize: bool,
) -> None:
    """One step.

    Args:
        grads: the gradients; parameters and buffers are of their type.
        tensors: int64 (1 to 3, parameters): addresses of parameters, with momentum of buffers, and of counts.
        count_dtype: of the counts, int16 or int32; ``None`` if there are none. Without dampening a buffer of zeros does as well.
        lr: a number, or a tensor of one element on the device.
        momentum: factor.
        dampening: of the gradients that enter the momentum.
        weight_decay: added to the gradient.
        nesterov: look ahead.
        maximize: ascend.
    """
    rate, lr_tensor = (0.0, lr) if isinstance(lr, Tensor) else (lr, None)
    _sgd_kernel[_grid(grads)](
        grads.table.pieces,
        tensors,
        grads.addresses,
        *count_tiles(grads),
        lr_tensor,
        grads.table.pieces.shape[0],
        grads.table.num_params,
        float(rate),
        float(momentum),
        1.0 - dampening,
        float(weight_decay),
        MOMENTUM=momentum != 0,
        COUNTED=count_dtype is not None,
        NESTEROV=nesterov,
        MAXIMIZE=maximize,
        **_counts(count_dtype),
        **_shape(grads),
    )


def gradient_norm(batches: Sequence[Gradients], max_norm: float, kind: int) -> tuple[Tensor, Tensor, list[Tiles]]:
    """The norm of the active gradients of all batches, which are on one device.

    Args:
        batches: the gradients.
        max_norm: the largest norm that is to be left as it is.
        kind: the order of the norm: 1, 2, or 0 for infinity.

    Returns:
        The norm and ``min(1, max_norm / (norm + 1e-6))``, each float32 and without a dimension, and what :func:`scale` takes of each batch.
    """
    device = batches[0].addresses.device
    tiles = [count_tiles(grads) for grads in batches]
    programs = [_grid(grads)[0] for grads in batches]
    parts = torch.empty(sum(programs), dtype=torch.float32, device=device)
    for grads, active, part in zip(batches, tiles, parts.split(programs), strict=True):
        _norm_kernel[_grid(grads)](
            grads.table.pieces, grads.addresses, *active, part, grads.table.pieces.shape[0], KIND=kind, **_shape(grads)
        )
    norm, factor = torch.empty(2, dtype=torch.float32, device=device).unbind()
    _factor_kernel[(1,)](parts, norm, factor, float(max_norm), parts.numel(), KIND=kind, PARTS=_PIECES)
    return norm, factor, tiles


def scale(grads: Gradients, tiles: Tiles, factor: Tensor | None) -> None:
    """Multiply the active gradients by ``factor``, float32 of one element, or make them zero without one."""
    _scale_kernel[_grid(grads)](
        grads.table.pieces,
        grads.addresses,
        *tiles,
        factor,
        grads.table.pieces.shape[0],
        ZERO=factor is None,
        **_shape(grads),
    )


def _grid(grads: Gradients) -> tuple[int]:
    most = triton.cdiv(grads.table.num_elements, _TILE) + grads.table.pieces.shape[0]
    return (min(most, _PROGRAMS_PER_MULTIPROCESSOR * num_programs(grads.addresses.device)),)


def _shape(grads: Gradients) -> dict[str, Any]:
    """What all kernels that walk over tiles are compiled for."""
    return {
        "TYPE": TYPES[grads.dtype],
        "WIDTH": grads.table.pieces.shape[1],
        "TILE": _TILE,
        "VECTOR": _VECTOR,
        "num_warps": _WARPS,
    }


def _counts(dtype: torch.dtype | None) -> dict[str, Any]:
    return {"COUNT_TYPE": tl.int32 if dtype == torch.int32 else tl.int16, "LARGEST": 2**31 - 1 if dtype == torch.int32 else 2**16 - 1}


def _decay(beta: float) -> float:
    return -math.log(beta) if beta > 0 else math.inf
