"""``layer_norm``: schemas in ``csrc/library.cpp``, kernels in ``csrc/layer_norm.cpp``, meaning in :func:`reference.layer_norm`."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import LayoutError
from . import reference
from .backend import LIBRARY_MISSING
from .batch_norm import statistics_type
from .widths import Widths


def layer_norm(
    input: Tensor, fixed_shape: tuple[int, ...], weight: Tensor | None, bias: Tensor | None, widths: Widths, eps: float
) -> Tensor:
    """Each row's active units less their mean, over their deviation, times ``weight`` plus ``bias``.

    Args:
        input: ``(*, units, *fixed_shape)``, the active units in compact layout, all in static layout.
        fixed_shape: the normalised sizes behind the elastic one.
        weight: ``(capacity, *fixed_shape)`` or ``None``.
        bias: as ``weight``.
        widths: of the one axis of the units.
        eps: added to the variance.

    Shape:
        That of ``input``; zeros behind the active units in static layout.

    Raises:
        LayoutError: the normalised sizes of ``input`` are not those that the layer has now.
    """
    normalized_dims = require_sizes(input, fixed_shape, widths)
    backend = widths.serving(input, weight, bias)
    if backend == "triton":
        from . import triton

        return triton.layer_norm(input, fixed_shape, weight, bias, widths, eps)
    if backend != "native":
        return reference.layer_norm(input, fixed_shape, weight, bias, widths, eps)
    result = torch.ops.esper_elastic.layer_norm.default(
        input, weight, bias, widths.control, widths.slots, not widths.static, normalized_dims, eps
    )
    return result[0]


def require_sizes(input: Tensor, fixed_shape: tuple[int, ...], widths: Widths) -> int:
    """How many sizes a norm runs over, if the last ones of ``input`` are those.

    Raises:
        LayoutError: they are not.
    """
    normalized_dims = 1 + len(fixed_shape)
    if input.dim() < normalized_dims or tuple(input.shape[input.dim() - len(fixed_shape) :]) != fixed_shape:
        expected = ", ".join(str(size) for size in ("*", widths.size(0), *fixed_shape))
        raise LayoutError(f"{widths.label}: input: expected shape ({expected}), got {tuple(input.shape)}.")
    if input.shape[-normalized_dims] != widths.size(0):
        raise widths.refuse("input units", input.shape[-normalized_dims], 0)
    return normalized_dims


if LIBRARY_MISSING is None:

    @torch.library.register_fake("esper_elastic::layer_norm")
    def _(input, weight, bias, control, slots, compact, normalized_dims, eps):  # type: ignore[no-untyped-def]
        rows = [*input.shape[: input.dim() - normalized_dims], *[1] * normalized_dims]
        dtype = statistics_type(input, weight, bias)
        return input.new_empty(input.shape), input.new_empty(rows, dtype=dtype), input.new_empty(rows, dtype=dtype)

    @torch.library.register_fake("esper_elastic::layer_norm_backward")
    def _(grad, input, weight, bias, mean, rstd, control, slots, compact, normalized_dims, mask):  # type: ignore[no-untyped-def]
        return (
            input.new_empty(input.shape) if mask[0] else grad.new_empty(0),
            torch.empty_like(weight) if mask[1] else grad.new_empty(0),
            torch.empty_like(bias) if mask[2] else grad.new_empty(0),
        )
