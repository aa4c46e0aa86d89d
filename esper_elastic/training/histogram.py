"""Latencies in buckets of equal ratio: a quantile is known to within one percent, however many values there were.

Source: Masson, Rim, Lee, "DDSketch: a fast and fully-mergeable quantile sketch with relative-error guarantees", VLDB 2019.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from typing import Any

RELATIVE_ERROR = 0.01
_RATIO = (1 + RELATIVE_ERROR) / (1 - RELATIVE_ERROR)
_LOG_RATIO = math.log(_RATIO)
_SHORTEST, _LONGEST = 1e-9, 1e12


class LatencyHistogram:
    """Counts of milliseconds, in buckets ``(ratio**(i-1), ratio**i]``; smallest and largest are exact.

    Anything below a femtosecond, or not a number, counts as zero; anything beyond thirty years as thirty years.
    """

    __slots__ = ("_buckets", "count", "largest", "smallest", "total")

    def __init__(self) -> None:
        self.count = 0
        self.total = 0.0
        self.smallest = math.inf
        self.largest = 0.0
        self._buckets: Counter[int | None] = Counter()  # None: zero

    def add(self, milliseconds: float) -> None:
        """Count one latency."""
        value = min(max(0.0, milliseconds), _LONGEST)  # in this order, not a number gives zero
        self._buckets[math.ceil(math.log(value) / _LOG_RATIO) if value >= _SHORTEST else None] += 1
        self.count += 1
        self.total += value
        self.smallest = min(self.smallest, value)
        self.largest = max(self.largest, value)

    def quantile(self, q: float) -> float:
        """The value that a share ``q`` of all do not exceed, by nearest rank, to within :data:`RELATIVE_ERROR`; NaN where there is none.

        Raises:
            ValueError: ``q`` is not between 0 and 1.
        """
        if not 0 <= q <= 1:
            raise ValueError(f"quantile: expected a share between 0 and 1, got {q}.")
        if self.count == 0:
            return math.nan
        rank = max(1, math.ceil(q * self.count))
        if rank == self.count:
            return self.largest
        seen = 0
        for bucket in sorted(self._buckets, key=lambda index: -math.inf if index is None else index):
            seen += self._buckets[bucket]
            if seen >= rank:
                break
        middle = 0.0 if bucket is None else 2 * _RATIO**bucket / (_RATIO + 1)
        return min(max(middle, self.smallest), self.largest)

    @property
    def mean(self) -> float:
        """The mean; NaN where there is none."""
        return self.total / self.count if self.count else math.nan

    def merge(self, other: LatencyHistogram) -> None:
        """Count all that ``other`` has counted too."""
        self._buckets.update(other._buckets)
        self.count += other.count
        self.total += other.total
        self.smallest = min(self.smallest, other.smallest)
        self.largest = max(self.largest, other.largest)

    def state_dict(self) -> dict[str, Any]:
        """All of it, as JSON can hold it."""
        return {
            "buckets": sorted([index, count] for index, count in self._buckets.items() if index is not None),
            "zeros": self._buckets[None],
            "total": self.total,
            "smallest": self.smallest if self.count else 0.0,
            "largest": self.largest,
        }

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> LatencyHistogram:
        """The histogram of that :meth:`state_dict`.

        Raises:
            KeyError, TypeError, ValueError: it is none.
        """
        histogram = cls()
        histogram._buckets.update({int(index): int(count) for index, count in state["buckets"]})
        if state["zeros"]:
            histogram._buckets[None] = int(state["zeros"])
        histogram.count = sum(histogram._buckets.values())
        histogram.total, histogram.largest = float(state["total"]), float(state["largest"])
        histogram.smallest = float(state["smallest"]) if histogram.count else math.inf
        return histogram
