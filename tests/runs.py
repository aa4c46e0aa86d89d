"""A run that never was: events as a trainer would emit them, for what reads them."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator

from esper_elastic.training.events import (
    Applied,
    Effect,
    Evaluated,
    Event,
    Progress,
    Refused,
    Requested,
    Restored,
    RolledBack,
    RunEnded,
    RunStarted,
    Saved,
    SnapshotTaken,
)

BEGAN = 1_750_000_000.0
SURGERY = ("add_layer", "add_skip_connection", "modify_layer", "remove_layer")
METADATA = ("grow", "grow", "grow", "resize", "prune", "enable", "disable")


class FakeRun:
    """Steps, losses and widths of a run in which ``num_decisions`` decisions are spread over ``steps`` steps."""

    def __init__(self, steps: int = 2000, num_decisions: int = 24, seed: int = 0, num_dims: int = 9, evaluate_every: int = 100) -> None:
        self.steps, self.evaluate_every = steps, evaluate_every
        self.random = random.Random(seed)
        self.widths = {"conv1": 16} | {f"layer{1 + i // 3}.{i % 3}.conv1": 16 * 2 ** min(3, i // 3) for i in range(num_dims - 1)}
        self.capacity = {name: 4 * width for name, width in self.widths.items()}
        self.decisions = sorted(self.random.sample(range(steps // 50, steps), min(num_decisions, steps - steps // 50)))
        self.extra_loss = 0.0

    @property
    def parameters(self) -> int:
        widths = list(self.widths.values())
        return sum(9 * a * b for a, b in zip([3, *widths], widths, strict=False)) + 10 * widths[-1]

    @property
    def multiply_adds(self) -> int:
        return self.parameters * 196

    @property
    def step_ms(self) -> float:
        return (4 + self.parameters / 12_000) * self.random.lognormvariate(0, 0.04)

    def loss(self, step: int) -> float:
        size = math.log(self.parameters / 20_000 + 1)
        clean = 0.25 + 2.1 * math.exp(-3.2 * step / self.steps * (1 + size)) + 0.35 / (1 + size) + self.extra_loss
        return clean * self.random.lognormvariate(0, 0.05)

    def events(self) -> Iterator[Event]:
        """All of them, in order."""
        time, due, effects = BEGAN, list(self.decisions), list[tuple[int, int]]()
        yield RunStarted(
            0, time, "ResNet", self.parameters, self.multiply_adds, dict(self.widths),
            {"learning_rate": 0.1, "batch_size": 128}, {"torch": "2.13.0", "esper_elastic": "0.1.0"},
        )  # fmt: skip
        request = 0
        for step in range(1, self.steps + 1):
            time += self.step_ms / 1e3
            if step % max(1, self.steps // 200) == 0:
                rate = 0.05 * (1 + math.cos(math.pi * step / self.steps))
                yield Progress(step, time, self.loss(step), self.step_ms, rate, self.parameters)
            if step % self.evaluate_every == 0:
                accuracy = max(10.0, 94 - 30 * self.loss(step))
                yield Evaluated(step, time, {"accuracy": accuracy, "loss": self.loss(step) * 1.08})
            while effects and effects[0][1] <= step:
                number, _ = effects.pop(0)
                yield Effect(step, time, number, self.loss(step - 20), self.loss(step), self.step_ms * 0.97, self.step_ms)
            while due and due[0] <= step:
                due.pop(0)
                request += 1
                for event in self.decision(step, time, request):
                    yield event
                    if isinstance(event, Applied):
                        effects.append((request, step + 20))
            if step % (self.steps // 4 or 1) == 0:
                yield Saved(step, time, f"checkpoints/step-{step}.safetensors", 41.5)
        yield RunEnded(self.steps, time, "all steps made")

    def decision(self, step: int, time: float, request: int) -> Iterator[Event]:
        """One decision and what became of it."""
        kind = self.random.choice(METADATA if self.random.random() < 0.75 else SURGERY)
        layer = self.random.choice(list(self.widths))
        source = self.random.choice(["plateau", "contribution", "schedule", "controller"])
        yield Requested(
            step, time, request,
            {
                "adaptation_type": kind, "layer_name": layer, "position": None, "layer_spec": None, "parameters": {"share": 1.5},
                "confidence": round(self.random.random(), 2), "urgency": 0.5, "metadata": {}, "timestamp": time,
            },
            source,
        )  # fmt: skip
        fate = self.random.random()
        if fate < 0.12:
            reason = f"capacity of {layer} is {self.capacity[layer]}: cannot activate {self.capacity[layer] + 8}"
            yield Refused(step, time, request, kind, layer, self.random.choice(["decision", "safety", "surgeon"]), reason)
            return
        if kind in SURGERY and fate < 0.25:
            yield RolledBack(step, time, request, kind, layer, self.random.lognormvariate(4, 0.5), "gradient of fc.weight is not finite")
            return
        before = self.widths[layer]
        if kind in ("grow", "resize"):
            self.widths[layer] = min(self.capacity[layer], before + before // 2)
        elif kind == "prune":
            self.widths[layer] = max(4, before * 3 // 4)
        surgery = kind in SURGERY
        milliseconds = self.random.lognormvariate(3.5, 0.7) if surgery else self.random.lognormvariate(-2.5, 0.6)
        yield SnapshotTaken(step, time, 3.2, 4 * self.parameters)
        yield Applied(
            step, time, request, kind, layer, "surgery" if surgery else "metadata", milliseconds,
            {"widths": {layer: [before, self.widths[layer]]}}, dict(self.widths), self.parameters, self.multiply_adds,
        )  # fmt: skip
        if self.random.random() < 0.06:
            yield Progress(step, time, math.nan, self.step_ms, 0.05, self.parameters)
            yield Restored(step, time, request, step, "loss is not finite", 12.5)
            self.widths[layer] = before
