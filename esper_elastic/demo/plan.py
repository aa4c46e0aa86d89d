"""What the demo changes and when: planned changes in order, each at the first stall of the loss within bounds.

Every change has an earliest step, before which no stall counts, and a latest one, at which it happens anyway, so that a run fits its budget
whatever the loss does.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from ..training.policies.plateau import PlateauDetector

Change = TypeVar("Change")


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
