"""``ElasticLayerNorm``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Self

from torch import Tensor, nn

from .. import ops
from ..control import Axis
from ..errors import CapacityError
from .base import ElasticLayer, resolve_dim


class ElasticLayerNorm(ElasticLayer, nn.LayerNorm):
    """An ``nn.LayerNorm`` over a width that is data: the first normalised size is elastic, the others are fixed.

    Args:
        normalized_shape: the active size, or all normalised sizes with the active one first.
        eps: added to the variance.
        elementwise_affine: whether there are ``weight`` and ``bias``.
        bias: whether an affine layer has a ``bias``.
        device: of the parameters.
        dtype: of the parameters.
        max_num_features: capacity of the first size; defaults to that size.
        dim: a dim or a derived axis to share, instead of a new one.

    Shape:
        Input and output ``(*, *normalized_shape)``: the first of these the active size in compact layout, capacity in static layout, where
        mean and variance are those of the active units. Parameters are ``(capacity, *normalized_shape[1:])``, for ever.

    Raises:
        CapacityError: a size is no valid width, or disagrees with the dim given.
    """

    dense_class = nn.LayerNorm
    newborn: ClassVar = {"weight": ("one",), "bias": ("zero",)}
    mixes_units = True
    dim: Axis
    _fixed_shape: tuple[int, ...]

    def __init__(
        self,
        normalized_shape: int | Sequence[int],
        eps: float = 1e-5,
        elementwise_affine: bool = True,
        bias: bool = True,
        device: Any = None,
        dtype: Any = None,
        *,
        max_num_features: int | None = None,
        dim: Axis | None = None,
    ) -> None:
        shape = tuple(normalized_shape) if isinstance(normalized_shape, Sequence) else (normalized_shape,)
        dims = normalized_dim("ElasticLayerNorm", shape, max_num_features, dim)
        self._adopt(nn.LayerNorm(shape, eps, elementwise_affine, bias, device, dtype), dims)

    @classmethod
    def from_dense(cls, module: nn.LayerNorm, *, max_num_features: int | None = None, dim: Axis | None = None) -> Self:
        """The elastic form of ``module``, with copies of its weights as the active ones."""
        cls._require_dense(module)
        return cls._from(module, normalized_dim("ElasticLayerNorm", module.normalized_shape, max_num_features, dim))

    def _adopt(self, dense: nn.Module, dims: dict[str, Axis]) -> None:
        assert isinstance(dense, nn.LayerNorm)
        self._fixed_shape = dense.normalized_shape[1:]
        super()._adopt(dense, dims)

    @property
    def normalized_shape(self) -> tuple[int, ...]:  # type: ignore[override]
        """The normalised sizes that activations have now."""
        return (self._widths.size(0), *self._fixed_shape)

    def tensor_axes(self) -> dict[str, tuple[Axis | None, ...]]:
        axes = (self.dim, *[None] * len(self._fixed_shape))
        return {"weight": axes, "bias": axes}

    def forward(self, input: Tensor) -> Tensor:
        self._follow(input)
        return ops.layer_norm(input, self._fixed_shape, self.weight, self.bias, self._widths, self.eps)

    def _dense(self, device: Any, dtype: Any) -> nn.LayerNorm:
        shape = (self.dim.active, *self._fixed_shape)
        return nn.LayerNorm(shape, self.eps, self.elementwise_affine, self.bias is not None, device, dtype)

    def _fill_dormant(self, name: str, storage: Tensor) -> None:
        storage.fill_(1.0 if name == "weight" else 0.0)

    def extra_repr(self) -> str:
        return (
            f"{self.normalized_shape}, eps={self.eps}, elementwise_affine={self.elementwise_affine}, bias={self.bias is not None}, "
            f"max_num_features={self.dim.capacity}"
        )


def normalized_dim(label: str, shape: Sequence[int], max_num_features: int | None, dim: Axis | None) -> dict[str, Axis]:
    """The dim of the first of the sizes that a layer normalises over.

    Raises:
        CapacityError: there is none, it is no valid width, or it disagrees with the dim given.
    """
    if not shape:
        raise CapacityError(f"{label}: normalized_shape: expected at least one size, got none.")
    return {"dim": resolve_dim(label, shape[0], "num_features", max_num_features, dim)}
