"""The report on a run as one HTML file that needs nothing else: no script, no font, no style from elsewhere.

Owns the words and the order of the page. All that came with the events is escaped.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from datetime import datetime
from html import escape

from ..describe import duration, one_line
from ..free_form import write_free
from . import plots
from .panel import slug
from .story import Decision, Story
from .style import VERDICTS, style_sheet
from .svg import compact

_POLICY = "default-src 'none'; style-src 'unsafe-inline'"


def page(story: Story, name: str) -> str:
    """The page about ``story``; ``name`` says where the run is."""
    title = one_line(story.started.model, 120) if story.started is not None else "A run"
    sections = [
        _header(story, title, name),
        _card("Learning, and every decision", plots.learning(story)),
        _card("Size", plots.size(story)),
        _card("Widths", plots.widths(story), "Each dim whose width changed; the deeper the colour, the closer to its widest."),
        _card("Step time", plots.step_time(story)),
        _latencies(story),
        _decisions(story.decisions),
        _restores(story),
        _settings(story),
    ]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1"><meta name="color-scheme" content="light dark">'
        f"<title>{escape(title)}: {escape(one_line(name))}</title><style>{style_sheet()}</style></head>\n"
        f"<body><main>{''.join(sections)}</main></body></html>\n"
    )


def totals(story: Story) -> list[tuple[str, str, str]]:
    """What the head of the page and of the summary say: name, value, remark."""
    found = [("steps", f"{story.last_step:,}", _ending(story)), ("time", duration(story.seconds * 1e3), _step_time(story))]
    finite = [event.loss for event in story.progress if math.isfinite(event.loss)]
    if story.progress:
        found.append(("training loss", f"{story.progress[-1].loss:.4g}", f"{finite[0]:.4g} at first" if finite else ""))
    for name, samples in list(story.metrics().items())[:4]:
        values = [value for _, value in samples if math.isfinite(value)]
        between = f"from {min(values):.4g} to {max(values):.4g}" if len(values) > 1 else ""
        found.append((f"evaluated {one_line(name, 40)}", f"{samples[-1][1]:.5g}", between))
    if story.sizes:
        found.append(("active parameters", compact(story.sizes[-1][1]), f"{compact(story.sizes[0][1])} at first"))
    work = [state.multiply_adds for state in story.states if state.multiply_adds is not None]
    if work:
        found.append(("multiply-adds", compact(work[-1]), f"{compact(work[0])} at first"))
    counts = {verdict: sum(decision.verdict == verdict for decision in story.decisions) for verdict in VERDICTS}
    said = ", ".join(f"{count:,} {verdict}" for verdict, count in counts.items() if count) or "none asked for"
    return [*found, ("decisions", f"{len(story.decisions):,}", said)]


def _header(story: Story, title: str, name: str) -> str:
    if not story.events:
        return f"<h1>{escape(one_line(name))}</h1><p class='quiet'>No events yet.</p>"
    began = story.events[0].time
    try:
        moment = datetime.fromtimestamp(began).astimezone().strftime("%d %B %Y, %H:%M:%S %Z")
    except (ValueError, OverflowError, OSError):
        moment = "an unknown time"
    versions = ", ".join(f"{package} {version}" for package, version in story.started.versions.items()) if story.started is not None else ""
    earlier = f" The file tells of {story.earlier_runs} earlier runs too." if story.earlier_runs else ""
    tiles = "".join(
        f'<div class="tile"><span>{escape(what)}</span><b>{escape(value)}</b><span>{escape(remark)}</span></div>'
        for what, value, remark in totals(story)
    )
    return (
        f'<h1>{escape(title)}</h1><p class="quiet">{escape(one_line(name))}, begun on {escape(moment)}.'
        f"{' ' + escape(one_line(versions)) + '.' if versions else ''}{earlier}</p><div class='tiles'>{tiles}</div>"
    )


def _ending(story: Story) -> str:
    resumed = f"resumed {len(story.resumes)} times; " if len(story.resumes) > 1 else "resumed once; " if story.resumes else ""
    return f"{resumed}{one_line(story.ended.reason, 80) if story.ended is not None else 'not ended, or cut off'}"


def _step_time(story: Story) -> str:
    times = sorted(event.step_ms for event in story.progress if math.isfinite(event.step_ms))
    return f"{duration(times[len(times) // 2])} a step" if times else ""


def _card(heading: str, content: str, remark: str = "") -> str:
    if not content:
        return ""
    said = f'<p class="quiet">{escape(remark)}</p>' if remark else ""
    return f'<section class="card"><h2>{escape(heading)}</h2>{said}{content}</section>'


def _table(headings: Sequence[tuple[str, bool]], rows: Iterable[str], last: str = "") -> str:
    """A table of ready rows; a heading that says so stands over numbers, and ``last`` is the markup of one more."""
    head = "".join(f"<th{' class=n' if numbers else ''}>{escape(heading)}</th>" for heading, numbers in headings)
    head += f"<th>{last}</th>" if last else ""
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>'


def _cells(*cells: str) -> str:
    return "".join(f'<td class="n">{escape(cell)}</td>' for cell in cells)


def _latencies(story: Story) -> str:
    found = story.latencies()
    if not found:
        return ""
    scale = plots.latency_scale(found)
    rows = (
        f"<tr><td>{escape(one_line(row.adaptation_type, 60))}</td><td>{escape(row.mechanism)}</td>"
        f"{_cells(f'{len(row.sorted):,}', *(duration(row.quantile(q)) for q in (0.5, 0.99, 1.0)))}<td>{plots.strip(row, scale)}</td></tr>"
        for row in found
    )
    headings = [("type", False), ("mechanism", False), ("count", True), ("median", True), ("p99", True), ("max", True)]
    return _card(
        "Latency of decisions",
        _table(headings, rows, plots.strip_axis(scale)),
        "Each dot a decision, the bar the median, the dashed line one second.",
    )


def _decisions(decisions: Sequence[Decision]) -> str:
    if not decisions:
        return ""
    counts = [("all", len(decisions)), *((verdict, sum(d.verdict == verdict for d in decisions)) for verdict in VERDICTS)]
    choices = "".join(
        f'<label class="choice"><input type="radio" name="show" id="show-{slug(name)}"{" checked" if name == "all" else ""}> '
        f"{name} ({count:,})</label>"
        for name, count in counts
        if count
    )
    headings = [("#", True), ("step", True), ("decision", False), ("source", False), ("verdict", False), ("mechanism", False)]
    headings += [("latency", True), ("loss", True), ("step time", True)]
    return f'<section class="card decisions"><h2>Decisions</h2>{choices}{_table(headings, map(_decision, decisions))}</section>'


def _decision(decision: Decision) -> str:
    asked = decision.asked.get("parameters")
    wanted = f"<small>{escape(one_line(json.dumps(write_free(asked)), 160))}</small>" if asked else ""
    layer = f" <b>{escape(one_line(decision.layer_name, 120))}</b>" if decision.layer_name is not None else ""
    remark = f"<small>{escape(one_line(decision.remark))}</small>" if decision.remark else ""
    latency = "" if decision.milliseconds is None else duration(decision.milliseconds)
    effect = decision.effect
    loss = _change(f"{effect.loss_before:.4g} → {effect.loss_after:.4g}", effect.loss_before, effect.loss_after) if effect else "<td></td>"
    pace = (
        _change(f"{duration(effect.step_ms_before)} → {duration(effect.step_ms_after)}", effect.step_ms_before, effect.step_ms_after)
        if effect
        else "<td></td>"
    )
    return (
        f'<tr class="{slug(decision.verdict)}">{_cells(f"{decision.request}", f"{decision.step:,}")}'
        f'<td class="words">{escape(one_line(decision.adaptation_type, 60))}{layer}{wanted}</td>'
        f"<td>{escape(one_line(decision.source, 60))}</td>"
        f'<td class="words"><span class="badge">{decision.verdict}</span>{remark}</td>'
        f"<td>{escape(decision.mechanism)}</td>{_cells(latency)}{loss}{pace}</tr>\n"
    )


def _change(words: str, before: float, after: float) -> str:
    """From and to, and the relative change, marked where it is more than two percent."""
    share = (after - before) / abs(before) if before else math.nan
    if not math.isfinite(share):
        return f'<td class="n">{escape(words)}</td>'
    class_ = "up" if share > 0.02 else "down" if share < -0.02 else "quiet"
    return f'<td class="n">{escape(words)}<small class="{class_}">{100 * share:+.1f} %</small></td>'


def _restores(story: Story) -> str:
    if not story.restores:
        return ""
    rows = (
        f"<tr>{_cells(f'{event.step:,}', f'{event.snapshot_step:,}', '' if event.request is None else str(event.request))}"
        f'<td class="words">{escape(one_line(event.reason))}</td>{_cells(duration(event.milliseconds))}</tr>'
        for event in story.restores
    )
    taken = [event.milliseconds for event in story.snapshots]
    cost = f"{len(taken):,} snapshots were taken in {duration(sum(taken))} altogether." if taken else ""
    headings = [("at step", True), ("state of step", True), ("decision", True), ("reason", False), ("latency", True)]
    return _card("Restored states", _table(headings, rows), cost)


def _settings(story: Story) -> str:
    if story.started is None or not story.started.settings:
        return ""
    text = json.dumps(write_free(story.started.settings), indent=1)
    return f'<section class="card"><details><summary>Settings</summary><pre>{escape(text)}</pre></details></section>'
