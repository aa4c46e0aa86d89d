"""``events.jsonl``: the events of a run in a file, one line of JSON each.

Owns writing, reading and cutting that file. A line ends with its newline: one without, which a killed process leaves at the end, was never
finished, and counts for nobody.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

from ..errors import MonitorError
from .events import Event, from_json, to_json

FILE_NAME = "events.jsonl"
_ENCODER = json.JSONEncoder(allow_nan=False, separators=(",", ":"))


class JsonLines:
    """A writer of events to the file at ``path``, which is made at the first flush; what it holds already stays.

    Effects: at the first flush, makes the folder and cuts off an unfinished last line. ``num_lines`` counts what the file holds since.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.num_lines = 0
        self._file: BinaryIO | None = None
        self._lines: list[bytes] = []

    def write(self, event: Event) -> None:
        """Take in ``event``; it reaches the file at the next :meth:`flush`."""
        self._lines.append(_ENCODER.encode(to_json(event)).encode() + b"\n")

    def flush(self) -> None:
        """Hand all lines to the operating system, which keeps them if this process is killed."""
        if self._file is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self.path.open("ab")
            finished = _finished(self.path.read_bytes())
            self._file.truncate(len(finished))
            self.num_lines = finished.count(b"\n")
        lines, self._lines = self._lines, []
        self._file.write(b"".join(lines))
        self._file.flush()
        self.num_lines += len(lines)

    def close(self) -> None:
        """Flush, and close the file; a later flush opens it again."""
        self.flush()
        if self._file is not None:
            self._file.close()
            self._file = None

    def keep(self, wanted: Callable[[list[Event]], list[int]]) -> None:
        """Keep the lines of those events whose indices ``wanted`` chooses.

        Effects: replaces the file in one move: whoever looks, after a crash too, finds the old one or the new one.

        Raises:
            MonitorError: the file cannot be read.
        """
        self.close()
        content = self.path.read_bytes()
        lines = content.split(b"\n")
        kept = [lines[index] + b"\n" for index in wanted(_parse(content, self.path))]
        partial = self.path.with_name(f"{self.path.name}.partial")
        try:
            with partial.open("wb") as file:
                file.write(b"".join(kept))
                file.flush()
                os.fsync(file.fileno())
            partial.replace(self.path)
        finally:
            with contextlib.suppress(FileNotFoundError):
                partial.unlink()


def read(path: str | os.PathLike[str]) -> list[Event]:
    """The events of a run, from its folder or from the file itself; an unfinished last line is left out.

    Raises:
        MonitorError: there is no such file, or a line holds no event; the message names it.
    """
    file = Path(path)
    file = file / FILE_NAME if file.is_dir() else file
    try:
        content = file.read_bytes()
    except OSError as error:
        raise MonitorError(f"{file}: expected the events of a run, got {error.strerror}. Name the folder that a run wrote to.") from error
    return _parse(content, file)


def _parse(content: bytes, file: Path) -> list[Event]:
    """The events of the finished lines."""
    events = []
    for number, line in enumerate(content.split(b"\n")[:-1], 1):
        where = f"{file}, line {number}"
        try:
            data = json.loads(line, parse_constant=_refuse)
        except (ValueError, RecursionError) as error:
            raise MonitorError(f"{where}: expected one event as JSON, got {line[:80]!r}.") from error
        events.append(from_json(data, where))
    return events


def _refuse(constant: str) -> None:
    """What is no JSON, although Python would read it."""
    raise ValueError(constant)


def _finished(content: bytes) -> bytes:
    """The finished lines."""
    return content[: content.rfind(b"\n") + 1]
