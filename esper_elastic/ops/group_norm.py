"""``group_norm``: schemas in ``csrc/library.cpp``, kernels in ``csrc/group_norm.cpp``, meaning in :func:`reference.group_norm`."""

from __future__ import annotations

import torch
from torch import Tensor
from torch._prims_common import suggest_memory_format

from ..errors import LayoutError
from . import reference
from .backend import LIBRARY_MISSING
from .widths import Widths


def group_norm(input: Tensor, group_width: int | None, weight: Tensor | None, bias: Tensor | None, widths: Widths, eps: float) -> Tensor:
    """Each active channel less the mean of its group in an image, over their deviation, times ``weight`` plus ``bias``.

    Args:
        input: ``(N, C, *)``, the active channels in compact layout, all in static layout.
        group_width: the channels of a group; ``None`` for one group of all active channels.
        weight: ``(capacity,)`` or ``None``.
        bias: ``(capacity,)`` or ``None``.
        widths: of the one axis of the channels.
        eps: added to the variance.

    Shape:
        That of ``input``, with its memory format; zeros behind the active channels in static layout.

    Raises:
        LayoutError: the second size of ``input`` is not the one that the layer has now.
        ValueError: all of the input is one value per group.
    """
    if input.dim() < 2:
        raise LayoutError(f"{widths.label}: input: expected shape (N, {widths.size(0)}, *), got {tuple(input.shape)}.")
    if input.shape[1] != widths.size(0):
        raise widths.refuse("input channels", input.shape[1], 0)
    if input.numel() == input.shape[1] and (widths.axes[0].active if group_width is None else group_width) == 1:
        raise ValueError(f"{widths.label}: expected more than one value per group, got input of shape {tuple(input.shape)}.")
    backend = widths.serving(input, weight, bias)
    if backend == "triton":
        from . import triton

        return triton.group_norm(input, group_width, weight, bias, widths, eps)
    if backend != "native":
        return reference.group_norm(input, group_width, weight, bias, widths, eps)
    result = torch.ops.esper_elastic.group_norm.default(
        input, weight, bias, widths.control, widths.slots, not widths.static, group_width or 0, eps
    )
    return result[0]


if LIBRARY_MISSING is None:

    def _dense_like(input: Tensor) -> Tensor:
        return torch.empty_like(
            input, memory_format=torch.contiguous_format if input.device.type == "cuda" else suggest_memory_format(input)
        )

    @torch.library.register_fake("esper_elastic::group_norm")
    def _(input, weight, bias, control, slots, compact, group_width, eps):  # type: ignore[no-untyped-def]
        groups = input.shape[1] // group_width if group_width else 1
        mean = input.new_empty((input.shape[0], groups), dtype=input.dtype if weight is None else weight.dtype)
        return _dense_like(input), mean, torch.empty_like(mean)

    @torch.library.register_fake("esper_elastic::group_norm_backward")
    def _(grad, input, weight, bias, mean, rstd, control, slots, compact, group_width, mask):  # type: ignore[no-untyped-def]
        return (
            _dense_like(input) if mask[0] else grad.new_empty(0),
            torch.empty_like(weight) if mask[1] else grad.new_empty(0),
            torch.empty_like(bias) if mask[2] else grad.new_empty(0),
        )
