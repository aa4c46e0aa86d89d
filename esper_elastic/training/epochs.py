"""The batches of a run, epoch by epoch, from wherever it stands: the same ones, with the same random numbers, as without a break."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from ..errors import TrainingError
from .checkpoints import random_state, set_random_state
from .state import TrainingState

Batches = Iterable[Any] | Callable[[int], Iterable[Any]]
Numbers = tuple[dict[str, Any], dict[str, Tensor]]


class Epochs:
    """Gives batches, and knows how to come back to where it was.

    Attributes:
        began: the states of random generators when the present epoch began, if one has.
        resumed: those that the run goes on with, after a resumption.
    """

    _KEYS = ("began", "now")

    def __init__(self, state: TrainingState) -> None:
        self.began: Numbers | None = None
        self.resumed: Numbers | None = None
        self._state = state
        self._generators: dict[str, torch.Generator] = {}
        self._loaded: dict[str, Tensor] = {}

    def numbers(self) -> Numbers:
        """The states of all random generators now, those of the data included."""
        return random_state(self._generators)

    def state_dict(self) -> dict[str, Any]:
        """The numbers that are JSON-able; the others are what :meth:`tensors` gives."""
        return {"began": self.began[0] if self.began is not None else None, "now": self.numbers()[0]}

    def tensors(self) -> dict[str, Tensor]:
        """The states of torch's generators, when the epoch began and now."""
        began = self.began[1] if self.began is not None else {}
        return {
            f"{key}:{name}": tensor for key, states in (("began", began), ("now", self.numbers()[1])) for name, tensor in states.items()
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what :meth:`state_dict` gave, and :meth:`load_tensors` was given."""
        parts = {
            key: {name.removeprefix(f"{key}:"): t for name, t in self._loaded.items() if name.startswith(f"{key}:")} for key in self._KEYS
        }
        self.began = (state["began"], parts["began"]) if state["began"] is not None else None
        self.resumed = (state["now"], parts["now"])
        self._loaded = {}

    def load_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Take what :meth:`tensors` gave, before :meth:`load_state_dict`."""
        self._loaded = tensors

    def left(self, data: Batches) -> Iterator[Any]:
        """The batches of this epoch that are left: those already taken are drawn again, with the random numbers of then, and left out.

        Raises:
            TrainingError: there are none at all.
        """
        state = self._state
        self._generators = _generators_of(data)
        now, self.resumed = self.resumed, None
        if state.batch == 0:
            if now is not None:
                set_random_state(*now, self._generators)
            self.began = self.numbers()
            batches = iter(data(state.epoch) if callable(data) else data)
        else:
            assert self.began is not None
            now = self.numbers() if now is None else now
            set_random_state(*self.began, self._generators)
            batches = iter(data(state.epoch) if callable(data) else data)
            for _ in range(state.batch):
                next(batches)
            set_random_state(*now, self._generators)
        for batch in batches:
            state.batch += 1
            yield batch
        if state.batch == 0:
            raise TrainingError(f"Trainer.fit: data: expected batches, got none in epoch {state.epoch}.")


def _generators_of(data: Any) -> dict[str, torch.Generator]:
    """Generators of a loader and of its sampler, by name."""
    found = {"loader": getattr(data, "generator", None), "sampler": getattr(getattr(data, "sampler", None), "generator", None)}
    return {name: generator for name, generator in found.items() if isinstance(generator, torch.Generator)}
