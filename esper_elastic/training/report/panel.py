"""One panel of a plot: its axes, its curves and its marks, over training steps.

Owns the look that all plots share: equal margins, so that the same step stands at the same place in each of them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from itertools import pairwise

from .story import Decision
from .svg import Point, Scale, compact, element, path, text, thinned, tip

WIDTH, LEFT, RIGHT = 1000.0, 92.0, 26.0
LARGEST = 1e300  # so that the extent of a scale is a number
CROSS = "\N{MULTIPLICATION SIGN}"
Samples = Sequence[tuple[int, float]]


class Panel:
    """A panel between ``top`` and ``bottom``; what is drawn is collected in ``marks``, in order."""

    def __init__(self, x: Scale, y: Scale, label: str) -> None:
        self.x, self.y = x, y
        top, bottom = y.end, y.begin
        self.marks = [text(label, LEFT, top - 9, class_="label")]
        for tick in y.ticks(max(2, round((bottom - top) / 42))):
            height = y(tick)
            self.marks.append(element("line", x1=LEFT, x2=WIDTH - RIGHT, y1=height, y2=height, class_="grid"))
            self.marks.append(text(compact(0.0 if abs(tick) < 1e-12 else tick), LEFT - 8, height + 4, class_="tick end"))

    def curve(self, samples: Samples, class_: str, *, dots: bool = False) -> None:
        """A line through ``samples``; it breaks where a value is not finite and where the steps go back."""
        for run in runs(samples):
            points = [(self.x(step), self.clamped(value)) for step, value in run]
            if len(points) > 1:
                self.marks.append(element("path", d=path(thinned(points)), class_=f"line {class_}"))
            if (dots and len(points) <= 150) or len(points) == 1:
                self.marks += [
                    element("circle", tip(f"step {step:,}: {value:.5g}"), cx=x, cy=y, r=2.6, class_=f"dot {class_}")
                    for (step, value), (x, y) in zip(run, points, strict=True)
                ]

    def stairs(self, samples: Samples, class_: str, last: int) -> None:
        """A value that holds from its step on until the next one, to the step ``last``, with the area below it filled."""
        for run in runs(samples):
            end = last if run[-1] == samples[-1] else run[-1][0]
            corners: list[Point] = []
            for (step, value), following in zip(run, [*(step for step, _ in run[1:]), end], strict=True):
                corners += [(self.x(step), self.clamped(value)), (self.x(following), self.clamped(value))]
            corners = thinned(corners)
            floor = [(corners[-1][0], self.y.begin), (corners[0][0], self.y.begin)]
            self.marks.append(element("path", d=path([*corners, *floor]) + "Z", class_=f"area {class_}"))
            self.marks.append(element("path", d=path(corners), class_=f"line {class_}"))

    def not_finite(self, samples: Samples) -> None:
        """A cross at the top where values are not finite; those that would touch share one."""
        columns: dict[int, list[tuple[int, float]]] = {}
        for step, value in samples:
            if not math.isfinite(value):
                columns.setdefault(round(self.x(step) / 8), []).append((step, value))
        for (step, value), *more in columns.values():
            words = tip(f"step {step:,}: {value}{f', and {len(more)} more' if more else ''}")
            self.marks.append(element("text", f"{words}{CROSS}", x=self.x(step), y=self.y.end + 12, class_="cross"))

    def guides(self, decisions: Iterable[Decision]) -> None:
        """A thin line from top to bottom at each decision."""
        for decision in decisions:
            x = self.x(decision.step)
            self.marks.append(element("line", x1=x, x2=x, y1=self.y.end, y2=self.y.begin, class_=f"guide {slug(decision.family)}"))

    def clamped(self, value: float) -> float:
        """The height of ``value``, within the panel."""
        return self.y(min(max(value, self.y.low), self.y.high))


def steps_axis(x: Scale, bottom: float) -> list[str]:
    """The axis of steps below the last panel."""
    marks = [element("line", x1=x.begin, x2=x.end, y1=bottom, y2=bottom, class_="axis")]
    for tick in x.ticks(8):
        if tick == round(tick):
            marks.append(element("line", x1=x(tick), x2=x(tick), y1=bottom, y2=bottom + 4, class_="axis"))
            marks.append(text(f"{tick:,.0f}", x(tick), bottom + 18, class_="tick middle"))
    return [*marks, text("training step", x.end, bottom + 36, class_="tick end")]


def figure(height: float, marks: Iterable[str], words: str) -> str:
    """The drawing as an element of a page, with words for those who cannot see it."""
    content = element("title", words) + "".join(marks)
    return element("svg", content, xmlns="http://www.w3.org/2000/svg", viewBox=f"0 0 {WIDTH:.0f} {height:.0f}", role="img", class_="plot")


def value_scale(values: Sequence[float], top: float, bottom: float, *, from_zero: bool = False, may_be_logarithmic: bool = False) -> Scale:
    """A scale of all finite ``values`` with a little room, logarithmic where they span much and may be."""
    finite = [min(max(value, -LARGEST), LARGEST) for value in values if math.isfinite(value)] or [0.0]
    low, high = min(finite), max(finite)
    if may_be_logarithmic and low > 0 and high / low > 15:
        return Scale(low / 1.1, high * 1.1, bottom, top, logarithmic=True)
    if from_zero:
        low = min(0.0, low)
    room = (high - low) * 0.06 or abs(high) * 0.1 or 1.0
    return Scale(low if from_zero and low == 0 else low - room, high + room, bottom, top)


def runs(samples: Samples) -> list[list[tuple[int, float]]]:
    """``samples`` cut where a value is not finite or a step is below the one before."""
    found: list[list[tuple[int, float]]] = [[]]
    for before, sample in pairwise([(-1, 0.0), *samples]):
        if not math.isfinite(sample[1]):
            found.append([])
            continue
        if sample[0] < before[0]:
            found.append([])
        found[-1].append(sample)
    return [run for run in found if run]


def slug(words: str) -> str:
    """A class of the style sheet."""
    return words.replace(" ", "-")
