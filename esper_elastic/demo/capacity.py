"""Changes of capacity while the demo trains: each decided to the trainer, timed, and kept as an :class:`Event`.

Owns the dial of one elastic network: what it can be turned to, what it was turned to and what that cost. It decides nothing; the plan in
``train.py`` does.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

import esper_elastic as ee

from .. import importance
from ..errors import ElasticError
from ..training import AdaptationDecision, AdaptationResult, Safety, Trainer
from .network import Network, Widths, start_block_at_zero

NARROW_SHARES = (0.75, 0.5, 0.25)
_PARTS = {"stem": "stem.", "stage1": "stage1.", "stage2": "stage2.", "inner": "block."}
Kind = Literal["grow", "switch", "prune", "refused"]


@dataclass(frozen=True)
class Event:
    """One change, or one that was refused: before which step, what, why, at what cost, and the widths after it."""

    step: int
    kind: Kind
    what: str
    reason: str
    microseconds: float
    widths: Widths


class Dial:
    """A demo network's dims by the demo's names for them, and the events so far.

    Args:
        network: that changes.
        trainer: that carries changes out; one that holds ``network`` and does not train it, by default.
    """

    def __init__(self, network: Network, trainer: Trainer | None = None) -> None:
        self.network = network
        self.trainer = trainer if trainer is not None else Trainer(network, safety=no_more_memory(network))
        found = ee.dims(network)
        self._names = {part: next(name for name in found if name.startswith(prefix)) for part, prefix in _PARTS.items()}
        self.dims = {part: found[name] for part, name in self._names.items()}
        self.events: list[Event] = []
        self._scores: dict[str, Tensor] = {}
        self._num_scored = 0

    @property
    def widths(self) -> Widths:
        """What is active now."""
        stem, stage1, stage2, inner = (dim.active for dim in self.dims.values())
        return Widths(stem, stage1, stage2, inner, block=isinstance(self.network.block, ee.ElasticBlock) and self.network.block.on)

    def grow(self, step: int, targets: Mapping[str, int], reason: str) -> None:
        """Give birth to units up to ``targets``, all at once for the forward pass: the function stays as it is."""
        before = self.widths._asdict()
        with self._timed(step, "grow", " ".join(f"{part} {before[part]}->{target}" for part, target in targets.items()), reason):
            self._require(*(AdaptationDecision("grow", self._names[part], parameters={"width": n}) for part, n in targets.items()))

    def switch_on(self, step: int, reason: str) -> None:
        """Switch the residual block on, its last norm's scale set to zero first, so that the function stays as it is at that moment."""
        start_block_at_zero(self.network)
        with self._timed(step, "switch", "block on", reason):
            self._require(AdaptationDecision("enable", "block"))

    def try_illegal(self, step: int) -> None:
        """Ask for more than the capacity, and make sure that the refusal cost nothing.

        Raises:
            ElasticError: the change was accepted, or left a trace.
        """
        part, dim = "stage2", self.dims["stage2"]
        asked = dim.capacity + 1
        control = ee.control_block(self.network)
        before = {name: tensor.clone() for name, tensor in self.network.state_dict().items() if isinstance(tensor, Tensor)}
        digest, generation, widths = control.digest(), control.generation, self.widths
        start = time.perf_counter()
        narrower = AdaptationDecision("resize", self._names["stem"], parameters={"width": 1})
        result = self._decide(narrower, AdaptationDecision("grow", self._names[part], parameters={"width": asked}))
        microseconds = (time.perf_counter() - start) * 1e6
        if result:
            raise ElasticError(f"demo: {part}: expected a refusal of {asked} units at capacity {dim.capacity}, got none. Report this.")
        after = self.network.state_dict()
        unharmed = all(torch.equal(tensor, after[name]) for name, tensor in before.items())
        if not unharmed or (digest, generation, widths) != (control.digest(), control.generation, self.widths):
            raise ElasticError("demo: a refused change: expected the network as it was, got another. Report this.")
        reason = f"{result.verdict.factor}: no room beyond {dim.capacity}; nothing lost"
        self.events.append(Event(step, "refused", f"stem ->1 with {part} {widths.stage2}->{asked}", reason, microseconds, widths))

    def score(self) -> None:
        """Add the first-order Taylor scores of the gradients at hand to the running sums that :meth:`prune` chooses by."""
        for part, dim in self.dims.items():
            found = importance.taylor(dim).detach().float()
            self._scores[part] = self._scores.get(part, torch.zeros_like(found)) + found
        self._num_scored += 1

    def prune(self, step: int, targets: Mapping[str, int]) -> None:
        """Keep the units with the highest scores, and order all dims so that narrower widths are made of the best units too."""
        before = self.widths._asdict()
        what = " ".join(f"{part} {before[part]}->{target}" for part, target in targets.items()) + ", all dims put in order"
        with self._timed(step, "prune", what, f"lowest Taylor scores over {self._num_scored} steps"):
            kept = {part: importance.top(self._scores[part], targets.get(part, dim.active)) for part, dim in self.dims.items()}
            self._require(*(AdaptationDecision("prune", self._names[part], parameters={"keep": kept[part].tolist()}) for part in targets))
            for part, dim in self.dims.items():
                _put_best_first(dim, self._scores[part][kept[part]])

    def _decide(self, *decisions: AdaptationDecision) -> AdaptationResult:
        return self.trainer.apply_architecture_modification(self.network, list(decisions))

    def _require(self, *decisions: AdaptationDecision) -> None:
        result = self._decide(*decisions)
        if not result:
            raise ElasticError(f"demo: {result}. Report this.")

    @contextmanager
    def narrowed(self, share: float) -> Iterator[None]:
        """Run at ``share`` of the present widths; they are back at the end, whatever happens."""
        now = {self._names[part]: dim.active for part, dim in self.dims.items()}
        narrow = {name: narrow_width(width, share) for name, width in now.items()}
        ee.resize(self.network, narrow)
        try:
            yield
        finally:
            ee.resize(self.network, now)

    @contextmanager
    def _timed(self, step: int, kind: Kind, what: str, reason: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        microseconds = (time.perf_counter() - start) * 1e6
        self.events.append(Event(step, kind, what, reason, microseconds, self.widths))


def _put_best_first(dim: ee.ElasticDim, scores: Tensor) -> None:
    """The best quarter of the units first, then the next best: what narrower widths will use. The function stays as it is."""
    width = dim.active
    for kept in sorted({narrow_width(width, share) for share in NARROW_SHARES}, reverse=True):
        best = importance.top(scores, kept)
        dim.keep(best)
        scores = scores[best]
    dim.resize(width)


def no_more_memory(network: Network) -> Safety:
    """Limits that allow whatever fits into what ``network`` holds now: parameters, gradients and two moments of each."""
    return Safety(max_bytes=4 * sum(parameter.numel() * parameter.element_size() for parameter in network.parameters()))


def narrow_width(width: int, share: float) -> int:
    """``share`` of ``width``, at least one unit."""
    return max(1, int(width * share))
