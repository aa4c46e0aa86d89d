"""``SGD`` on active elements, with momentum."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim.sgd import sgd

from ..errors import OptimizerError
from ..ops.optimizer import Batch
from .base import ElasticOptimizer, at_least


class SGD(ElasticOptimizer):
    """``torch.optim.SGD`` for elastic parameters: it acts on what is active and finds that out by itself.

    Momentum begins with an element's own first gradient, which dampening does not touch. Without momentum there is no state.

    Args:
        params: parameters, named parameters or groups.
        lr: learning rate, a number or a tensor of one element.
        momentum: factor.
        dampening: of the gradients that enter the momentum.
        weight_decay: added to the gradient.
        nesterov: look ahead; needs momentum and no dampening.
        maximize: ascend.

    Raises:
        OptimizerError: a hyperparameter is out of its range.
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        momentum: float = 0,
        dampening: float = 0,
        weight_decay: float = 0,
        nesterov: bool = False,
        *,
        maximize: bool = False,
    ) -> None:
        at_least("SGD", "lr", lr, 0)
        at_least("SGD", "momentum", momentum, 0)
        at_least("SGD", "weight_decay", weight_decay, 0)
        if nesterov and (momentum <= 0 or dampening != 0):
            raise OptimizerError(
                f"SGD: nesterov: expected momentum above 0 and dampening 0, got {momentum!r} and {dampening!r}. Set both, or drop nesterov."
            )
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "dampening": dampening,
            "weight_decay": weight_decay,
            "nesterov": nesterov,
            "maximize": maximize,
        }
        super().__init__(params, defaults)

    def _names(self, group: dict[str, Any]) -> tuple[str, ...]:
        return ("momentum_buffer",) if group["momentum"] != 0 else ()

    def _count_dtype(self, group: dict[str, Any]) -> torch.dtype | None:
        # only whether an update is the first makes a difference, and without dampening not even that: a buffer of zeros does the same
        return torch.int16 if group["momentum"] != 0 and group["dampening"] != 0 else None

    def _step_kernels(self, group: dict[str, Any], batch: Batch, grads: Any, tensors: list[int], count_dtype: torch.dtype | None) -> None:
        options = {name: group[name] for name in ("lr", "momentum", "dampening", "weight_decay", "nesterov", "maximize")}
        batch.sgd(grads, tensors, count_dtype, **options)

    def _step_native(self, group: dict[str, Any], operands: list[list[Tensor]], counts: list[Tensor], plans: list[Tensor]) -> None:
        params, grads, *buffers = operands
        torch.ops.esper_elastic.sgd_.default(
            params,
            grads,
            buffers[0] if buffers else [],
            counts,
            plans,
            float(group["lr"]),
            group["momentum"],
            group["dampening"],
            group["weight_decay"],
            group["nesterov"],
            group["maximize"],
        )

    def _step_views(self, group: dict[str, Any], operands: list[list[Tensor]], counts: list[int]) -> None:
        params, grads, *buffers = operands
        kept = buffers[0] if buffers else [None] * len(params)
        given = [buffer if count else None for buffer, count in zip(kept, counts, strict=True)]
        sgd(
            params,
            grads,
            given,
            has_sparse_grad=False,
            weight_decay=group["weight_decay"],
            momentum=group["momentum"],
            lr=group["lr"],
            dampening=group["dampening"],
            nesterov=group["nesterov"],
            maximize=group["maximize"],
        )
        for buffer, made, count in zip(kept, given, counts, strict=True):
            if buffer is not None and made is not None and not count:
                buffer.copy_(made)
