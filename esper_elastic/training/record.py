"""The record of a run's decisions: results become events, and what a change did to loss and step time is said some steps after it."""

from __future__ import annotations

import dataclasses
import itertools
import math
import statistics
import time
from collections import deque
from typing import Any

from ..model import known
from .controller import AdaptationResult, Request
from .decisions import AdaptationDecision
from .events import Applied, Effect, Event, Refused, Requested, RolledBack
from .monitor import Monitor
from .state import TrainingState

#: Steps before a change, and after it, whose loss and time are compared.
STEPS = 20


@dataclasses.dataclass
class _Change:
    request: int
    step: int
    loss: float
    step_ms: float


class Record:
    """Tells a monitor what becomes of requests.

    Args:
        monitor: that is told.
        state: of the run.
    """

    def __init__(self, monitor: Monitor, state: TrainingState) -> None:
        self.monitor = monitor
        self.state = state
        self._changes: deque[_Change] = deque()

    def requested(self, request: Request, decisions: tuple[AdaptationDecision, ...]) -> None:
        """A request was taken up and could be read."""
        for decision in decisions:
            self.monitor.emit(Requested(self.state.step, time.time(), request.number, decision.to_json(), request.source))

    def done(self, result: AdaptationResult) -> None:
        """A request was carried out, refused or undone."""
        step, now = self.state.step, time.time()
        if result:
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
            self._changes.append(_Change(result.request, step, *self._recent()))
            return
        kind = result.decisions[0].adaptation_type if result.decisions else "?"
        name = result.decisions[0].layer_name if result.decisions else None
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
            loss, step_ms = self._recent()
            self.monitor.emit(Effect(self.state.step, time.time(), change.request, change.loss, loss, change.step_ms, step_ms))

    def forget(self) -> None:
        """Say nothing of the changes so far: they were taken back."""
        self._changes.clear()

    def _recent(self) -> tuple[float, float]:
        """Mean loss and median time in milliseconds of the last steps."""
        losses = list(itertools.islice(reversed(self.state.losses), STEPS))
        seconds = list(itertools.islice(reversed(self.state.step_seconds), STEPS))
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
