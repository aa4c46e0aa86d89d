"""What contributes least goes: units of all dims, or whole blocks."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from ... import importance
from ...control import ElasticDim
from ...errors import CapacityError, DecisionError
from ...model import known
from ..decisions import AdaptationDecision
from ..state import TrainingState


class PruneLeast:
    """Prunes the units that contribute least, all dims in one request, chosen together.

    Scores are summed over the steps between two prunings and brought to unit length in each dim, so that those of different dims can be
    compared; then the lowest of all go. Source: Molchanov, Tyree, Karras, Aila, Kautz: Pruning convolutional neural
    networks for resource efficient inference (ICLR 2017), section 2.2 for the comparison.

    Args:
        share: of the units present at the first pruning that each pruning takes.
        every: steps between two prunings.
        until: the share of those units that stays in the end.
        dims: names; all of the model's by default.
        least: the share of its width that every dim keeps.
        score: ``"taylor"``, of the gradients that training makes; or ``"fisher"`` or ``"activation"``, of steps that are observed.
        sample_every: steps between two looks.
    """

    name = "prune least"

    def __init__(
        self,
        share: float = 0.1,
        *,
        every: int = 100,
        until: float = 0.5,
        dims: Sequence[str] | None = None,
        least: float = 0.1,
        score: str = "taylor",
        sample_every: int = 1,
    ) -> None:
        if score not in ("taylor", "fisher", "activation"):
            raise DecisionError(f"PruneLeast: score: expected 'taylor', 'fisher' or 'activation', got {score!r}.")
        for what, value in (("share", share), ("until", until), ("least", least)):
            if not 0 <= value <= 1:
                raise DecisionError(f"PruneLeast: {what}: expected a number from 0 to 1, got {value!r}.")
        self._share, self._every, self._until, self._least = share, every, until, least
        self._dims = None if dims is None else list(dims)
        self._score, self._sample_every = score, sample_every
        self._scores: dict[str, Tensor] = {}
        self._widths: dict[str, int] = {}
        self._since = 0

    def decisions(self, state: TrainingState) -> Iterable[Any]:
        """One request each time, with the units that stay."""
        dims = known(state.model)[0]
        found = {name: dims[name] for name in (self._dims if self._dims is not None else dims)}
        if not self._widths:
            self._widths = {name: dim.active for name, dim in found.items()}
        self._since += 1
        if self._since % self._sample_every == 0:
            self._look(found, state)
        if self._since < self._every or not self._scores:
            return ()
        kept = self._chosen(found)
        self._since, self._scores = 0, {}
        wanted = [
            AdaptationDecision("prune", name, parameters={"keep": units}, metadata={"reason": f"least by {self._score}"})
            for name, units in kept.items()
            if len(units) < found[name].active
        ]
        return [wanted] if wanted else ()

    def observes(self, state: TrainingState) -> str | None:
        """The steps that are looked at, unless gradients are enough."""
        return "scores" if self._score != "taylor" and (self._since + 1) % self._sample_every == 0 else None

    def _look(self, found: dict[str, ElasticDim], state: TrainingState) -> None:
        score = importance.taylor if self._score == "taylor" else getattr(state.observed, self._score, None)
        if score is None:
            return
        for name, dim in found.items():
            try:
                scores = score(dim).detach().float().cpu()
            except CapacityError:  # switched off, or without a gradient in this step
                continue
            before = self._scores.get(name)
            self._scores[name] = scores if before is None or before.shape != scores.shape else before + scores

    def _chosen(self, found: dict[str, ElasticDim]) -> dict[str, list[int]]:
        """The units that stay, of each dim."""
        total, present = sum(self._widths.values()), sum(dim.active for dim in found.values())
        count = min(round(self._share * total), present - math.ceil(self._until * total))
        ranked: list[tuple[float, str, int]] = []
        for name, scores in self._scores.items():
            if scores.numel() == found[name].active:
                ranked += [(value, name, unit) for unit, value in enumerate((scores / scores.norm().clamp_min(1e-12)).tolist())]
        room = {name: dim.active - max(dim.minimum, math.ceil(self._least * self._widths[name])) for name, dim in found.items()}
        going: dict[str, set[int]] = {name: set() for name in found}
        for _, name, unit in sorted(ranked):
            if count <= 0:
                break
            if len(going[name]) < room[name]:
                going[name].add(unit)
                count -= 1
        for name, dim in found.items():
            while len(going[name]) and (dim.active - len(going[name])) % dim.multiple_of:
                going[name].pop()
        return {name: [unit for unit in range(dim.active) if unit not in going[name]] for name, dim in found.items()}

    def state_dict(self) -> dict[str, Any]:
        """The scores so far, exactly."""
        return {"scores": {name: scores.tolist() for name, scores in self._scores.items()}, "widths": self._widths, "since": self._since}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what :meth:`state_dict` gave."""
        self._scores = {name: torch.tensor(scores) for name, scores in state["scores"].items()}
        self._widths, self._since = dict(state["widths"]), state["since"]


class DisableLeast:
    """Switches off the block that contributes least, by ``sum |weight * gradient|`` over its parameters, summed over steps.

    Args:
        every: steps between two blocks.
        keep: blocks that stay on.
        blocks: paths; all of the model's by default.
    """

    name = "disable least"

    def __init__(self, *, every: int = 500, keep: int = 1, blocks: Sequence[str] | None = None) -> None:
        self._every, self._keep = every, keep
        self._blocks = None if blocks is None else list(blocks)
        self._scores: dict[str, float] = {}
        self._since = 0

    def decisions(self, state: TrainingState) -> Iterable[Any]:
        """One block each time."""
        blocks = known(state.model)[1]
        on = {path: block for path, block in blocks.items() if block.on and (self._blocks is None or path in self._blocks)}
        self._since += 1
        for path, block in on.items():
            terms = [(p.detach() * p.grad).nan_to_num().abs().sum() for p in block.inside.parameters() if p.grad is not None]
            if terms:
                self._scores[path] = self._scores.get(path, 0.0) + float(torch.stack(terms).sum())
        scored = {path: score for path, score in self._scores.items() if path in on}
        if self._since < self._every or len(on) <= self._keep or not scored:
            return ()
        path = min(scored, key=lambda each: (scored[each], each))
        self._since, self._scores = 0, {}
        return [AdaptationDecision("disable", path, metadata={"reason": f"least score of {len(scored)} blocks: {scored[path]:.3g}"})]

    def state_dict(self) -> dict[str, Any]:
        """The scores so far."""
        return {"scores": self._scores, "since": self._since}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what :meth:`state_dict` gave."""
        self._scores, self._since = dict(state["scores"]), state["since"]
