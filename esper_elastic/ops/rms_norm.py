"""``rms_norm``: schemas in ``csrc/library.cpp``, kernels in ``csrc/rms_norm.cpp``, meaning in :func:`reference.rms_norm`."""

from __future__ import annotations

import torch
from torch import Tensor

from . import reference
from .backend import LIBRARY_MISSING
from .layer_norm import require_sizes
from .widths import Widths


def rms_norm(input: Tensor, fixed_shape: tuple[int, ...], weight: Tensor | None, widths: Widths, eps: float | None) -> Tensor:
    """Each row's active units over the root of their mean square, times ``weight``.

    Args:
        input: ``(*, units, *fixed_shape)``, the active units in compact layout, all in static layout.
        fixed_shape: the normalised sizes behind the elastic one.
        weight: ``(capacity, *fixed_shape)`` or ``None``.
        widths: of the one axis of the units.
        eps: added to the mean square; ``None`` for the machine epsilon of the type that it is computed in.

    Shape:
        That of ``input``; zeros behind the active units in static layout.

    Raises:
        LayoutError: the normalised sizes of ``input`` are not those that the layer has now.
    """
    normalized_dims = require_sizes(input, fixed_shape, widths)
    backend = widths.serving(input, weight)
    if backend == "reference":
        return reference.rms_norm(input, fixed_shape, weight, widths, eps)
    if eps is None:
        eps = torch.finfo(_computed_in(input)).eps
    if backend == "triton":
        from . import triton

        return triton.rms_norm(input, fixed_shape, weight, widths, eps)
    result = torch.ops.esper_elastic.rms_norm.default(input, weight, widths.control, widths.slots, not widths.static, normalized_dims, eps)
    return result[0]


def _computed_in(input: Tensor) -> torch.dtype:
    return torch.promote_types(input.dtype, torch.float32)


if LIBRARY_MISSING is None:

    @torch.library.register_fake("esper_elastic::rms_norm")
    def _(input, weight, control, slots, compact, normalized_dims, eps):  # type: ignore[no-untyped-def]
        rows = [*input.shape[: input.dim() - normalized_dims], *[1] * normalized_dims]
        return input.new_empty(input.shape), input.new_empty(rows, dtype=_computed_in(input))

    @torch.library.register_fake("esper_elastic::rms_norm_backward")
    def _(grad, input, weight, rstd, control, slots, compact, normalized_dims, mask):  # type: ignore[no-untyped-def]
        return (
            input.new_empty(input.shape) if mask[0] else grad.new_empty(0),
            torch.empty_like(weight) if mask[1] else grad.new_empty(0),
        )
