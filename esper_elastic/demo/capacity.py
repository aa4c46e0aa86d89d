"""Changes of capacity while the demo trains: each made through the public calls, timed, and kept as an :class:`Event`.

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
from ..errors import CapacityError, ElasticError
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
    """A demo network's dims by the demo's names for them, and the events so far."""

    def __init__(self, network: Network) -> None:
        self.network = network
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
            for part, target in targets.items():
                self.dims[part].grow(target, init="zero")

    def switch_on(self, step: int, reason: str) -> None:
        """Switch the residual block on, its last norm's scale set to zero first, so that the function stays as it is at that moment."""
        start_block_at_zero(self.network)
        with self._timed(step, "switch", "block on", reason):
            ee.enable(self.network, "block")

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
        try:
            ee.resize(self.network, {self._names["stem"]: 1, self._names[part]: asked})
        except CapacityError as refusal:
            microseconds = (time.perf_counter() - start) * 1e6
            said = str(refusal)
        else:
            raise ElasticError(f"demo: {part}: expected a refusal of {asked} units at capacity {dim.capacity}, got none. Report this.")
        after = self.network.state_dict()
        unharmed = all(torch.equal(tensor, after[name]) for name, tensor in before.items())
        if not unharmed or (digest, generation, widths) != (control.digest(), control.generation, self.widths):
            raise ElasticError("demo: a refused change: expected the network as it was, got another. Report this.")
        reason = f"{said.split(': ', 1)[-1].split('. ')[0]}; nothing lost"
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
            for part, dim in self.dims.items():
                _keep_best(dim, self._scores[part], targets.get(part, dim.active))

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


def _keep_best(dim: ee.ElasticDim, scores: Tensor, width: int) -> None:
    """Prune ``dim`` to its ``width`` best units, the best quarter of those first, then the next best: what narrower widths will use."""
    for kept in sorted({width, *(narrow_width(width, share) for share in NARROW_SHARES)}, reverse=True):
        best = importance.top(scores, kept)
        dim.keep(best)
        scores = scores[best]
    dim.resize(width)


def narrow_width(width: int, share: float) -> int:
    """``share`` of ``width``, at least one unit."""
    return max(1, int(width * share))
