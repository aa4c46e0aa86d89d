"""``linear``: schema in ``csrc/library.cpp``, kernels in ``csrc/linear.cpp``, meaning in :func:`reference.linear`."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import LayoutError
from . import reference
from .backend import LIBRARY, LIBRARY_MISSING
from .widths import Widths


def linear(input: Tensor, weight: Tensor, bias: Tensor | None, widths: Widths) -> Tensor:
    """``input @ weight[active].T + bias[active]``.

    Args:
        input: ``(*, in)``, the active columns in compact layout, all in static layout.
        weight: ``(out capacity, in capacity)``.
        bias: ``(out capacity,)`` or ``None``.
        widths: of the axes ``(out, in)``.

    Shape:
        ``(*, out)``: active in compact layout, capacity with zeros behind in static layout.

    Raises:
        LayoutError: the last size of ``input`` is not the one that the layer has now.
    """
    rows, columns = widths.axes
    width = None if widths.static else rows.active
    expected = columns.capacity if width is None else columns.active
    shape = input.shape
    if not shape:
        raise LayoutError(f"{widths.label}: input: expected at least one axis, the features, got a single number. Unsqueeze it.")
    if shape[-1] != expected:
        raise widths.refuse("input features", shape[-1], 1)
    backend = widths.serving(input, weight, bias)
    if backend == "triton":
        from . import triton

        return triton.linear(input, weight, bias, widths)
    if backend != "native":
        return reference.linear(input, weight, bias, widths)
    if type(input) is Tensor and not torch.compiler.is_compiling():
        return LIBRARY.linear(input, weight, bias, widths.control, widths.slots, width)
    return torch.ops.esper_elastic.linear.default(input, weight, bias, widths.control, widths.slots, width)


if LIBRARY_MISSING is None:

    @torch.library.register_fake("esper_elastic::linear")
    def _(input, weight, bias, control, slots, width, dtype=None):  # type: ignore[no-untyped-def]
        return input.new_empty((*input.shape[:-1], weight.shape[0] if width is None else width))

    @torch.library.register_fake("esper_elastic::linear_grad_input")
    def _(grad, weight, control, slots, width, in_width):  # type: ignore[no-untyped-def]
        return grad.new_empty((*grad.shape[:-1], in_width))

    @torch.library.register_fake("esper_elastic::linear_grad_weight")
    def _(grad, input, weight, control, slots, width):  # type: ignore[no-untyped-def]
        return torch.empty_like(weight, memory_format=torch.contiguous_format)

    @torch.library.register_fake("esper_elastic::linear_grad_bias")
    def _(grad, bias, control, slots, width):  # type: ignore[no-untyped-def]
        return torch.empty_like(bias)
