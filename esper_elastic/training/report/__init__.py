"""``esper-elastic inspect``: the report on a run as a page, and in short in the terminal."""

from __future__ import annotations

import os
import webbrowser
from pathlib import Path

from ...errors import MonitorError
from ..lines import FILE_NAME, read
from .page import page
from .story import Story

__all__ = ["Story", "inspect", "inspect_and_tell", "page"]


def inspect(run: str | os.PathLike[str], out: str | os.PathLike[str] | None = None) -> tuple[Path, Story]:
    """Write the report on ``run`` and return its path and the story that it tells.

    Args:
        run: the folder that a run wrote to, or its ``events.jsonl``.
        out: the file to write; ``report.html`` beside the events by default.

    Raises:
        MonitorError: the events cannot be read, or the page cannot be written.
    """
    story = Story(read(run))
    folder = Path(run) if Path(run).is_dir() else Path(run).parent
    path = Path(out) if out is not None else folder / "report.html"
    name = str(run if Path(run).name != FILE_NAME else folder)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(page(story, name), encoding="utf-8")
    except OSError as error:
        raise MonitorError(
            f"inspect: {path}: expected a file that can be written, got {error.strerror}. Choose another with --out."
        ) from error
    return path, story


def inspect_and_tell(run: str | os.PathLike[str], out: str | os.PathLike[str] | None = None, *, show: bool = False) -> None:
    """:func:`inspect`, a summary on stdout, and with ``show`` the page in a browser.

    Raises:
        MonitorError: as :func:`inspect`, or rich is not installed.
    """
    from . import terminal

    console = terminal.console()
    path, story = inspect(run, out)
    terminal.tell(console, story, path)
    if show:
        webbrowser.open(path.resolve().as_uri())
