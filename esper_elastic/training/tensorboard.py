"""A writer of events for TensorBoard: scalars of progress, evaluation, size, widths and latency, and every decision as text.

Owns the names of the curves. ``tensorboard`` is imported when a writer is made, and only then.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from ..errors import MonitorError
from .describe import describe
from .events import Applied, Effect, Evaluated, Event, Progress, Refused, Requested, Restored, Resumed, RolledBack, RunEnded, RunStarted

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter


class TensorBoardWriter:
    """Writes what a :class:`~esper_elastic.training.monitor.Monitor` hands it to the folder ``directory``.

    Effects: the first event opens a file in the folder; where that is ``Resumed``, TensorBoard leaves out what was written beyond its step.

    Raises:
        MonitorError: tensorboard is not installed.
    """

    def __init__(self, directory: str | os.PathLike[str]) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as missing:
            raise MonitorError(
                f"TensorBoardWriter: tensorboard: expected it to be installed, got {missing}. pip install 'esper-elastic[tensorboard]'"
            ) from missing
        self._open = SummaryWriter
        self._directory = os.fspath(directory)
        self._board: SummaryWriter | None = None

    def write(self, event: Event) -> None:
        """Add the scalars and the text of ``event``."""
        if self._board is None:
            self._board = self._open(self._directory, purge_step=event.step + 1 if isinstance(event, Resumed) else None)
        for name, value in _scalars(event).items():
            self._board.add_scalar(name, value, event.step, walltime=event.time)
        if isinstance(event, _TOLD):
            words = f"    {describe(event)}"  # indented: Markdown shows it as it is
            self._board.add_text("decisions" if isinstance(event, _DECIDED) else "run", words, event.step, walltime=event.time)

    def flush(self) -> None:
        """Bring what was added to the file."""
        if self._board is not None:
            self._board.flush()

    def close(self) -> None:
        """Close the file; a later event opens another."""
        if self._board is not None:
            self._board.close()
            self._board = None


_DECIDED = (Requested, Refused, Applied, RolledBack, Restored)
_TOLD = (*_DECIDED, RunStarted, Resumed, RunEnded)


def _scalars(event: Event) -> dict[str, float]:
    """Name -> value of what ``event`` measures."""
    match event:
        case Progress():
            return {
                "progress/loss": event.loss,
                "progress/step_ms": event.step_ms,
                "progress/learning_rate": event.learning_rate,
                "size/parameters": event.parameters,
            }
        case Evaluated():
            return {f"evaluation/{name}": value for name, value in event.metrics.items()}
        case RunStarted():
            return _size(event)
        case Applied():
            return _size(event) | {f"latency_ms/{event.adaptation_type}/{event.mechanism}": event.milliseconds}
        case Effect():
            return {
                "effect/loss_change": event.loss_after - event.loss_before,
                "effect/step_ms_change": event.step_ms_after - event.step_ms_before,
            }
        case RolledBack() | Restored():
            return {f"latency_ms/{'rolled_back' if isinstance(event, RolledBack) else 'restored'}": event.milliseconds}
    return {}


def _size(event: RunStarted | Applied) -> dict[str, float]:
    counted = {"size/parameters": event.parameters, "size/multiply_adds": event.multiply_adds}
    return {name: float(count) for name, count in counted.items() if count is not None} | {
        f"widths/{name}": width for name, width in event.widths.items()
    }
