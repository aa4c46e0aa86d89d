"""``embedding`` in static layout, by ops of torch: to look rows up takes no kernel of ours, as long as widths are read on the device."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..reference import fence, fence_operands
from ..widths import Widths
from .common import active, launching, switched_on


def embedding(
    indices: Tensor,
    weight: Tensor,
    widths: Widths,
    padding_idx: int | None,
    max_norm: float | None,
    norm_type: float,
    scale_grad_by_freq: bool,
) -> Tensor:
    """See :func:`esper_elastic.ops.embedding.embedding`. The index of a dormant row is treated as one beyond the weight: on CUDA, too."""
    inside, limit = _active(widths.control, widths.slots, widths.segments, weight.shape[1])
    rows = torch.where(indices < limit, indices, weight.shape[0])
    if max_norm is not None:
        _renormalise(rows.reshape(-1), weight.detach(), inside, max_norm, norm_type)
    (w,) = fence_operands(widths, weight)
    found = F.embedding(rows, w, padding_idx, scale_grad_by_freq=scale_grad_by_freq)
    return fence(torch.where(inside, found, 0), widths.control, widths.label)


@torch.library.custom_op("esper_elastic::triton_embedding_active", mutates_args=())
def _active(control: Tensor, slots: Tensor, segments: list[int], size: int) -> tuple[Tensor, Tensor]:
    """Which of ``size`` columns are active, none while a switch above is off; and how many rows are."""
    vectors, _, switches, _ = segments
    with launching(control):
        inside = active(control, slots, 0, vectors, size) & switched_on(control, slots, switches)
        rows = slots[vectors : vectors + 1]
        return inside, (control[rows[:, 1]] * rows[:, 3]).squeeze(0)


@_active.register_fake
def _(control: Tensor, slots: Tensor, segments: list[int], size: int) -> tuple[Tensor, Tensor]:
    return control.new_empty(size, dtype=torch.bool), control.new_empty(())


@torch.no_grad()
def _renormalise(rows: Tensor, weight: Tensor, inside: Tensor, max_norm: float, norm_type: float) -> None:
    """Shorten the active part of ``rows`` in place. One that is looked up twice is written twice, with the same numbers."""
    found = weight.index_select(0, rows)
    part = torch.where(inside, found, 0)
    norms = torch.linalg.vector_norm(part, norm_type, dim=1, keepdim=True)
    scale = torch.where(norms > max_norm, max_norm / (norms + 1e-7), 1)  # as torch.embedding_renorm_ does
    weight.index_copy_(0, rows, torch.where(inside, part * scale, found))
