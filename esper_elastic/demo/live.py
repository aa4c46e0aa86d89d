"""What is seen while the demo trains: a live table in a terminal, plain lines elsewhere.

Owns the formatting of steps and events; refuses nothing. ``rich`` is imported here and in ``report.py`` alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from .capacity import Event
from .network import Widths
from .train import Watcher

_STYLES = {"grow": "green", "switch": "cyan", "prune": "yellow", "refused": "red"}
_HEADINGS = ("step", "accuracy", "widths", "event", "reason", "cost")


@contextmanager
def watching(console: Console, title: str) -> Iterator[Watcher]:
    """Give a watcher that shows one run on ``console``."""
    if not console.is_terminal:
        console.print(f"{title}\n" + _line(*_HEADINGS), soft_wrap=True, highlight=False, markup=False)
        yield lambda step, percent, widths, event: console.print(
            _line(*_cells(step, percent, widths, event)), soft_wrap=True, highlight=False, markup=False
        )
        return
    table = Table(title=title, title_justify="left", title_style="bold", header_style="bold", expand=False)
    for heading in _HEADINGS:
        table.add_column(heading, justify="right" if heading in ("step", "accuracy", "cost") else "left")
    with Live(table, console=console, refresh_per_second=4):

        def watch(step: int, percent: float, widths: Widths, event: Event | None) -> None:
            style = _STYLES[event.kind] if event is not None else "dim"
            table.add_row(*(Text(cell, style=style) for cell in _cells(step, percent, widths, event)))

        yield watch


def cost_in_words(microseconds: float) -> str:
    """A duration in microseconds, without decimals that nobody reads."""
    return f"{microseconds:,.0f} us" if microseconds >= 10 else f"{microseconds:.1f} us"


def _cells(step: int, percent: float, widths: Widths, event: Event | None) -> tuple[str, str, str, str, str, str]:
    happened = (event.what, event.reason, cost_in_words(event.microseconds)) if event is not None else ("", "", "")
    if event is not None and event.kind == "refused":
        happened = (f"REFUSED {event.what}", *happened[1:])
    return (f"{step}", f"{percent:.1f} %", str(widths), *happened)


def _line(step: str, percent: str, widths: str, event: str, reason: str, cost: str) -> str:
    return f"{step:>5}  {percent:>8}  {widths:<12}  {event:<30}  {cost:>10}  {reason}".rstrip()
