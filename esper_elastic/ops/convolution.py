"""What the convolutions share: the check of their input, and the compiled op of ``csrc/convolution.cpp`` with its fakes."""

from __future__ import annotations

import torch
from torch import Tensor
from torch._prims_common import suggest_memory_format

from ..errors import LayoutError
from .backend import LIBRARY_MISSING
from .widths import Widths


def require_image(input: Tensor, widths: Widths) -> None:
    """Refuse what is no image, or has other channels than the layer has now.

    Raises:
        LayoutError: it is so.
    """
    if input.dim() not in (3, 4):
        raise LayoutError(
            f"{widths.label}: input: expected (C, H, W) or (N, C, H, W), got {tuple(input.shape)}. Reshape it, or use another layer."
        )
    if input.shape[-3] != widths.size(1):
        raise widths.refuse("input channels", input.shape[-3], 1)


def native(
    batch: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    widths: Widths,
    stride: tuple[int, ...],
    padding: tuple[int, ...],
    dilation: tuple[int, ...],
    grouped: bool,
    *,
    output_padding: tuple[int, ...] | None = None,
) -> Tensor:
    """The compiled op, of a batch of images; transposed if there is an ``output_padding``."""
    geometry = stride, padding, dilation, output_padding is not None, output_padding or (0, 0), grouped
    where = widths.control, widths.slots
    return torch.ops.esper_elastic.convolution.default(batch, weight, bias, *where, *geometry, widths.size(0), not widths.static)


if LIBRARY_MISSING is None:

    def _format(input: Tensor, weight: Tensor, transposed: bool) -> torch.memory_format:
        wanted = torch.channels_last in (suggest_memory_format(input), suggest_memory_format(weight))
        return torch.channels_last if wanted and (transposed or input.dtype != torch.float64) else torch.contiguous_format

    @torch.library.register_fake("esper_elastic::convolution")
    def _(  # type: ignore[no-untyped-def]
        input, weight, bias, control, slots, stride, padding, dilation, transposed, output_padding, grouped, channels, compact, dtype=None
    ):
        sizes = [input.shape[0], channels]
        for axis in (0, 1):
            size, s, p, extra = input.shape[2 + axis], stride[axis], padding[axis], output_padding[axis]
            reach = dilation[axis] * (weight.shape[2 + axis] - 1) + 1
            sizes.append((size - 1) * s - 2 * p + reach + extra if transposed else (size + 2 * p - reach) // s + 1)
        return torch.empty(sizes, dtype=input.dtype, device=input.device, memory_format=_format(input, weight, transposed))

    @torch.library.register_fake("esper_elastic::convolution_backward")
    def _(  # type: ignore[no-untyped-def]
        grad, input, weight, bias_size, control, slots, stride, padding, dilation, transposed, output_padding, grouped, compact, mask
    ):
        return (
            torch.empty_like(input, memory_format=_format(input, weight, transposed)) if mask[0] else input.new_empty(0),
            torch.empty_like(weight, memory_format=suggest_memory_format(weight)) if mask[1] else weight.new_empty(0),
            weight.new_empty(bias_size if mask[2] else 0),
        )
