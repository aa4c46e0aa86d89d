"""The report tells a run's story: from any events, in one file, in order, and with nothing of theirs taken for markup."""

from __future__ import annotations

import builtins
import math
import random
import re
import sys
from collections import Counter
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st
from runs import FakeRun

from esper_elastic import cli
from esper_elastic.errors import MonitorError
from esper_elastic.palette import HAPPENINGS
from esper_elastic.training.describe import duration
from esper_elastic.training.events import (
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
)
from esper_elastic.training.monitor import Monitor
from esper_elastic.training.report import Story, inspect, page, plots
from esper_elastic.training.report.panel import LARGEST, Panel, runs, value_scale
from esper_elastic.training.report.style import style_sheet
from esper_elastic.training.report.svg import Scale, compact, thinned
from esper_elastic.training.tensorboard import TensorBoardWriter

STORY = list(FakeRun(num_decisions=40, seed=4).events())
HOSTILE = "</text><script>alert('1')</script>\"'&amp;\x00\x1b[31m\ud800\u202e{}"


def started(step: int = 0, **changed: Any) -> RunStarted:
    usual = {"model": "Net", "parameters": 100, "multiply_adds": 1000, "widths": {"a": 4}, "settings": {}, "versions": {}}
    return RunStarted(step, 0.0, **usual | changed)


def applied(step: int, request: int, width: int, kind: str = "grow", milliseconds: float = 0.1) -> Applied:
    return Applied(step, 0.0, request, kind, "a", "metadata", milliseconds, {}, {"a": width}, 25 * width, 250 * width)


class Checked(HTMLParser):
    """Every element closed in order; what there is of elements, attributes and text."""

    VOID = frozenset({"meta", "input"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: Counter[str] = Counter()
        self.attributes: list[tuple[str, str | None]] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        self.attributes += attrs
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        self.attributes += attrs

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += "" if self.open[-1:] == ["style"] else data


def checked(events: list[Event]) -> Checked:
    """The page about ``events``, which is whole, needs nothing from elsewhere, and whose drawings are valid."""
    text = page(Story(events), "runs/test")
    text.encode("utf-8")
    assert not re.search(r"[\x00-\x08\x0b-\x1f]", text)
    for drawing in re.findall(r"<svg.*?</svg>", text, re.DOTALL):
        for node in ElementTree.fromstring(drawing).iter():
            for name, value in node.attrib.items():
                if name in {"x", "y", "x1", "x2", "y1", "y2", "cx", "cy", "width", "height"}:
                    assert math.isfinite(float(value)) and abs(float(value)) < 1e5
                assert "nan" not in value.split() and "inf" not in value.split()
    found = Checked(text)
    assert found.tags["script"] == found.tags["link"] == found.tags["img"] == found.tags["iframe"] == 0
    assert not any(name in {"src", "href", "onclick", "onload", "style"} for name, _ in found.attributes)
    assert "url(" not in text and "@import" not in text
    return found


# The page


def test_the_page_tells_all_of_a_run() -> None:
    told = checked(STORY)
    accuracy = [event.metrics["accuracy"] for event in STORY if isinstance(event, Evaluated)]
    for words in ("ResNet", "2,000", "all steps made", f"{accuracy[-1]:.5g}", f"from {min(accuracy):.4g} to {max(accuracy):.4g}"):
        assert words in told.text, words
    for heading in ("Learning", "Size", "Widths", "Step time", "Latency", "Decisions", "Restored", "Settings"):
        assert heading in told.text, heading
    decisions = Story(STORY).decisions
    assert len(decisions) == 40
    for decision in decisions:
        assert f"#{decision.request} {decision.adaptation_type} {decision.layer_name}: {decision.verdict}" in told.text
    for verdict, count in Counter(decision.verdict for decision in decisions).items():
        assert f"{verdict} ({count})" in told.text
        assert sum(value == verdict.replace(" ", "-") for name, value in told.attributes if name == "class") == count


@pytest.mark.parametrize(
    "events",
    [
        [],
        [started()],
        [started(), RunEnded(0, 0.0, "nothing to do")],
        [Progress(5, 0.0, 1.0, 2.0, 0.1, 100)],
        [Progress(0, 0.0, math.nan, math.inf, math.nan, 0), Evaluated(0, math.nan, {"a": math.nan, "b": math.inf})],
        [Progress(step, 1e300, 10.0**step, 0.0, 0.1, 10**30) for step in range(-5, 300)],
        [Evaluated(3, 0.0, {f"metric {number}": 1.0 for number in range(40)}), Evaluated(4, 0.0, {})],
        [Applied(9, 0.0, 1, "grow", None, "surgery", math.nan, {}, {}, 0, None), Effect(9, 0.0, 1, 0.0, math.nan, 0.0, 1.0)],
        [Effect(9, 0.0, 77, 1.0, 1.0, 1.0, 1.0), Restored(9, 0.0, 78, 3, "?", 1.0), Restored(10, 0.0, None, 3, "?", 1.0)],
        [Requested(10**12, 0.0, 1, {}, "")],
        [started(widths={"a": 0, "b": 3}), applied(5, 1, 0), applied(5, 2, 3), applied(4, 3, 8)],
        [started(widths={f"dim {number}" * 20: 1 for number in range(300)}), Applied(
            3, 0.0, 1, "grow", "a", "metadata", 0.0, {}, {f"dim {number}" * 20: 2 for number in range(300)}, 1, 1)],
    ],
    ids=["empty", "start", "nothing", "no start", "nan", "vast", "metrics", "no numbers", "strangers", "waiting", "width 0", "dims"],
)  # fmt: skip
def test_a_page_can_be_made_of_anything(events: list[Event]) -> None:
    checked(events)


@pytest.mark.parametrize("length", [1, 2, 3, 50, 130, 250])
def test_a_run_that_was_cut_off_has_its_page(length: int) -> None:
    told = checked(STORY[:length])
    assert "not ended, or cut off" in told.text


def test_a_run_without_evaluation_has_its_page() -> None:
    told = checked([event for event in STORY if not isinstance(event, Evaluated)])
    assert "evaluated" not in told.text and "accuracy" not in told.text and "Learning" in told.text


def test_thousands_of_decisions_are_all_told_and_the_plots_stay_small() -> None:
    events = list(FakeRun(steps=15_000, num_decisions=2000, num_dims=30, evaluate_every=500, seed=1).events())
    told = checked(events)
    assert told.tags["tr"] > 2000
    assert len(plots.learning(Story(events))) < 1_000_000
    assert plots.learning(Story(events)).count("guide") == 0 < plots.learning(Story(STORY)).count("guide")


def test_what_came_with_events_is_text_everywhere() -> None:
    events = [
        started(model=HOSTILE, widths={HOSTILE: 4}, settings={HOSTILE: HOSTILE}, versions={HOSTILE: HOSTILE}),
        Progress(1, 0.0, 1.0, 1.0, 0.1, 5),
        Evaluated(2, 0.0, {HOSTILE: 3.0}),
        Requested(3, 0.0, 1, {"adaptation_type": HOSTILE, "layer_name": HOSTILE, "parameters": {HOSTILE: HOSTILE}}, HOSTILE),
        Applied(3, 0.0, 1, HOSTILE, HOSTILE, "metadata", 1.0, {HOSTILE: HOSTILE}, {HOSTILE: 8}, 10, 10),
        Refused(4, 0.0, 2, HOSTILE, HOSTILE, HOSTILE, HOSTILE),
        RolledBack(5, 0.0, 3, HOSTILE, HOSTILE, 1.0, HOSTILE),
        Restored(6, 0.0, 1, 2, HOSTILE, 1.0),
        Resumed(7, 0.0, HOSTILE),
        RunEnded(8, 0.0, HOSTILE),
    ]
    told = checked(events)
    assert told.text.count("<script>") > 10
    text = page(Story(events), HOSTILE)
    assert "<script" not in text and "\x1b" not in text and "\u202e" not in text


def test_every_mark_has_its_colour_by_day_and_by_night() -> None:
    sheet = style_sheet()
    light, dark = re.findall(r":root \{ (.*?) \}", sheet)
    names = set(re.findall(r"--([a-z-]+):", light))
    assert set(HAPPENINGS) < names == set(re.findall(r"--([a-z-]+):", dark))
    assert set(re.findall(r"var\(--([a-z-]+)\)", sheet)) - {"mark"} <= names
    for class_ in (*HAPPENINGS, "rolled-back", "restored", "waiting", "applied", "loss", "evaluated"):
        assert f".{class_} {{ --mark" in sheet or f".{class_}, " in sheet or f", .{class_} {{ --mark" in sheet, class_


# The story


def test_a_decision_is_followed_to_its_end() -> None:
    events: list[Event] = [started()]
    for request in range(1, 7):
        decision = {"adaptation_type": "grow", "layer_name": "a", "parameters": {"n": request}}
        events.append(Requested(request, 0.0, request, decision, "plateau"))
    events += [
        Refused(7, 0.0, 1, "grow", "a", "safety", "too wide"),
        RolledBack(7, 0.0, 2, "grow", "a", 12.0, "not finite"),
        applied(8, 3, 8, milliseconds=0.5),
        applied(9, 4, 16),
        Effect(12, 0.0, 3, 2.0, 1.0, 5.0, 6.0),
        Restored(13, 0.0, 4, 9, "loss is nan", 3.0),
        applied(14, 5, 24, kind="prune"),
    ]
    one, two, three, four, five, six = Story(events).decisions
    assert (one.verdict, one.remark, one.step, one.family) == ("refused", "safety: too wide", 7, "refused")
    assert (two.verdict, two.remark, two.milliseconds) == ("rolled back", "not finite", 12.0)
    assert (three.verdict, three.mechanism, three.milliseconds, three.family) == ("applied", "metadata", 0.5, "grow")
    assert three.effect is not None and three.effect.loss_after == 1.0 and three.asked["parameters"] == {"n": 3}
    assert (four.verdict, four.remark, four.family) == ("restored", "loss is nan", "restored")
    assert (five.adaptation_type, five.family, five.source) == ("prune", "prune", "plateau")
    assert (six.verdict, six.step) == ("waiting", 6)


def test_what_was_taken_back_is_not_what_the_network_is() -> None:
    story = Story([started(), applied(5, 1, 8), applied(9, 2, 16), Restored(12, 0.0, 2, 9, "nan", 1.0), applied(15, 3, 12)])
    assert [(state.step, state.widths["a"]) for state in story.states] == [(0, 4), (5, 8), (9, 16), (12, 8), (15, 12)]
    story = Story([started(), applied(5, 1, 8), applied(9, 2, 16), applied(9, 3, 32), Restored(12, 0.0, 2, 9, "nan", 1.0)])
    assert story.states[-1].widths == {"a": 8}
    story = Story([started(), applied(5, 1, 8), applied(9, 2, 16), Restored(12, 0.0, None, 7, "nan", 1.0)])
    assert story.states[-1].widths == {"a": 8}


def test_the_last_run_of_a_file_is_told() -> None:
    story = Story([started(model="old"), applied(5, 1, 8), started(model="new"), applied(2, 1, 16)])
    assert story.started is not None and story.started.model == "new"
    assert story.earlier_runs == 1 and len(story.decisions) == 1 and story.last_step == 2


def test_the_time_between_an_interruption_and_a_resumption_does_not_count() -> None:
    events = [started(), Progress(1, 10.0, 1, 1, 1, 1), Resumed(1, 5000.0, "x"), Progress(2, 5007.0, 1, 1, 1, 1)]
    assert Story(events).seconds == 17.0


def test_latencies_are_exact() -> None:
    story = Story([started(), *(applied(step, step, 4, milliseconds=float(step)) for step in range(1, 202))])
    (row,) = story.latencies()
    assert (row.adaptation_type, row.mechanism, len(row.sorted)) == ("grow", "metadata", 201)
    assert (row.quantile(0.5), row.quantile(0.99), row.quantile(1.0)) == (101.0, 199.0, 201.0)
    text = page(story, "")
    assert all(duration(value) in text for value in (101.0, 199.0, 201.0))


def test_widths_are_told_as_long_as_they_held() -> None:
    events = [started(), applied(5, 1, 8), applied(9, 2, 16), Restored(9, 0.0, 2, 9, "nan", 1.0), applied(15, 3, 12)]
    drawn = plots.widths(Story([*events, RunEnded(20, 0.0, "")]))
    assert re.findall(r"steps [^<]*", drawn) == ["steps 0 to 5: 4", "steps 5 to 15: 8", "steps 15 to 20: 12"]
    assert plots.widths(Story([started(), RunEnded(20, 0.0, "")])) == ""


def test_what_a_plot_has_no_room_for_is_said() -> None:
    dims = {f"dim {number}": 1 for number in range(plots.MAX_DIMS + 7)}
    grown = dict.fromkeys(dims, 2)
    events = [started(widths=dims), Applied(3, 0.0, 1, "grow", "a", "metadata", 0.0, {}, grown, 1, 1), RunEnded(9, 0.0, "")]
    assert "7 more changed" in plots.widths(Story(events))
    metrics = {f"metric {number}": 1.0 for number in range(plots.MAX_METRICS + 3)}
    assert "3 more metrics are in the file" in plots.learning(Story([Evaluated(3, 0.0, metrics)]))
    assert "more" not in plots.widths(Story(STORY)) + plots.learning(Story(STORY))


# Drawing


@given(st.floats(-1e9, 1e9), st.floats(1e-6, 1e9), st.integers(2, 12))
def test_ticks_are_within_the_scale_and_about_as_many_as_wanted(low: float, extent: float, wanted: int) -> None:
    high = low + extent
    if high - low < 1e-9 * max(abs(low), 1):
        return
    scale = Scale(low, high, 0, 100)
    ticks = scale.ticks(wanted)
    assert 1 <= len(ticks) <= 2 * wanted + 1
    assert all(low - 1e-6 * extent <= tick <= high + 1e-6 * extent for tick in ticks)
    assert all(before < after for before, after in pairwise(ticks))


@given(st.floats(-12, 12), st.floats(0.3, 20), st.integers(2, 8))
def test_logarithmic_ticks_are_within_the_scale(power: float, decades: float, wanted: int) -> None:
    scale = Scale(10**power, 10 ** (power + decades), 0, 100, logarithmic=True)
    ticks = scale.ticks(wanted)
    assert len(ticks) <= 3 * wanted + 6
    assert all(-0.1 <= scale(tick) <= 100.1 for tick in ticks)


@given(st.lists(st.floats(), max_size=20), st.booleans(), st.booleans())
def test_a_scale_can_be_made_of_any_values(values: list[float], from_zero: bool, logarithmic: bool) -> None:
    scale = value_scale(values, 0, 100, from_zero=from_zero, may_be_logarithmic=logarithmic)
    for value in values:
        if math.isfinite(value):
            assert -1e-6 <= scale(min(max(value, scale.low), scale.high)) <= 100 + 1e-6
            assert abs(value) > LARGEST or scale.low <= value <= scale.high


def test_a_curve_breaks_where_there_is_no_value_or_time_goes_back() -> None:
    samples = [(1, 1.0), (2, math.nan), (3, 1.0), (4, 2.0), (2, 5.0), (3, math.inf)]
    assert runs(samples) == [[(1, 1.0)], [(3, 1.0), (4, 2.0)], [(2, 5.0)]]
    panel = Panel(Scale(0, 5, 0, 100), Scale(0, 5, 100, 0), "loss")
    before = len(panel.marks)
    panel.curve(samples, "loss")
    panel.not_finite(samples)
    drawn = panel.marks[before:]
    assert [mark.split()[0] for mark in drawn] == ["<circle", "<path", "<circle", "<text", "<text"]


def test_stairs_hold_to_the_last_step() -> None:
    panel = Panel(Scale(0, 10, 0, 100), Scale(0, 10, 100, 0), "size")
    panel.stairs([(0, 2.0), (4, 6.0)], "grow", last=10)
    assert 'd="M0,80L40,80L40,40L100,40"' in panel.marks[-1]


def test_thinning_keeps_the_extremes_of_every_column() -> None:
    draw = random.Random(0)
    points = sorted((draw.uniform(0, 50), draw.gauss(0, 10)) for _ in range(3000))
    kept = thinned(points)
    assert len(kept) <= 4 * 51 and set(kept) <= set(points)
    for column in {math.floor(x) for x, _ in points}:
        of_all, of_kept = ([y for x, y in some if math.floor(x) == column] for some in (points, kept))
        assert (min(of_all), max(of_all), of_all[0], of_all[-1]) == (min(of_kept), max(of_kept), of_kept[0], of_kept[-1])


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (0.0123, "0.0123"), (999, "999"), (1234, "1,234"), (12_345, "12.3 k"), (2.5e6, "2.5 M"), (math.nan, "nan")],
)
def test_numbers_are_short(value: float, text: str) -> None:
    assert compact(value) == text


# The command


@pytest.fixture
def recorded(tmp_path: Path) -> Path:
    with Monitor(tmp_path / "run") as monitor:
        for event in STORY:
            monitor.emit(event)
    return tmp_path / "run"


def test_inspect_writes_the_page_and_says_the_rest(recorded: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("rich", reason="the summary in the terminal is rich's")
    assert cli.main(["inspect", str(recorded)]) == 0
    said = capsys.readouterr().out
    assert "accuracy" in said and "rolled back" in said and str(recorded / "report.html") in said
    assert checked(STORY).text.count("layer") == Checked((recorded / "report.html").read_text()).text.count("layer")
    assert cli.main(["inspect", str(recorded / "events.jsonl"), "--out", str(tmp_path / "deep" / "page.html")]) == 0
    assert (tmp_path / "deep" / "page.html").exists()


def test_inspect_can_show_the_page(recorded: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("rich", reason="the summary in the terminal is rich's")
    shown: list[str] = []
    monkeypatch.setattr("webbrowser.open", shown.append)
    assert cli.main(["inspect", str(recorded), "--open"]) == 0
    assert shown == [(recorded / "report.html").as_uri()]


@pytest.mark.parametrize("events", [[], STORY[:9]], ids=["empty", "cut"])
def test_inspect_takes_what_there_is(events: list[Event], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("rich", reason="the summary in the terminal is rich's")
    with Monitor(tmp_path) as monitor:
        for event in events:
            monitor.emit(event)
    with (tmp_path / "events.jsonl").open("ab") as file:
        file.write(b'{"event":"Pro')
    assert cli.main(["inspect", str(tmp_path)]) == 0
    assert ("No events yet" in capsys.readouterr().out) == (not events)


def test_errors_are_one_line(recorded: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["inspect", str(tmp_path / "nothing")]) == 1
    assert cli.main(["inspect", str(recorded), "--out", str(recorded)]) == 1
    (recorded / "events.jsonl").write_text("{}\n")
    assert cli.main(["inspect", str(recorded)]) == 1
    nothing, folder, damaged = capsys.readouterr().err.splitlines()
    assert nothing.startswith("esper-elastic: ") and "No such file" in nothing
    assert "Choose another with --out" in folder
    assert "events.jsonl, line 1: event: expected one of" in damaged


def hide(monkeypatch: pytest.MonkeyPatch, package: str) -> None:
    """Make imports of ``package`` fail."""
    real = builtins.__import__

    def refuse(name: str, *arguments: Any, **named: Any) -> ModuleType:
        if name == package or name.startswith(f"{package}."):
            raise ImportError(f"No module named {name!r}")
        return real(name, *arguments, **named)

    monkeypatch.setattr(builtins, "__import__", refuse)


def test_without_rich_the_extra_is_named(recorded: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    hide(monkeypatch, "rich")
    assert cli.main(["inspect", str(recorded)]) == 1
    assert "pip install 'esper-elastic[inspect]'" in capsys.readouterr().err
    assert inspect(recorded)[0].exists()  # the page itself needs nothing


# TensorBoard


class Board:
    """What ``torch.utils.tensorboard.SummaryWriter`` is to the writer."""

    made: list[Board]

    def __init__(self, directory: str, purge_step: int | None = None) -> None:
        self.directory, self.purge_step = directory, purge_step
        self.scalars: list[tuple[str, float, int, float]] = []
        self.texts: list[tuple[str, str, int]] = []
        self.calls: list[str] = []
        Board.made.append(self)

    def add_scalar(self, name: str, value: float, step: int, walltime: float) -> None:
        self.scalars.append((name, value, step, walltime))

    def add_text(self, name: str, text: str, step: int, walltime: float) -> None:
        self.texts.append((name, text, step))

    def flush(self) -> None:
        self.calls.append("flush")

    def close(self) -> None:
        self.calls.append("close")


@pytest.fixture
def boards(monkeypatch: pytest.MonkeyPatch) -> list[Board]:
    Board.made = []
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", SimpleNamespace(SummaryWriter=Board))  # type: ignore[arg-type]
    return Board.made


def test_tensorboard_gets_scalars_and_decisions(boards: list[Board], tmp_path: Path) -> None:
    with Monitor(writers=[TensorBoardWriter(tmp_path)]) as monitor:
        for event in STORY:
            monitor.emit(event)
    (board,) = boards
    assert board.directory == str(tmp_path) and board.purge_step is None and board.calls[-1] == "close" and "flush" in board.calls
    names = {name for name, *_ in board.scalars}
    assert {"progress/loss", "progress/step_ms", "progress/learning_rate", "size/parameters", "size/multiply_adds"} < names
    assert {"evaluation/accuracy", "widths/conv1", "latency_ms/grow/metadata", "effect/loss_change"} < names
    losses = [(value, step, walltime) for name, value, step, walltime in board.scalars if name == "progress/loss"]
    assert repr(losses) == repr([(event.loss, event.step, event.time) for event in STORY if isinstance(event, Progress)])
    decided = [event for event in STORY if isinstance(event, Requested | Refused | Applied | RolledBack | Restored)]
    assert [step for name, _, step in board.texts if name == "decisions"] == [event.step for event in decided]


def test_tensorboard_leaves_out_what_a_resumed_run_repeats(boards: list[Board], tmp_path: Path) -> None:
    writer = TensorBoardWriter(tmp_path)
    assert boards == []
    writer.flush()
    writer.write(Resumed(70, 0.0, "checkpoint"))
    assert boards[0].purge_step == 71
    writer.close()
    writer.close()
    assert boards[0].calls == ["close"]


def test_without_tensorboard_the_extra_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    hide(monkeypatch, "torch.utils.tensorboard")
    with pytest.raises(MonitorError, match=r"pip install 'esper-elastic\[tensorboard\]'"):
        TensorBoardWriter(tmp_path)
