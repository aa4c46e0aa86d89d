"""``y = act(x rstd w + residual)`` over the active part of each row, ``rstd = (mean(x^2) + eps)^(-1/2)``, and its gradients.

The kernels are those of :mod:`layer_norm`, which leave out the mean.
"""

from torch import Tensor

from .launch import Segments
from .layer_norm import Config, layer_norm_backward, layer_norm_forward


def rms_norm_forward(
    x: Tensor,
    fixed: int,
    weight: Tensor | None,
    residual: Tensor | None,
    control: Tensor,
    slots: Tensor,
    segments: Segments,
    eps: float,
    activation: str = "none",
    *,
    config: Config | None = None,
) -> tuple[Tensor, Tensor]:
    """``(y, rstd)`` of ``x``, contiguous ``(rows, size)``; rstd of each row, in float32."""
    y, _, rstd = layer_norm_forward(
        x, fixed, weight, None, residual, control, slots, segments, eps, activation, centre=False, config=config
    )
    return y, rstd


def rms_norm_backward(
    grad: Tensor,
    x: Tensor,
    fixed: int,
    weight: Tensor | None,
    residual: Tensor | None,
    rstd: Tensor,
    control: Tensor,
    slots: Tensor,
    segments: Segments,
    activation: str = "none",
    *,
    config: Config | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """``(gx, gw, gresidual)`` of ``gy``, contiguous ``(rows, size)``; ``None`` for what was not given."""
    gx, gw, _, gresidual = layer_norm_backward(
        grad, x, fixed, weight, None, residual, None, rstd, control, slots, segments, activation, config=config
    )
    return gx, gw, gresidual
