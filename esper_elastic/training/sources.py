"""Decisions from outside: a file of JSON lines to which another process appends, as a controller that learns when to change what."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from .state import TrainingState


class DecisionFile:
    """Reads decisions from a file, a line each: an object with the fields of a decision, or a list of them that belong together.

    An object may have ``"step"``, before which it is not due. A line is read once, when it is complete; a file that is not there yet is
    waited for, and one that has become shorter is read from its beginning. What is wrong with a line is refused and recorded like any
    decision that is.

    Args:
        path: of the file.
        every: steps between two looks at it.

    Example:
        >>> print(json.dumps({"step": 100, "adaptation_type": "grow", "layer_name": "conv1", "parameters": {"factor": 1.5}}))
        {"step": 100, "adaptation_type": "grow", "layer_name": "conv1", "parameters": {"factor": 1.5}}
    """

    #: Bytes that are read at one look, and of one line.
    MOST = 2**20

    def __init__(self, path: str | os.PathLike[str], *, every: int = 1) -> None:
        self.path = Path(path)
        self.name = self.path.name
        self._every = every
        self._position = 0
        self._waiting: list[tuple[int, Any]] = []

    def decisions(self, state: TrainingState) -> Iterable[Any]:
        """What has been written since, and what has become due."""
        if state.step % self._every:
            return ()
        self._read()
        due = [decision for step, decision in self._waiting if step <= state.step]
        self._waiting = [each for each in self._waiting if each[0] > state.step]
        return due

    def _read(self) -> None:
        try:
            size = os.stat(self.path).st_size
        except OSError:
            return
        if size < self._position:
            self._position = 0
        if size == self._position:
            return
        with self.path.open("rb") as file:
            file.seek(self._position)
            content = file.read(self.MOST)
        complete = content[: content.rfind(b"\n") + 1] if len(content) < self.MOST or b"\n" in content else content
        self._position += len(complete)
        for line in complete.splitlines():
            if line.strip():
                self._waiting.append(_decision_of(line))

    def state_dict(self) -> dict[str, Any]:
        """How far it has read, and what is not due yet."""
        return {"position": self._position, "waiting": [[step, decision] for step, decision in self._waiting]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what :meth:`state_dict` gave."""
        self._position = state["position"]
        self._waiting = [(step, decision) for step, decision in state["waiting"]]


def _decision_of(line: bytes) -> tuple[int, Any]:
    """A line as the step it is for and a decision; one that is no JSON is passed on as it is, to be refused."""
    try:
        given = json.loads(line)
    except (ValueError, RecursionError):
        return 0, line.decode(errors="replace")
    if isinstance(given, dict) and type(given.get("step", 0)) is int:
        return given.pop("step", 0), given
    return 0, given
