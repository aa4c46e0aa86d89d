"""``AdamW`` on active elements, each with a bias correction of its own."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from ..ops.optimizer import Batch
from .base import ElasticOptimizer, at_least


class AdamW(ElasticOptimizer):
    """``torch.optim.AdamW`` for elastic parameters: it acts on what is active and finds that out by itself.

    A step count belongs to an element: how often it was updated. So the first step of a newborn unit has the size of ``lr`` however
    old the rest is, and units that slept go on where they stopped. Plain parameters are served too.

    Args:
        params: parameters, named parameters or groups.
        lr: learning rate, a number or a tensor of one element.
        betas: decay rates of the first and second moment.
        eps: added to the denominator.
        weight_decay: decoupled.
        amsgrad: divide by the largest second moment so far.
        maximize: ascend.

    Raises:
        OptimizerError: a hyperparameter is out of its range.

    Source: Loshchilov, Hutter: Decoupled Weight Decay Regularization (ICLR 2019).
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
    ) -> None:
        at_least("AdamW", "lr", lr, 0)
        at_least("AdamW", "betas[0]", betas[0], 0, 1)
        at_least("AdamW", "betas[1]", betas[1], 0, 1)
        at_least("AdamW", "eps", eps, 0)
        at_least("AdamW", "weight_decay", weight_decay, 0)
        defaults = {
            "lr": lr,
            "betas": (float(betas[0]), float(betas[1])),
            "eps": eps,
            "weight_decay": weight_decay,
            "amsgrad": amsgrad,
            "maximize": maximize,
        }
        super().__init__(params, defaults)

    def _names(self, group: dict[str, Any]) -> tuple[str, ...]:
        return ("exp_avg", "exp_avg_sq", "max_exp_avg_sq") if group["amsgrad"] else ("exp_avg", "exp_avg_sq")

    def _count_dtype(self, group: dict[str, Any]) -> torch.dtype:
        # from t = 65535 on, 1 - beta^t is 1 in float32
        return torch.int16 if max(group["betas"]) ** 65535 < 2**-25 else torch.int32

    def _step_kernels(self, group: dict[str, Any], batch: Batch, grads: Any, tensors: list[int], count_dtype: torch.dtype | None) -> None:
        assert count_dtype is not None
        options = {name: group[name] for name in ("lr", "betas", "eps", "weight_decay", "amsgrad", "maximize")}
        batch.adamw(grads, tensors, count_dtype, **options)

    def _step_native(self, group: dict[str, Any], operands: list[list[Tensor]], counts: list[Tensor], plans: list[Tensor]) -> None:
        params, grads, exp_avgs, exp_avg_sqs, *rest = operands
        torch.ops.esper_elastic.adamw_.default(
            params,
            grads,
            exp_avgs,
            exp_avg_sqs,
            rest[0] if rest else [],
            counts,
            plans,
            float(group["lr"]),
            *group["betas"],
            group["weight_decay"],
            group["eps"],
            group["maximize"],
        )

    def _step_views(self, group: dict[str, Any], operands: list[list[Tensor]], counts: list[int]) -> None:
        params, grads, exp_avgs, exp_avg_sqs, *rest = operands
        adamw(
            params,
            grads,
            exp_avgs,
            exp_avg_sqs,
            rest[0] if rest else [],
            [torch.tensor(float(count)) for count in counts],
            has_complex=any(param.is_complex() for param in params),
            amsgrad=group["amsgrad"],
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=group["maximize"],
        )
