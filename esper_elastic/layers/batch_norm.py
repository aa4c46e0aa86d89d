"""``ElasticBatchNorm1d`` and ``ElasticBatchNorm2d``."""

from __future__ import annotations

from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from .. import ops
from ..control import Axis
from .base import ElasticLayer, resolve_dim


class _ElasticBatchNorm(ElasticLayer, nn.modules.batchnorm._BatchNorm):
    """Both batch norms; they differ in the inputs that their ``nn`` class takes."""

    newborn: ClassVar = {"weight": ("one",), "bias": ("zero",), "running_mean": ("zero",), "running_var": ("one",)}
    dense_class: ClassVar[type[nn.modules.batchnorm._BatchNorm]]
    dim: Axis

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: Any = None,
        dtype: Any = None,
        *,
        bias: bool = True,
        max_num_features: int | None = None,
        dim: Axis | None = None,
    ) -> None:
        dims = {"dim": resolve_dim(type(self).__name__, num_features, "num_features", max_num_features, dim)}
        dense = self.dense_class(num_features, eps, momentum, affine, track_running_stats, device, dtype)
        if not bias:
            dense.register_parameter("bias", None)
        self._adopt(dense, dims)

    @classmethod
    def from_dense(cls, module: nn.modules.batchnorm._BatchNorm, *, max_num_features: int | None = None, dim: Axis | None = None) -> Self:
        """The elastic form of ``module``, with copies of its weights and statistics as the active ones."""
        cls._require_dense(module)
        return cls._from(module, {"dim": resolve_dim(cls.__name__, module.num_features, "num_features", max_num_features, dim)})

    @property
    def num_features(self) -> int:  # type: ignore[override]
        """The number of features that activations have now."""
        return self._widths.size(0)

    def tensor_axes(self) -> dict[str, tuple[Axis | None, ...]]:
        return {**dict.fromkeys(self.newborn, (self.dim,)), "num_batches_tracked": ()}

    def forward(self, input: Tensor) -> Tensor:
        self._check_input_dim(input)
        self._follow(input)
        kept = not self.training or self.track_running_stats
        return ops.batch_norm(
            input,
            self.weight,
            self.bias,
            self.running_mean if kept else None,
            self.running_var if kept else None,
            self.num_batches_tracked if self.training and self.track_running_stats else None,
            self._widths,
            self.training or (self.running_mean is None and self.running_var is None),
            self.momentum,
            self.eps,
        )

    @torch.no_grad()
    def reset_running_stats(self) -> None:
        """Forget the batches seen, as far as active features go; what sleeps is left as it is."""
        if not self.track_running_stats or self.running_mean is None or self.running_var is None:
            return
        for start, length in self.dim.runs():
            self.running_mean.narrow(0, start, length).zero_()
            self.running_var.narrow(0, start, length).fill_(1)
        if self.num_batches_tracked is not None:
            self.num_batches_tracked.zero_()

    def _dense(self, device: Any, dtype: Any) -> nn.Module:
        dense = self.dense_class(self.dim.active, self.eps, self.momentum, self.affine, self.track_running_stats, device, dtype)
        if self.bias is None:
            dense.register_parameter("bias", None)
        return dense

    def _fill_dormant(self, name: str, storage: Tensor) -> None:
        storage.fill_(1.0 if self.newborn[name] == ("one",) else 0.0)

    def extra_repr(self) -> str:
        return (
            f"{self.num_features}, eps={self.eps}, momentum={self.momentum}, affine={self.affine}, bias={self.bias is not None}, "
            f"track_running_stats={self.track_running_stats}, max_num_features={self.dim.capacity}"
        )


class ElasticBatchNorm1d(_ElasticBatchNorm, nn.BatchNorm1d):
    """An ``nn.BatchNorm1d`` whose width is data.

    Args:
        num_features: active features.
        eps: added to the variance.
        momentum: share of a batch in the running statistics; ``None`` for their plain mean over all batches.
        affine: whether there are ``weight`` and ``bias``.
        track_running_stats: whether there are running statistics.
        device: of the parameters.
        dtype: of the parameters.
        bias: whether an affine layer has a ``bias``.
        max_num_features: capacity; defaults to ``num_features``.
        dim: a dim or a derived axis to share, instead of a new one: ``dim * 49`` behind a flatten of 7 x 7 maps.

    Shape:
        Input and output ``(N, num_features)`` or ``(N, num_features, L)``: the active size in compact layout, capacity in static layout.
        Parameters and running statistics are ``(capacity,)``, for ever.

    Effects:
        A forward in training mode writes the running statistics of active features and ``num_batches_tracked``; none while a
        switch above is off.

    Raises:
        CapacityError: a size is no valid width, or disagrees with the dim given.
    """

    dense_class = nn.BatchNorm1d


class ElasticBatchNorm2d(_ElasticBatchNorm, nn.BatchNorm2d):
    """An ``nn.BatchNorm2d`` whose width is data.

    Args:
        num_features: active channels.
        eps: added to the variance.
        momentum: share of a batch in the running statistics; ``None`` for their plain mean over all batches.
        affine: whether there are ``weight`` and ``bias``.
        track_running_stats: whether there are running statistics.
        device: of the parameters.
        dtype: of the parameters.
        bias: whether an affine layer has a ``bias``.
        max_num_features: capacity; defaults to ``num_features``.
        dim: a dim or a derived axis to share, instead of a new one.

    Shape:
        Input and output ``(N, num_features, H, W)``: the active size in compact layout, capacity in static layout. The memory format stays.
        Parameters and running statistics are ``(capacity,)``, for ever.

    Effects:
        A forward in training mode writes the running statistics of active channels and ``num_batches_tracked``; none while a
        switch above is off.

    Raises:
        CapacityError: a size is no valid width, or disagrees with the dim given.
    """

    dense_class = nn.BatchNorm2d
