"""A detector of stalled loss. It sees losses one by one, and knows nothing of networks."""

from __future__ import annotations

from collections import deque


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
