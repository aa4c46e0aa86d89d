"""The control block and what lives in it: slots, commits, generations, and nothing else that may write them.

A :class:`ControlBlock` is one int32 vector on the host, with one replica per device. Each :class:`Entry`, a dim or a :class:`Switch`, owns
a slot of it. A *commit* publishes staged values in one write, raises the generation and bumps the version of every copy, so that the
backward of a graph built before it raises instead of computing something else.
"""

from __future__ import annotations

import ctypes
import hashlib
import operator
import queue
import threading
import weakref
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from contextlib import AbstractContextManager
from types import TracebackType
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, Self

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from ..errors import CapacityError, OwnerError
from .replica import Replica

if TYPE_CHECKING:
    from .dims import Axis


class User(Protocol):
    """What a dim or switch knows of the layers that use it."""

    def tensor_axes(self) -> dict[str, tuple[Axis | None, ...]]:
        """The axes of each parameter and buffer, by name; ``None`` for an axis of fixed size."""

    def bind_control(self) -> None:
        """Fetch the control tensor and the slots again, after they moved."""


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
        self._entries: dict[int, weakref.ref[Entry]] = {}
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
        return self._replica(device).tensor

    def entries(self) -> list[Entry]:
        """Every live dim and switch of the block, in slot order."""
        found = [entry for entry in (reference() for reference in self._entries.values()) if entry is not None]
        return sorted(found, key=lambda entry: entry.slot)

    def digest(self) -> str:
        """A hash of all widths and switches; ranks of a data-parallel job compare it, since weights do not show a width that differs."""
        values = ",".join(f"{type(entry).__name__}:{entry._value}" for entry in self.entries())
        return hashlib.blake2b(values.encode(), digest_size=16).hexdigest()

    # Writing

    def batch(self) -> AbstractContextManager[ControlBlock]:
        """Stage every change made inside, and publish all of them in one commit at the end; none, if the body raises.

        Reading ``active`` inside gives the published value. Batches nest: the outermost one commits, and an inner one whose body raises
        drops what it staged.

        Raises:
            OwnerError: on entering, the calling thread does not own the block.
        """
        return _Staging(self)

    def _publish(self, batch: _Batch) -> None:
        if batch.prepares:
            self._require_writable()
        for prepare in batch.prepares:
            prepare()
        self.commit(batch.values.items(), moved=bool(batch.prepares))

    def stage(self, entry: Entry, value: int, prepare: Callable[[], None] | None = None) -> None:
        """Publish one valid value now, or with the open batch. ``prepare`` moves the data that the new value needs, just before."""
        if self._batch is not None:
            self._require_owner()
            self._batch.values[entry] = value
            if prepare is not None:
                self._batch.prepares.append(prepare)
            return
        if prepare is not None:
            self._require_owner()
            self._require_writable()
            prepare()
        self.commit(((entry, value),))

    def stage_all(self, changes: Iterable[tuple[Entry, int]]) -> None:
        """:meth:`stage` for several entries at once."""
        if self._batch is not None:
            self._require_owner()
            self._batch.values.update(changes)
        else:
            self.commit(changes)

    def commit(self, changes: Iterable[tuple[Entry, int]], moved: bool = False) -> None:
        """Publish valid values in one write: host mirror, versions, generation, device replicas. Nothing happens where nothing changes.

        Args:
            changes: entries with their new values.
            moved: units were moved or initialised for it, so that older graphs are void though every value may be as before.

        Raises:
            OwnerError: the calling thread does not own the block.
            GraphCaptureError: a CUDA graph is being captured.
        """
        if threading.get_ident() != self.owner:
            self._require_owner()
        changes = [(entry, value) for entry, value in changes if entry._value != value]
        if not changes and not moved:
            return
        if self._replicas:
            self._require_writable()
        values = self._view.from_address(self._host.data_ptr())  # fetched anew: share_memory_ and friends move storage
        for entry, value in changes:
            values[entry.slot] = value
            entry._value = value
        increment_version(self._host)
        self.generation += 1
        if self._replicas:
            slots = [entry.slot for entry, _ in changes]
            for replica in self._replicas.values():
                replica.write(self._host, min(slots, default=0), max(slots, default=0) + 1)
        if self._superseded:
            increment_version(self._superseded)
            self._superseded.clear()

    def _require_owner(self) -> None:
        if threading.get_ident() != self.owner:
            raise OwnerError(
                f"ControlBlock: thread {threading.current_thread().name!r} cannot commit: the block belongs to the thread that made it. "
                "Post the change with control.post(dim.resize, n), which the owner applies in control.drain(), or control.adopt() it."
            )

    def _require_writable(self) -> None:
        for replica in self._replicas.values():
            replica.require_writable()

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
            target._superseded += [block._host, *block._abandon_replicas(), *block._superseded]
            target.generation = max(target.generation, block.generation)
            while not block._posted.empty():
                target._posted.put(block._posted.get())
        for user in users.values():
            user.bind_control()
        return target

    def _place(self, entry: Entry) -> int:
        """Give ``entry`` a slot and write its value there."""
        if self._used == self._host.numel() and not self._free:
            self._reallocate()
        slot = self._free.pop() if self._free else self._used
        self._used += slot == self._used
        self._entries[slot] = weakref.ref(entry)
        self._view.from_address(self._host.data_ptr())[slot] = entry._value
        for replica in self._replicas.values():
            replica.write(self._host, slot, slot + 1)
        return slot

    def _replica(self, device: torch.device) -> Replica:
        replica = self._replicas.get(device)
        if replica is None:
            replica = self._replicas[device] = Replica(self._host, device)
            of_fixed_shape(replica.tensor)
        return replica

    def _abandon_replicas(self) -> list[Tensor]:
        """The device tensors that the block leaves."""
        for replica in self._replicas.values():
            replica.abandon()
        return [replica.tensor for replica in self._replicas.values()]

    def _allocate(self, length: int) -> None:
        with torch.inference_mode(False):
            self._host = of_fixed_shape(torch.zeros(length, dtype=torch.int32, device="cpu"))
        self._view = ctypes.c_int32 * length
        self._replicas: dict[torch.device, Replica] = {}

    def _reallocate(self) -> None:
        """Move to a new vector. Slots of dead entries are free in it; in the old one, graphs that outlive their layer still read them."""
        old = self._host
        self._superseded += [old, *self._abandon_replicas()]
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

    def _register(self, entry: Entry) -> None:
        self._entries[entry.slot] = weakref.ref(entry)


class _Batch(NamedTuple):
    values: dict[Entry, int]
    prepares: list[Callable[[], None]]


class _Staging(AbstractContextManager[ControlBlock]):
    """One ``with block.batch():``, the outermost one or one inside of another."""

    __slots__ = ("_block", "_outer")

    def __init__(self, block: ControlBlock) -> None:
        self._block = block
        self._outer: tuple[dict[Entry, int], int] | None = None  # what the batch around held on entering

    def __enter__(self) -> ControlBlock:
        block = self._block
        block._require_owner()
        if block._batch is None:
            block._batch = _Batch({}, [])
        else:
            self._outer = dict(block._batch.values), len(block._batch.prepares)
        return block

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        block = self._block
        batch = block._batch
        assert batch is not None
        if self._outer is None:
            block._batch = None
            if kind is None:
                block._publish(batch)
        elif kind is not None:
            values, count = self._outer
            batch.values.clear()
            batch.values.update(values)
            del batch.prepares[count:]


class Entry:
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


class Switch(Entry):
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


def of_fixed_shape(tensor: Tensor) -> Tensor:
    """Tell compilers that no size of ``tensor`` is a batch size, even where both are equal. Returns it.

    What ``torch._dynamo.mark_static`` notes; calling that would import the compiler with the package.
    """
    tensor._dynamo_static_indices = set(range(tensor.dim()))  # type: ignore[attr-defined]
    return tensor


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
