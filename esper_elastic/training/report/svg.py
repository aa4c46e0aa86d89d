"""Drawing in SVG: scales with round ticks, curves thinned to what a screen can show, and escaped elements.

Owns shapes and numbers, not what they mean. Colours come from the page's style sheet by class, so that one drawing serves light and dark
pages.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape

Point = tuple[float, float]
_ROUND = (1, 2, 2.5, 5, 10)


@dataclass(frozen=True)
class Scale:
    """Values from ``low`` to ``high`` on pixels from ``begin`` to ``end``, evenly or by their logarithms."""

    low: float
    high: float
    begin: float
    end: float
    logarithmic: bool = False

    def __call__(self, value: float) -> float:
        low, high = self.low, self.high
        if self.logarithmic:
            low, high, value = math.log(low), math.log(high), math.log(max(value, 1e-300))
        share = (value - low) / (high - low)
        return self.begin + min(max(share, -10.0), 11.0) * (self.end - self.begin)

    def ticks(self, wanted: int = 5) -> list[float]:
        """About as many round values as wanted, all within the scale."""
        if self.logarithmic:
            return self._log_ticks(wanted)
        rough = (self.high - self.low) / max(1, wanted)
        power = 10.0 ** math.floor(math.log10(rough))
        stride = power * min(_ROUND, key=lambda factor: abs(math.log(power * factor / rough)))
        first, last = math.ceil(self.low / stride - 1e-9), math.floor(self.high / stride + 1e-9)
        return [index * stride for index in range(first, last + 1)]

    def _log_ticks(self, wanted: int) -> list[float]:
        powers = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
        if len(powers) > wanted + 2:
            powers = range(powers[0], powers[-1] + 1, math.ceil(len(powers) / wanted))
            factors: tuple[int, ...] = (1,)
        else:
            factors = (1, 2, 5) if len(powers) <= 3 else (1,)
        return [f * 10.0**p for p in powers for f in factors if self.low * 0.999 <= f * 10.0**p <= self.high * 1.001]


def element(tag: str, content: str = "", /, **attributes: object) -> str:
    """One element; ``content`` is markup already, attributes are escaped. ``class_`` is ``class``, other underscores are hyphens."""
    inside = "".join(
        f' {name.rstrip("_").replace("_", "-")}="{escape(number(value) if isinstance(value, float) else str(value))}"'
        for name, value in attributes.items()
    )
    return f"<{tag}{inside}>{content}</{tag}>" if content else f"<{tag}{inside}/>"


def text(content: str, x: float, y: float, **attributes: object) -> str:
    """A line of text, escaped."""
    return element("text", escape(content), x=float(x), y=float(y), **attributes)


def tip(content: str) -> str:
    """What is shown when the pointer rests on the element that holds it."""
    return element("title", escape(content) or " ")


def number(value: float) -> str:
    """A coordinate, to a hundredth of a pixel."""
    return f"{value:.2f}".rstrip("0").rstrip(".") if math.isfinite(value) else "0"


def path(points: Iterable[Point]) -> str:
    """Path data through ``points``."""
    return "M" + "L".join(f"{number(x)},{number(y)}" for x, y in points)


def thinned(points: Sequence[Point]) -> list[Point]:
    """First, lowest, highest and last point of each column of pixels: what a screen shows of more is the same."""
    if len(points) <= 2000:
        return list(points)
    columns: dict[int, list[Point]] = {}
    for point in points:
        columns.setdefault(math.floor(point[0]), []).append(point)
    kept: list[Point] = []
    for column in columns.values():
        chosen = {0, len(column) - 1, *(best(range(len(column)), key=lambda i, c=column: c[i][1]) for best in (min, max))}  # type: ignore[misc]
        kept += [column[index] for index in sorted(chosen)]
    return kept


def compact(value: float) -> str:
    """A number in few characters: 1.25 M, 340 k, 0.012."""
    if not math.isfinite(value):
        return str(value)
    size = abs(value)
    for limit, unit in ((1e12, " T"), (1e9, " G"), (1e6, " M"), (1e4, " k")):
        if size >= limit * 0.9995:
            return f"{value / (limit if unit != ' k' else 1e3):.3g}{unit}"
    return f"{value:,.0f}" if size >= 1000 else f"{value:.3g}"
