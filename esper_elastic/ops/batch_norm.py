"""``batch_norm``: schemas in ``csrc/library.cpp``, kernels in ``csrc/batch_norm.cpp``, meaning in :func:`reference.batch_norm`."""

from __future__ import annotations

import torch
from torch import Tensor
from torch._prims_common import suggest_memory_format

from . import reference
from .backend import LIBRARY_MISSING
from .widths import Widths


def batch_norm(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    widths: Widths,
    training: bool,
    momentum: float | None,
    eps: float,
) -> Tensor:
    """Each active feature less its mean, over its deviation, times ``weight`` plus ``bias``.

    Args:
        input: ``(N, C, *)``, the active features in compact layout, all in static layout.
        weight: ``(capacity,)`` or ``None``.
        bias: ``(capacity,)`` or ``None``.
        running_mean: ``(capacity,)``; in training ``None`` if it is not kept.
        running_var: as ``running_mean``.
        num_batches_tracked: scalar that training counts up, or ``None``.
        widths: of the one axis of the features.
        training: whether mean and variance are those of the batch.
        momentum: share of the batch in the running statistics; ``None`` for their plain mean over all batches, by the count.
        eps: added to the variance.

    Shape:
        That of ``input``, with its memory format; zeros behind the active features in static layout.

    Effects:
        In training, writes the active slice of the running statistics and the count; nothing while a switch above a static layer is off.

    Raises:
        LayoutError: the second size of ``input`` is not the one that the layer has now.
        ValueError: training on one value per feature, or with an ``eps`` that leaves a division by zero.
    """
    if input.shape[1] != widths.size(0):
        raise widths.refuse("input features", input.shape[1], 0)
    if training and input.numel() == input.shape[1]:
        raise ValueError(f"{widths.label}: training: expected more than one value per feature, got input of shape {tuple(input.shape)}.")
    if eps < 0.0 or (training and eps == 0.0):
        raise ValueError(f"{widths.label}: eps: expected a positive number, or zero in eval mode, got {eps}.")
    if num_batches_tracked is None and momentum is None:
        momentum = 0.0
    backend = widths.serving(input, weight, bias, running_mean, running_var)
    if backend == "triton":
        from . import triton

        return triton.batch_norm(input, weight, bias, running_mean, running_var, num_batches_tracked, widths, training, momentum, eps)
    if backend != "native":
        return reference.batch_norm(input, weight, bias, running_mean, running_var, num_batches_tracked, widths, training, momentum, eps)
    control, slots, compact = widths.control, widths.slots, not widths.static
    if training:
        result = torch.ops.esper_elastic.batch_norm.default(
            input, weight, bias, running_mean, running_var, num_batches_tracked, control, slots, compact, momentum, eps
        )
        return result[0]
    return torch.ops.esper_elastic.batch_norm_eval.default(input, weight, bias, running_mean, running_var, control, slots, compact, eps)


if LIBRARY_MISSING is None:

    @torch.library.register_fake("esper_elastic::batch_norm")
    def _(input, weight, bias, mean, var, batches, control, slots, compact, momentum, eps):  # type: ignore[no-untyped-def]
        output = torch.empty_like(input, memory_format=suggest_memory_format(input))
        dtype = statistics_type(input, weight, mean)
        return output, input.new_empty(input.shape[1], dtype=dtype), input.new_empty(input.shape[1], dtype=dtype)

    @torch.library.register_fake("esper_elastic::batch_norm_eval")
    def _(input, weight, bias, mean, var, control, slots, compact, eps):  # type: ignore[no-untyped-def]
        return torch.empty_like(input, memory_format=suggest_memory_format(input))

    @torch.library.register_fake("esper_elastic::batch_norm_backward")
    def _(grad, input, weight, bias, mean, spread, control, slots, compact, training, eps, mask):  # type: ignore[no-untyped-def]
        return (
            torch.empty_like(input, memory_format=suggest_memory_format(input)) if mask[0] else grad.new_empty(0),
            torch.empty_like(weight) if mask[1] else grad.new_empty(0),
            torch.empty_like(bias) if mask[2] else grad.new_empty(0),
        )


def statistics_type(input: Tensor, *parameters: Tensor | None) -> torch.dtype:
    """The type in which ATen saves statistics of a batch or a row for backward."""
    if input.device.type != "cpu":
        return torch.float32 if input.dtype in (torch.float16, torch.bfloat16) else input.dtype
    return next((parameter.dtype for parameter in parameters if parameter is not None), input.dtype)
