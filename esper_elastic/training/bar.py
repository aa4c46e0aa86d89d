"""A bar of progress on the terminal, by rich, which is asked for on demand."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

from ..errors import TrainingError
from .state import TrainingState


@contextlib.contextmanager
def bar(steps: int | None, shown: bool) -> Iterator[Callable[[TrainingState], None]]:
    """What to call after each step; it moves a bar, if one is to be ``shown``.

    Raises:
        TrainingError: rich is missing.
    """
    if not shown:
        yield lambda state: None
        return
    try:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
    except ImportError as error:
        raise TrainingError("Trainer.fit: progress: expected rich to be installed. pip install 'esper-elastic[demo]'") from error
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns) as progress:
        task = progress.add_task("training", total=steps)

        def advance(state: TrainingState) -> None:
            progress.update(task, completed=state.step, description=f"epoch {state.epoch}  loss {state.loss:.4f}")

        yield advance
