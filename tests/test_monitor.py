"""The monitor counts right, writes what it is given, survives what it must, and goes on after a resume as if nothing had been."""

from __future__ import annotations

import json
import logging
import math
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from runs import FakeRun

from esper_elastic.errors import MonitorError
from esper_elastic.training.describe import describe, duration
from esper_elastic.training.events import (
    Applied,
    Event,
    Mechanism,
    Progress,
    Refused,
    Requested,
    Restored,
    Resumed,
    RolledBack,
    RunEnded,
    Saved,
)
from esper_elastic.training.histogram import RELATIVE_ERROR, LatencyHistogram
from esper_elastic.training.lines import FILE_NAME, JsonLines, read
from esper_elastic.training.monitor import LOGGER, OTHER, PENDING, Monitor

STORY = list(FakeRun(num_decisions=60, seed=4).events())


def progress(step: int, loss: float = 1.0) -> Progress:
    return Progress(step, 0.0, loss, 2.0, 0.1, 100)


def applied(step: int, request: int = 1, kind: str = "grow", mechanism: Mechanism = "metadata", milliseconds: float = 0.1) -> Applied:
    return Applied(step, 0.0, request, kind, "a", mechanism, milliseconds, {}, {"a": 3}, 100, None)


def texts(events: list[Event]) -> list[str]:
    """NaN is not equal to itself, its repr is."""
    return [repr(event) for event in events]


class Memory:
    """A writer that keeps what it gets, and fails at the event of a step."""

    def __init__(self, failing_step: int | None = None, failing_close: bool = False) -> None:
        self.events: list[Event] = []
        self.flushed = self.closed = 0
        self.failing_step, self.failing_close = failing_step, failing_close

    def write(self, event: Event) -> None:
        if event.step == self.failing_step:
            raise OSError("disk full")
        self.events.append(event)

    def flush(self) -> None:
        self.flushed += 1

    def close(self) -> None:
        self.closed += 1
        if self.failing_close:
            raise OSError("gone")


# Counting


def test_outcomes_are_counted_by_type() -> None:
    monitor = Monitor()
    expected: dict[str, Counter[str]] = {}
    kinds = {event.request: str(event.decision["adaptation_type"]) for event in STORY if isinstance(event, Requested)}
    names = {Requested: "requested", Applied: "applied", Refused: "refused", RolledBack: "rolled_back", Restored: "restored"}
    for event in STORY:
        monitor.emit(event)
        if type(event) in names:
            expected.setdefault(kinds[event.request], Counter())[names[type(event)]] += 1  # type: ignore[attr-defined]
    assert monitor.counts == expected
    assert {outcome for counts in expected.values() for outcome in counts} == set(names.values())
    assert monitor.counts["never"]["applied"] == 0


def test_counts_are_a_copy() -> None:
    monitor = Monitor()
    monitor.emit(applied(1))
    monitor.counts["grow"]["applied"] += 5
    assert monitor.counts["grow"] == {"applied": 1}


def test_types_that_a_source_makes_up_do_not_fill_the_memory() -> None:
    monitor = Monitor()
    for number in range(1000):
        monitor.emit(Refused(1, 0.0, number, f"kind {number}", None, "decision", "unknown"))
        monitor.emit(applied(1, number, f"kind {number}"))
    assert len(monitor.counts) <= 65
    assert monitor.counts[OTHER]["refused"] == monitor.counts[OTHER]["applied"] == 1000 - 64
    assert monitor.latency().count == 1000


def test_a_restored_state_counts_for_the_type_that_it_takes_back() -> None:
    monitor = Monitor()
    monitor.emit(applied(1, request=7, kind="prune"))
    monitor.emit(Restored(2, 0.0, 7, 1, "loss is nan", 3.0))
    monitor.emit(Restored(3, 0.0, None, 1, "loss is nan", 3.0))
    assert monitor.counts == {"prune": {"applied": 1, "restored": 1}, OTHER: {"restored": 1}}


def test_latencies_are_kept_by_type_and_mechanism() -> None:
    monitor = Monitor()
    for number in range(1, 101):
        monitor.emit(applied(number, number, "grow", "metadata", number / 100))
    monitor.emit(applied(101, 101, "grow", "surgery", 50.0))
    monitor.emit(applied(102, 102, "prune", "surgery", 80.0))
    assert monitor.latency("grow", "metadata").count == 100
    assert monitor.latency("grow", "metadata").quantile(0.99) == pytest.approx(0.99, rel=RELATIVE_ERROR)
    assert monitor.latency("grow").quantile(1) == 50.0
    assert monitor.latency(mechanism="surgery").quantile(0) == pytest.approx(50.0, rel=RELATIVE_ERROR)
    assert monitor.latency().count == 102
    assert monitor.latency("enable").count == 0 and math.isnan(monitor.latency("enable").quantile(0.5))


@given(st.lists(st.floats(1e-6, 1e6), min_size=1, max_size=200), st.floats(0, 1))
def test_a_quantile_is_known_to_one_percent(values: list[float], q: float) -> None:
    histogram = LatencyHistogram()
    for value in values:
        histogram.add(value)
    exact = sorted(values)[max(0, math.ceil(q * len(values)) - 1)]
    assert histogram.quantile(q) == pytest.approx(exact, rel=RELATIVE_ERROR * (1 + 1e-9))
    assert histogram.mean == pytest.approx(sum(values) / len(values))
    assert histogram.smallest == min(values) and histogram.largest == max(values)


@given(st.lists(st.floats(0, 1e9), max_size=50), st.lists(st.floats(0, 1e9), max_size=50))
def test_merged_and_reloaded_histograms_equal_one_that_saw_all(first: list[float], second: list[float]) -> None:
    one, two, both = LatencyHistogram(), LatencyHistogram(), LatencyHistogram()
    for value in first:
        one.add(value)
        both.add(value)
    for value in second:
        two.add(value)
        both.add(value)
    one.merge(LatencyHistogram.from_state(json.loads(json.dumps(two.state_dict(), allow_nan=False))))
    assert one.state_dict() | {"total": 0} == both.state_dict() | {"total": 0}
    assert one.total == pytest.approx(both.total)


@pytest.mark.parametrize("value", [0.0, -1.0, math.nan, math.inf, 1e-300, 1e300])
def test_impossible_latencies_are_counted_all_the_same(value: float) -> None:
    histogram = LatencyHistogram()
    histogram.add(value)
    assert histogram.count == 1 and math.isfinite(histogram.quantile(0.5)) and math.isfinite(histogram.total)


@pytest.mark.parametrize("q", [-0.1, 1.1, math.nan])
def test_a_quantile_that_is_none_is_refused(q: float) -> None:
    with pytest.raises(ValueError, match="between 0 and 1"):
        LatencyHistogram().quantile(q)


# The file


def test_the_file_tells_what_was_emitted(tmp_path: Path) -> None:
    with Monitor(tmp_path / "run") as monitor:
        for event in STORY:
            monitor.emit(event)
    assert texts(read(tmp_path / "run")) == texts(STORY) == texts(read(tmp_path / "run" / FILE_NAME))
    assert texts(monitor.events) == texts(STORY)


def test_nothing_is_written_without_a_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with Monitor() as monitor:
        monitor.emit(progress(1))
        monitor.rewind(0)
    assert list(tmp_path.iterdir()) == []


def test_many_events_are_written_unasked_and_few_wait(tmp_path: Path) -> None:
    monitor = Monitor(tmp_path)
    for step in range(PENDING - 1):
        monitor.emit(progress(step))
    assert not (tmp_path / FILE_NAME).exists()
    monitor.emit(progress(PENDING))
    assert len(read(tmp_path)) == PENDING


def test_old_events_are_written_unasked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monitor = Monitor(tmp_path)
    monitor.emit(progress(1))
    monkeypatch.setattr("esper_elastic.training.monitor.SECONDS", -1.0)
    monitor.emit(Requested(1, 0.0, 1, {}, "other thread"))
    assert not (tmp_path / FILE_NAME).exists()  # a request never waits for the disk
    monitor.emit(progress(2))
    assert len(read(tmp_path)) == 3


@pytest.mark.parametrize("cut", [1, 5, 40])
def test_a_line_that_was_cut_off_is_dropped_by_readers_and_writers(tmp_path: Path, cut: int) -> None:
    with Monitor(tmp_path) as monitor:
        for event in STORY[:20]:
            monitor.emit(event)
    file = tmp_path / FILE_NAME
    file.write_bytes(file.read_bytes()[:-cut])
    assert texts(read(file)) == texts(STORY[:19])
    with Monitor(tmp_path) as monitor:
        monitor.emit(RunEnded(9, 0.0, "twice"))
    assert texts(read(file)) == texts([*STORY[:19], RunEnded(9, 0.0, "twice")])


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"event":"Prog', "line 3: expected one event as JSON, got b'{\"event"),
        (b'{"event":"RunEnded","step":NaN,"time":0,"reason":""}', "line 3: expected one event as JSON"),
        (b"\xff\xfe", "line 3: expected one event as JSON"),
        (b"", "line 3: expected one event as JSON"),
        (b"[" * 100_000, "line 3: expected one event as JSON"),
        (b"[]", "line 3: expected an object"),
        (b'{"event":"RunEnded","step":"x","time":0,"reason":""}', "line 3: RunEnded.step: expected an integer, got 'x'"),
    ],
    ids=["half", "nan", "no text", "empty", "deep", "list", "field"],
)
def test_a_damaged_line_is_named(tmp_path: Path, line: bytes, message: str) -> None:
    with Monitor(tmp_path) as monitor:
        for event in STORY[:3]:
            monitor.emit(event)
    file = tmp_path / FILE_NAME
    lines = file.read_bytes().split(b"\n")
    lines[2] = line
    file.write_bytes(b"\n".join(lines))
    with pytest.raises(MonitorError) as caught:
        read(tmp_path)
    assert message in str(caught.value) and str(file) in str(caught.value)


@pytest.mark.parametrize("name", ["", "nothing", "nothing/here.jsonl"])
def test_a_run_that_is_not_there_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(MonitorError, match="expected the events of a run, got No such file"):
        read(tmp_path / name)


# Writers and the log


def test_writers_get_every_event_in_order_and_are_closed(tmp_path: Path) -> None:
    memory = Memory()
    with Monitor(tmp_path, [memory]) as monitor:
        for event in STORY:
            monitor.emit(event)
    assert texts(memory.events) == texts(STORY)
    assert memory.flushed > 0 and memory.closed == 1


@pytest.fixture
def logged() -> Iterator[list[logging.LogRecord]]:
    """What the package logs at the level of information or above."""
    records: list[logging.LogRecord] = []
    handler, level = logging.Handler(), LOGGER.level
    handler.emit = records.append  # type: ignore[method-assign]
    LOGGER.addHandler(handler)
    LOGGER.setLevel(logging.INFO)
    yield records
    LOGGER.removeHandler(handler)
    LOGGER.setLevel(level)


def test_a_writer_that_raises_is_reported_once_and_left_out(tmp_path: Path, logged: list[logging.LogRecord]) -> None:
    bad, good = Memory(failing_step=2), Memory()
    with Monitor(tmp_path, [bad, good]) as monitor:
        for step in range(5):
            monitor.emit(progress(step))
            monitor.flush()
    assert [event.step for event in good.events] == [0, 1, 2, 3, 4] == [event.step for event in read(tmp_path)]
    assert [event.step for event in bad.events] == [0, 1] and bad.closed == 0
    assert [record.getMessage() for record in logged if record.levelno >= logging.ERROR] == [
        "Memory failed and gets no more events: OSError: disk full"
    ]


def test_a_file_that_cannot_be_written_does_not_stop_the_run(tmp_path: Path, logged: list[logging.LogRecord]) -> None:
    (tmp_path / "taken").write_text("")
    with Monitor(tmp_path / "taken") as monitor:
        monitor.emit(applied(1))
        assert monitor.state_dict()["counts"] == {"grow": {"applied": 1}}
        monitor.rewind(0)
    assert "JsonLines failed" in logged[-1].getMessage()


def test_a_writer_that_cannot_be_closed_does_not_stop_the_run(logged: list[logging.LogRecord]) -> None:
    Monitor(writers=[Memory(failing_close=True)]).close()
    assert "Memory failed and gets no more events: OSError: gone" in logged[-1].getMessage()


def test_decisions_are_logged_in_one_line_and_progress_for_debugging_alone(logged: list[logging.LogRecord]) -> None:
    monitor = Monitor()
    for event in STORY:
        monitor.emit(event)
    lines = [record.getMessage() for record in logged]
    assert not any("learning rate" in line for line in lines)
    assert any(": grow of " in line and "applied by metadata in " in line for line in lines)
    warned = [event for event in STORY if isinstance(event, RolledBack | Restored)]
    assert [record.getMessage() for record in logged if record.levelno == logging.WARNING] == [describe(event) for event in warned]
    assert warned


def test_what_came_from_outside_cannot_break_a_line_of_the_log() -> None:
    event = Refused(1, 0.0, 1, "grow\nINFO all is well", "\x1b[31mlayer", "decision", "x" * 10_000)
    line = describe(event)
    assert line.isprintable() and len(line) < 1000


@pytest.mark.parametrize("event", [*{type(event): event for event in STORY}.values(), Resumed(1, 0.0, "x")], ids=lambda e: type(e).__name__)
def test_every_kind_has_its_words(event: Event) -> None:
    assert describe(event).startswith(f"step {event.step}: ")


@pytest.mark.parametrize(
    ("milliseconds", "text"),
    [(0, "0 us"), (0.0123, "12.3 us"), (0.9999, "1 ms"), (12.34, "12.3 ms"), (999.9, "1 s"), (61_000, "61 s"), (125_000, "2 min 5 s"),
     (7_500_000, "2 h 5 min"), (math.nan, "nan h nan min")],
)  # fmt: skip
def test_durations_have_the_unit_that_suits(milliseconds: float, text: str) -> None:
    assert duration(milliseconds) == text


# Threads


def test_requests_may_come_from_any_thread(tmp_path: Path) -> None:
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with Monitor(tmp_path) as monitor:

            def ask(first: int) -> None:
                for number in range(1000):
                    monitor.emit(Requested(0, 0.0, first + number, {"adaptation_type": "grow"}, "thread"))

            threads = [threading.Thread(target=ask, args=(1000 * index,)) for index in range(4)]
            for thread in threads:
                thread.start()
            for step in range(500):
                monitor.emit(progress(step))
                monitor.emit(applied(step, step))
            for thread in threads:
                thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert monitor.counts["grow"] == {"requested": 4000, "applied": 500}
    events = read(tmp_path)
    assert sorted(event.request for event in events if isinstance(event, Requested)) == list(range(4000))
    assert [event.step for event in events if isinstance(event, Progress)] == list(range(500))


def test_one_thread_at_a_time_counts() -> None:
    inside, leave = threading.Event(), threading.Event()

    class Slow(dict[str, Counter[str]]):
        def get(self, key: str, default: Any = None) -> Any:
            inside.set()
            assert leave.wait(10)
            return super().get(key, default)

    monitor = Monitor()
    monitor._counts = Slow()
    threads = [
        threading.Thread(target=monitor.emit, args=(Requested(0, 0.0, number, {"adaptation_type": "grow"}, "x"),)) for number in range(2)
    ]
    threads[0].start()
    assert inside.wait(10)
    threads[1].start()
    threads[1].join(0.1)
    assert len(monitor._recent) == 1
    leave.set()
    for thread in threads:
        thread.join()
    assert monitor.counts["grow"]["requested"] == 2


def test_a_handler_of_signals_may_emit_while_its_thread_does() -> None:
    monitor = Monitor()
    with monitor._lock:
        monitor.emit(RunEnded(1, 0.0, "terminated"))
    assert len(monitor.events) == 1


# Resuming


def without_saves(events: list[Event]) -> list[str]:
    return texts([event for event in events if not isinstance(event, Resumed)])


@pytest.mark.parametrize("killed_at", [0, 1, 7, 100])
@pytest.mark.parametrize("saved_at", [200, 1000, 1700])
def test_a_resumed_run_tells_the_story_of_one_that_was_not_interrupted(tmp_path: Path, saved_at: int, killed_at: int) -> None:
    cut = next(index for index, event in enumerate(STORY) if event.step >= saved_at)
    saved = Saved(STORY[cut - 1].step, 0.0, "checkpoint", 1.0)
    whole = [*STORY[:cut], saved, *STORY[cut:]]
    first = Monitor(tmp_path)
    for event in STORY[:cut]:
        first.emit(event)
    state = json.loads(json.dumps(first.state_dict(), allow_nan=False))
    for event in [saved, *STORY[cut : cut + killed_at]]:
        first.emit(event)
    first.flush()
    file = tmp_path / FILE_NAME
    with file.open("ab") as half:
        half.write(b'{"event":"Prog')

    second = Monitor(tmp_path)
    second.load_state_dict(state)
    second.rewind(saved.step)
    for event in [Resumed(saved.step, 0.0, "checkpoint"), *STORY[cut:]]:
        second.emit(event)
    second.close()
    assert without_saves(read(tmp_path)) == texts(whole)
    assert list(tmp_path.iterdir()) == [file]

    uninterrupted = Monitor()
    for event in whole:
        uninterrupted.emit(event)
    assert second.counts == uninterrupted.counts
    assert second.latency().state_dict() == uninterrupted.latency().state_dict()


def test_events_of_the_very_step_that_came_after_the_state_go(tmp_path: Path) -> None:
    monitor = Monitor(tmp_path)
    monitor.emit(progress(5))
    state = monitor.state_dict()
    monitor.emit(Saved(5, 0.0, "a", 1.0))
    monitor.emit(applied(5, 1))
    monitor.emit(progress(6))
    monitor.emit(Saved(5, 0.0, "of a second pass", 1.0))
    monitor.flush()
    monitor.load_state_dict(state)
    monitor.rewind(5)
    assert read(tmp_path) == [progress(5), Saved(5, 0.0, "a", 1.0)]
    assert monitor.counts == {}
    monitor.emit(progress(7))
    monitor.close()
    assert read(tmp_path)[2:] == [progress(7)]


def test_a_checkpoint_that_was_never_finished_leaves_no_trace(tmp_path: Path) -> None:
    monitor = Monitor(tmp_path)
    monitor.emit(progress(5))
    state = monitor.state_dict()
    monitor.emit(Saved(9, 0.0, "another", 1.0))
    monitor.flush()
    monitor.load_state_dict(state)
    monitor.rewind(5)
    assert read(tmp_path) == [progress(5)]


def test_a_run_can_be_resumed_from_a_resumed_one(tmp_path: Path) -> None:
    state = None
    for first in (0, 10, 20):
        with Monitor(tmp_path) as monitor:
            if state is not None:
                monitor.load_state_dict(state)
                monitor.rewind(first)
            for step in range(first + 1, first + 11):
                monitor.emit(progress(step))
                monitor.emit(applied(step, step))
            state = monitor.state_dict()
            monitor.emit(progress(first + 11))  # a step of which no checkpoint knows
    assert [event.step for event in read(tmp_path)] == [*(step for step in range(1, 31) for _ in range(2)), 31]
    assert monitor.counts["grow"]["applied"] == 30


def test_without_a_state_all_up_to_the_last_event_of_the_step_stay(tmp_path: Path) -> None:
    monitor = Monitor(tmp_path)
    story = [progress(1), progress(9), Restored(3, 0.0, None, 3, "nan", 1.0), progress(4), Requested(4, 0.0, 1, {}, "x"), progress(8)]
    for event in [*story, Requested(4, 0.0, 2, {}, "a thread that was late")]:
        monitor.emit(event)
    monitor.flush()
    monitor.rewind(5)
    assert read(tmp_path) == story[:4]
    monitor.rewind(0)
    assert read(tmp_path) == [] and monitor.events == []


def test_what_waits_is_not_written_after_a_rewind(tmp_path: Path) -> None:
    monitor = Monitor(tmp_path)
    monitor.emit(progress(1))
    state = monitor.state_dict()
    monitor.emit(progress(2))
    monitor.load_state_dict(state)
    monitor.rewind(1)
    monitor.close()
    assert read(tmp_path) == [progress(1)]


def test_a_failed_rewind_leaves_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = JsonLines(tmp_path / FILE_NAME)
    for step in range(3):
        lines.write(progress(step))
    lines.close()

    def fail(descriptor: int) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        lines.keep(lambda events: [0])
    assert len(read(tmp_path)) == 3 and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize(
    "state",
    [{}, {"lines": "many", "counts": {}, "latencies": [], "applied": []}, {"lines": 0, "counts": [], "latencies": [], "applied": []},
     {"lines": 0, "counts": {}, "latencies": [["grow", "metadata", {}]], "applied": []}],
)  # fmt: skip
def test_a_state_that_is_none_is_refused_and_changes_nothing(state: dict[str, object]) -> None:
    monitor = Monitor()
    monitor.emit(applied(1))
    before = monitor.state_dict()
    with pytest.raises(MonitorError, match="expected the state that Monitor.state_dict made"):
        monitor.load_state_dict(state)
    assert monitor.state_dict() == before


def test_a_request_from_before_the_checkpoint_can_be_taken_back_after_it() -> None:
    first, second = Monitor(), Monitor()
    first.emit(applied(1, request=3, kind="prune"))
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    second.emit(Restored(2, 0.0, 3, 1, "nan", 1.0))
    assert second.counts == {"prune": {"applied": 1, "restored": 1}}
