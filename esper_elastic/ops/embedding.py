"""``embedding``: schemas in ``csrc/library.cpp``, kernels in ``csrc/embedding.cpp``, meaning in :func:`reference.embedding`."""

from __future__ import annotations

import torch
from torch import Tensor

from . import reference
from .backend import LIBRARY_MISSING
from .widths import Widths


def embedding(
    indices: Tensor,
    weight: Tensor,
    widths: Widths,
    padding_idx: int | None,
    max_norm: float | None,
    norm_type: float,
    scale_grad_by_freq: bool,
) -> Tensor:
    """The rows of ``weight`` that ``indices`` name.

    Args:
        indices: of any shape, each below the number of active rows.
        weight: ``(capacity of the indices, capacity of the vectors)``.
        widths: of the axes ``(vectors, indices)``.
        padding_idx: the row without a gradient, or ``None``.
        max_norm: what the norm of the active part of a row looked up is brought down to, or ``None``.
        norm_type: of ``max_norm``.
        scale_grad_by_freq: whether a row's gradient is divided by how often it was looked up.

    Shape:
        ``(*indices, vectors)``: active in compact layout, capacity with zeros behind in static layout.

    Effects:
        With ``max_norm``, writes the active part of the rows looked up; nothing while a switch above a static layer is off.

    Raises:
        IndexError: an index is negative, or names a row that is not active.
    """
    backend = widths.serving(weight)
    if backend == "triton":
        from . import triton

        return triton.embedding(indices, weight, widths, padding_idx, max_norm, norm_type, scale_grad_by_freq)
    if backend != "native":
        return reference.embedding(indices, weight, widths, padding_idx, max_norm, norm_type, scale_grad_by_freq)
    ops, control, slots = torch.ops.esper_elastic, widths.control, widths.slots
    if max_norm is not None:
        with torch.no_grad():
            ops.embedding_renorm_.default(weight, indices, control, slots, not widths.static, max_norm, norm_type)
    width = None if widths.static else widths.axes[0].active
    return ops.embedding.default(weight, indices, control, slots, -1 if padding_idx is None else padding_idx, scale_grad_by_freq, width)


if LIBRARY_MISSING is None:

    @torch.library.register_fake("esper_elastic::embedding")
    def _(weight, indices, control, slots, padding_idx, scale_grad_by_freq, width):  # type: ignore[no-untyped-def]
        return weight.new_empty((*indices.shape, weight.shape[1] if width is None else width))

    @torch.library.register_fake("esper_elastic::embedding_backward")
    def _(grad, weight, indices, control, slots, padding_idx, scale_grad_by_freq, compact):  # type: ignore[no-untyped-def]
        return torch.empty_like(weight, memory_format=torch.contiguous_format)

    @torch.library.register_fake("esper_elastic::embedding_renorm_")
    def _(weight, indices, control, slots, compact, max_norm, norm_type):  # type: ignore[no-untyped-def]
        return None
