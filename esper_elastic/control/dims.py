"""Dims and the axes made of them: one size shared by every tensor axis that it runs through.

This file knows tensors only by the axes that layers report. It neither initialises nor moves weights: ``grow`` and ``keep`` are
installed by :mod:`esper_elastic.growth`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from ..errors import CapacityError
from .block import Entry, exact_int

Runs = list[tuple[int, int]]


class Binding(NamedTuple):
    """One tensor axis that a dim runs through.

    Index ``i`` of the axis, counted from ``start``, is active iff ``(i // inner) % capacity < active``; there are ``outer`` periods.
    """

    tensor: Tensor
    axis: int
    outer: int
    inner: int
    start: int
    layer: Any
    name: str


class Segment(NamedTuple):
    """A dim's place in an axis: ``dim.capacity * inner`` indices from ``start`` on, the first ``dim.active * inner`` of them active."""

    dim: ElasticDim
    start: int
    inner: int


class Axis:
    """A tensor axis whose width is data: one dim, a multiple of one, or several dims side by side.

    ``active`` and ``capacity`` count indices of the axis, ``segments`` say which dims they belong to.
    """

    @property
    def active(self) -> int:
        return sum(segment.dim.active * segment.inner for segment in self.segments)

    @property
    def capacity(self) -> int:
        return sum(segment.dim.capacity * segment.inner for segment in self.segments)

    @property
    def segments(self) -> tuple[Segment, ...]:
        raise NotImplementedError

    @property
    def dims(self) -> list[ElasticDim]:
        """The root dims of the axis, each once, in order."""
        return list({id(segment.dim): segment.dim for segment in self.segments}.values())

    def runs(self) -> Runs:
        """The active indices as ``(start, length)`` pairs, in order, adjacent ones joined."""
        runs: Runs = []
        for segment in self.segments:
            length = segment.dim.active * segment.inner
            if runs and sum(runs[-1]) == segment.start:
                runs[-1] = (runs[-1][0], runs[-1][1] + length)
            else:
                runs.append((segment.start, length))
        return runs

    def __mul__(self, factor: int) -> Axis:
        """The axis in which every unit of this one takes ``factor`` neighbouring indices, as a flatten after a convolution does."""
        factor = exact_int(factor, "Axis", "factor")
        if factor < 1:
            raise CapacityError(f"Axis: cannot take {factor} indices per unit: expected at least 1.")
        return DerivedAxis(tuple(Segment(s.dim, s.start * factor, s.inner * factor) for s in self.segments))

    __rmul__ = __mul__


class DerivedAxis(Axis):
    """An axis computed from dims: ``dim * k`` or ``concat(...)``. It follows them and cannot be set itself."""

    def __init__(self, segments: tuple[Segment, ...]) -> None:
        self._segments = segments

    @property
    def segments(self) -> tuple[Segment, ...]:
        return self._segments

    def __repr__(self) -> str:
        parts = ", ".join(f"{segment.dim.label} * {segment.inner} at {segment.start}" for segment in self.segments)
        return f"DerivedAxis(active={self.active}, capacity={self.capacity}: {parts})"


def set_capacity(dim: ElasticDim, capacity: int, derived: Iterable[DerivedAxis]) -> None:
    """Let a dim have another capacity, and what lies behind it in ``derived`` begin elsewhere. Whoever calls moves the tensors."""
    moved = [(axis, segments_at(axis, dim, capacity)) for axis in derived]
    dim._capacity = capacity
    for axis, segments in moved:
        axis._segments = segments


def segments_at(axis: Axis, dim: ElasticDim, capacity: int) -> tuple[Segment, ...]:
    """The segments that an axis would have if ``dim`` had another capacity; those of an axis lie end to end."""
    segments: list[Segment] = []
    start = 0
    for segment in axis.segments:
        segments.append(segment._replace(start=start))
        start += segment.inner * (capacity if segment.dim is dim else segment.dim.capacity)
    return tuple(segments)


def concat(*axes: Axis) -> Axis:
    """The axis that holds ``axes`` side by side, each at its capacity offset, as ``torch.cat`` along channels does."""
    segments: list[Segment] = []
    start = 0
    for axis in axes:
        segments += [Segment(s.dim, start + s.start, s.inner) for s in axis.segments]
        start += axis.capacity
    if not segments:
        raise CapacityError("concat: expected at least one dim, got none.")
    return DerivedAxis(tuple(segments))


class ElasticDim(Entry, Axis):
    """One size, shared by every tensor axis that it runs through: like ``torch.export.Dim``, but alive.

    Args:
        active: units in use, from the start of each axis.
        capacity: units allocated; defaults to ``active``, and is exactly what was asked.
        minimum: the smallest width that :meth:`resize` takes.
        multiple_of: every width is a multiple of it.
        name: how messages call the dim.

    Attributes:
        rigid: why the width cannot change, as conversion of a model found, or ``None``.
        compact_only: why activations of the dim cannot be static, or ``None``.
        mixed: what plain code computes from all of its units at once, so that no newborn one can leave it as it is, or ``None``.

    Raises:
        CapacityError: ``active`` is not a multiple between minimum and capacity.
    """

    rigid: str | None = None
    compact_only: str | None = None
    mixed: str | None = None

    def __init__(
        self, active: int, capacity: int | None = None, *, minimum: int = 1, multiple_of: int = 1, name: str | None = None
    ) -> None:
        where = f"ElasticDim {name!r}" if name else "ElasticDim"
        active = exact_int(active, where, "active")
        self._capacity = active if capacity is None else exact_int(capacity, where, "capacity")
        self.minimum = exact_int(minimum, where, "minimum")
        self.multiple_of = exact_int(multiple_of, where, "multiple_of")
        if self.multiple_of < 1 or self.minimum < 1:
            raise CapacityError(f"{where}: minimum and multiple_of: expected at least 1, got {self.minimum} and {self.multiple_of}.")
        self.name = name
        super().__init__(self.admit(active), name)

    def __repr__(self) -> str:
        return f"{self.label}(active={self.active}, capacity={self.capacity})"

    @property
    def active(self) -> int:
        """Units in use."""
        return self._value

    @property
    def capacity(self) -> int:
        """Units allocated."""
        return self._capacity

    @property
    def segments(self) -> tuple[Segment, ...]:
        return (Segment(self, 0, 1),)

    def runs(self) -> Runs:
        return [(0, self._value)]

    @property
    def bindings(self) -> list[Binding]:
        """Every tensor axis that the dim runs through."""
        found = []
        for layer in self.users():
            for name, axes in layer.tensor_axes().items():
                tensor = layer.storage(name)
                if tensor is None:
                    continue
                for index, axis in enumerate(axes):
                    if axis is not None:
                        found += [Binding(tensor, index, outer, inner, start, layer, name) for outer, inner, start in _periods(axis, self)]
        return found

    def admit(self, n: int, capacity: int | None = None) -> int:
        """Check a width against minimum, capacity and multiple.

        Args:
            n: the width.
            capacity: that the dim is to have, if not its own.

        Raises:
            CapacityError: with what was expected, and the remedy.
        """
        if type(n) is not int:
            n = exact_int(n, self.label, "width")
        if self.rigid is not None and n != self._value:
            raise CapacityError(f"{self.label}: cannot activate {n} units: its width is fixed at {self._value}, since {self.rigid}.")
        capacity = self._capacity if capacity is None else capacity
        if n > capacity:
            raise CapacityError(
                f"{self.label}: cannot activate {n} units: capacity is {capacity}. "
                "Rebuild the layer with a larger max_* size, or choose a width up to the capacity."
            )
        if n < self.minimum:
            raise CapacityError(
                f"{self.label}: cannot activate {n} units: minimum is {self.minimum}. To switch a layer off, put it in an ElasticBlock."
            )
        if n % self.multiple_of:
            step = self.multiple_of
            near = [width for width in (n - n % step, n - n % step + step) if self.minimum <= width <= capacity]
            hint = f"The nearest: {' and '.join(map(str, near))}." if near else "No width of this dim is one: build it with other bounds."
            raise CapacityError(f"{self.label}: cannot activate {n} units: expected a multiple of {step}. {hint}")
        return n

    def resize(self, n: int) -> None:
        """Activate the first ``n`` units, everywhere at once: pure metadata. Units that slept return as they were.

        Effects: one commit, unless ``n`` is the present width. No weight, gradient or optimizer state is read or written.

        Raises:
            CapacityError: ``n`` is beyond capacity, below minimum or not a multiple; nothing has changed.
            OwnerError: the calling thread does not own the control block; nothing has changed.
        """
        self.block.stage(self, self.admit(n))

    def grow(self, n: int, init: str = "zero", exact: bool = True) -> None:
        """Give birth to the units from ``active`` up to ``n``: re-initialise them so that the function does not change, then activate them.

        Args:
            n: the new width, at least the present one.
            init: ``"zero"``: random producers, zero consumer columns. ``"split"``: copies of existing units whose outgoing weights are
                divided in unequal shares (Net2Net), so that they part ways in training. ``"gradmax"``: zero producers, and consumers along
                the largest gradients that :func:`esper_elastic.growth.observe` saw last (GradMax).
            exact: raise where the function cannot be kept, as for a dim that a LayerNorm runs over.

        Effects: writes weights, gradients and optimizer state of the newborn units, over the full capacity of crossing axes; one commit.

        Raises:
            CapacityError: the width is invalid, or the function cannot be kept and ``exact`` holds; nothing has changed.
            OptimizerError: an unguarded optimizer holds state for the parameters; nothing has changed.

        Source: Chen, Goodfellow, Shlens: Net2Net (ICLR 2016), for ``"split"``; Evci et al.: GradMax (ICLR 2022), for ``"gradmax"``.
        """
        _verb("grow")(self, n, init=init, exact=exact)

    def keep(self, indices: Sequence[int] | Tensor) -> None:
        """Keep the chosen units and put the others to sleep behind them, in order, through every binding and optimizer state.

        Args:
            indices: distinct active units, in any order; they come to the front in ascending order. A later ``resize`` wakes the others.

        Effects: permutes weights, buffers, gradients and optimizer state over the full capacity of every crossing axis; one commit.

        Raises:
            CapacityError: an index is repeated, asleep or no integer, or their number is no valid width; nothing has changed.
            OptimizerError: an unguarded optimizer holds state for the parameters; nothing has changed.
        """
        _verb("keep")(self, indices)


def _periods(axis: Axis, dim: ElasticDim) -> list[tuple[int, int, int]]:
    """The places of ``dim`` in ``axis`` as ``(outer, inner, start)``; equal neighbouring segments are one place with several periods."""
    places: list[tuple[int, int, int]] = []
    for segment in axis.segments:
        if segment.dim is not dim:
            continue
        if places:
            outer, inner, start = places[-1]
            if inner == segment.inner and start + outer * dim.capacity * inner == segment.start:
                places[-1] = (outer + 1, inner, start)
                continue
        places.append((1, segment.inner, segment.start))
    return places


_verbs: dict[str, Callable[..., None]] = {}


def install_verb(name: str, function: Callable[..., None]) -> None:
    """Let :class:`ElasticDim` offer a verb that moves data, which this file does not know how to do."""
    _verbs[name] = function


def _verb(name: str) -> Callable[..., None]:
    return _verbs[name]
