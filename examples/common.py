"""What the examples share: Fashion-MNIST in batches of one order, an honest accuracy, the command line, and the picture of some runs."""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from esper_elastic import datasets, palette
from esper_elastic.training import Trainer
from esper_elastic.training.describe import duration
from esper_elastic.training.events import Applied


@dataclass
class Run:
    """What one training left behind: accuracy over steps, active parameters over steps, and what was decided."""

    label: str
    curve: list[tuple[int, float]] = field(default_factory=list)
    sizes: list[tuple[int, int]] = field(default_factory=list)
    decided: list[tuple[int, str]] = field(default_factory=list)
    accuracy: float = 0.0
    multiply_adds: float = 0.0

    def note(self, trainer: Trainer) -> None:
        """Take up what the trainer's monitor knows of decisions."""
        applied = [event for event in trainer.monitor.events if isinstance(event, Applied)]
        by_step: dict[int, list[Applied]] = {}
        for event in applied:
            by_step.setdefault(event.step, []).append(event)
        for step, events in by_step.items():
            kinds = dict.fromkeys(event.adaptation_type for event in events)
            longest = max(event.milliseconds for event in events)
            said = ", ".join(f"{kind} x{sum(event.adaptation_type == kind for event in events)}" for kind in kinds)
            self.decided.append((step, f"{said}\n{events[0].mechanism}, {duration(longest)}"))


class Data:
    """Fashion-MNIST on the CPU, normalised. Batches of an epoch depend on the seed and the epoch alone."""

    def __init__(self) -> None:
        found = datasets.load()
        self.name = found.name
        mean, deviation = found.train_images[:10_000].float().mean(), found.train_images[:10_000].float().std()
        self._train = (found.train_images, found.train_labels)
        self._normal: Callable[[Tensor], Tensor] = lambda images: (images.float() - mean) / deviation
        self._test = (self._normal(found.test_images), found.test_labels)

    def epochs(self, batch_size: int, seed: int) -> Callable[[int], Iterator[tuple[Tensor, Tensor]]]:
        """What :meth:`Trainer.fit` takes."""

        def batches(epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
            generator = torch.Generator().manual_seed(1000 * seed + epoch)
            order = torch.randperm(len(self._train[1]), generator=generator)
            for start in range(0, len(order) - batch_size + 1, batch_size):
                chosen = order[start : start + batch_size]
                yield self._normal(self._train[0][chosen]), self._train[1][chosen]

        return batches

    def accuracy(self, model: nn.Module, limit: int | None = None) -> float:
        """Percent of the first ``limit`` test images, all by default, that are labelled rightly."""
        images, labels = self._test[0][:limit], self._test[1][:limit]
        training = model.training
        model.eval()
        with torch.no_grad():
            parts = zip(images.split(1000), labels.split(1000), strict=True)
            right = sum(int((model(batch).argmax(1) == answer).sum()) for batch, answer in parts)
        model.train(training)
        return 100 * right / len(labels)


def fit(trainer: Trainer, run: Run, data: Data, seed: int, batch_size: int, steps: int, evaluations: int) -> Run:
    """Train, and take up what became of it: accuracy over the steps and at the end, sizes, decisions."""

    def evaluate(model: nn.Module) -> dict[str, float]:
        percent = data.accuracy(model, 2000)
        run.curve.append((trainer.state.step, percent))
        return {"accuracy": percent}

    every = max(1, steps // evaluations)
    trainer.fit(data.epochs(batch_size, seed), steps=steps, evaluate=evaluate, evaluate_every=every)
    run.accuracy = data.accuracy(trainer.model)
    run.sizes.append((steps, run.sizes[-1][1]))
    run.note(trainer)
    return run


def arguments(description: str, out: str) -> argparse.Namespace:
    """The command line of an example."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--seeds", type=int, default=1, help="how many seeds to run (default: 1)")
    parser.add_argument("--steps", type=int, default=None, help="training steps (default: the example's own number)")
    parser.add_argument("--out", type=Path, default=Path("runs") / out, help="folder for the picture, the numbers and the events")
    return parser.parse_args()


def over(seeds: int) -> str:
    """What numbers are of, for the beginning of a sentence."""
    return "One seed" if seeds == 1 else f"Mean of {seeds} seeds"


def mean(runs: Sequence[Run], what: str = "accuracy") -> float:
    """The mean of an attribute of some runs."""
    return statistics.fmean(getattr(run, what) for run in runs)


def save(path: Path, title: str, text: str, runs: Sequence[Run], numbers: dict[str, Any]) -> None:
    """Draw the runs, the last one as the one that it is about, and write the numbers beside the picture."""
    path.mkdir(parents=True, exist_ok=True)
    figure = Figure(figsize=(11, 7.5), dpi=140, facecolor="white")
    top, bottom = figure.subplots(2, 1, sharex=True, gridspec_kw={"height_ratios": (3, 1.4), "hspace": 0.08})
    colours = ("#8d99ae", "#2f6690", "#d1495b")[-len(runs) :]
    for run, colour in zip(runs, colours, strict=True):
        main = run is runs[-1]
        top.plot(*zip(*run.curve, strict=True), color=colour, linewidth=2.6 if main else 1.8, label=f"{run.label}: {run.accuracy:.2f} %")
        steps, sizes = zip(*run.sizes, strict=True)
        bottom.step(steps, [size / 1000 for size in sizes], where="post", color=colour, linewidth=2.2 if main else 1.6)
    last_text = -1.0
    end = runs[-1].curve[-1][0]
    for step, said in runs[-1].decided:
        for axes in (top, bottom):
            axes.axvline(step, color=palette.HAPPENINGS["grow"][0], linewidth=1, linestyle=(0, (4, 3)), alpha=0.7)
        if step / end - last_text > 0.13:
            top.text(step, 1.01, said, transform=top.get_xaxis_transform(), fontsize=8, color=palette.QUIET, va="bottom")
            last_text = step / end
    top.set_ylabel("test accuracy [%]")
    bottom.set_ylabel("active parameters [k]")
    bottom.set_ylim(bottom=0)
    bottom.set_xlabel("training step")
    top.legend(loc="best", frameon=False)
    for axes in (top, bottom):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color=palette.GRID)
        axes.set_xlim(0, None)
    figure.suptitle(title, x=0.07, y=0.975, ha="left", fontsize=15, fontweight="bold")
    figure.text(0.07, 0.925, text, color=palette.QUIET, fontsize=10.5)
    figure.subplots_adjust(left=0.07, right=0.97, top=0.84, bottom=0.08)
    figure.savefig(path / "picture.png")
    (path / "numbers.json").write_text(json.dumps(numbers, indent=1) + "\n")
    print(text)
    print(f"Picture: {path / 'picture.png'}   events: {path / 'events.jsonl'}   report: esper-elastic inspect {path}")
