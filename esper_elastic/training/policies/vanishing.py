"""Skips where gradients vanish."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch

from ..decisions import AdaptationDecision
from ..state import TrainingState


class SkipVanishing:
    """Adds a skip around layers that hardly get a gradient.

    The gradient of a layer is measured against its weights, ``|gradient| / |weight|``, and held against the largest of the layers.

    Args:
        pairs: ``(from, to)``: where skips may go, from the output of one module to that of another.
        ratio: of the largest, below which the gradient of what lies at ``to`` counts as vanished.
        patience: steps in a row for which it must.
        all_at_once: whether all pairs are added in one request when one is due.
        preserve: whether skips begin at zero. Where the gradient has vanished altogether, a skip that begins at zero may never open.
    """

    name = "skip vanishing"

    def __init__(
        self,
        pairs: Sequence[tuple[str, str]],
        *,
        ratio: float = 1e-3,
        patience: int = 10,
        all_at_once: bool = True,
        preserve: bool = True,
    ) -> None:
        self._pairs = [(str(source), str(target)) for source, target in pairs]
        self._ratio, self._patience, self._all, self._preserve = ratio, patience, all_at_once, preserve
        self._below: dict[str, int] = {}
        self._done: list[str] = []

    def decisions(self, state: TrainingState) -> Iterable[Any]:
        """The skips that are due, each pair once."""
        waiting = [(source, target) for source, target in self._pairs if target not in self._done]
        if not waiting:
            return ()
        strength = {target: _strength(state.model.get_submodule(target)) for _, target in waiting}
        top = _strength(state.model)
        for target, value in strength.items():
            self._below[target] = self._below.get(target, 0) + 1 if value < self._ratio * top else 0
        due = [pair for pair in waiting if self._below[pair[1]] >= self._patience]
        if not due:
            return ()
        chosen = waiting if self._all else due
        self._done += [target for _, target in chosen]
        return [
            [
                AdaptationDecision(
                    "add_skip_connection",
                    source,
                    position=target,
                    parameters={"preserve": self._preserve},
                    metadata={"reason": f"gradient at {target} is {strength[target] / max(top, 1e-300):.2g} of the largest"},
                )
                for source, target in chosen
            ]
        ]

    def state_dict(self) -> dict[str, Any]:
        """How long which gradients have been small, and what was added."""
        return {"below": self._below, "done": self._done}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what :meth:`state_dict` gave."""
        self._below, self._done = dict(state["below"]), list(state["done"])


@torch.no_grad()
def _strength(module: torch.nn.Module) -> float:
    """The norm of a module's gradients against that of its weights, matrices alone; the largest of its parameters'."""
    found = [
        float(p.grad.nan_to_num().norm() / p.nan_to_num().norm().clamp_min(1e-30))
        for p in module.parameters()
        if p.grad is not None and p.dim() > 1
    ]
    return max(found, default=0.0)
