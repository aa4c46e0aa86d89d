"""``ElasticLinear``."""

from __future__ import annotations

import math
from typing import Any, ClassVar, Self

from torch import Tensor, nn

from .. import ops
from ..control import Axis
from .base import ElasticLayer, resolve_dim


class ElasticLinear(ElasticLayer, nn.Linear):
    """An ``nn.Linear`` whose widths are data.

    Args:
        in_features: active input features.
        out_features: active output features.
        bias: whether there is a bias.
        device: of the parameters.
        dtype: of the parameters.
        max_in_features: capacity; defaults to ``in_features``.
        max_out_features: capacity; defaults to ``out_features``.
        in_dim: a dim to share, instead of a new one.
        out_dim: a dim to share, instead of a new one.

    Shape:
        Input ``(*, in_features)``, output ``(*, out_features)``: active sizes in compact layout, capacities in static layout.
        ``weight`` is ``(out capacity, in capacity)``, ``bias`` is ``(out capacity,)``, for ever.

    Raises:
        CapacityError: a size is no valid width, or disagrees with the dim given.
    """

    dense_class = nn.Linear
    newborn: ClassVar = {"weight": ("draw", "zero"), "bias": ("draw",)}
    in_dim: Axis
    out_dim: Axis

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: Any = None,
        dtype: Any = None,
        *,
        max_in_features: int | None = None,
        max_out_features: int | None = None,
        in_dim: Axis | None = None,
        out_dim: Axis | None = None,
    ) -> None:
        dims = _dims(in_features, out_features, max_in_features, max_out_features, in_dim, out_dim)
        self._adopt(nn.Linear(in_features, out_features, bias, device, dtype), dims)

    @classmethod
    def from_dense(
        cls,
        module: nn.Linear,
        *,
        max_in_features: int | None = None,
        max_out_features: int | None = None,
        in_dim: Axis | None = None,
        out_dim: Axis | None = None,
    ) -> Self:
        """The elastic form of ``module``, with copies of its weights as the active ones; no random number is drawn."""
        cls._require_dense(module)
        return cls._from(module, _dims(module.in_features, module.out_features, max_in_features, max_out_features, in_dim, out_dim))

    @property
    def in_features(self) -> int:  # type: ignore[override]
        """The input size that activations have now."""
        return self._widths.size(1)

    @property
    def out_features(self) -> int:  # type: ignore[override]
        """The output size that activations have now."""
        return self._widths.size(0)

    def tensor_axes(self) -> dict[str, tuple[Axis | None, ...]]:
        return {"weight": (self.out_dim, self.in_dim), "bias": (self.out_dim,)}

    def forward(self, input: Tensor) -> Tensor:
        return ops.linear(input, self.weight, self.bias, self._widths)

    def _dense(self, device: Any, dtype: Any) -> nn.Linear:
        return nn.Linear(self.in_dim.active, self.out_dim.active, self.bias is not None, device, dtype)

    def _init_bound(self) -> float:
        return 1 / math.sqrt(self.in_dim.active)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, max_in_features={self.in_dim.capacity}, max_out_features={self.out_dim.capacity}"


def _dims(
    in_features: int,
    out_features: int,
    max_in_features: int | None,
    max_out_features: int | None,
    in_dim: Axis | None,
    out_dim: Axis | None,
) -> dict[str, Axis]:
    columns = resolve_dim("ElasticLinear", in_features, "in_features", max_in_features, in_dim)
    rows = resolve_dim("ElasticLinear", out_features, "out_features", max_out_features, out_dim)
    return {"out_dim": rows, "in_dim": columns}
