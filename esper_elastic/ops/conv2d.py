"""``conv2d``: schema in ``csrc/library.cpp``, kernels in ``csrc/conv2d.cpp``, meaning in :func:`reference.conv2d`."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._prims_common import suggest_memory_format

from ..errors import LayoutError
from . import reference
from .backend import LIBRARY_MISSING
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
    if input.dim() not in (3, 4):
        raise LayoutError(
            f"{widths.label}: input: expected (C, H, W) or (N, C, H, W), got {tuple(input.shape)}. Reshape it, or use another layer."
        )
    if input.shape[-3] != widths.size(1):
        raise widths.refuse("input channels", input.shape[-3], 1)
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
        width = None if widths.static else widths.axes[0].active
        output = torch.ops.esper_elastic.conv2d.default(
            batch, weight, bias, widths.control, widths.slots, stride, padding, dilation, grouped, width
        )
    return output if input.dim() == 4 else output.squeeze(0)


def _explicit(input: Tensor, padding: str, kernel: tuple[int, ...], dilation: tuple[int, ...]) -> tuple[Tensor, tuple[int, ...]]:
    """The paddings that a name stands for. Where ``"same"`` is uneven, the right side gets one more, which the input brings along."""
    if padding == "valid":
        return input, (0, 0)
    total = [d * (k - 1) for k, d in zip(kernel, dilation, strict=True)]
    if any(t % 2 for t in total):
        input = F.pad(input, (0, total[1] % 2, 0, total[0] % 2))
    return input, tuple(t // 2 for t in total)


if LIBRARY_MISSING is None:

    def _format(input: Tensor, weight: Tensor) -> torch.memory_format:
        wanted = torch.channels_last in (suggest_memory_format(input), suggest_memory_format(weight))
        return torch.channels_last if wanted and input.dtype != torch.float64 else torch.contiguous_format

    @torch.library.register_fake("esper_elastic::conv2d")
    def _(input, weight, bias, control, slots, stride, padding, dilation, grouped, width, dtype=None):  # type: ignore[no-untyped-def]
        sizes = [input.shape[0], weight.shape[0] if width is None else width]
        for size, kernel, s, p, d in zip(input.shape[2:], weight.shape[2:], stride, padding, dilation, strict=True):
            sizes.append((size + 2 * p - d * (kernel - 1) - 1) // s + 1)
        return torch.empty(sizes, dtype=input.dtype, device=input.device, memory_format=_format(input, weight))

    @torch.library.register_fake("esper_elastic::conv2d_backward")
    def _(grad, input, weight, control, slots, stride, padding, dilation, grouped, width, mask):  # type: ignore[no-untyped-def]
        return (
            torch.empty_like(input, memory_format=_format(input, weight)) if mask[0] else input.new_empty(0),
            torch.empty_like(weight, memory_format=suggest_memory_format(weight)) if mask[1] else weight.new_empty(0),
            weight.new_empty(weight.shape[0] if mask[2] else 0),
        )
