"""The convolutional network of two examples, and one training of it under a trainer, with its costs counted."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import common
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

import esper_elastic as ee
from esper_elastic.training import Trainer, TrainingState

STEPS, BATCH, RATE = 1100, 128, 0.02
LARGE = (16, 32, 48)


def network(widths: tuple[int, ...]) -> nn.Sequential:
    """Four convolutions with batch norm, a mean over pixels, a linear head."""
    stem, middle, top = widths

    def stage(inside: int, outside: int, stride: int = 1) -> nn.Sequential:
        return nn.Sequential(nn.Conv2d(inside, outside, 3, stride, 1, bias=False), nn.BatchNorm2d(outside), nn.ReLU())

    stages = (stage(1, stem, 2), stage(stem, middle), stage(middle, top, 2), stage(top, top))
    return nn.Sequential(*stages, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(top, 10))


class Work:
    """A source that decides nothing, and adds up what training costs: three forward passes a step."""

    name = "work"

    def __init__(self, example: Tensor, run: common.Run) -> None:
        self._example, self._run, self._widths = example, run, None
        self._of_one = 0

    def decisions(self, state: TrainingState) -> tuple[()]:
        """None."""
        widths = {name: dim.active for name, dim in ee.dims(state.model).items()}
        if widths != self._widths or not self._of_one:
            found = ee.summary(state.model, self._example)
            self._widths, self._of_one = widths, found.active_multiply_adds or 0
            self._run.sizes.append((state.step, found.active_parameters))
        self._run.multiply_adds += 3 * BATCH * self._of_one
        return ()


def one_cycle(optimizer: Optimizer, steps: int) -> LRScheduler:
    """Up for three tenths of the steps, and down again."""
    rate = optimizer.param_groups[0]["lr"]
    return torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps, pct_start=0.3, cycle_momentum=False)


def train(
    label: str,
    model: nn.Module,
    data: common.Data,
    seed: int,
    steps: int,
    rate: float = RATE,
    schedule: Callable[[Optimizer, int], LRScheduler] = one_cycle,
    **settings: Any,
) -> common.Run:
    """One training, with the batches of the seed."""
    run = common.Run(label)
    optimizer = ee.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.01)
    sources = [*settings.pop("sources", ()), Work(torch.zeros(1, 1, 28, 28), run)]
    trainer = Trainer(model, optimizer, F.cross_entropy, schedulers=schedule(optimizer, steps), sources=sources, **settings)
    common.fit(trainer, run, data, seed, BATCH, steps, 22)
    print(f"seed {seed}  {label:<28} {run.accuracy:6.2f} %  {run.multiply_adds / 1e12:.3f} T multiply-adds", flush=True)
    return run
