"""The governor: puts a run back to before a change when its loss turns to NaN or leaves its band after it."""

from __future__ import annotations

import dataclasses
import logging
import math
import statistics
from typing import Any

from ..errors import DecisionError
from .snapshot import Snapshot, size_of_all
from .state import TrainingState

LOGGER = logging.getLogger("esper_elastic.training")


@dataclasses.dataclass(frozen=True)
class Governor:
    """When a change is taken back.

    Args:
        window: steps before a change whose losses say where the loss belongs.
        horizon: steps after a change in which it is watched.
        settle: steps whose median is held against the band, so that a single bad batch decides nothing.
        deviations: the band reaches so many standard deviations of the window's losses above their mean, and at least
        share: this share of the mean's absolute value.
        refresh: steps for which one snapshot serves: the state that is put back may be that many steps older than the change.
        max_bytes: of a snapshot. Models above it are changed without one, which is said once.
        max_restores: in a run; afterwards changes are not taken back any more.

    Raises:
        DecisionError: a number is out of bounds.
    """

    window: int = 20
    horizon: int = 50
    settle: int = 5
    deviations: float = 4.0
    share: float = 0.5
    refresh: int = 25
    max_bytes: int = 2**33
    max_restores: int = 10

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            least = 1 if field.name in ("window", "horizon", "settle") else 0
            if isinstance(value, bool) or not isinstance(value, int | float) or not (math.isfinite(value) and value >= least):
                raise DecisionError(f"Governor: {field.name}: expected a number of at least {least}, got {value!r}.")


class Watch:
    """A governor at work on one run.

    Attributes:
        restores: how often it has put the run back.
        snapshot: of the state before the last changes, if there is one.
        too_large: the bytes of a snapshot that was not taken, or ``None``.
    """

    def __init__(self, governor: Governor, followers: list[Any]) -> None:
        self.governor = governor
        self.followers = followers
        self.restores = 0
        self.snapshot: Snapshot | None = None
        self.too_large: int | None = None
        self._changed_at: int | None = None
        self._request: int | None = None
        self._limit = math.inf
        self._after: list[float] = []

    @property
    def watching(self) -> bool:
        """Whether a change was made so lately that it may still be taken back."""
        return self._changed_at is not None

    def before_change(self, state: TrainingState) -> Snapshot | None:
        """Make sure that there is a snapshot, and return it if it was taken now."""
        if self.restores >= self.governor.max_restores or self.too_large is not None:
            return None
        if self.snapshot is not None and state.step - self.snapshot.step <= self.governor.refresh:
            return None
        self.snapshot = None  # its copies go before new ones are made
        wanted = size_of_all(state.model, self.followers)
        if wanted > self.governor.max_bytes:
            self.too_large = wanted
            LOGGER.warning(
                "no snapshot: it would take %s bytes, of at most %s (Governor(max_bytes=)); changes are not taken back from here on",
                f"{wanted:,}",
                f"{self.governor.max_bytes:,}",
            )
            return None
        self.snapshot = Snapshot(state.model, self.followers, state.step)
        return self.snapshot

    def changed(self, state: TrainingState, request: int) -> None:
        """Watch the loss from here on. Of changes in close order, the band is that of before the first."""
        if self._changed_at is None:
            losses = list(state.losses)[-self.governor.window :]
            finite = [loss for loss in losses if math.isfinite(loss)]
            if len(finite) >= 2:
                mean, deviation = statistics.fmean(finite), statistics.pstdev(finite)
                self._limit = mean + max(self.governor.deviations * deviation, self.governor.share * abs(mean))
        self._changed_at, self._request = state.step, request
        self._after = []

    def verdict(self, state: TrainingState) -> str | None:
        """Why the last changes are to be taken back, after one more step; ``None`` if they are not."""
        if self._changed_at is None:
            return None
        if state.step - self._changed_at > self.governor.horizon:
            self._changed_at, self._request, self._limit, self._after = None, None, math.inf, []
            return None
        self._after.append(state.loss)
        if not math.isfinite(state.loss):
            return f"loss {state.loss} {state.step - self._changed_at} steps after a change"
        recent = self._after[-self.governor.settle :]
        if len(recent) >= self.governor.settle and statistics.median(recent) > self._limit:
            return (
                f"loss {statistics.median(recent):.4g}, the median of {len(recent)} steps, above its band up to {self._limit:.4g}, "
                f"{state.step - self._changed_at} steps after a change"
            )
        return None

    def restore(self, state: TrainingState) -> tuple[Snapshot, int | None] | None:
        """Put the run back, and return the snapshot and the last request that this takes back; ``None`` if there is no snapshot."""
        snapshot, request = self.snapshot, self._request
        self.forget()
        if snapshot is None:
            return None
        snapshot.restore()
        self.restores += 1
        return snapshot, request

    def forget(self) -> None:
        """Watch no longer, and let the snapshot go."""
        self.snapshot = None
        self._changed_at, self._request, self._limit, self._after = None, None, math.inf, []

    def state_dict(self) -> dict[str, Any]:
        """How often it has acted, as JSON-able data. A checkpoint is taken while nothing is watched."""
        return {"restores": self.restores}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what :meth:`state_dict` gave."""
        self.forget()
        self.restores = state["restores"]
