"""``embedding``: meaning in :func:`reference.embedding`."""

from __future__ import annotations

from torch import Tensor

from . import reference
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
    return reference.embedding(indices, weight, widths, padding_idx, max_norm, norm_type, scale_grad_by_freq)
