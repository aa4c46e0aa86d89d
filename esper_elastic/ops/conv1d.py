"""``conv1d``: that of an image one pixel high, so whatever serves :func:`conv2d` serves it; meaning in :func:`reference.conv2d`."""

from __future__ import annotations

from torch import Tensor

from ..errors import LayoutError
from .conv2d import conv2d
from .widths import Widths


def conv1d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    widths: Widths,
    stride: tuple[int, ...],
    padding: str | tuple[int, ...],
    dilation: tuple[int, ...],
    grouped: bool,
) -> Tensor:
    """``F.conv1d(input, weight[active], bias[active], ...)``.

    Args:
        input: ``(N, C, L)`` or ``(C, L)``: the active channels in compact layout, all in static layout.
        weight: ``(out capacity, in capacity, k)``, or ``(out capacity, in channels per group, k)`` if grouped.
        bias: ``(out capacity,)`` or ``None``.
        widths: of the channel axes ``(out, in)``.
        stride: of the kernel, a tuple of one.
        padding: a tuple of one, ``"same"`` or ``"valid"``.
        dilation: of the kernel, a tuple of one.
        grouped: whether the groups are what is elastic; as many are active as the input channels make.

    Shape:
        As of ``F.conv1d``; the channels are the active ones in compact layout, capacity with zeros behind in static layout.

    Raises:
        LayoutError: ``input`` is no sequence of channels, or its channels are not those that the layer has now.
    """
    if input.dim() not in (2, 3):
        raise LayoutError(
            f"{widths.label}: input: expected (C, L) or (N, C, L), got {tuple(input.shape)}. Reshape it, or use another layer."
        )
    if widths.backend != "triton":  # whose kernels want channels last
        input = input.contiguous()  # as F.conv1d does: a permuted sequence would pass for an image in channels_last
    sides = padding if isinstance(padding, str) else (0, *padding)
    geometry = (1, *stride), sides, (1, *dilation)
    return conv2d(input.unsqueeze(-2), weight.unsqueeze(-2), bias, widths, *geometry, grouped).squeeze(-2)
