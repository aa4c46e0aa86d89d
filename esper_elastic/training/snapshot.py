"""A model and what trains it, put aside in memory, to be put back after whatever change: edits of its structure included.

References are noted as a transaction notes them, values are cloned. So what comes back are the same modules, parameters and optimizer, as
they were.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import TrainingError
from ..model import forgetting, known
from ..surgery.compiled import forget_compiled
from ..surgery.undo import UndoLog


class Snapshot:
    """The state of ``model`` and of what follows it, once.

    Args:
        model: whose structure, parameters, buffers, gradients and widths are put aside.
        followers: optimizer, schedulers, scaler, average; ``None`` among them is skipped.
        step: of the run, for the record.

    Attributes:
        step: as given.
        bytes: that its copies take.
        milliseconds: that taking it took.

    Random generators are left alone: what is trained after a restoration is not what was trained before it.
    """

    def __init__(self, model: nn.Module, followers: list[Any], step: int) -> None:
        begun = time.perf_counter()
        self.step = step
        self._model = model
        self._log = UndoLog()
        things = [model, *(each for each in followers if each is not None)]
        tensors = list(_tensors(model, things[1:]))
        self.bytes = size_of(tensors)
        self._log.add(*forgetting(model))
        self._log.record(*things)
        self._log.save_values(*tensors)
        self.milliseconds = 1e3 * (time.perf_counter() - begun)

    def restore(self) -> None:
        """Put everything back, and use the snapshot up.

        Effects: one commit, so that graphs built meanwhile are void; what was compiled of the model is compiled anew.

        Raises:
            TrainingError: something could not be put back.
        """
        generation = {id(entry.block): entry.block.generation for entry in self._entries()}
        try:
            with torch.no_grad():
                self._log.unwind()
        except Exception as error:
            raise TrainingError(
                f"snapshot of step {self.step}: could not be put back: {type(error).__name__}: {error}. Load the last checkpoint."
            ) from error
        for block in {id(entry.block): entry.block for entry in self._entries()}.values():
            block.generation = max(block.generation, generation.get(id(block), 0))
            block.commit((), moved=True)
        forget_compiled(self._model)

    def _entries(self) -> Iterator[Any]:
        dims, blocks = known(self._model)
        yield from dims.values()
        yield from (block.switch for block in blocks.values())


def _tensors(model: nn.Module, followers: list[Any]) -> Iterator[Tensor]:
    """Every tensor whose values training writes, each once."""
    seen: set[int] = set()
    pending: list[Any] = [*model.parameters(), *model.buffers()]
    for follower in followers:
        if isinstance(follower, nn.Module):
            pending += (*follower.parameters(), *follower.buffers())
        else:
            pending.append(getattr(follower, "__dict__", follower))
    while pending:
        value = pending.pop()
        if isinstance(value, Tensor):
            if id(value) not in seen:
                seen.add(id(value))
                yield value
                if value.is_leaf and value.grad is not None:
                    pending.append(value.grad)
        elif isinstance(value, dict):
            pending += value.values()
        elif isinstance(value, list | tuple):
            pending += value


def size_of(tensors: list[Tensor]) -> int:
    """Bytes of the values of some tensors."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def size_of_all(model: nn.Module, followers: list[Any]) -> int:
    """The bytes that a snapshot would take."""
    return size_of(list(_tensors(model, [each for each in followers if each is not None])))
