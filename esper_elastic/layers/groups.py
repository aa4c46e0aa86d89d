"""How channels follow the groups that they are computed in: groups come and go, the width of each is fixed.

Used by the layers whose channels fall into groups; it knows axes and no tensors.
"""

from __future__ import annotations

from ..control import Axis, DerivedAxis, ElasticDim, Segment, exact_int
from ..errors import CapacityError


def times(dim: ElasticDim, width: int) -> Axis:
    """The axis of the channels of groups that ``dim`` counts."""
    return dim if width == 1 else dim * width


def per_group(label: str, what: str, channels: int, groups: int) -> int:
    """How many of ``channels`` each of ``groups`` has.

    Raises:
        CapacityError: they cannot be divided evenly.
    """
    channels = exact_int(channels, label, what)
    if groups < 1 or channels < groups or channels % groups:
        raise CapacityError(f"{label}: {what}: expected a multiple of groups={groups}, at least 1, got {channels}.")
    return channels // groups


def num_groups(label: str, what: str, capacity: int, width: int) -> int:
    """How many groups of ``width`` channels a capacity makes.

    Raises:
        CapacityError: it splits a group.
    """
    number, rest = divmod(exact_int(capacity, label, what), width)
    if rest:
        raise CapacityError(
            f"{label}: {what}: expected whole groups of {width} channels, got {capacity}. "
            f"The nearest are {number * width} and {(number + 1) * width}."
        )
    return number


def follow_groups(label: str, what: str, axis: Axis, width: int, other: int) -> Axis:
    """The axis that has ``other`` channels where ``axis`` has a group of ``width``.

    Raises:
        CapacityError: a width of ``axis`` could split a group, or the other axis could not follow it.
    """
    segments = []
    for segment in axis.segments:
        if segment.inner % width:
            step = segment.dim.multiple_of * segment.inner
            aligned = all(n % width == 0 for n in (segment.start, step, segment.dim.capacity * segment.inner))
            if width != other or not aligned:
                beside = f", or one with a capacity that is a multiple of {width} and multiple_of={width}" if width == other else ""
                raise CapacityError(
                    f"{label}: {what}: {segment.dim.label} moves in steps of {step} channels, which splits groups of {width}. "
                    f"Share a dim whose unit is a group (dim * {width}){beside}."
                )
        segments.append(segment if width == other else _scaled(segment, width, other))
    if width == other:
        return axis
    first = segments[0]
    return first.dim if len(segments) == 1 and first.inner == 1 else DerivedAxis(tuple(segments))


def _scaled(segment: Segment, width: int, other: int) -> Segment:
    return Segment(segment.dim, segment.start // width * other, segment.inner // width * other)
