"""One training run of the demo: a baseline, or the grown network with its plan of changes.

Owns the loop and the plan; what a change does is in ``capacity.py``. Baselines and the grown network get the same steps, batches, learning
rates and optimizer law.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional as F

import esper_elastic as ee

from ..training.plateau import Planned, PlateauDetector, Schedule
from .capacity import Dial, Event
from .data import Images, accuracy
from .network import Network, Widths, elastic_network, placed, plain_network

SMALL = Widths(stem=6, stage1=8, stage2=16, inner=32, block=False)
LARGE = Widths(stem=12, stage1=24, stage2=48, inner=32, block=True)
EARLY_GROWTH = {"stage1": 16, "stage2": 32}
LATE_GROWTH = {"stem": 12, "stage1": 24, "stage2": 48}
PRUNED = {"inner": 28}


@dataclass(frozen=True)
class Settings:
    """What all three runs have in common."""

    steps: int = 1100
    batch_size: int = 128
    learning_rate: float = 0.02
    weight_decay: float = 0.01
    warm_up: float = 0.3
    evaluate_every: int = 50
    evaluation_images: int = 2000


@dataclass
class Run:
    """What one training run left behind. ``curve`` holds (step, percent of a part of the test set), ``sizes`` (step, active parameters)."""

    label: str
    network: Network
    curve: list[tuple[int, float]] = field(default_factory=list)
    sizes: list[tuple[int, int]] = field(default_factory=list)
    events: list[Event] = field(default_factory=list)
    multiply_adds: int = 0
    final_accuracy: float = 0.0
    seconds: float = 0.0


Watcher = Callable[[int, float, Widths, Event | None], None]


def _silent(step: int, percent: float, widths: Widths, event: Event | None) -> None:
    """Watch nothing."""


def train_baseline(label: str, widths: Widths, images: Images, settings: Settings, seed: int, watch: Watcher = _silent) -> Run:
    """Train the plain network of ``widths`` from start to end."""
    torch.manual_seed(seed)
    network = placed(plain_network(widths), images.device)
    optimizer = torch.optim.AdamW(network.parameters(), lr=settings.learning_rate, weight_decay=settings.weight_decay)
    run = Run(label, network)
    for step, batch, labels in _steps(run, optimizer, images, settings, seed):
        optimizer.zero_grad()
        F.cross_entropy(network(batch), labels).backward()
        optimizer.step()
        run.multiply_adds += _training_multiply_adds(widths, len(labels))
        _record(run, step, widths, images, settings, watch)
    run.final_accuracy = accuracy(network, images)
    return run


def train_grown(label: str, images: Images, settings: Settings, seed: int, watch: Watcher = _silent) -> tuple[Run, Dial]:
    """Train the elastic network: narrow at first, grown when the loss stalls, pruned by score, and once asked for the impossible."""
    torch.manual_seed(seed)
    network = placed(elastic_network(SMALL, LARGE), images.device)
    optimizer = ee.optim.AdamW(network.parameters(), lr=settings.learning_rate, weight_decay=settings.weight_decay)
    run, dial = Run(label, network), Dial(network)
    run.events = dial.events
    plan = Plan(dial, settings.steps)
    for step, batch, labels in _steps(run, optimizer, images, settings, seed):
        num_events = len(run.events)
        plan.before(step)
        for event in run.events[num_events:]:
            percent = accuracy(network, images, settings.evaluation_images)
            run.sizes.append((step, event.widths.parameters()))
            watch(step, percent, event.widths, event)
        widths = dial.widths
        optimizer.zero_grad()
        loss = F.cross_entropy(network(batch), labels)
        loss.backward()
        run.multiply_adds += _training_multiply_adds(widths, len(labels))
        if plan.scores(step):
            dial.score()
        optimizer.step()
        plan.after(loss.item())
        _record(run, step, widths, images, settings, watch)
    run.final_accuracy = accuracy(network, images)
    return run, dial


class Plan:
    """The changes of one run: growth and the switch at stalls within bounds, the rest at fixed shares of the steps."""

    def __init__(self, dial: Dial, steps: int) -> None:
        self._dial = dial
        self._illegal = round(0.30 * steps)
        self._prune = round(0.70 * steps)
        self._scored_steps = max(1, round(0.04 * steps))
        window = max(2, round(0.011 * steps))
        changes: list[Callable[[int, str], None]] = [
            lambda step, reason: dial.grow(step, EARLY_GROWTH, reason),
            lambda step, reason: dial.grow(step, LATE_GROWTH, reason),
            dial.switch_on,
        ]
        bounds = [(0.03, 0.04), (0.06, 0.07), (0.09, 0.11)]
        planned = [Planned(change, round(a * steps), round(b * steps)) for change, (a, b) in zip(changes, bounds, strict=True)]
        self._schedule = Schedule(planned, PlateauDetector(window))

    def before(self, step: int) -> None:
        """Make the changes that are due before ``step``."""
        if due := self._schedule.due(step):
            change, reason = due
            change(step, reason)
        if step == self._illegal:
            self._dial.try_illegal(step)
        if step == self._prune:
            self._dial.prune(step, PRUNED)

    def scores(self, step: int) -> bool:
        """Whether the gradients of ``step`` count for the choice of what to prune."""
        return self._prune - self._scored_steps <= step < self._prune

    def after(self, loss: float) -> None:
        """Take in the loss of the step just made."""
        self._schedule.saw(loss)


def _steps(
    run: Run, optimizer: torch.optim.Optimizer, images: Images, settings: Settings, seed: int
) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Each step's number and batch; moves the learning rate after it and adds up the time of the run."""
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer,
        settings.learning_rate,
        total_steps=settings.steps,
        pct_start=settings.warm_up,
        div_factor=25,
        cycle_momentum=False,
    )
    start = time.perf_counter()
    for step, (batch, labels) in enumerate(images.batches(settings.steps, settings.batch_size, seed)):
        yield step, batch, labels
        schedule.step()
    run.seconds = time.perf_counter() - start


def _record(run: Run, step: int, widths: Widths, images: Images, settings: Settings, watch: Watcher) -> None:
    if step == 0 or (step + 1) % settings.evaluate_every == 0:
        percent = accuracy(run.network, images, settings.evaluation_images)
        run.curve.append((step + 1, percent))
        run.sizes.append((step + 1, widths.parameters()))
        watch(step + 1, percent, widths, None)


def _training_multiply_adds(widths: Widths, batch_size: int) -> int:
    """A backward pass does about twice the work of the forward pass: once for the inputs' gradients, once for the weights'."""
    return 3 * batch_size * widths.multiply_adds()
