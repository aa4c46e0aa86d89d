"""``clip_grad_norm_``: torch's, over active gradients alone."""

from __future__ import annotations

import functools
import itertools
import math
from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import get_total_norm
from torch.utils.weak import WeakTensorKeyDictionary

from ..control import ControlBlock
from ..layers import registry
from ..ops import optimizer as kernels
from .base import block_of, join_plain


@torch.no_grad()
def clip_grad_norm_(
    parameters: Tensor | Iterable[Tensor],
    max_norm: float,
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
    foreach: bool | None = None,
) -> Tensor:
    """``torch.nn.utils.clip_grad_norm_`` for elastic parameters: scale the active gradients, as one vector, down to ``max_norm``.

    Args:
        parameters: whose gradients are clipped; each counts once.
        max_norm: the largest norm that stays as it is.
        norm_type: the order of the norm, ``float("inf")`` for the largest magnitude.
        error_if_nonfinite: raise if the norm is not finite. This waits for the device.
        foreach: as in torch, for gradients that Triton's kernels do not serve.

    Returns:
        The norm before clipping.

    Effects: writes active gradients in place; dormant ones, and those under a switch that is off, are neither read nor written. On a GPU
    nothing waits for the device unless ``error_if_nonfinite``; a CUDA graph that captured the call follows widths and switches where the
    order is 1, 2 or infinity.

    Raises:
        RuntimeError: the norm is not finite and ``error_if_nonfinite`` holds; nothing has changed.
    """
    norm_type = float(norm_type)
    views: list[Tensor] = []
    resident: defaultdict[torch.device, defaultdict[tuple[Any, ...], list[tuple[kernels.Pieces, Tensor]]]]
    resident = defaultdict(lambda: defaultdict(list))
    dtypes = set()
    for param in {id(p): p for p in ([parameters] if isinstance(parameters, Tensor) else parameters)}.values():
        grad = param.grad
        if grad is None:
            continue
        dtypes.add(grad.dtype)
        pieces = _pieces(param, grad) if norm_type in (1, 2, math.inf) else None
        if pieces is None:
            views += _active_views(param, grad)
        else:
            resident[grad.device][grad.dtype, block_of(registry.lookup(param))].append((pieces, grad))

    batches = [[_gradients(members, *key) for key, members in join_plain(here).items()] for here in resident.values()]
    clips = [kernels.gradient_norm(here, max_norm, norm_type) for here in batches]
    norms = [norm for norm, _, _ in clips]
    if views or not clips:
        norms.append(get_total_norm(views, norm_type, foreach=foreach))
    total = norms[0]
    if len(norms) > 1:
        total = torch.linalg.vector_norm(torch.stack([norm.to(total.device) for norm in norms]), norm_type)
    if error_if_nonfinite and not total.isfinite():
        raise RuntimeError(
            f"clip_grad_norm_: the total norm of order {norm_type} of the active gradients is non-finite ({total.item()}), so it cannot be "
            "clipped. Pass error_if_nonfinite=False to scale by it all the same."
        )
    if views or len(norms) > 1:
        common = torch.clamp(max_norm / (total + 1e-6), max=1.0)
        clips = [(norm, common.to(norm), tiles) for norm, _, tiles in clips]
        for view in views:
            view.mul_(common.to(view.device))
    for here, (_, factor, tiles) in zip(batches, clips, strict=True):
        for grads, active in zip(here, tiles, strict=True):
            kernels.scale(grads, active, factor)
    return total.to(functools.reduce(torch.promote_types, dtypes)) if clips else total


def _active_views(param: Tensor, grad: Tensor) -> list[Tensor]:
    """The active part of ``grad``, the gradient itself if that is all of it."""
    known = registry.lookup(param)
    if known is None:
        return [grad]
    if known.asleep:
        return []
    runs = known.runs(param.shape)
    if all(run == [(0, size)] for run, size in zip(runs, param.shape, strict=True)):
        return [grad]
    return [grad[tuple(slice(start, start + length) for start, length in corner)] for corner in itertools.product(*runs)]


_known: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def _pieces(param: Tensor, grad: Tensor) -> kernels.Pieces | None:
    """The rectangles of ``grad`` for Triton's kernels, ``None`` where they do not serve; looked up until an axis or a switch changes."""
    if not kernels.triton_steps(grad.device) or grad.layout != torch.strided:
        return None
    state = registry.revision(), grad.dtype, grad.stride()
    kept: tuple[Any, kernels.Pieces | None] | None = _known.get(param)
    if kept is None or kept[0] != state:
        known = registry.lookup(param)
        axes, switches = ((None,) * grad.dim(), ()) if known is None else (known.axes, known.switches)
        kept = _known[param] = state, kernels.pieces_of(grad, axes, switches)
    return kept[1]


def _gradients(members: list[tuple[kernels.Pieces, Tensor]], dtype: torch.dtype, block: ControlBlock | None) -> Any:
    """Gradients of one type, device and control block, as kernels know them."""
    pieces, grads = zip(*members, strict=True)
    batch = _batch(pieces, sum(grad.numel() for grad in grads), grads[0].device, dtype)
    return batch.gradients(block, [grad.data_ptr() for grad in grads])


_batch = functools.lru_cache(maxsize=16)(kernels.Batch)
