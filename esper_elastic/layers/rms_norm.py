"""``ElasticRMSNorm``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Self

from torch import Tensor, nn

from .. import ops
from ..control import Axis
from .base import ElasticLayer
from .layer_norm import normalized_dim


class ElasticRMSNorm(ElasticLayer, nn.RMSNorm):
    """An ``nn.RMSNorm`` over a width that is data: the first normalised size is elastic, the others are fixed.

    Args:
        normalized_shape: the active size, or all normalised sizes with the active one first.
        eps: added to the mean square; ``None`` for the machine epsilon of the type that it is computed in.
        elementwise_affine: whether there is a ``weight``.
        device: of the weight.
        dtype: of the weight.
        max_num_features: capacity of the first size; defaults to that size.
        dim: a dim or a derived axis to share, instead of a new one.

    Shape:
        Input and output ``(*, *normalized_shape)``: the first of these the active size in compact layout, capacity in static layout, where
        the mean square is that of the active units. The weight is ``(capacity, *normalized_shape[1:])``, for ever.

    Raises:
        CapacityError: a size is no valid width, or disagrees with the dim given.
    """

    dense_class = nn.RMSNorm
    newborn: ClassVar = {"weight": ("one",)}
    mixes_units = True
    dim: Axis
    _fixed_shape: tuple[int, ...]

    def __init__(
        self,
        normalized_shape: int | Sequence[int],
        eps: float | None = None,
        elementwise_affine: bool = True,
        device: Any = None,
        dtype: Any = None,
        *,
        max_num_features: int | None = None,
        dim: Axis | None = None,
    ) -> None:
        shape = list(normalized_shape) if isinstance(normalized_shape, Sequence) else [normalized_shape]
        dims = normalized_dim("ElasticRMSNorm", shape, max_num_features, dim)
        self._adopt(nn.RMSNorm(shape, eps, elementwise_affine, device, dtype), dims)

    @classmethod
    def from_dense(cls, module: nn.RMSNorm, *, max_num_features: int | None = None, dim: Axis | None = None) -> Self:
        """The elastic form of ``module``, with a copy of its weight as the active one."""
        cls._require_dense(module)
        return cls._from(module, normalized_dim("ElasticRMSNorm", module.normalized_shape, max_num_features, dim))

    def _adopt(self, dense: nn.Module, dims: dict[str, Axis]) -> None:
        assert isinstance(dense, nn.RMSNorm)
        self._fixed_shape = dense.normalized_shape[1:]
        super()._adopt(dense, dims)

    @property
    def normalized_shape(self) -> tuple[int, ...]:  # type: ignore[override]
        """The normalised sizes that activations have now."""
        return (self._widths.size(0), *self._fixed_shape)

    def tensor_axes(self) -> dict[str, tuple[Axis | None, ...]]:
        return {"weight": (self.dim, *[None] * len(self._fixed_shape))}

    def forward(self, x: Tensor) -> Tensor:
        self._follow(x)
        return ops.rms_norm(x, self._fixed_shape, self.weight, self._widths, self.eps)

    def _dense(self, device: Any, dtype: Any) -> nn.RMSNorm:
        return nn.RMSNorm([self.dim.active, *self._fixed_shape], self.eps, self.elementwise_affine, device, dtype)

    def _fill_dormant(self, name: str, storage: Tensor) -> None:
        storage.fill_(1.0)

    def extra_repr(self) -> str:
        return (
            f"{self.normalized_shape}, eps={self.eps}, elementwise_affine={self.elementwise_affine}, max_num_features={self.dim.capacity}"
        )
