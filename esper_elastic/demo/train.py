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

from ..training import Governor, Trainer, TrainingState
from ..training.policies.plateau import PlateauDetector
from .capacity import Dial, Event, no_more_memory
from .data import Images, accuracy
from .network import Network, Widths, elastic_network, placed, plain_network
from .plan import Planned, Schedule

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
    trainer = Trainer(
        network, optimizer, F.cross_entropy, schedulers=_schedule(optimizer, settings), safety=no_more_memory(network), governor=Governor()
    )
    run, dial = Run(label, network), Dial(network, trainer)
    run.events = dial.events
    trainer.sources.append(Plan(dial, run, images, settings, watch))
    start = time.perf_counter()
    trainer.fit(lambda epoch: images.batches(settings.steps, settings.batch_size, seed), steps=settings.steps)
    run.seconds = time.perf_counter() - start
    run.final_accuracy = accuracy(network, images)
    return run, dial


class Plan:
    """The changes of one run: growth and the switch at stalls within bounds, the rest at fixed shares of the steps.

    A source of the trainer's, which asks it between steps. It makes its changes there and then, to show each one's cost by itself.
    """

    name = "plan"

    def __init__(self, dial: Dial, run: Run, images: Images, settings: Settings, watch: Watcher) -> None:
        steps = settings.steps
        self._dial, self._run, self._images, self._settings, self._watch = dial, run, images, settings, watch
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

    def decisions(self, state: TrainingState) -> tuple[()]:
        """Take up the step just made, and change what is due before the next."""
        last, widths = state.step - 1, self._dial.widths
        self._run.multiply_adds += _training_multiply_adds(widths, self._settings.batch_size)
        if self.scores(last):
            self._dial.score()
        self._schedule.saw(state.loss)
        _record(self._run, last, widths, self._images, self._settings, self._watch)
        if state.step < self._settings.steps:
            num_events = len(self._run.events)
            self.before(state.step)
            for event in self._run.events[num_events:]:
                percent = accuracy(self._run.network, self._images, self._settings.evaluation_images)
                self._run.sizes.append((state.step, event.widths.parameters()))
                self._watch(state.step, percent, event.widths, event)
        return ()

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


def _steps(
    run: Run, optimizer: torch.optim.Optimizer, images: Images, settings: Settings, seed: int
) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Each step's number and batch; moves the learning rate after it and adds up the time of the run."""
    schedule = _schedule(optimizer, settings)
    start = time.perf_counter()
    for step, (batch, labels) in enumerate(images.batches(settings.steps, settings.batch_size, seed)):
        yield step, batch, labels
        schedule.step()
    run.seconds = time.perf_counter() - start


def _schedule(optimizer: torch.optim.Optimizer, settings: Settings) -> torch.optim.lr_scheduler.OneCycleLR:
    """The learning rates that all runs share."""
    return torch.optim.lr_scheduler.OneCycleLR(
        optimizer,
        settings.learning_rate,
        total_steps=settings.steps,
        pct_start=settings.warm_up,
        div_factor=25,
        cycle_momentum=False,
    )


def _record(run: Run, step: int, widths: Widths, images: Images, settings: Settings, watch: Watcher) -> None:
    if step == 0 or (step + 1) % settings.evaluate_every == 0:
        percent = accuracy(run.network, images, settings.evaluation_images)
        run.curve.append((step + 1, percent))
        run.sizes.append((step + 1, widths.parameters()))
        watch(step + 1, percent, widths, None)


def _training_multiply_adds(widths: Widths, batch_size: int) -> int:
    """A backward pass does about twice the work of the forward pass: once for the inputs' gradients, once for the weights'."""
    return 3 * batch_size * widths.multiply_adds()
