"""How the channels of a convolution make its dims: two of their own, or, with groups, one that counts groups and runs through both."""

from __future__ import annotations

from ..control import Axis, DerivedAxis, ElasticDim, Segment, exact_int
from ..errors import CapacityError
from .base import resolve_dim


def channel_dims(
    label: str,
    in_channels: int,
    out_channels: int,
    groups: int,
    max_in_channels: int | None,
    max_out_channels: int | None,
    in_dim: Axis | None,
    out_dim: Axis | None,
) -> dict[str, Axis]:
    """The dims of a layer's channels, by name, the output first.

    Raises:
        CapacityError: a size is no valid width, disagrees with the dim given, or splits a group.
    """
    if exact_int(groups, label, "groups") == 1:
        columns = resolve_dim(label, in_channels, "in_channels", max_in_channels, in_dim)
        rows = resolve_dim(label, out_channels, "out_channels", max_out_channels, out_dim)
        return {"out_dim": rows, "in_dim": columns}
    in_width = _per_group(label, in_channels, groups, "in_channels")
    out_width = _per_group(label, out_channels, groups, "out_channels")
    if in_dim is None and out_dim is None:
        root = ElasticDim(groups, _group_capacity(label, groups, in_width, out_width, max_in_channels, max_out_channels))
        return {"out_dim": _times(root, out_width), "in_dim": _times(root, in_width)}
    if in_dim is not None:
        columns = resolve_dim(label, in_channels, "in_channels", max_in_channels, in_dim)
        follower = _regroup(label, columns, "in_dim", in_width, out_width)
        rows = follower if out_dim is None else resolve_dim(label, out_channels, "out_channels", max_out_channels, out_dim)
        if rows.segments != follower.segments:
            raise CapacityError(
                f"{label}: out_dim: expected the axis whose groups are those of in_dim, {follower!r}, got {out_dim!r}. Leave out_dim out."
            )
    else:
        rows = resolve_dim(label, out_channels, "out_channels", max_out_channels, out_dim)
        columns = _regroup(label, rows, "out_dim", out_width, in_width)
    for what, capacity, axis in (("in", max_in_channels, columns), ("out", max_out_channels, rows)):
        if capacity is not None:
            raise CapacityError(
                f"{label}: max_{what}_channels: the dim given sets the capacity of both sides, {axis.capacity} here, got {capacity}. "
                f"Drop max_{what}_channels."
            )
    return {"out_dim": rows, "in_dim": columns}


def _times(dim: ElasticDim, width: int) -> Axis:
    return dim if width == 1 else dim * width


def _per_group(label: str, channels: int, groups: int, what: str) -> int:
    channels = exact_int(channels, label, what)
    if groups < 1 or channels < groups or channels % groups:
        raise CapacityError(f"{label}: {what}: expected a multiple of groups={groups}, at least 1, got {channels}.")
    return channels // groups


def _group_capacity(
    label: str, groups: int, in_width: int, out_width: int, max_in_channels: int | None, max_out_channels: int | None
) -> int:
    """How many groups the capacities make.

    Raises:
        CapacityError: they split a group, or disagree.
    """
    found = {}
    for what, width, capacity in (("in", in_width, max_in_channels), ("out", out_width, max_out_channels)):
        if capacity is not None:
            number, rest = divmod(exact_int(capacity, label, f"max_{what}_channels"), width)
            if rest:
                raise CapacityError(
                    f"{label}: max_{what}_channels: expected whole groups of {width} channels, got {capacity}. "
                    f"The nearest are {number * width} and {(number + 1) * width}."
                )
            found[what] = number
    if len(set(found.values())) > 1:
        raise CapacityError(
            f"{label}: max_in_channels and max_out_channels: expected as many groups in both, got {found['in']} groups of {in_width} "
            f"and {found['out']} of {out_width}. Give one of the two; the other follows."
        )
    return next(iter(found.values()), groups)


def _regroup(label: str, axis: Axis, what: str, width: int, other: int) -> Axis:
    """The axis that has ``other`` channels where ``axis`` has a group of ``width``.

    Raises:
        CapacityError: a width of ``axis`` could split a group.
    """
    segments = []
    for segment in axis.segments:
        whole = segment.inner % width == 0
        if not whole:
            step = segment.dim.multiple_of * segment.inner
            aligned = all(n % width == 0 for n in (segment.start, step, segment.dim.capacity * segment.inner))
            if width != other or not aligned:
                raise CapacityError(
                    f"{label}: {what}: {segment.dim.label} moves in steps of {step} channels, which splits groups of {width}. "
                    f"Share a dim whose unit is a group (dim * {width}), or, where a group has as many outputs as inputs, one with a "
                    f"capacity that is a multiple of {width} and multiple_of={width}."
                )
        segments.append(segment if width == other else _scaled(segment, width, other))
    if width == other:
        return axis
    first = segments[0]
    return first.dim if len(segments) == 1 and first.inner == 1 else DerivedAxis(tuple(segments))


def _scaled(segment: Segment, width: int, other: int) -> Segment:
    return Segment(segment.dim, segment.start // width * other, segment.inner // width * other)
