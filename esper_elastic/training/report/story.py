"""The story of a run: its events put together to curves, states of the network and decisions with what became of them.

Owns the reading of events, not how anything looks. Every list may be empty: a run may have been cut off anywhere.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from ..events import (
    Applied,
    Effect,
    Evaluated,
    Event,
    Progress,
    Refused,
    Requested,
    Restored,
    Resumed,
    RolledBack,
    RunEnded,
    RunStarted,
    Saved,
    SnapshotTaken,
)

Verdict = Literal["waiting", "applied", "refused", "rolled back", "restored"]
_FAMILIES = {"grow": "grow", "resize": "resize", "prune": "prune", "enable": "switch", "disable": "switch"}
FAMILIES = ("grow", "resize", "prune", "switch", "surgery", "refused", "rolled back", "restored", "waiting")


@dataclass
class Decision:
    """One decision and what became of it; ``remark`` is why it was refused, rolled back or taken back."""

    request: int
    step: int
    adaptation_type: str = "?"
    layer_name: str | None = None
    source: str = ""
    asked: dict[str, Any] = field(default_factory=dict)
    verdict: Verdict = "waiting"
    mechanism: str = ""
    milliseconds: float | None = None
    remark: str = ""
    effect: Effect | None = None

    @property
    def family(self) -> str:
        """What it is shown as: a kind of change where it was made, else its verdict."""
        return _FAMILIES.get(self.adaptation_type, "surgery") if self.verdict == "applied" else self.verdict


@dataclass(frozen=True)
class State:
    """What the network was like from ``step`` on; ``request`` is the decision that made it so."""

    step: int
    request: int | None
    parameters: int | None
    multiply_adds: int | None
    widths: dict[str, int]


@dataclass(frozen=True)
class Latency:
    """The latencies of one type of decision by one mechanism, in milliseconds, sorted."""

    adaptation_type: str
    mechanism: str
    sorted: list[float]

    def quantile(self, q: float) -> float:
        """The value that a share ``q`` of all do not exceed, by nearest rank."""
        return self.sorted[max(0, math.ceil(q * len(self.sorted)) - 1)]


class Story:
    """What a run did, from its events. Where a file tells of several runs, the last one.

    ``seconds`` leaves out the time between an interruption and the resumption.
    """

    def __init__(self, events: Sequence[Event]) -> None:
        starts = [index for index, event in enumerate(events) if isinstance(event, RunStarted)]
        self.earlier_runs = max(0, len(starts) - 1)
        self.events = events[starts[-1] :] if starts else events
        self.started: RunStarted | None = None
        self.ended: RunEnded | None = None
        self.progress: list[Progress] = []
        self.evaluations: list[Evaluated] = []
        self.restores: list[Restored] = []
        self.resumes: list[Resumed] = []
        self.saves: list[Saved] = []
        self.snapshots: list[SnapshotTaken] = []
        self.states: list[State] = []
        self.sizes: list[tuple[int, int]] = []  # step, active parameters
        self._decisions: dict[int, Decision] = {}
        self.seconds = 0.0
        for index, event in enumerate(self.events):
            if index and not isinstance(event, Resumed):
                self.seconds += max(0.0, event.time - self.events[index - 1].time)
            self._take(event)
            if isinstance(event, RunStarted | Progress | Applied) and event.parameters is not None:
                self.sizes.append((event.step, event.parameters))

    @property
    def decisions(self) -> list[Decision]:
        """All decisions, in the order in which they came."""
        return list(self._decisions.values())

    @property
    def last_step(self) -> int:
        """The largest step that anything happened at."""
        return max((event.step for event in self.events), default=0)

    def metrics(self) -> dict[str, list[tuple[int, float]]]:
        """Name of each metric -> (step, value) of every evaluation."""
        found: defaultdict[str, list[tuple[int, float]]] = defaultdict(list)
        for evaluated in self.evaluations:
            for name, value in evaluated.metrics.items():
                found[name].append((evaluated.step, value))
        return dict(found)

    def outcomes(self) -> dict[str, dict[str, int]]:
        """Adaptation type -> verdict -> number of decisions."""
        found: defaultdict[str, dict[str, int]] = defaultdict(dict)
        for decision in self.decisions:
            counts = found[decision.adaptation_type]
            counts[decision.verdict] = counts.get(decision.verdict, 0) + 1
        return dict(sorted(found.items()))

    def latencies(self) -> list[Latency]:
        """Latencies of what was carried out, by type and mechanism, also where it was taken back later."""
        found: defaultdict[tuple[str, str], list[float]] = defaultdict(list)
        for decision in self.decisions:
            if decision.mechanism and decision.milliseconds is not None and math.isfinite(decision.milliseconds):
                found[decision.adaptation_type, decision.mechanism].append(decision.milliseconds)
        return [Latency(*key, sorted(values)) for key, values in sorted(found.items())]

    def _take(self, event: Event) -> None:
        match event:
            case RunStarted():
                self.started = event
                self.states.append(State(event.step, None, event.parameters, event.multiply_adds, event.widths))
            case RunEnded():
                self.ended = event
            case Progress():
                self.progress.append(event)
            case Evaluated():
                self.evaluations.append(event)
            case Resumed():
                self.resumes.append(event)
                self.ended = None
            case Saved():
                self.saves.append(event)
            case SnapshotTaken():
                self.snapshots.append(event)
            case Requested():
                kind, layer = (event.decision.get(name) for name in ("adaptation_type", "layer_name"))
                decision = Decision(
                    event.request, event.step, str(kind), None if layer is None else str(layer), event.source, event.decision
                )
                self._decisions[event.request] = decision
            case Refused():
                decision = self._of(event)
                decision.verdict, decision.remark = "refused", f"{event.by}: {event.reason}"
            case RolledBack():
                decision = self._of(event)
                decision.verdict, decision.milliseconds, decision.remark = "rolled back", event.milliseconds, event.error
            case Applied():
                decision = self._of(event)
                decision.verdict, decision.milliseconds, decision.mechanism = "applied", event.milliseconds, event.mechanism
                widths = (self.states[-1].widths if self.states else {}) | event.widths
                self.states.append(State(event.step, event.request, event.parameters, event.multiply_adds, widths))
            case Effect():
                if event.request in self._decisions:
                    self._decisions[event.request].effect = event
            case Restored():
                self._restore(event)

    def _of(self, event: Applied | Refused | RolledBack) -> Decision:
        """The decision that ``event`` is about, which knows best what it was about."""
        decision = self._decisions.setdefault(event.request, Decision(event.request, event.step))
        decision.step, decision.adaptation_type, decision.layer_name = event.step, event.adaptation_type, event.layer_name
        return decision

    def _restore(self, event: Restored) -> None:
        self.restores.append(event)
        if event.request is not None and event.request in self._decisions:
            decision = self._decisions[event.request]
            decision.verdict, decision.remark = "restored", event.reason
        before = [state for state in self.states if state.step <= event.snapshot_step and state.request != event.request]
        made = next(
            (index for index, state in enumerate(self.states) if state.request is not None and state.request == event.request), None
        )
        if made:
            before = self.states[:made]
        if before:
            old = before[-1]
            self.states.append(State(event.step, old.request, old.parameters, old.multiply_adds, old.widths))
