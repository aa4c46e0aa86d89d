"""``group_norm``: meaning in :func:`reference.group_norm`."""

from __future__ import annotations

from torch import Tensor

from ..errors import LayoutError
from . import reference
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
    return reference.group_norm(input, group_width, weight, bias, widths, eps)
