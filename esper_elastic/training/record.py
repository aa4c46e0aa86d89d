"""The record of a run: how training goes, what becomes of decisions, and some steps after a change what it did to loss and step time."""

from __future__ import annotations

import dataclasses
import itertools
import math
import platform
import statistics
import time
from collections import deque
from typing import Any

import torch

from ..model import known
from ..summary import parameters_in_use
from .controller import AdaptationResult, Request
from .decisions import AdaptationDecision
from .events import Applied, Effect, Event, Progress, Refused, Requested, RolledBack, RunStarted
from .monitor import Monitor
from .state import TrainingState

#: Steps before a change, and after it, whose loss and time are compared.
STEPS = 20


@dataclasses.dataclass
class _Change:
    request: int
    step: int


class Record:
    """Tells a monitor how training goes, and what becomes of requests.

    Args:
        monitor: that is told.
        state: of the run.
    """

    def __init__(self, monitor: Monitor, state: TrainingState) -> None:
        self.monitor = monitor
        self.state = state
        self._changes: deque[_Change] = deque()
        self._parameters: int | None = None  # in use, while they stay as they are

    def started(self, settings: dict[str, Any]) -> None:
        """A run begins."""
        model = self.state.model
        widths = {name: dim.active for name, dim in known(model)[0].items()}
        versions = {"python": platform.python_version(), "torch": torch.__version__}
        name = type(model).__name__
        self.monitor.emit(RunStarted(self.state.step, time.time(), name, self._count(), None, widths, settings, versions))

    def progress(self, count: int) -> None:
        """Tell how the last ``count`` steps went."""
        state: Any = self.state
        losses = list(itertools.islice(reversed(state.losses), count))
        seconds = list(itertools.islice(reversed(state.step_seconds), count))
        mean, took = math.fsum(losses) / max(len(losses), 1), 1e3 * math.fsum(seconds) / max(len(seconds), 1)
        self.monitor.emit(Progress(state.step, time.time(), mean, took, float(state.optimizer.param_groups[0]["lr"]), self._count()))

    def _count(self) -> int:
        """Parameters in use; counted when they may have changed."""
        if self._parameters is None:
            self._parameters = parameters_in_use(self.state.model)
        return self._parameters

    def requested(self, request: Request, decisions: tuple[AdaptationDecision, ...]) -> None:
        """A request was taken up and could be read."""
        for decision in decisions:
            self.monitor.emit(Requested(self.state.step, time.time(), request.number, decision.to_json(), request.source))

    def done(self, result: AdaptationResult) -> None:
        """A request was carried out, refused or undone."""
        step, now = self.state.step, time.time()
        if result:
            self._parameters = None
            assert result.mechanism is not None
            everything = result.mechanism == "surgery"
            widths = {name: dim.active for name, dim in known(self.state.model)[0].items()} if everything else {}
            for decision, details in zip(result.decisions, result.details, strict=True):
                if not everything and type(details.get("to")) is int:
                    widths = {details["name"]: details["to"]}
                self.monitor.emit(
                    Applied(
                        step,
                        now,
                        result.request,
                        decision.adaptation_type,
                        decision.layer_name or decision.position,
                        result.mechanism,
                        result.milliseconds,
                        details,
                        widths,
                        None,
                        None,
                    )
                )
            self._changes.append(_Change(result.request, step))
            return
        said = [(decision.adaptation_type, decision.layer_name) for decision in result.decisions] or [("?", None)]
        for kind, name in said:
            event: Event
            if result.undone:
                event = RolledBack(step, now, result.request, kind, name, result.milliseconds, str(result.error))
            else:
                event = Refused(step, now, result.request, kind, name, result.verdict.factor, str(result.error))
            self.monitor.emit(event)

    def stepped(self) -> None:
        """Say of changes that are some steps old what they did."""
        while self._changes and self.state.step >= self._changes[0].step + STEPS:
            change = self._changes.popleft()
            ago = self.state.step - change.step
            (loss_before, ms_before), (loss, ms) = self._mean_of_steps(ago), self._mean_of_steps(0)
            self.monitor.emit(Effect(self.state.step, time.time(), change.request, loss_before, loss, ms_before, ms))

    def forget(self) -> None:
        """Say nothing of the changes so far: they were taken back."""
        self._changes.clear()
        self._parameters = None

    def _mean_of_steps(self, ago: int) -> tuple[float, float]:
        """Mean loss and median time in milliseconds of the steps up to that many ago; NaN where none is remembered."""
        losses = list(itertools.islice(reversed(self.state.losses), ago, ago + STEPS))
        seconds = list(itertools.islice(reversed(self.state.step_seconds), ago, ago + STEPS))
        return (
            statistics.fmean(losses) if losses else math.nan,
            1e3 * statistics.median(seconds) if seconds else math.nan,
        )

    def state_dict(self) -> dict[str, Any]:
        """The changes of which nothing was said yet, as JSON-able data."""
        return {"changes": [dataclasses.asdict(change) for change in self._changes]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what :meth:`state_dict` gave."""
        self._changes = deque(_Change(**change) for change in state["changes"])
        self._parameters = None
