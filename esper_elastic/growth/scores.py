"""The scores of one dim as batches go by: gate derivatives and their squares, and what activations are like."""

from __future__ import annotations

import torch
from torch import Tensor

from ..control import Axis, ElasticDim
from ..errors import CapacityError
from .activations import by_example, per_unit, places_of
from .revision import stamp


class Scores:
    """What passes over a dim have shown of its active units.

    A gate on a unit multiplies it by one, everywhere at once; ``sum activation * gradient`` is the derivative of the loss by it. Where
    weights consume the units, the gates stand at their inputs. What nothing consumes is gated where it was last computed: *sources* tell
    the places apart, and the last one that ran counts.
    """

    def __init__(self, dim: ElasticDim) -> None:
        self.dim = dim
        self.stamp = stamp(dim)
        self.moved = False
        self.last: object = None
        self.gates: dict[object, _Gates] = {}
        self.sums: dict[object, _Sums] = {}

    def current(self) -> bool:
        """Whether the dim still has the units of the first pass; if not, what was gathered is void."""
        self.moved = self.moved or stamp(self.dim) != self.stamp
        return not self.moved

    def saw(self, source: object, activation: Tensor, index: int, axis: Axis, static: bool) -> None:
        """Add what one forward shows at a source."""
        if not self.current():
            return
        self.last = source
        values = activation.movedim(index, -1).flatten(0, -2) if activation.dim() > 1 else activation[None]
        dtype = torch.promote_types(values.dtype, torch.float32)
        total = per_unit(values.abs().sum(0, dtype=dtype), axis, self.dim, static)
        zeros = per_unit(values.eq(0).sum(0, dtype=dtype), axis, self.dim, static)
        known = self.sums.setdefault(source, _Sums(torch.zeros_like(total), torch.zeros_like(zeros)))
        known.add(total, zeros, len(values) * places_of(axis, self.dim))

    def gate(self, source: object, task: int, activation: Tensor, gradient: Tensor, index: int, axis: Axis, static: bool) -> None:
        """Add the gate derivatives of one layer's call, in the backward pass ``task``."""
        if self.current():
            dtype = torch.promote_types(activation.dtype, torch.float32)
            examples = per_unit(by_example(activation.to(dtype) * gradient.to(dtype), index), axis, self.dim, static)
            self.gates.setdefault(source, _Gates(examples)).add(task, examples)

    def close(self, task: int) -> None:
        """Take note that a backward pass is over."""
        for gates in self.gates.values():
            gates.close(task)

    def drop_unfinished(self) -> None:
        """Forget passes that an exception ended."""
        for gates in self.gates.values():
            gates.open.clear()

    def answer(self, what: str) -> Tensor:
        """A score by its name.

        Raises:
            CapacityError: there is none, and why.
        """
        where = f"{self.dim.label}: {what}"
        if not self.current():
            raise CapacityError(
                f"{where}: units were born, moved, woken or put to sleep since they were observed: expected the width {self.stamp[0]} "
                f"of then, got {self.dim.active}. Observe again: with ee.growth.observe(model): loss.backward()."
            )
        if what in ("activation", "zeros"):
            sums = self.sums.get(self.last)
            if sums is None:
                raise CapacityError(f"{where}: expected a forward pass over the units within ee.growth.observe, got none.")
            return sums.total / sums.count if what == "activation" else sums.zeros / sums.count
        gates = self.gates.get(self.last)
        if gates is None or not gates.batches:
            raise CapacityError(
                f"{where}: expected a backward pass over the units, got none. "
                "Run it within: with ee.growth.observe(model): loss.backward()."
            )
        if what == "fisher" and gates.uneven:
            raise CapacityError(
                f"{where}: expected all layers that consume the units to see the same examples, got batches of different sizes. "
                "Use taylor, which adds up whole batches."
            )
        return (gates.taylor if what == "taylor" else gates.fisher).clone()


class _Sums:
    def __init__(self, total: Tensor, zeros: Tensor) -> None:
        self.total = total
        self.zeros = zeros
        self.count = 0

    def add(self, total: Tensor, zeros: Tensor, count: int) -> None:
        self.total += total
        self.zeros += zeros
        self.count += count


class _Gates:
    """Gate derivatives at one source: those of passes under way per example, those of finished ones as scores."""

    def __init__(self, like: Tensor) -> None:
        self.open: dict[int, list[Tensor]] = {}
        self.taylor = torch.zeros_like(like[0])
        self.fisher = torch.zeros_like(like[0])
        self.batches = 0
        self.uneven = False

    def add(self, task: int, examples: Tensor) -> None:
        under_way = self.open.setdefault(task, [])
        for index, known in enumerate(under_way):
            if len(known) == len(examples):
                under_way[index] = known + examples
                return
        under_way.append(examples)

    def close(self, task: int) -> None:
        parts = self.open.pop(task, None)
        if parts is None:
            return
        self.batches += 1
        self.uneven = self.uneven or len(parts) > 1
        total = parts[0].sum(0)
        for part in parts[1:]:
            total = total + part.sum(0)
        self.taylor += total.abs()
        self.fisher += parts[0].square().sum(0)
