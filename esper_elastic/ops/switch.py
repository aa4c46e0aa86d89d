"""``switch``: which of two activations leaves a block in static layout, by its switch in the control block."""

from __future__ import annotations

import torch
from torch import Tensor


def switch(branch: Tensor, otherwise: Tensor | None, control: Tensor, slot: Tensor, backend: str) -> Tensor:
    """``branch`` while the switch is on, ``otherwise`` or zeros while it is off; decided where the tensors are.

    Args:
        branch: what the block computed; of any content while it is off.
        otherwise: of the same shape, or ``None`` for zeros.
        control: the control tensor on the device of ``branch``.
        slot: int32, one element: the slot of the switch.
        backend: what :func:`~esper_elastic.ops.backend.choose` said; plain ops serve where it is not ``"triton"``.
    """
    alike = otherwise is None or (otherwise.shape == branch.shape and otherwise.dtype == branch.dtype)
    if alike and backend == "triton":
        from . import triton

        return triton.switch(branch, otherwise, control, slot)
    return torch.where(control.index_select(0, slot) != 0, branch, 0 if otherwise is None else otherwise)
