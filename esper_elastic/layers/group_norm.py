"""``ElasticGroupNorm``."""

from __future__ import annotations

from typing import Any, ClassVar, Self

from torch import Tensor, nn

from .. import ops
from ..control import Axis, ElasticDim, exact_int
from .base import ElasticLayer, resolve_dim
from .groups import follow_groups, num_groups, per_group, times

_LABEL = "ElasticGroupNorm"


class ElasticGroupNorm(ElasticLayer, nn.GroupNorm):
    """An ``nn.GroupNorm`` whose width is data: the number of groups is, and the channels of each are fixed.

    With ``num_groups=1`` there is one group for ever, of all active channels: the norm mixes them, as a layer norm does.

    Args:
        num_groups: active groups.
        num_channels: active channels.
        eps: added to the variance.
        affine: whether there are ``weight`` and ``bias``.
        device: of the parameters.
        dtype: of the parameters.
        bias: whether an affine layer has a ``bias``.
        max_num_features: capacity in channels, whole groups of them; defaults to ``num_channels``.
        dim: a dim or a derived axis of the channels to share, instead of a new one, which moves in whole groups: ``groups * size``.

    Shape:
        Input and output ``(N, num_channels, *)``: the active size in compact layout, capacity in static layout. The memory format stays.
        Parameters are ``(capacity,)``, for ever.

    Raises:
        CapacityError: a size is no valid width, disagrees with the dim given, or splits a group.
    """

    dense_class = nn.GroupNorm
    newborn: ClassVar = {"weight": ("one",), "bias": ("zero",)}
    dim: Axis

    def __init__(
        self,
        num_groups: int,
        num_channels: int,
        eps: float = 1e-5,
        affine: bool = True,
        device: Any = None,
        dtype: Any = None,
        *,
        bias: bool = True,
        max_num_features: int | None = None,
        dim: Axis | None = None,
    ) -> None:
        dims = _dims(num_groups, num_channels, max_num_features, dim)
        dense = nn.GroupNorm(num_groups, num_channels, eps, affine, device, dtype)
        if not bias:
            dense.register_parameter("bias", None)
        self._adopt(dense, dims)

    @classmethod
    def from_dense(cls, module: nn.GroupNorm, *, max_num_features: int | None = None, dim: Axis | None = None) -> Self:
        """The elastic form of ``module``, with copies of its weights as the active ones."""
        cls._require_dense(module)
        return cls._from(module, _dims(module.num_groups, module.num_channels, max_num_features, dim))

    def _adopt(self, dense: nn.Module, dims: dict[str, Axis]) -> None:
        assert isinstance(dense, nn.GroupNorm)
        self._group_width = dense.num_channels // dense.num_groups if dense.num_groups > 1 else None
        super()._adopt(dense, dims)

    @property
    def num_channels(self) -> int:  # type: ignore[override]
        """The channels that activations have now."""
        return self._widths.size(0)

    @property
    def num_groups(self) -> int:  # type: ignore[override]
        """The groups that activations have now."""
        return 1 if self._group_width is None else self._widths.size(0) // self._group_width

    @property
    def mixes_units(self) -> bool:
        """Whether all channels are one group; others do not know of each other."""
        return self._group_width is None

    @property
    def inseparable(self) -> int:
        """The channels of a group."""
        return self._group_width or 1

    def tensor_axes(self) -> dict[str, tuple[Axis | None, ...]]:
        return {"weight": (self.dim,), "bias": (self.dim,)}

    def forward(self, input: Tensor) -> Tensor:
        self._follow(input)
        return ops.group_norm(input, self._group_width, self.weight, self.bias, self._widths, self.eps)

    def _dense(self, device: Any, dtype: Any) -> nn.GroupNorm:
        groups = 1 if self._group_width is None else self.dim.active // self._group_width
        dense = nn.GroupNorm(groups, self.dim.active, self.eps, self.affine, device, dtype)
        if self.bias is None:
            dense.register_parameter("bias", None)
        return dense

    def _fill_dormant(self, name: str, storage: Tensor) -> None:
        storage.fill_(1.0 if name == "weight" else 0.0)

    def extra_repr(self) -> str:
        return (
            f"{self.num_groups}, {self.num_channels}, eps={self.eps}, affine={self.affine}, bias={self.bias is not None}, "
            f"max_num_features={self.dim.capacity}"
        )


def _dims(groups: int, channels: int, max_num_features: int | None, dim: Axis | None) -> dict[str, Axis]:
    if exact_int(groups, _LABEL, "num_groups") == 1:
        return {"dim": resolve_dim(_LABEL, channels, "num_features", max_num_features, dim)}
    width = per_group(_LABEL, "num_channels", channels, groups)
    if dim is not None:
        return {"dim": follow_groups(_LABEL, "dim", resolve_dim(_LABEL, channels, "num_features", max_num_features, dim), width, width)}
    capacity = groups if max_num_features is None else num_groups(_LABEL, "max_num_features", max_num_features, width)
    return {"dim": times(ElasticDim(groups, capacity), width)}
