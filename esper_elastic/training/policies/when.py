"""When decisions are made: at steps that are said beforehand, or by another source within bounds."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from ..decisions import DecisionSource
from ..state import TrainingState


class Schedule:
    """Decisions at steps that are known beforehand.

    Args:
        decisions: ``{step: decision}``; a list of decisions succeeds or vanishes as one.
    """

    name = "schedule"

    def __init__(self, decisions: Mapping[int, Any]) -> None:
        self._decisions = dict(decisions)

    def decisions(self, state: TrainingState) -> Iterable[Any]:
        """Those of this step."""
        return [self._decisions[state.step]] if state.step in self._decisions else ()


class When:
    """Asks another source at some steps only.

    Args:
        source: that is asked.
        first: step at which it is asked at the earliest.
        last: step at which it is asked at the latest.
        every: steps between two questions.
    """

    def __init__(self, source: DecisionSource, *, first: int = 0, last: int | None = None, every: int = 1) -> None:
        self.source = source
        self.name = str(getattr(source, "name", type(source).__name__))
        self._first, self._last, self._every = first, last, every

    def decisions(self, state: TrainingState) -> Iterable[Any]:
        """Those of the other source, if it is asked."""
        return self.source.decisions(state) if self._asks(state.step) else ()

    def observes(self, state: TrainingState) -> str | None:
        """What the other source wants observed, if it is asked after the step that begins."""
        observes = getattr(self.source, "observes", None)
        wanted: str | None = observes(state) if observes is not None and self._asks(state.step + 1) else None
        return wanted

    def _asks(self, step: int) -> bool:
        within = step >= self._first and (self._last is None or step <= self._last)
        return within and (step - self._first) % self._every == 0

    def outcome(self, result: Any) -> None:
        """Pass on what became of a request."""
        if hasattr(self.source, "outcome"):
            self.source.outcome(result)

    def state_dict(self) -> dict[str, Any]:
        """That of the other source."""
        return dict(self.source.state_dict()) if hasattr(self.source, "state_dict") else {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what :meth:`state_dict` gave."""
        if hasattr(self.source, "load_state_dict"):
            self.source.load_state_dict(state)
