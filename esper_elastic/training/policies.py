"""Policies: rules that decide. Each looks at where a run stands between two steps and says what to change; nothing changes here.

They are sources of decisions like any other (:class:`DecisionSource`), and are composed by giving several to the trainer, or by
:class:`When`. What they have gathered is part of a checkpoint.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import importance
from ..control import ElasticDim
from ..errors import CapacityError, DecisionError
from ..model import known
from .decisions import AdaptationDecision, DecisionSource
from .plateau import PlateauDetector
from .state import TrainingState


class Schedule:
    """Decisions at steps that are known beforehand.

    Args:
        decisions: ``{step: decision}``; a list of decisions succeeds or vanishes as one.
    """

    name = "schedule"

    def __init__(self, decisions: Mapping[int, Any]) -> None:
        self._decisions = dict(decisions)

    def decisions(self, state: TrainingState) -> Iterable[Any]:
        """Those of this step."""
        return [self._decisions[state.step]] if state.step in self._decisions else ()


class When:
    """Asks another source at some steps only.

    Args:
        source: that is asked.
        first: step at which it is asked at the earliest.
        last: step at which it is asked at the latest.
        every: steps between two questions.
    """

    def __init__(self, source: DecisionSource, *, first: int = 0, last: int | None = None, every: int = 1) -> None:
        self.source = source
        self.name = str(getattr(source, "name", type(source).__name__))
        self._first, self._last, self._every = first, last, every

    def decisions(self, state: TrainingState) -> Iterable[Any]:
        """Those of the other source, if it is asked."""
        return self.source.decisions(state) if self._asks(state.step) else ()

    def observes(self, state: TrainingState) -> str | None:
        """What the other source wants observed, if it is asked after the step that begins."""
        observes = getattr(self.source, "observes", None)
        wanted: str | None = observes(state) if observes is not None and self._asks(state.step + 1) else None
        return wanted

    def _asks(self, step: int) -> bool:
        within = step >= self._first and (self._last is None or step <= self._last)
        return within and (step - self._first) % self._every == 0

    def outcome(self, result: Any) -> None:
        """Pass on what became of a request."""
        if hasattr(self.source, "outcome"):
            self.source.outcome(result)

    def state_dict(self) -> dict[str, Any]:
        """That of the other source."""
        return dict(self.source.state_dict()) if hasattr(self.source, "state_dict") else {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what :meth:`state_dict` gave."""
        if hasattr(self.source, "load_state_dict"):
            self.source.load_state_dict(state)


class GrowOnPlateau:
    """Grows when the loss has stalled: all dims named, by a factor, in one request.

    Args:
        dims: names, as of :func:`ee.dims`; all of the model's by default.
        factor: of the present width, up to the capacity.
        window: losses in each of the two means that are compared.
        min_improvement: the relative fall from one mean to the next below which the loss counts as stalled.
        parameters: of the decisions beside the width, as ``{"init": "split"}``. With ``"gradmax"``, one more step is made and observed
            before the network grows.
        confidence: of the decisions.
    """

    name = "grow on plateau"

    def __init__(
        self,
        dims: Sequence[str] | None = None,
        *,
        factor: float = 1.5,
        window: int = 50,
        min_improvement: float = 0.01,
        parameters: Mapping[str, Any] | None = None,
        confidence: float = 1.0,
    ) -> None:
        self._dims = None if dims is None else list(dims)
        self._factor, self._confidence = factor, confidence
        self._parameters = dict(parameters or {})
        self._detector = PlateauDetector(window, min_improvement)
        self._stalled: str | None = None

    def observes(self, state: TrainingState) -> str | None:
        """The step after a stall, for the birth of units by GradMax."""
        return "gradmax" if self._stalled is not None and self._parameters.get("init") == "gradmax" else None

    def decisions(self, state: TrainingState) -> Iterable[Any]:
        """One request at a stall; the detector begins anew after it."""
        self._detector.update(state.loss)
        self._stalled = reason = self._stalled or self._detector.stalled()
        if reason is None or (self._parameters.get("init") == "gradmax" and state.observed is None):
            return ()
        self._stalled = None
        self._detector.reset()
        dims = known(state.model)[0]
        found = {name: dims[name] for name in (self._dims if self._dims is not None else dims)}
        targets = {name: _grown(dim, self._factor) for name, dim in found.items()}
        wanted = [
            AdaptationDecision(
                "grow", name, parameters={"width": width, **self._parameters}, confidence=self._confidence, metadata={"reason": reason}
            )
            for name, width in targets.items()
            if width > found[name].active
        ]
        return [wanted] if wanted else ()

    def state_dict(self) -> dict[str, Any]:
        """The losses that it looks at."""
        return {"losses": self._detector.losses, "stalled": self._stalled}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what :meth:`state_dict` gave."""
        self._detector.reset()
        for loss in state["losses"]:
            self._detector.update(loss)
        self._stalled = state["stalled"]


def _grown(dim: ElasticDim, factor: float) -> int:
    step = dim.multiple_of
    width = max(round(dim.active * factor / step) * step, dim.active + step)
    return min(width, dim.capacity - dim.capacity % step)


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
