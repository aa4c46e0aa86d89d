"""What a run is at, between two steps: what policies and other sources of decisions look at."""

from __future__ import annotations

import math
from collections import deque
from typing import Any

from torch import nn
from torch.optim import Optimizer

from ..growth import Observation

#: How many losses a run remembers.
REMEMBERED = 1024


class TrainingState:
    """Where a run stands.

    Attributes:
        model: that is trained.
        optimizer: that trains it.
        step: steps of the optimizer made so far.
        epoch: of the data, from 0 on.
        batch: batches of this epoch taken so far.
        loss: of the last step, the mean over its accumulation window.
        losses: the last ones, oldest first, since the last change of the loss's scale: at most 1024.
        step_seconds: how long the last steps took, in the same order.
        metrics: of the last evaluation.
        observed: what :func:`esper_elastic.growth.observe` has seen of the last step, if a source asked for it.

    Gradients of the last step are still in ``parameter.grad``; weights have been stepped since.
    """

    def __init__(self, model: nn.Module, optimizer: Optimizer | None) -> None:
        self.model = model
        self.optimizer = optimizer
        self.step = 0
        self.epoch = 0
        self.batch = 0
        self.loss = math.nan
        self.losses: deque[float] = deque(maxlen=REMEMBERED)
        self.step_seconds: deque[float] = deque(maxlen=REMEMBERED)
        self.metrics: dict[str, float] = {}
        self.observed: Observation | None = None

    def mean_loss(self, count: int, before: int = 0) -> float | None:
        """The mean of ``count`` losses, those of the last ``before`` steps left out; ``None`` while there are not as many."""
        losses = list(self.losses)[: len(self.losses) - before] if before else list(self.losses)
        return sum(losses[-count:]) / count if len(losses) >= count > 0 else None

    def state_dict(self) -> dict[str, Any]:
        """Where the run stands, as JSON-able data; how long steps took is not part of it."""
        kept = {name: getattr(self, name) for name in ("step", "epoch", "batch", "loss")}
        return kept | {"losses": list(self.losses), "metrics": dict(self.metrics)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what :meth:`state_dict` gave."""
        for name in ("step", "epoch", "batch", "loss"):
            setattr(self, name, state[name])
        self.losses = deque(state["losses"], maxlen=REMEMBERED)
        self.metrics = dict(state["metrics"])
