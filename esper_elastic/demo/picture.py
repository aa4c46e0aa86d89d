"""The demo's one picture: accuracy and active parameters over training steps, with every event marked, and both baselines.

Owns the drawing. ``matplotlib`` is imported here alone; no window, no global state.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ..palette import GRID, HAPPENINGS, INK, QUIET
from .capacity import Event
from .train import Run

GROWN, LARGE, SMALL = "#d1495b", "#2f6690", "#8d99ae"
_MARKS = {kind: HAPPENINGS[kind][0] for kind in ("grow", "switch", "prune", "refused")}
_STYLE: dict[Any, Any] = {
    "font.size": 11,
    "font.family": "DejaVu Sans",
    "axes.edgecolor": QUIET,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "text.color": INK,
    "xtick.color": QUIET,
    "ytick.color": QUIET,
}


def draw(path: Path, grown: Run, small: Run, large: Run, *, data_name: str, steps: int, note: str = "") -> None:
    """Write the picture of three runs to ``path`` as PNG, with a small ``note`` below it."""
    with rc_context(_STYLE):
        figure = Figure(figsize=(12, 8.4), dpi=140)
        top, bottom = figure.subplots(2, 1, sharex=True, gridspec_kw={"height_ratios": (3, 1.5), "hspace": 0.09})
        runs = [(small, SMALL, 1.8), (large, LARGE, 1.8), (grown, GROWN, 2.8)]
        _draw_accuracy(top, runs, steps)
        _draw_parameters(bottom, runs)
        _mark_events(top, bottom, grown.events, steps)
        saved = 100 * (1 - grown.multiply_adds / large.multiply_adds)
        figure.suptitle(
            f"A network that grows, switches and prunes itself while it trains on {data_name}",
            x=0.065,
            y=0.975,
            ha="left",
            fontsize=15.5,
            fontweight="bold",
        )
        figure.text(
            0.065,
            0.925,
            f"Test accuracy {grown.final_accuracy:.1f} % grown, {large.final_accuracy:.1f} % large from the start, "
            f"{small.final_accuracy:.1f} % small for ever; {saved:.0f} % fewer multiply-adds than the large one.",
            color=QUIET,
            fontsize=11.5,
        )
        figure.text(0.86, 0.022, note, color=QUIET, fontsize=8.5, ha="right")
        figure.subplots_adjust(left=0.065, right=0.86, top=0.8, bottom=0.075)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, facecolor="white")


def _draw_accuracy(axes: Axes, runs: Sequence[tuple[Run, str, float]], steps: int) -> None:
    floor = min(percent for run, _, _ in runs for step, percent in run.curve if step >= min(0.2 * steps, run.curve[-1][0]))
    ceiling = max(percent for run, _, _ in runs for percent in (run.final_accuracy, *(percent for _, percent in run.curve)))
    axes.set_ylim(max(0.0, floor - 2), ceiling + 1)
    for run, colour, width in runs:
        axes.plot(*zip(*run.curve, strict=True), color=colour, linewidth=width, marker="o", markersize=width + 1.2, clip_on=True)
    _label_ends(axes, [(run.final_accuracy, f"{run.label}\n{run.final_accuracy:.1f} %", colour) for run, colour, _ in runs], steps)
    axes.set_ylabel("test accuracy [%]")
    axes.set_axisbelow(True)
    axes.grid(axis="y", color=GRID)
    axes.tick_params(axis="x", length=0)


def _draw_parameters(axes: Axes, runs: Sequence[tuple[Run, str, float]]) -> None:
    for run, colour, width in runs:
        moments, sizes = zip(*run.sizes, strict=True)
        thousands = [size / 1000 for size in sizes]
        axes.step(moments, thousands, where="post", color=colour, linewidth=width)
        if run is runs[-1][0]:
            axes.fill_between(moments, thousands, step="post", color=colour, alpha=0.12, linewidth=0)
    axes.set_ylim(bottom=0)
    axes.set_ylabel("active parameters [k]")
    axes.set_xlabel("training step")
    axes.set_axisbelow(True)
    axes.grid(axis="y", color=GRID)


def _mark_events(top: Axes, bottom: Axes, events: Sequence[Event], steps: int) -> None:
    """A line through both panels for each event, its label above the upper one; labels that would touch go side by side."""
    marked = [event for event in events if event.kind in _MARKS]
    for axes in (top, bottom):
        axes.set_xlim(0, steps)
        for event in marked:
            axes.axvline(event.step, color=_MARKS[event.kind], linewidth=1.1, linestyle=(0, (4, 3)), alpha=0.8, zorder=1)
    spread = _spread([event.step / steps for event in marked], apart=0.155)
    for event, place in zip(marked, spread, strict=True):
        colour = _MARKS[event.kind]
        text = f"{event.kind.upper()}  {event.microseconds:,.0f} us\n" + event.what.replace("->", "→").replace(" stage", "\nstage").replace(
            " inner", "\ninner"
        )
        top.annotate(
            text,
            xy=(event.step / steps, 1.0),
            xytext=(place, 1.05),
            xycoords="axes fraction",
            textcoords="axes fraction",
            ha="left",
            va="bottom",
            fontsize=8.6,
            color=colour,
            linespacing=1.3,
            annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": colour, "linewidth": 0.9, "shrinkA": 0, "shrinkB": 0, "relpos": (0, 0)},
        )


def _label_ends(axes: Axes, ends: Sequence[tuple[float, str, str]], steps: int) -> None:
    """Name each line at its end, moved apart where two ends nearly meet."""
    low, high = axes.get_ylim()
    ordered = sorted(ends)
    heights = _spread([(end[0] - low) / (high - low) for end in ordered], apart=0.1)
    overshoot = max(0.0, heights[-1] - 0.98)
    for (_, text, colour), height in zip(ordered, heights, strict=True):
        axes.text(1.012, height - overshoot, text, transform=axes.transAxes, color=colour, fontweight="bold", va="center", fontsize=10.5)


def _spread(places: Sequence[float], apart: float) -> list[float]:
    """The sorted ``places``, pushed up where needed so that neighbours are at least ``apart``."""
    moved: list[float] = []
    for place in places:
        moved.append(max(place, moved[-1] + apart) if moved else place)
    return moved
