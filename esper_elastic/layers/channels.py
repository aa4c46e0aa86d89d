"""How the channels of a convolution make its dims: two of their own, or, with groups, one that counts groups and runs through both."""

from __future__ import annotations

from ..control import Axis, ElasticDim, exact_int
from ..errors import CapacityError
from .base import resolve_dim
from .groups import follow_groups, num_groups, per_group, times


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
    in_width = per_group(label, "in_channels", in_channels, groups)
    out_width = per_group(label, "out_channels", out_channels, groups)
    if in_dim is None and out_dim is None:
        root = ElasticDim(groups, _group_capacity(label, groups, in_width, out_width, max_in_channels, max_out_channels))
        return {"out_dim": times(root, out_width), "in_dim": times(root, in_width)}
    if in_dim is not None:
        columns = resolve_dim(label, in_channels, "in_channels", max_in_channels, in_dim)
        follower = follow_groups(label, "in_dim", columns, in_width, out_width)
        rows = follower if out_dim is None else resolve_dim(label, out_channels, "out_channels", max_out_channels, out_dim)
        if rows.segments != follower.segments:
            raise CapacityError(
                f"{label}: out_dim: expected the axis whose groups are those of in_dim, {follower!r}, got {out_dim!r}. Leave out_dim out."
            )
    else:
        rows = resolve_dim(label, out_channels, "out_channels", max_out_channels, out_dim)
        columns = follow_groups(label, "out_dim", rows, out_width, in_width)
    for what, capacity, axis in (("in", max_in_channels, columns), ("out", max_out_channels, rows)):
        if capacity is not None:
            raise CapacityError(
                f"{label}: max_{what}_channels: the dim given sets the capacity of both sides, {axis.capacity} here, got {capacity}. "
                f"Drop max_{what}_channels."
            )
    return {"out_dim": rows, "in_dim": columns}


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
            found[what] = num_groups(label, f"max_{what}_channels", capacity, width)
    if len(set(found.values())) > 1:
        raise CapacityError(
            f"{label}: max_in_channels and max_out_channels: expected as many groups in both, got {found['in']} groups of {in_width} "
            f"and {found['out']} of {out_width}. Give one of the two; the other follows."
        )
    return next(iter(found.values()), groups)
