"""``conv2d``: kernels in ``csrc/convolution.cpp`` and ``triton_kernels/conv2d.py``, meaning in :func:`reference.conv2d`."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from . import reference
from .convolution import native, require_image
from .widths import Widths


def conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    widths: Widths,
    stride: tuple[int, ...],
    padding: str | tuple[int, ...],
    dilation: tuple[int, ...],
    grouped: bool,
) -> Tensor:
    """``F.conv2d(input, weight[active], bias[active], ...)``.

    Args:
        input: ``(N, C, H, W)`` or ``(C, H, W)``: the active channels in compact layout, all in static layout.
        weight: ``(out capacity, in capacity, kh, kw)``, or ``(out capacity, in channels per group, kh, kw)`` if grouped.
        bias: ``(out capacity,)`` or ``None``.
        widths: of the channel axes ``(out, in)``.
        stride: per spatial axis.
        padding: per spatial axis, ``"same"`` or ``"valid"``.
        dilation: per spatial axis.
        grouped: whether the groups are what is elastic; as many are active as the input channels make.

    Shape:
        As of ``F.conv2d``; the channels are the active ones in compact layout, capacity with zeros behind in static layout.

    Raises:
        LayoutError: ``input`` is no image, or its channels are not those that the layer has now.
    """
    require_image(input, widths)
    backend = widths.serving(input, weight, bias)
    if backend == "reference" or weight.is_complex():
        return reference.conv2d(input, weight, bias, widths, stride, padding, dilation, grouped)
    if isinstance(padding, str):
        input, padding = _explicit(input, padding, weight.shape[2:], dilation)
    batch = input if input.dim() == 4 else input.unsqueeze(0)
    if backend == "triton":
        from . import triton

        output = triton.conv2d(batch, weight, bias, widths, stride, padding, dilation, grouped)
    else:
        output = native(batch, weight, bias, widths, stride, padding, dilation, grouped)
    return output if input.dim() == 4 else output.squeeze(0)


def _explicit(input: Tensor, padding: str, kernel: tuple[int, ...], dilation: tuple[int, ...]) -> tuple[Tensor, tuple[int, ...]]:
    """The paddings that a name stands for. Where ``"same"`` is uneven, the right side gets one more, which the input brings along."""
    if padding == "valid":
        return input, (0, 0)
    total = [d * (k - 1) for k, d in zip(kernel, dilation, strict=True)]
    if any(t % 2 for t in total):
        input = F.pad(input, (0, total[1] % 2, 0, total[0] % 2))
    return input, tuple(t // 2 for t in total)
