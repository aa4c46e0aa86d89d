"""One update of the weights: the batches whose gradients make it, clipping, optimizer, scaler, schedulers, average."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .. import optim


class Update:
    """Gathers the gradients of some batches, and steps.

    Args:
        model: that is trained.
        optimizer: that trains it.
        compute_loss: the loss of a batch.
        schedulers: stepped with the optimizer.
        scaler: of gradients, or ``None``.
        ema: an average of the weights, or ``None``.
        autocast: the dtype of a mixed-precision forward; ``None`` for none.
        accumulate: batches that make one update.
        clip_norm: the norm that gradients are clipped to; ``None`` for none.

    The last three are attributes, and may be set between two updates.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Any,
        compute_loss: Callable[[Any], Tensor],
        *,
        schedulers: list[Any],
        scaler: Any,
        ema: Any,
        autocast: torch.dtype | None,
        accumulate: int,
        clip_norm: float | None,
    ) -> None:
        self._model = model
        self._optimizer = optimizer
        self._compute_loss = compute_loss
        self._schedulers = schedulers
        self._scaler = scaler
        self._ema = ema
        self.autocast = autocast
        self.accumulate = accumulate
        self.clip_norm = clip_norm
        self._losses: list[Tensor] = []
        self._begun = 0.0

    @property
    def empty(self) -> bool:
        """Whether no batch was taken since the last update."""
        return not self._losses

    def clear(self) -> None:
        """Forget the batches since the last update."""
        self._losses.clear()

    def add(self, batch: Any) -> bool:
        """Forward and backward of one batch; returns whether the update is complete."""
        if self.empty:
            self._begun = time.perf_counter()
            self._optimizer.zero_grad()  # what is left of the last one was there for those who decide
        with torch.autocast(_device_of(self._model), self.autocast) if self.autocast is not None else contextlib.nullcontext():
            loss = self._compute_loss(batch)
        part = loss / self.accumulate if self.accumulate > 1 else loss
        (self._scaler.scale(part) if self._scaler is not None else part).backward()
        self._losses.append(loss.detach())
        return len(self._losses) >= self.accumulate

    def step(self) -> tuple[float, float]:
        """Update the weights; returns the mean loss of the batches, and the seconds since the first one."""
        if self.clip_norm is not None:
            if self._scaler is not None:
                self._scaler.unscale_(self._optimizer)
            parameters = [parameter for group in self._optimizer.param_groups for parameter in group["params"]]
            optim.clip_grad_norm_(parameters, self.clip_norm)  # of what is active: dormant gradients have no norm
        if self._scaler is not None:
            self._scaler.step(self._optimizer)
            self._scaler.update()
        else:
            self._optimizer.step()
        for scheduler in self._schedulers:
            scheduler.step()
        if hasattr(self._ema, "update_parameters"):
            self._ema.update_parameters(self._model)
        loss = math.fsum(map(float, self._losses)) / len(self._losses)
        self.clear()
        return loss, time.perf_counter() - self._begun


def _device_of(model: nn.Module) -> str:
    parameter = next(model.parameters(), None)
    return "cpu" if parameter is None else parameter.device.type
