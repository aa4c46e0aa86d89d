"""What the convolutions share: the check of their input, and the compiled op of ``csrc/convolution.cpp`` with its fakes."""

from __future__ import annotations

from collections.abc import Sequence

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


def output_size(
    input: Sequence[int],
    weight: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    output_padding: Sequence[int] | None = None,
) -> list[int]:
    """The sizes behind the channels that a convolution gives of a batch and a weight of these shapes.

    It is a transposed one if there is an ``output_padding``.
    """
    reach = [gap * (kernel - 1) + 1 for gap, kernel in zip(dilation, weight[2:], strict=True)]
    if output_padding is None:
        return [(n + 2 * p - r) // s + 1 for n, s, p, r in zip(input[2:], stride, padding, reach, strict=True)]
    return [(n - 1) * s - 2 * p + r + e for n, s, p, r, e in zip(input[2:], stride, padding, reach, output_padding, strict=True)]


if LIBRARY_MISSING is None:

    def _format(input: Tensor, weight: Tensor, transposed: bool) -> torch.memory_format:
        wanted = torch.channels_last in (suggest_memory_format(input), suggest_memory_format(weight))
        return torch.channels_last if wanted and (transposed or input.dtype != torch.float64) else torch.contiguous_format

    @torch.library.register_fake("esper_elastic::convolution")
    def _(  # type: ignore[no-untyped-def]
        input, weight, bias, control, slots, stride, padding, dilation, transposed, output_padding, grouped, channels, compact, dtype=None
    ):
        size = output_size(input.shape, weight.shape, stride, padding, dilation, output_padding if transposed else None)
        sizes = (input.shape[0], channels, *size)
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
