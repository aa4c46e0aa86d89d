"""The monitor: takes the events of a run, counts them, and passes them on to a file, the log and other writers.

Owns the counters, the latency histograms and the recent events of one run. Monitoring never stops training: a writer that raises is
reported once and left out from then on.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

from ..errors import MonitorError
from .describe import describe
from .events import Applied, Event, Mechanism, Progress, Refused, Requested, Restored, RolledBack, Saved, SnapshotTaken
from .histogram import LatencyHistogram
from .lines import FILE_NAME, JsonLines

LOGGER = logging.getLogger("esper_elastic.training")
RECENT = 1000
PENDING = 256  # events that wait for the writers before they are handed over unasked
SECONDS = 1.0  # and how long they wait
OTHER = "other"
_MAX_TYPES = 64
_REMEMBERED = 4096
_LEVELS: dict[type[Event], int] = {
    Progress: logging.DEBUG,
    SnapshotTaken: logging.DEBUG,
    RolledBack: logging.WARNING,
    Restored: logging.WARNING,
}
_OUTCOMES = {Refused: "refused", RolledBack: "rolled_back"}


class Writer(Protocol):
    """Where events go. All three are called by the thread that flushes, one at a time."""

    def write(self, event: Event) -> None:
        """Take in one event; events come in order."""

    def flush(self) -> None:
        """Bring what was taken in to where it belongs."""

    def close(self) -> None:
        """Flush, and let go of files; nothing is written afterwards."""


class Monitor:
    """Counts and passes on the events of one run.

    Args:
        directory: the folder in which ``events.jsonl`` is written, or continued; without one, no file is.
        writers: others that get every event.

    Effects: :meth:`emit` hands events to the writers when many or old ones wait, otherwise :meth:`flush` does. ``Requested`` may be
    emitted by any thread; it never waits for a writer. All else belongs to the thread that trains.
    """

    def __init__(self, directory: Path | None = None, writers: Sequence[Writer] = ()) -> None:
        self._file = JsonLines(Path(directory) / FILE_NAME) if directory is not None else None
        self._writers: list[Writer] = [*([self._file] if self._file is not None else []), *writers]
        self._lock = threading.RLock()  # a handler of signals may emit while this thread is emitting
        self._pending: list[Event] = []
        self._recent: deque[Event] = deque(maxlen=RECENT)
        self._counts: dict[str, Counter[str]] = {}
        self._latencies: dict[tuple[str, str], LatencyHistogram] = {}
        self._types: OrderedDict[int, str] = OrderedDict()  # of the requests that were applied, for those that are taken back later
        self._resumed_at: int | None = None  # lines of the file that a loaded state knows of
        self._flushed = time.monotonic()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    @property
    def counts(self) -> defaultdict[str, Counter[str]]:
        """A copy of the counters: adaptation type -> ``requested``, ``applied``, ``refused``, ``rolled_back``, ``restored`` -> number.

        Beyond 64 types, as a source that makes them up brings, the rest counts as ``"other"``.
        """
        with self._lock:
            return defaultdict(Counter, {kind: Counter(counts) for kind, counts in self._counts.items()})

    @property
    def events(self) -> list[Event]:
        """The most recent events, a thousand at most."""
        with self._lock:
            return list(self._recent)

    def latency(self, adaptation_type: str | None = None, mechanism: Mechanism | None = None) -> LatencyHistogram:
        """The latencies of applied decisions of that type by that mechanism, of all where None: a copy."""
        found = LatencyHistogram()
        with self._lock:
            for (kind, by), histogram in self._latencies.items():
                if adaptation_type in (None, kind) and mechanism in (None, by):
                    found.merge(histogram)
        return found

    def emit(self, event: Event) -> None:
        """Take in one event: count it, log it, and keep it for the writers."""
        kind = type(event)
        with self._lock:
            self._pending.append(event)
            self._recent.append(event)
            if kind is not Progress:
                self._count(event)
            due = len(self._pending) >= PENDING or time.monotonic() - self._flushed > SECONDS
        level = _LEVELS.get(kind, logging.INFO)
        if LOGGER.isEnabledFor(level):
            LOGGER.log(level, "%s", _Line(event))
        if due and kind is not Requested:
            self.flush()

    def flush(self) -> None:
        """Hand what waits to the writers, and flush them."""
        with self._lock:
            waiting, self._pending = self._pending, []
            self._flushed = time.monotonic()
        for writer in self._writers[:]:
            try:
                for event in waiting:
                    writer.write(event)
                writer.flush()
            except Exception as error:
                self._leave_out(writer, error)

    def close(self) -> None:
        """Flush, and close the writers. A monitor that is closed twice, or goes on afterwards, does no harm: a file is opened again."""
        self.flush()
        for writer in self._writers[:]:
            try:
                writer.close()
            except Exception as error:
                self._leave_out(writer, error)

    def state_dict(self) -> dict[str, Any]:
        """The counters and the position in the file, as JSON can hold them: what a checkpoint keeps.

        Effects: flushes, so that the file has every event that is counted.
        """
        self.flush()
        with self._lock:
            return {
                "lines": self._file.num_lines if self._file is not None else 0,
                "counts": {kind: dict(counts) for kind, counts in self._counts.items()},
                "latencies": [[*key, histogram.state_dict()] for key, histogram in self._latencies.items()],
                "applied": [[request, kind] for request, kind in self._types.items()],
            }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on counting from a :meth:`state_dict`. :meth:`rewind` brings the file to the same point.

        Raises:
            MonitorError: it is no such state; the monitor is as it was.
        """
        try:
            lines = int(state["lines"])
            counts = {str(kind): Counter({str(k): int(n) for k, n in of_kind.items()}) for kind, of_kind in state["counts"].items()}
            latencies = {(str(kind), str(by)): LatencyHistogram.from_state(entry) for kind, by, entry in state["latencies"]}
            types = OrderedDict((int(request), str(kind)) for request, kind in state["applied"])
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise MonitorError(f"monitor: expected the state that Monitor.state_dict made, got {error!r}.") from error
        with self._lock:
            self._resumed_at = lines
            self._counts, self._latencies, self._types = counts, latencies, types

    def rewind(self, step: int) -> None:
        """Drop the events after the checkpoint of ``step``, so that a resumed run tells the same story as one that was not interrupted.

        After :meth:`load_state_dict` the events that the state counts stay, and the ``Saved`` of that checkpoint, which was written after
        the state was taken. Without a state, all up to the last event of ``step`` or an earlier one stay.

        Effects: replaces ``events.jsonl`` in one move; forgets events that wait and recent ones beyond ``step``.

        Raises:
            MonitorError: the file is damaged.
        """
        with self._lock:
            self._pending.clear()
            self._recent = deque((event for event in self._recent if event.step <= step), RECENT)
        counted, self._resumed_at = self._resumed_at, None
        if self._file is not None and self._file in self._writers and self._file.path.exists():
            self._file.keep(lambda events: _before(events, step, counted))

    def _count(self, event: Event) -> None:
        if isinstance(event, Applied):
            kind, outcome = event.adaptation_type, "applied"
            key = (self._counted_as(kind), event.mechanism)
            histogram = self._latencies.get(key)
            if histogram is None:
                histogram = self._latencies[key] = LatencyHistogram()
            histogram.add(event.milliseconds)
            self._types[event.request] = kind
            if len(self._types) > _REMEMBERED:
                self._types.popitem(last=False)
        elif isinstance(event, Requested):
            kind, outcome = str(event.decision.get("adaptation_type")), "requested"
        elif isinstance(event, Refused | RolledBack):
            kind, outcome = event.adaptation_type, _OUTCOMES[type(event)]
        elif isinstance(event, Restored):
            kind, outcome = self._types.get(-1 if event.request is None else event.request, OTHER), "restored"
        else:
            return
        kind = self._counted_as(kind)
        counts = self._counts.get(kind)
        if counts is None:
            counts = self._counts[kind] = Counter()
        counts[outcome] += 1

    def _counted_as(self, kind: str) -> str:
        return kind if kind in self._counts or len(self._counts) < _MAX_TYPES else OTHER

    def _leave_out(self, writer: Writer, error: Exception) -> None:
        self._writers.remove(writer)
        LOGGER.error("%s failed and gets no more events: %s: %s", type(writer).__name__, type(error).__name__, error)


class _Line:
    """An event that is put into words when somebody reads them."""

    __slots__ = ("_event",)

    def __init__(self, event: Event) -> None:
        self._event = event

    def __str__(self) -> str:
        return describe(self._event)


def _before(events: Sequence[Event], step: int, counted: int | None) -> list[int]:
    """The indices of the events that were there when the checkpoint of ``step`` was written."""
    if counted is None:
        last = max((index for index, event in enumerate(events) if event.step <= step and not isinstance(event, Requested)), default=-1)
        return list(range(last + 1))
    kept = list(range(min(counted, len(events))))
    saved = (index for index, event in enumerate(events) if index >= counted and isinstance(event, Saved) and event.step == step)
    return [*kept, *(index for index in [next(saved, None)] if index is not None)]
