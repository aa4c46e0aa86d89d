"""How kernels read what is active: the control block, a layer's rows in it, and the tiles that an axis is cut into.

``slots`` is an int32 table, one row ``[axis, slot, start, inner]`` per segment of the layer's axes, in the order of the axes, and then one
per switch. A kernel is compiled for how many segments an axis has, never for where they lie or how wide they are: that it loads.

An axis is cut into *tiles* of ``BLOCK`` indices, each within one segment. A tile is active if its first index is: of the last active tile
of a segment, only the part before ``edge`` is.
"""

import triton
import triton.language as tl


@triton.jit
def switched_on(control, slots, FIRST: tl.constexpr, SWITCHES: tl.constexpr):
    """1 if all switches are on, whose rows begin at ``FIRST``; 0 otherwise."""
    on = 1
    for switch in tl.static_range(SWITCHES):
        on = on * tl.load(control + tl.load(slots + 4 * (FIRST + switch) + 1))
    return on


@triton.jit
def segment_start(slots, FIRST: tl.constexpr, SEGMENT: tl.constexpr):
    """The index of its axis at which a segment begins. The compiler knows that of the first, and so how addresses are aligned."""
    start = 0
    if SEGMENT > 0:
        start = tl.load(slots + 4 * (FIRST + SEGMENT) + 2)
    return start


@triton.jit
def segment_active(control, slots, SEGMENT: tl.constexpr):
    """How many indices of a segment are active."""
    return tl.load(control + tl.load(slots + 4 * SEGMENT + 1)) * tl.load(slots + 4 * SEGMENT + 3)


@triton.jit
def count_active(control, slots, FIRST: tl.constexpr, SEGMENTS: tl.constexpr):
    """How many indices of an axis are active."""
    total = 0
    for segment in tl.static_range(SEGMENTS):
        total += segment_active(control, slots, FIRST + segment)
    return total


@triton.jit
def is_active(control, slots, index, FIRST: tl.constexpr, SEGMENTS: tl.constexpr):
    """Which of the indices of an axis are active."""
    inside = index < 0
    for segment in tl.static_range(SEGMENTS):
        offset = index - segment_start(slots, FIRST, segment)
        inside |= (offset >= 0) & (offset < segment_active(control, slots, FIRST + segment))
    return inside


@triton.jit
def count_tiles(control, slots, on, size, FIRST: tl.constexpr, SEGMENTS: tl.constexpr, BLOCK: tl.constexpr):
    """How many tiles of an axis of ``size`` are active (none, if ``on`` is 0), and how many there are."""
    active = 0
    total = 0
    for segment in tl.static_range(SEGMENTS):
        stop = size
        if segment + 1 < SEGMENTS:
            stop = segment_start(slots, FIRST, segment + 1)
        active += tl.cdiv(segment_active(control, slots, FIRST + segment) * on, BLOCK)
        total += tl.cdiv(stop - segment_start(slots, FIRST, segment), BLOCK)
    return active, total


@triton.jit
def locate_tile(control, slots, on, tile, size, FIRST: tl.constexpr, SEGMENTS: tl.constexpr, BLOCK: tl.constexpr):
    """Where a tile lies: its first index, the edge of what is active of its segment, and the segment's end.

    Tiles are numbered so that the active ones come first, in order, and then the dormant ones.
    """
    begin = 0
    edge = 0
    end = 0
    active, _ = count_tiles(control, slots, on, size, FIRST, SEGMENTS, BLOCK)
    awake = tile < active
    remaining = tl.where(awake, tile, tile - active)
    for segment in tl.static_range(SEGMENTS):
        start = segment_start(slots, FIRST, segment)
        stop = size
        if segment + 1 < SEGMENTS:
            stop = segment_start(slots, FIRST, segment + 1)
        length = segment_active(control, slots, FIRST + segment) * on
        num_active = tl.cdiv(length, BLOCK)
        count = tl.where(awake, num_active, tl.cdiv(stop - start, BLOCK) - num_active)
        here = (remaining >= 0) & (remaining < count)
        first = start + (remaining + tl.where(awake, 0, num_active)) * BLOCK
        begin = tl.where(here, first, begin)
        edge = tl.where(here, start + length, edge)
        end = tl.where(here, stop, end)
        remaining -= count
    return begin, edge, end


@triton.jit
def entry_value(control, slot, inside):
    """What the control block holds in ``slot``, where ``inside``; 1 for slot -1, which stands for a size that is fixed."""
    return tl.load(control + slot, mask=inside & (slot >= 0), other=1)
