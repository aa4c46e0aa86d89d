"""When to grow: a detector of stalled loss, and the schedule that asks it.

Owns the decision, not the change: it answers "which step of the plan is due, and why". Every planned change has an earliest step, before
which no stall counts, and a latest one, at which it happens anyway, so that a run fits its budget whatever the loss does.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

Change = TypeVar("Change")


class PlateauDetector:
    """Says that the loss has stalled: the mean of the last ``window`` losses is hardly below the mean of the ``window`` before them.

    Args:
        window: losses in each of the two means.
        min_improvement: the relative fall from one mean to the next below which the loss counts as stalled.
    """

    def __init__(self, window: int = 12, min_improvement: float = 0.08) -> None:
        self.window = window
        self.min_improvement = min_improvement
        self._losses: deque[float] = deque(maxlen=2 * window)

    def update(self, loss: float) -> None:
        """Take in the loss of one step."""
        self._losses.append(loss)

    def reset(self) -> None:
        """Forget what was seen, as after a change of the network."""
        self._losses.clear()

    @property
    def losses(self) -> list[float]:
        """What it has seen since it was made or reset, oldest first: as much as it looks at."""
        return list(self._losses)

    def means(self) -> tuple[float, float] | None:
        """The earlier and the later mean; None until both windows are full."""
        if len(self._losses) < 2 * self.window:
            return None
        losses = list(self._losses)
        return sum(losses[: self.window]) / self.window, sum(losses[self.window :]) / self.window

    def stalled(self) -> str | None:
        """The reason in words where the loss has stalled, else None."""
        means = self.means()
        if means is None or means[1] < means[0] * (1 - self.min_improvement):
            return None
        return f"loss stalled: {means[0]:.2f} -> {means[1]:.2f} in {self.window} steps"


@dataclass(frozen=True)
class Planned(Generic[Change]):
    """A change that becomes due at the first stall from ``earliest`` on, and at ``latest`` without one."""

    change: Change
    earliest: int
    latest: int


class Schedule(Generic[Change]):
    """Planned changes in order, one at a time; the detector starts afresh after each."""

    def __init__(self, planned: Sequence[Planned[Change]], detector: PlateauDetector) -> None:
        self._waiting = deque(planned)
        self._detector = detector

    def due(self, step: int) -> tuple[Change, str] | None:
        """The change to make before ``step`` and the reason, if there is one; asking takes it off the plan."""
        if not self._waiting or step < self._waiting[0].earliest:
            return None
        reason = self._detector.stalled()
        if reason is None and step >= self._waiting[0].latest:
            reason = f"latest step for it: {self._waiting[0].latest}"
        if reason is None:
            return None
        self._detector.reset()
        return self._waiting.popleft().change, reason

    def saw(self, loss: float) -> None:
        """Take in the loss of the step just made."""
        self._detector.update(loss)
