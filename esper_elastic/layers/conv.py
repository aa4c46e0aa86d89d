"""``ElasticConv2d``, and how the input and output channels of a grouped convolution share its groups."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any, ClassVar, Self

import torch.nn.functional as F
from torch import Tensor, nn

from .. import ops
from ..control import Axis, ElasticDim, exact_int
from ..errors import CapacityError
from .base import ElasticLayer, resolve_dim
from .groups import follow_groups, num_groups, per_group, times

Pair = int | tuple[int, int]


class ElasticConv2d(ElasticLayer, nn.Conv2d):
    """An ``nn.Conv2d`` whose channels are data. With ``groups > 1`` the number of groups is, and the width per group is fixed.

    Args:
        in_channels: active input channels.
        out_channels: active output channels.
        kernel_size: as in ``nn.Conv2d``, like all up to ``dtype``.
        stride: of the kernel.
        padding: per side, ``"same"`` or ``"valid"``.
        dilation: of the kernel.
        groups: active groups; 1 means that input and output channels are not tied, for ever.
        bias: whether there is a bias.
        padding_mode: ``"zeros"``, ``"reflect"``, ``"replicate"`` or ``"circular"``.
        device: of the parameters.
        dtype: of the parameters.
        max_in_channels: capacity; defaults to ``in_channels``. With groups one of the two capacities gives the other.
        max_out_channels: capacity; defaults to ``out_channels``.
        in_dim: a dim to share, instead of a new one. With groups it gives the output channels theirs.
        out_dim: a dim to share, instead of a new one. With groups it gives the input channels theirs.

    Shape:
        Input ``(N, in_channels, H, W)`` or without ``N``, output ``(N, out_channels, H', W')``: active sizes in compact layout, capacities
        in static layout. ``weight`` is ``(out capacity, in capacity, kh, kw)``, with groups ``(out capacity, in per group, kh, kw)``, and
        ``bias`` is ``(out capacity,)``, for ever.

    Raises:
        CapacityError: a size is no valid width, disagrees with the dim given, or splits a group.
    """

    dense_class = nn.Conv2d
    newborn: ClassVar = {"weight": ("draw", "zero", "draw", "draw"), "bias": ("draw",)}
    in_dim: Axis
    out_dim: Axis

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Pair,
        stride: Pair = 1,
        padding: str | Pair = 0,
        dilation: Pair = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        device: Any = None,
        dtype: Any = None,
        *,
        max_in_channels: int | None = None,
        max_out_channels: int | None = None,
        in_dim: Axis | None = None,
        out_dim: Axis | None = None,
    ) -> None:
        dims = _dims(in_channels, out_channels, groups, max_in_channels, max_out_channels, in_dim, out_dim)
        dense = nn.Conv2d(in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode, device, dtype)  # type: ignore[arg-type]
        self._adopt(dense, dims)

    @classmethod
    def from_dense(
        cls,
        module: nn.Conv2d,
        *,
        max_in_channels: int | None = None,
        max_out_channels: int | None = None,
        in_dim: Axis | None = None,
        out_dim: Axis | None = None,
    ) -> Self:
        """The elastic form of ``module``, with copies of its weights as the active ones; no random number is drawn."""
        cls._require_dense(module)
        dims = _dims(module.in_channels, module.out_channels, module.groups, max_in_channels, max_out_channels, in_dim, out_dim)
        return cls._from(module, dims)

    def _adopt(self, dense: nn.Module, dims: dict[str, Axis]) -> None:
        assert isinstance(dense, nn.Conv2d)
        self._group_width = dense.in_channels // dense.groups if dense.groups > 1 else None
        super()._adopt(dense, dims)

    @property
    def in_channels(self) -> int:  # type: ignore[override]
        """The input channels that activations have now."""
        return self._widths.size(1)

    @property
    def out_channels(self) -> int:  # type: ignore[override]
        """The output channels that activations have now."""
        return self._widths.size(0)

    @property
    def groups(self) -> int:  # type: ignore[override]
        """The groups that activations have now."""
        return 1 if self._group_width is None else self._widths.size(1) // self._group_width

    @property
    def inseparable(self) -> int:
        """The output channels of a group."""
        return 1 if self._group_width is None else self._group_width * self.out_dim.capacity // self.in_dim.capacity

    def tensor_axes(self) -> dict[str, tuple[Axis | None, ...]]:
        columns = self.in_dim if self._group_width is None else None
        return {"weight": (self.out_dim, columns, None, None), "bias": (self.out_dim,)}

    def forward(self, input: Tensor) -> Tensor:
        padding = self.padding
        if self.padding_mode != "zeros":
            input = F.pad(input, self._reversed_padding_repeated_twice, mode=self.padding_mode)
            padding = (0, 0)
        grouped = self._group_width is not None
        return ops.conv2d(input, self.weight, self.bias, self._widths, self.stride, padding, self.dilation, grouped)

    def _dense(self, device: Any, dtype: Any) -> nn.Conv2d:
        groups = 1 if self._group_width is None else self.in_dim.active // self._group_width
        return nn.Conv2d(
            self.in_dim.active,
            self.out_dim.active,
            self.kernel_size,  # type: ignore[arg-type]
            self.stride,  # type: ignore[arg-type]
            self.padding,  # type: ignore[arg-type]
            self.dilation,  # type: ignore[arg-type]
            groups,
            self.bias is not None,
            self.padding_mode,
            device,
            dtype,
        )

    def _init_bound(self) -> float:
        return 1 / math.sqrt((self._group_width or self.in_dim.active) * math.prod(self.kernel_size))

    def extra_repr(self) -> str:
        sizes = {name: getattr(self, name) for name in ("in_channels", "out_channels", "groups", "bias")}
        shown = SimpleNamespace(**self.__dict__, **sizes)  # nn formats its __dict__, where it keeps the sizes
        text = nn.Conv2d.extra_repr(shown)  # type: ignore[arg-type]
        return f"{text}, max_in_channels={self.in_dim.capacity}, max_out_channels={self.out_dim.capacity}"


def _dims(
    in_channels: int,
    out_channels: int,
    groups: int,
    max_in_channels: int | None,
    max_out_channels: int | None,
    in_dim: Axis | None,
    out_dim: Axis | None,
) -> dict[str, Axis]:
    label = "ElasticConv2d"
    if exact_int(groups, label, "groups") == 1:
        columns = resolve_dim(label, in_channels, "in_channels", max_in_channels, in_dim)
        rows = resolve_dim(label, out_channels, "out_channels", max_out_channels, out_dim)
        return {"out_dim": rows, "in_dim": columns}
    in_width = per_group(label, "in_channels", in_channels, groups)
    out_width = per_group(label, "out_channels", out_channels, groups)
    if in_dim is None and out_dim is None:
        root = ElasticDim(groups, _group_capacity(groups, in_width, out_width, max_in_channels, max_out_channels))
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


def _group_capacity(groups: int, in_width: int, out_width: int, max_in_channels: int | None, max_out_channels: int | None) -> int:
    """How many groups the capacities make.

    Raises:
        CapacityError: they split a group, or disagree.
    """
    found = {}
    for what, width, capacity in (("in", in_width, max_in_channels), ("out", out_width, max_out_channels)):
        if capacity is not None:
            found[what] = num_groups("ElasticConv2d", f"max_{what}_channels", capacity, width)
    if len(set(found.values())) > 1:
        raise CapacityError(
            f"ElasticConv2d: max_in_channels and max_out_channels: expected as many groups in both, got {found['in']} groups of {in_width} "
            f"and {found['out']} of {out_width}. Give one of the two; the other follows."
        )
    return next(iter(found.values()), groups)
