"""The story of a run in short, for a terminal.

Owns the wording there. ``rich`` is imported here alone, when it is needed.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from ...errors import MonitorError
from ..describe import duration, one_line
from .page import totals
from .story import Latency, Story
from .style import VERDICTS

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table


def console() -> Console:
    """Standard output.

    Raises:
        MonitorError: rich is not installed.
    """
    try:
        from rich.console import Console
    except ImportError as missing:
        raise MonitorError(f"inspect: rich: expected it to be installed, got {missing}. pip install 'esper-elastic[inspect]'") from missing
    return Console() if sys.stdout.isatty() else Console(width=140)  # a pipe has no width, and 80 columns cut the tables


def tell(console: Console, story: Story, path: Path) -> None:
    """Print totals, decisions by type, and where the page is."""
    from rich.table import Table
    from rich.text import Text

    if not story.events:
        console.print("No events yet.")
    else:
        table = Table.grid(padding=(0, 2))
        for name, value, remark in totals(story):
            table.add_row(Text(name, style="dim"), Text(value, style="bold"), Text(remark, style="dim"))
        console.print(table)
    if story.decisions:
        console.print(_outcomes(story))
    console.print(f"Report: {path}", highlight=False, soft_wrap=True, markup=False)


def _outcomes(story: Story) -> Table:
    """A row for each type of decision: how many of them ended how, and how long they took."""
    from rich.table import Table
    from rich.text import Text

    table = Table(header_style="bold")
    for heading in ("type", *VERDICTS, "median", "p99"):
        table.add_column(heading, justify="left" if heading == "type" else "right")
    for kind, counts in story.outcomes().items():
        latency = Latency(kind, "", sorted(value for row in story.latencies() if row.adaptation_type == kind for value in row.sorted))
        cells = [one_line(kind, 40), *(f"{counts[verdict]:,}" if verdict in counts else "" for verdict in VERDICTS)]
        cells += [duration(latency.quantile(q)) for q in (0.5, 0.99)] if latency.sorted else ["", ""]
        table.add_row(*map(Text, cells))
    return table
