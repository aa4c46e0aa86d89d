"""``ElasticConv1d``, ``ElasticConv2d`` and ``ElasticConvTranspose2d``: what they share, and each one's signature and op."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any, ClassVar, Self

import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from .. import ops
from ..control import Axis
from .base import ElasticLayer
from .channels import channel_dims

Single = int | tuple[int]
Pair = int | tuple[int, int]


class _ElasticConv(ElasticLayer, _ConvNd):
    """A convolution whose channels are data. With groups the number of groups is, and the width per group is fixed.

    The weight of a transposed convolution has its input channels on the first axis; all others have their output channels there.
    """

    in_dim: Axis
    out_dim: Axis

    @classmethod
    def from_dense(
        cls,
        module: _ConvNd,
        *,
        max_in_channels: int | None = None,
        max_out_channels: int | None = None,
        in_dim: Axis | None = None,
        out_dim: Axis | None = None,
    ) -> Self:
        """The elastic form of ``module``, with copies of its weights as the active ones; no random number is drawn."""
        cls._require_dense(module)
        sizes = module.in_channels, module.out_channels, module.groups
        return cls._from(module, channel_dims(cls.__name__, *sizes, max_in_channels, max_out_channels, in_dim, out_dim))

    def _adopt(self, dense: nn.Module, dims: dict[str, Axis]) -> None:
        assert isinstance(dense, _ConvNd)
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
    def _grouped(self) -> bool:
        return self._group_width is not None

    @property
    def inseparable(self) -> int:
        """The output channels of a group."""
        return 1 if self._group_width is None else self._group_width * self.out_dim.capacity // self.in_dim.capacity

    def tensor_axes(self) -> dict[str, tuple[Axis | None, ...]]:
        first, second = (self.in_dim, self.out_dim) if self.transposed else (self.out_dim, self.in_dim)
        return {"weight": (first, None if self._grouped else second, *(None,) * len(self.kernel_size)), "bias": (self.out_dim,)}

    def _dense(self, device: Any, dtype: Any) -> nn.Module:
        return self.dense_class(
            self.in_dim.active,
            self.out_dim.active,
            self.kernel_size,
            self.stride,
            self.padding,
            dilation=self.dilation,
            groups=1 if self._group_width is None else self.in_dim.active // self._group_width,
            bias=self.bias is not None,
            padding_mode=self.padding_mode,
            device=device,
            dtype=dtype,
            **({"output_padding": self.output_padding} if self.transposed else {}),
        )

    def _init_bound(self) -> float:
        second = self.tensor_axes()["weight"][1]
        return 1 / math.sqrt((self.weight.shape[1] if second is None else second.active) * math.prod(self.kernel_size))

    def _padded(self, input: Tensor) -> tuple[Tensor, Any]:
        """``input`` with the padding that is not of zeros, and what is left for the op to add."""
        if self.padding_mode == "zeros":
            return input, self.padding
        return F.pad(input, self._reversed_padding_repeated_twice, mode=self.padding_mode), (0,) * len(self.kernel_size)

    def extra_repr(self) -> str:
        sizes = {name: getattr(self, name) for name in ("in_channels", "out_channels", "groups", "bias")}
        shown = SimpleNamespace(**self.__dict__, **sizes)  # nn formats its __dict__, where it keeps the sizes
        text = _ConvNd.extra_repr(shown)  # type: ignore[arg-type]
        return f"{text}, max_in_channels={self.in_dim.capacity}, max_out_channels={self.out_dim.capacity}"


class ElasticConv1d(_ElasticConv, nn.Conv1d):
    """An ``nn.Conv1d`` whose channels are data. With ``groups > 1`` the number of groups is, and the width per group is fixed.

    Args:
        in_channels: active input channels.
        out_channels: active output channels.
        kernel_size: as in ``nn.Conv1d``, like all up to ``dtype``.
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
        Input ``(N, in_channels, L)`` or without ``N``, output ``(N, out_channels, L')``: active sizes in compact layout, capacities in
        static layout. ``weight`` is ``(out capacity, in capacity, k)``, with groups ``(out capacity, in per group, k)``, and ``bias`` is
        ``(out capacity,)``, for ever.

    Raises:
        CapacityError: a size is no valid width, disagrees with the dim given, or splits a group.
    """

    dense_class = nn.Conv1d
    newborn: ClassVar = {"weight": ("draw", "zero", "draw"), "bias": ("draw",)}

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Single,
        stride: Single = 1,
        padding: str | Single = 0,
        dilation: Single = 1,
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
        label, sizes = type(self).__name__, (in_channels, out_channels, groups)
        dims = channel_dims(label, *sizes, max_in_channels, max_out_channels, in_dim, out_dim)
        settings = stride, padding, dilation, groups, bias, padding_mode, device, dtype
        self._adopt(nn.Conv1d(in_channels, out_channels, kernel_size, *settings), dims)  # type: ignore[arg-type]

    def forward(self, input: Tensor) -> Tensor:
        x, padding = self._padded(input)
        return ops.conv1d(x, self.weight, self.bias, self._widths, self.stride, padding, self.dilation, self._grouped)


class ElasticConv2d(_ElasticConv, nn.Conv2d):
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
        label, sizes = type(self).__name__, (in_channels, out_channels, groups)
        dims = channel_dims(label, *sizes, max_in_channels, max_out_channels, in_dim, out_dim)
        settings = stride, padding, dilation, groups, bias, padding_mode, device, dtype
        self._adopt(nn.Conv2d(in_channels, out_channels, kernel_size, *settings), dims)  # type: ignore[arg-type]

    def forward(self, input: Tensor) -> Tensor:
        x, padding = self._padded(input)
        return ops.conv2d(x, self.weight, self.bias, self._widths, self.stride, padding, self.dilation, self._grouped)


class ElasticConvTranspose2d(_ElasticConv, nn.ConvTranspose2d):
    """An ``nn.ConvTranspose2d`` whose channels are data. With ``groups > 1`` the number of groups is, and the width per group is fixed.

    Args:
        in_channels: active input channels.
        out_channels: active output channels.
        kernel_size: as in ``nn.ConvTranspose2d``, like all up to ``dtype``.
        stride: of the kernel.
        padding: per side; so much less comes out.
        output_padding: so much more comes out, at the end of each axis.
        groups: active groups; 1 means that input and output channels are not tied, for ever.
        bias: whether there is a bias.
        dilation: of the kernel.
        padding_mode: ``"zeros"``.
        device: of the parameters.
        dtype: of the parameters.
        max_in_channels: capacity; defaults to ``in_channels``. With groups one of the two capacities gives the other.
        max_out_channels: capacity; defaults to ``out_channels``.
        in_dim: a dim to share, instead of a new one. With groups it gives the output channels theirs.
        out_dim: a dim to share, instead of a new one. With groups it gives the input channels theirs.

    Shape:
        Input ``(N, in_channels, H, W)`` or without ``N``, output ``(N, out_channels, H', W')``: active sizes in compact layout, capacities
        in static layout. ``weight`` is ``(in capacity, out capacity, kh, kw)``, with groups ``(in capacity, out per group, kh, kw)``, and
        ``bias`` is ``(out capacity,)``, for ever.

    Raises:
        CapacityError: a size is no valid width, disagrees with the dim given, or splits a group.
    """

    dense_class = nn.ConvTranspose2d

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Pair,
        stride: Pair = 1,
        padding: Pair = 0,
        output_padding: Pair = 0,
        groups: int = 1,
        bias: bool = True,
        dilation: Pair = 1,
        padding_mode: str = "zeros",
        device: Any = None,
        dtype: Any = None,
        *,
        max_in_channels: int | None = None,
        max_out_channels: int | None = None,
        in_dim: Axis | None = None,
        out_dim: Axis | None = None,
    ) -> None:
        label, sizes = type(self).__name__, (in_channels, out_channels, groups)
        dims = channel_dims(label, *sizes, max_in_channels, max_out_channels, in_dim, out_dim)
        settings = stride, padding, output_padding, groups, bias, dilation, padding_mode, device, dtype
        self._adopt(nn.ConvTranspose2d(in_channels, out_channels, kernel_size, *settings), dims)  # type: ignore[arg-type]

    @property
    def newborn(self) -> dict[str, tuple[str, ...]]:  # type: ignore[override]
        """What `grow` writes. A newborn group, whose inputs and outputs are born together, is drawn: its consumers' zeros hide it."""
        return {"weight": ("draw" if self._grouped else "zero", "draw", "draw", "draw"), "bias": ("draw",)}

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        """As that of ``nn.ConvTranspose2d``: ``output_size``, with or without batch and channels, takes the place of ``output_padding``."""
        geometry = self.stride, self.padding, self.kernel_size, 2, self.dilation
        extra = tuple(self._output_padding(input, output_size, *geometry))  # type: ignore[arg-type]
        op = self.stride, self.padding, extra, self.dilation, self._grouped
        return ops.conv_transpose2d(input, self.weight, self.bias, self._widths, *op)  # type: ignore[arg-type]
