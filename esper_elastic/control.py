"""Widths as data: the control block, the dims and switches that live in it, and nothing else that may write them.

A :class:`ControlBlock` is one int32 vector on the host, with one replica per device. An :class:`ElasticDim` or :class:`Switch` owns a
slot of it. A *commit* publishes staged values in one write, raises the generation and bumps the version of every copy, so that the backward
of a graph built before it raises instead of computing something else.

This file knows tensors only by the axes that layers report. It neither initialises nor moves weights: ``grow`` and ``keep`` are
installed by :mod:`esper_elastic.growth`.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import operator
import queue
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from typing import Any, NamedTuple, Protocol, Self

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from .errors import CapacityError, OwnerError

Runs = list[tuple[int, int]]


class User(Protocol):
    """What a dim or switch knows of the layers that use it."""

    def tensor_axes(self) -> dict[str, tuple[Axis | None, ...]]:
        """The axes of each parameter and buffer, by name; ``None`` for an axis of fixed size."""

    def bind_control(self) -> None:
        """Fetch the control tensor and the slots again, after they moved."""


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


class ControlBlock:
    """The one int32 vector that says what is active, for all layers that share it.

    A plain object: neither buffer nor module, so that no cast, ``to_empty`` or weight average ever touches it. Copies and pickles carry the
    values; device replicas are made on demand. Only the thread that owns the block commits; others :meth:`post`.
    """

    _SLACK = 16

    def __init__(self) -> None:
        self.generation = 0
        self.owner = threading.get_ident()
        self._used = 0
        self._entries: dict[int, weakref.ref[_Entry]] = {}
        self._free: list[int] = []
        self._allocate(self._SLACK)
        self._superseded: list[Tensor] = []
        self._batch: _Batch | None = None
        self._posted: queue.SimpleQueue[tuple[Future[Any], Callable[[], Any]]] = queue.SimpleQueue()

    def __repr__(self) -> str:
        return f"ControlBlock(entries={len(self.entries())}, generation={self.generation})"

    # Reading

    def on(self, device: torch.device) -> Tensor:
        """The control tensor that ops on ``device`` read: the host vector itself on the CPU, a replica elsewhere."""
        if device.type in ("cpu", "meta"):
            return self._host
        replica = self._replicas.get(device)
        if replica is None:
            with torch.inference_mode(False):
                replica = self._replicas[device] = self._host.to(device)
        return replica

    def entries(self) -> list[_Entry]:
        """Every live dim and switch of the block, in slot order."""
        found = [entry for entry in (reference() for reference in self._entries.values()) if entry is not None]
        return sorted(found, key=lambda entry: entry.slot)

    def digest(self) -> str:
        """A hash of all widths and switches; ranks of a data-parallel job compare it, since weights do not show a width that differs."""
        values = ",".join(f"{type(entry).__name__}:{entry._value}" for entry in self.entries())
        return hashlib.blake2b(values.encode(), digest_size=16).hexdigest()

    # Writing

    @contextlib.contextmanager
    def batch(self) -> Iterator[ControlBlock]:
        """Stage every change made inside, and publish all of them in one commit at the end; none, if the body raises.

        Reading ``active`` inside gives the published value. Batches nest: the outermost one commits, and an inner one whose body raises
        drops what it staged.
        """
        self._require_owner()
        if self._batch is not None:
            values, count = dict(self._batch.values), len(self._batch.prepares)
            try:
                yield self
            except BaseException:
                self._batch.values.clear()
                self._batch.values.update(values)
                del self._batch.prepares[count:]
                raise
            return
        self._batch = batch = _Batch({}, [])
        try:
            yield self
        finally:
            self._batch = None
        for prepare in batch.prepares:
            prepare()
        self.commit(batch.values.items(), moved=bool(batch.prepares))

    def stage(self, entry: _Entry, value: int, prepare: Callable[[], None] | None = None) -> None:
        """Publish one valid value now, or with the open batch. ``prepare`` moves the data that the new value needs, just before."""
        if self._batch is not None:
            self._require_owner()
            self._batch.values[entry] = value
            if prepare is not None:
                self._batch.prepares.append(prepare)
            return
        if prepare is not None:
            self._require_owner()
            prepare()
        self.commit(((entry, value),))

    def stage_all(self, changes: Iterable[tuple[_Entry, int]]) -> None:
        """:meth:`stage` for several entries at once."""
        if self._batch is not None:
            self._require_owner()
            self._batch.values.update(changes)
        else:
            self.commit(changes)

    def commit(self, changes: Iterable[tuple[_Entry, int]], moved: bool = False) -> None:
        """Publish valid values in one write: host mirror, versions, generation, device replicas. Nothing happens where nothing changes.

        Args:
            changes: entries with their new values.
            moved: units were moved or initialised for it, so that older graphs are void though every value may be as before.

        Raises:
            OwnerError: the calling thread does not own the block.
        """
        if threading.get_ident() != self.owner:
            self._require_owner()
        changes = [(entry, value) for entry, value in changes if entry._value != value]
        if not changes and not moved:
            return
        values = self._view.from_address(self._host.data_ptr())  # fetched anew: share_memory_ and friends move storage
        for entry, value in changes:
            values[entry.slot] = value
            entry._value = value
        increment_version(self._host)
        self.generation += 1
        if self._replicas:
            for replica in self._replicas.values():
                replica.copy_(self._host, non_blocking=True)
        if self._superseded:
            increment_version(self._superseded)
            self._superseded.clear()

    def _require_owner(self) -> None:
        if threading.get_ident() != self.owner:
            raise OwnerError(
                f"ControlBlock: thread {threading.current_thread().name!r} cannot commit: the block belongs to the thread that made it. "
                "Post the change with control.post(dim.resize, n), which the owner applies in control.drain(), or control.adopt() it."
            )

    def adopt(self) -> None:
        """Make the calling thread the owner."""
        self.owner = threading.get_ident()

    def post(self, change: Callable[..., Any], *args: Any, **kwargs: Any) -> Future[Any]:
        """Queue ``change(*args, **kwargs)`` for the owner, from any thread; the future carries its result or its exception."""
        future: Future[Any] = Future()
        self._posted.put((future, lambda: change(*args, **kwargs)))
        return future

    def drain(self) -> int:
        """Apply what other threads posted, in order; returns how many changes that was. Call it between steps."""
        self._require_owner()
        count = 0
        while True:
            try:
                future, change = self._posted.get_nowait()
            except queue.Empty:
                return count
            count += 1
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(change())
                except Exception as error:
                    future.set_exception(error)

    # Membership

    @staticmethod
    def merge(blocks: Iterable[ControlBlock]) -> ControlBlock:
        """Move every entry into the largest of ``blocks``, and rebind the layers that moved. Widths stay; the highest generation wins.

        Raises:
            OwnerError: one of the blocks belongs to another thread; nothing has moved.
            CapacityError: a batch is open; nothing has moved.
        """
        distinct = list({id(block): block for block in blocks}.values())
        target = max(distinct, key=lambda block: len(block._entries))
        if len(distinct) == 1:
            return target
        for block in distinct:
            block._require_owner()
            if block._batch is not None:
                raise CapacityError("ControlBlock: cannot merge with another block while a batch is open. Leave the batch first.")
        users: dict[int, User] = {}
        for block in distinct:
            if block is target:
                continue
            for entry in block.entries():
                users.update((id(user), user) for user in entry.users())
                entry.slot = target._place(entry)
                entry.block = target
            target._superseded += [block._host, *block._replicas.values(), *block._superseded]
            target.generation = max(target.generation, block.generation)
            while not block._posted.empty():
                target._posted.put(block._posted.get())
        for user in users.values():
            user.bind_control()
        return target

    def _place(self, entry: _Entry) -> int:
        """Give ``entry`` a slot and write its value there."""
        if self._used == self._host.numel() and not self._free:
            self._reallocate()
        slot = self._free.pop() if self._free else self._used
        self._used += slot == self._used
        self._entries[slot] = weakref.ref(entry)
        self._view.from_address(self._host.data_ptr())[slot] = entry._value
        for replica in self._replicas.values():
            replica[slot] = entry._value
        return slot

    def _allocate(self, length: int) -> None:
        with torch.inference_mode(False):
            self._host = torch.zeros(length, dtype=torch.int32, device="cpu")
        self._view = ctypes.c_int32 * length
        self._replicas: dict[torch.device, Tensor] = {}

    def _reallocate(self) -> None:
        """Move to a new vector. Slots of dead entries are free in it; in the old one, graphs that outlive their layer still read them."""
        old, replicas = self._host, self._replicas
        self._superseded += [old, *replicas.values()]
        self._free = [slot for slot, reference in self._entries.items() if reference() is None]
        self._allocate(old.numel() if 4 * len(self._free) >= old.numel() else 2 * old.numel())
        self._host[: old.numel()] = old
        for user in {id(user): user for entry in self.entries() for user in entry.users()}.values():
            user.bind_control()

    # Copies and pickles carry values; entries register themselves again as they arrive.

    def __getstate__(self) -> dict[str, Any]:
        return {"values": self._host[: self._used].tolist(), "generation": self.generation}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__()  # type: ignore[misc]
        self.generation = state["generation"]
        values = state["values"]
        self._allocate(max(self._SLACK, len(values)))
        self._host[: len(values)] = torch.tensor(values, dtype=torch.int32, device="cpu")
        self._used = len(values)

    def _register(self, entry: _Entry) -> None:
        self._entries[entry.slot] = weakref.ref(entry)


class _Batch(NamedTuple):
    values: dict[_Entry, int]
    prepares: list[Callable[[], None]]


class _Entry:
    """One int of a control block: its slot, its mirrored value, and the layers that read it."""

    name: str | None
    path: str | None = None

    def __init__(self, value: int, name: str | None) -> None:
        self.name = name
        self._value = value
        self._users: list[weakref.ref[Any]] = []
        self.block = ControlBlock()
        self.slot = self.block._place(self)

    @property
    def label(self) -> str:
        """How messages call this entry: by the name it was given, or the path where a model-level call found it."""
        name = self.name or self.path
        return f"{type(self).__name__} {name!r}" if name else type(self).__name__

    @property
    def staged(self) -> int:
        """The value that the next commit will leave."""
        batch = self.block._batch
        return self._value if batch is None else batch.values.get(self, self._value)

    def users(self) -> list[Any]:
        """The layers bound to this entry, oldest first."""
        return [user for user in (reference() for reference in self._users) if user is not None]

    def attach(self, user: User) -> None:
        """Bind a layer, weakly."""
        alive = self.users()
        if not any(known is user for known in alive):
            self._users = [weakref.ref(known) for known in alive] + [weakref.ref(user)]

    def __copy__(self) -> Self:
        return self  # a second object for the same slot would part from it at the next commit

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key != "_users"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._users = []
        self.block._register(self)


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


class ElasticDim(_Entry, Axis):
    """One size, shared by every tensor axis that it runs through: like ``torch.export.Dim``, but alive.

    Args:
        active: units in use, from the start of each axis.
        capacity: units allocated; defaults to ``active``, and is exactly what was asked.
        minimum: the smallest width that :meth:`resize` takes.
        multiple_of: every width is a multiple of it.
        name: how messages call the dim.

    Raises:
        CapacityError: ``active`` is not a multiple between minimum and capacity.
    """

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
                tensor = getattr(layer, name)
                if tensor is None:
                    continue
                for index, axis in enumerate(axes):
                    if axis is not None:
                        found += [Binding(tensor, index, outer, inner, start, layer, name) for outer, inner, start in _periods(axis, self)]
        return found

    def admit(self, n: int) -> int:
        """Check a width against minimum, capacity and multiple.

        Raises:
            CapacityError: with what was expected, and the remedy.
        """
        if type(n) is not int:
            n = exact_int(n, self.label, "width")
        if n > self._capacity:
            raise CapacityError(
                f"{self.label}: cannot activate {n} units: capacity is {self._capacity}. "
                "Rebuild the layer with a larger max_* size, or choose a width up to the capacity."
            )
        if n < self.minimum:
            raise CapacityError(
                f"{self.label}: cannot activate {n} units: minimum is {self.minimum}. To switch a layer off, put it in an ElasticBlock."
            )
        if n % self.multiple_of:
            step = self.multiple_of
            near = [width for width in (n - n % step, n - n % step + step) if self.minimum <= width <= self._capacity]
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
                divided in unequal shares (Net2Net), so that they part ways in training.
            exact: raise where the function cannot be kept, as for a dim that a LayerNorm runs over.

        Effects: writes weights, gradients and optimizer state of the newborn units, over the full capacity of crossing axes; one commit.

        Raises:
            CapacityError: the width is invalid, or the function cannot be kept and ``exact`` holds; nothing has changed.
            OptimizerError: an unguarded optimizer holds state for the parameters; nothing has changed.

        Source: Chen, Goodfellow, Shlens: Net2Net (ICLR 2016), for ``"split"``.
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


class Switch(_Entry):
    """A block's on/off flag in the control block."""

    def __init__(self, on: bool = True, *, name: str | None = None) -> None:
        super().__init__(int(on), name)

    def __repr__(self) -> str:
        return f"{self.label}({'on' if self.on else 'off'})"

    @property
    def on(self) -> bool:
        return self._value != 0

    def set(self, on: bool) -> None:
        """Switch on or off: one commit, unless it already is."""
        self.block.stage(self, 1 if on else 0)


def exact_int(value: Any, where: str, what: str) -> int:
    """``value`` as an ``int``, if it is one in every respect.

    Raises:
        CapacityError: for a bool, a float, or anything else that only resembles an integer.
    """
    if not isinstance(value, bool | Tensor):
        try:
            return operator.index(value)
        except TypeError:
            pass
    raise CapacityError(f"{where}: {what}: expected an integer, got {value!r} of type {type(value).__name__}.")


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
