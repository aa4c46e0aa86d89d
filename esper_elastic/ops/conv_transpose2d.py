"""``conv_transpose2d``: kernels in ``csrc/convolution.cpp``, meaning in :func:`reference.conv_transpose2d`."""

from __future__ import annotations

from torch import Tensor

from . import reference
from .convolution import native, require_image
from .widths import Widths


def conv_transpose2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    widths: Widths,
    stride: tuple[int, ...],
    padding: tuple[int, ...],
    output_padding: tuple[int, ...],
    dilation: tuple[int, ...],
    grouped: bool,
) -> Tensor:
    """``F.conv_transpose2d(input, weight[active], bias[active], ...)``.

    Args:
        input: ``(N, C, H, W)`` or ``(C, H, W)``: the active channels in compact layout, all in static layout.
        weight: ``(in capacity, out capacity, kh, kw)``, or ``(in capacity, out channels per group, kh, kw)`` if grouped.
        bias: ``(out capacity,)`` or ``None``.
        widths: of the channel axes ``(out, in)``.
        stride: per spatial axis.
        padding: per spatial axis; so much less comes out.
        output_padding: per spatial axis; so much more comes out, at its end.
        dilation: per spatial axis.
        grouped: whether the groups are what is elastic; as many are active as the output channels make.

    Shape:
        As of ``F.conv_transpose2d``; the channels are the active ones in compact layout, capacity with zeros behind in static layout.

    Raises:
        LayoutError: ``input`` is no image, or its channels are not those that the layer has now.
    """
    require_image(input, widths)
    backend = widths.serving(input, weight, bias, lacking="transposed convolutions")
    if backend == "reference" or weight.is_complex():
        return reference.conv_transpose2d(input, weight, bias, widths, stride, padding, output_padding, dilation, grouped)
    batch = input if input.dim() == 4 else input.unsqueeze(0)
    output = native(batch, weight, bias, widths, stride, padding, dilation, grouped, output_padding=output_padding)
    return output if input.dim() == 4 else output.squeeze(0)
