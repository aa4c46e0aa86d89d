"""The plots of a run: learning with every decision marked, size, widths, step time, and latencies.

Owns what is drawn; how, is in ``panel.py`` and ``svg.py``. A plot that nothing is known for is the empty string.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from itertools import accumulate

from ..describe import duration, one_line
from .panel import LEFT, RIGHT, WIDTH, Panel, Samples, figure, slug, steps_axis, value_scale
from .story import FAMILIES, Decision, Latency, State, Story
from .svg import Scale, compact, element, text, tip

MAX_GUIDES = 60
MAX_METRICS = 6
MAX_DIMS = 40
LANE, ROW = 17.0, 24.0
STRIP = 260.0


def learning(story: Story) -> str:
    """Loss and metrics over steps, below them a lane of marks for each kind of change and each way in which a decision failed."""
    losses = [(event.step, event.loss) for event in story.progress]
    metrics = story.metrics()
    evaluated = metrics.pop("loss", [])
    if not losses and not evaluated and not metrics and not story.decisions:
        return ""
    x, top, marks = _steps(story), 30.0, list[str]()
    guides = story.decisions if len(story.decisions) <= MAX_GUIDES else []
    if losses or evaluated:
        y = value_scale([value for _, value in [*losses, *evaluated]], top, top + 230, may_be_logarithmic=True)
        panel = Panel(x, y, f"loss{' (logarithmic)' if y.logarithmic else ''}")
        panel.guides(guides)
        many = len(losses) > 60
        panel.curve(losses, "loss faint" if many else "loss")
        if many:
            panel.curve(_smoothed(losses), "loss")
        panel.curve(evaluated, "evaluated", dots=True)
        panel.not_finite([*losses, *evaluated])
        panel.marks += _legend(bool(losses), bool(evaluated), top - 9)
        marks, top = marks + panel.marks, top + 230 + 46
    for name, samples in list(metrics.items())[:MAX_METRICS]:
        y = value_scale([value for _, value in samples], top, top + 120)
        panel = Panel(x, y, one_line(name, 60))
        panel.guides(guides)
        panel.curve(samples, "evaluated", dots=True)
        panel.not_finite(samples)
        marks, top = marks + panel.marks, top + 120 + 46
    top -= 28
    lanes, bottom = _lanes(story.decisions, x, top)
    if len(metrics) > MAX_METRICS:
        marks.append(text(f"{len(metrics) - MAX_METRICS:,} more metrics are in the file", LEFT, bottom + 40, class_="tick"))
    marks += lanes + steps_axis(x, bottom + 4)
    return figure(bottom + 48, marks, "Loss, evaluation and decisions over training steps")


def size(story: Story) -> str:
    """Active parameters and multiply-adds over steps."""
    parameters = [(step, float(count)) for step, count in story.sizes]
    work = [(state.step, float(state.multiply_adds)) for state in story.states if state.multiply_adds is not None]
    x, top, marks = _steps(story), 30.0, list[str]()
    for label, samples, class_ in (("active parameters", parameters, "grow"), ("multiply-adds of one forward pass", work, "resize")):
        if samples:
            panel = Panel(x, value_scale([value for _, value in samples], top, top + 120, from_zero=True), label)
            panel.stairs(samples, class_, story.last_step)
            marks, top = marks + panel.marks, top + 120 + 46
    return figure(top - 46 + 48, [*marks, *steps_axis(x, top - 46)], "Size of the network over training steps") if marks else ""


def widths(story: Story) -> str:
    """One row for each dim whose width changed: the width as a number and as the depth of a colour, over steps."""
    rows = [(name, found) for name, found in _dims(story.states).items() if len({width for _, width in found}) > 1]
    if not rows:
        return ""
    shown = {name for name, _ in sorted(rows, key=lambda row: -len(row[1]))[:MAX_DIMS]}
    left_out = len(rows) - len(shown)
    rows = [row for row in rows if row[0] in shown]
    left = min(330.0, max(LEFT, 16 + 6.3 * max(len(one_line(name, 48)) for name, _ in rows)))
    x = Scale(0, max(1, story.last_step), left, WIDTH - RIGHT)
    marks = list[str]()
    for row, (name, found) in enumerate(rows):
        top = 6 + row * ROW
        marks.append(text(one_line(name, 48), left - 8, top + ROW / 2 + 4, class_="tick end"))
        marks += _row(found, x, top, story.last_step)
    bottom = 6 + len(rows) * ROW
    if left_out:
        marks.append(text(f"those that changed most; {left_out:,} more changed", left, bottom + 40, class_="tick"))
    return figure(bottom + 48, [*marks, *steps_axis(x, bottom + 4)], "Width of each dim over training steps")


def step_time(story: Story) -> str:
    """Milliseconds of a step; the highest half percent, as of a first step that compiles, is cut to the height of the panel."""
    samples = [(event.step, event.step_ms) for event in story.progress]
    finite = sorted(value for _, value in samples if math.isfinite(value))
    if not finite:
        return ""
    x = _steps(story)
    ceiling = finite[max(0, math.ceil(0.995 * len(finite)) - 1)]
    panel = Panel(x, value_scale([ceiling], 30, 150, from_zero=True), "milliseconds of a step")
    panel.guides(story.decisions if len(story.decisions) <= MAX_GUIDES else [])
    panel.curve(samples, "evaluated")
    return figure(198, [*panel.marks, *steps_axis(x, 150)], "Step time over training steps")


def latency_scale(rows: Sequence[Latency]) -> Scale:
    """The scale of all :func:`strip` of a table."""
    values = [value for row in rows for value in row.sorted if value > 0] or [1.0]
    return Scale(min(0.01, *values) / 1.3, max(1000.0, *values) * 1.3, 6, STRIP - 20, logarithmic=True)


def strip(latency: Latency, scale: Scale) -> str:
    """Every latency of one row as a dot on a logarithmic line, with the median as a bar, and one second as a dashed one."""
    second, median = scale(1000.0), scale(latency.quantile(0.5))
    places = sorted({round(scale(value)) for value in latency.sorted})
    marks = [
        element("line", x1=scale.begin, x2=scale.end, y1=11.0, y2=11.0, class_="grid"),
        element("line", tip("one second"), x1=second, x2=second, y1=1.0, y2=21.0, class_="guide refused"),
        *(element("circle", cx=float(place), cy=11.0, r=3.4, class_="latency") for place in places),
        element("line", tip(f"median {duration(latency.quantile(0.5))}"), x1=median, x2=median, y1=3.0, y2=19.0, class_="median"),
    ]
    return element("svg", "".join(marks), viewBox=f"0 0 {STRIP:.0f} 22", class_="strip", role="img")


def strip_axis(scale: Scale) -> str:
    """What stands over the column of :func:`strip`."""
    powers = range(math.ceil(math.log10(scale.low)), math.floor(math.log10(scale.high)) + 1)
    marks = [text(duration(10.0**power), scale(10.0**power), 15, class_="tick middle") for power in powers if power % 2]
    return element("svg", "".join(marks), viewBox=f"0 0 {STRIP:.0f} 22", class_="strip", role="img")


def _steps(story: Story) -> Scale:
    return Scale(0, max(1, story.last_step), LEFT, WIDTH - RIGHT)


def _smoothed(samples: Samples) -> list[tuple[int, float]]:
    """The mean over about a sixtieth of the samples around each, fewer near the ends; what is not finite does not count."""
    finite = [sample for sample in samples if math.isfinite(sample[1])]
    sums = [0.0, *accumulate(value for _, value in finite)]
    smooth: list[tuple[int, float]] = []
    for index, (step, _) in enumerate(finite):
        reach = min(max(1, len(finite) // 120), index, len(finite) - 1 - index)
        smooth.append((step, (sums[index + reach + 1] - sums[index - reach]) / (2 * reach + 1)))
    return smooth


def _legend(losses: bool, evaluated: bool, y: float) -> list[str]:
    entries = [(words, class_) for words, class_, there in (("training", "loss", losses), ("evaluation", "evaluated", evaluated)) if there]
    marks, right = list[str](), WIDTH - RIGHT
    for words, class_ in reversed(entries):
        marks.append(text(words, right, y, class_=f"tick end {class_}"))
        right -= 7.0 * len(words) + 4
        marks.append(element("line", x1=right - 18, x2=right - 2, y1=y - 4, y2=y - 4, class_=f"line {class_}"))
        right -= 34
    return marks


def _lanes(decisions: Sequence[Decision], x: Scale, top: float) -> tuple[list[str], float]:
    """A lane for each family that occurs; decisions that share a column of two pixels share a mark."""
    families = [family for family in FAMILIES if any(decision.family == family for decision in decisions)]
    marks = list[str]()
    for lane, family in enumerate(families):
        y = top + lane * LANE
        columns: defaultdict[int, list[Decision]] = defaultdict(list)
        for decision in decisions:
            if decision.family == family:
                columns[round(x(decision.step) / 2)].append(decision)
        marks.append(text(family, LEFT - 8, y + LANE / 2 + 4, class_=f"tick end {slug(family)}"))
        marks.append(element("line", x1=LEFT, x2=WIDTH - RIGHT, y1=y + LANE - 1, y2=y + LANE - 1, class_="grid"))
        for shared in columns.values():
            place = x(shared[0].step)
            marks.append(
                element(
                    "rect", tip(_told(shared)), x=place - 1.5, y=y + 2.0, width=3.0, height=LANE - 5, rx=1.2, class_=f"mark {slug(family)}"
                )
            )
    return marks, top + len(families) * LANE


def _told(shared: Sequence[Decision]) -> str:
    lines = [
        f"step {d.step:,}  #{d.request} {one_line(d.adaptation_type, 40)} {one_line(d.layer_name or '', 80)}: {d.verdict}"
        f"{'' if d.milliseconds is None else f', {duration(d.milliseconds)}'}{'' if not d.remark else f': {one_line(d.remark, 160)}'}"
        for d in shared[:8]
    ]
    return "\n".join([*lines, *([f"and {len(shared) - 8} more"] if len(shared) > 8 else [])])


def _dims(states: Sequence[State]) -> dict[str, list[tuple[int, int]]]:
    """Name of each dim -> (step, width), where the width changed."""
    found: dict[str, list[tuple[int, int]]] = {}
    for state in states:
        for name, width in state.widths.items():
            changes = found.setdefault(name, [])
            while changes and changes[-1][0] == state.step:
                changes.pop()  # what held for no step
            if not changes or changes[-1][1] != width:
                changes.append((state.step, width))
    return found


def _row(found: Sequence[tuple[int, int]], x: Scale, top: float, last: int) -> list[str]:
    largest = max(1, *(width for _, width in found))
    marks = list[str]()
    for (step, width), end in zip(found, [*(step for step, _ in found[1:]), max(last, found[-1][0])], strict=True):
        begin, extent = x(step), x(end) - x(step)
        if extent <= 0:
            continue
        depth = 0.10 + 0.9 * width / largest
        words = tip(f"steps {step:,} to {end:,}: {width}")
        marks.append(element("rect", words, x=begin, y=top + 2, width=extent, height=ROW - 4, fill_opacity=round(depth, 3), class_="width"))
        if extent > 9 * len(compact(width)) + 6:
            marks.append(text(f"{width}", begin + 5, top + ROW / 2 + 4, class_=f"inside {'deep' if depth > 0.85 else ''}"))
    return marks
