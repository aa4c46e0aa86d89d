"""What undoes an edit: a list of calls of built-in functions, and nothing of ours that has to run. Every write is reported here.

An :class:`UndoLog` notes a thing as the calls that put it back (``dict.update``, ``list.__setitem__``, the setter of ``Tensor.data``), and
what makes those calls, in the order that they need, is built in too. An exception may therefore arrive at any line of this package, again
and again, and the log still unwinds: no line of this package is part of that.

It holds references, not copies: it costs by the number of objects, not of weights. Values written in place are the exception, and
:func:`save_values` clones them first. Followed are modules, optimizers, schedulers, tensors, generators, the control block with its
dims, and containers among their attributes; other objects of the user's own are left to the user.
"""

from __future__ import annotations

import functools
import itertools
import operator
import random
import sys
import threading
import types
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from .. import followers
from ..control import Axis, ControlBlock
from ..control.block import Entry
from ..layers import registry
from ..ops import Widths

Call = Callable[[], Any]
Write = Callable[[Tensor, Tensor], None]


class Open(Protocol):
    """What an open transaction does with a report."""

    log: UndoLog
    thread: int

    def added(self, parameter: Tensor, near: Tensor | None) -> None: ...

    def removed(self, parameter: Tensor) -> None: ...

    def moved(self, parameter: Tensor, shape: tuple[int, ...], write: Write) -> None: ...

    def rewritten(self, parameter: Tensor) -> None: ...


#: The open transactions of all threads, outer ones before those inside.
open_transactions: list[Open] = []


def open_here() -> list[Open]:
    """The open transactions of the calling thread, outermost first."""
    here = threading.get_ident()
    return [each for each in open_transactions if each.thread == here]


# Reports


def save_values(*tensors: Tensor) -> None:
    """Say that the values of ``tensors``, or of the slices that they are views of, are about to be written in place.

    Effects: clones them, once for each open transaction of the calling thread; writes into what is given are undone with their version
    counters, and reach no further than the view that was given.
    """
    for each in open_here():
        each.log.save_values(*tensors)


def save_objects(*things: Any) -> None:
    """Say that modules, tensors, optimizers, containers or dims that do not belong to the model are about to be changed."""
    for each in open_here():
        each.log.record(*things)


def added(parameter: Tensor, near: Tensor | None = None) -> None:
    """Say that the model has a new parameter.

    Args:
        parameter: joins an optimizer group.
        near: the parameter whose group that is; ``None`` for the group that holds most of the model's parameters. Nothing is joined near a
            parameter of a twin (:func:`esper_elastic.surgery.trial.twins`).
    """
    for each in open_here()[-1:]:
        each.added(parameter, near)


def removed(parameter: Tensor) -> None:
    """Say that a parameter has left the model: it leaves its optimizer group, and its state goes."""
    for each in open_here()[-1:]:
        each.removed(parameter)


def moved(parameter: Tensor, shape: tuple[int, ...], write: Write) -> None:
    """Say that a parameter or buffer, the same object, got new storage.

    Args:
        parameter: as it is now. Its gradient is the business of whoever moved it.
        shape: that it had.
        write: ``write(made, old)`` copies what is kept from a tensor of the old shape to one of the present shape.

    Effects: optimizer state of the parameter's shape, its step counts, and its entry in an EMA get new storage as well: what is kept is
    carried bit for bit, the rest is what it was before a first step; in an EMA, what it is in the parameter.

    Raises:
        OptimizerError: the optimizer keeps state of which no part belongs to a unit.
    """
    for each in open_here()[-1:]:
        each.moved(parameter, shape, write)


def rewritten(parameter: Tensor) -> None:
    """Say that all values of a parameter mean something else than before: an average of it, kept by name, begins anew."""
    for each in open_here()[-1:]:
        each.rewritten(parameter)


class UndoLog:
    """Notes things as they are, and puts them back.

    What is noted later is put back first, after what :meth:`begin_with` was given. The notes are iterators that make a call at each step,
    so that one that fails can be passed over.

    Attributes:
        unwind: makes the noted calls, each once. Where one fails it raises; :attr:`go_on` then makes those that are left.
        go_on: makes the calls that are left.
        despair: makes the calls of :attr:`failed`, if :attr:`unwind` did not get through.
        failed: what is to happen if the log does not unwind.
    """

    def __init__(self) -> None:
        self._known: dict[int, Any] = {}
        self._notes: list[Iterator[Any] | None] = [None, iter(())]
        self.failed: list[Call] = []
        calls = itertools.chain.from_iterable(iter(self._notes.pop, None))
        self.unwind: Call = functools.partial(deque, itertools.chain(calls, map(operator.call, [self.failed.clear])), 0)
        self.go_on: Call = functools.partial(deque, calls, 0)
        self.despair: Call = functools.partial(deque, map(operator.call, self.failed), 0)

    def __contains__(self, thing: Any) -> bool:
        return id(thing) in self._known

    def forget(self) -> None:
        """Let things be as they are now: an exception before the last line still unwinds everything, one after it nothing."""
        self._known.clear()
        del self._notes[1:]

    def begin_with(self, *calls: Call) -> None:
        """Set the calls that come before everything noted, now and later; the first one comes first."""
        self._notes[-1] = map(operator.call, calls)

    def add(self, *calls: Call) -> None:
        """Note calls of functions that no line of this package is part of; the first one comes first."""
        self._notes[-1:-1] = [map(operator.call, calls)]

    def record(self, *things: Any) -> None:
        """Note things and what they hold, unless they are known. An object of an unknown kind is followed if it is one of ``things``."""
        notes = _Notes()
        seen: dict[int, Any] = {}
        rules: dict[type, _Rule | None] = {type(thing): _rule_of(type(thing)) or _note_object for thing in things}
        known, pending = self._known, list(things)
        while pending:
            thing = pending.pop()
            kind = type(thing)
            try:
                rule = rules[kind]
            except KeyError:
                rule = rules[kind] = _rule_of(kind)
            if rule is not None:
                key = id(thing)
                if key not in seen and key not in known:
                    seen[key] = thing
                    rule(thing, notes, pending)
        self._notes[-1:-1] = notes.iterators()  # first, so that whatever is known is noted, also if an exception arrives between
        self._known.update(seen)

    def save_values(self, *tensors: Tensor) -> None:
        """Clone values, to be copied back; version counters with them, so that graphs built before are valid again."""
        notes = _Notes()
        for tensor in tensors:
            notes.values(tensor)
        self._notes[-1:-1] = notes.iterators()

    def record_random_numbers(self) -> None:
        """Note the states of the generators of Python, NumPy and torch, as far as they are in use."""
        calls: list[Call] = [functools.partial(random.setstate, random.getstate())]
        numpy = sys.modules.get("numpy")
        if numpy is not None:
            calls.append(functools.partial(numpy.random.set_state, numpy.random.get_state()))
        generators = [torch.default_generator]
        if torch.cuda.is_available() and torch.cuda.is_initialized():
            generators += torch.cuda.default_generators
        calls += (functools.partial(generator.set_state, generator.get_state()) for generator in generators)
        self.add(*calls)


class _Notes:
    """What one look at things finds, a column for each argument of a call: a model has thousands, and few objects are made for them."""

    def __init__(self) -> None:
        self.calls: list[Call] = []
        self.objects: list[Any] = []
        self.classes: list[type] = []
        self.dicts: list[dict[Any, Any]] = []
        self.filled: list[dict[Any, Any]] = []
        self.contents: list[dict[Any, Any]] = []
        self.ordered_dicts: list[dict[Any, Any]] = []
        self.ordered_filled: list[dict[Any, Any]] = []
        self.ordered_contents: list[dict[Any, Any]] = []
        self.tensors: list[Tensor] = []
        self.data: list[Tensor] = []
        self.leaves: list[Tensor] = []
        self.require_grad: list[bool] = []
        self.grads: list[Tensor | None] = []

    def values(self, tensor: Tensor) -> None:
        part = tensor.detach()
        if not part.is_inference():
            self.calls.append(functools.partial(torch._C._autograd._unsafe_set_version_counter, (part,), (part._version,)))
        self.calls.append(functools.partial(part.copy_, part.clone()))

    def iterators(self) -> list[Iterator[Any]]:
        """The last one is put back first: containers, then storage, then the gradients that must fit it."""
        return [
            map(operator.call, reversed(self.calls)),
            map(_set_grad, self.leaves, self.grads),
            map(_set_requires_grad, self.leaves, self.require_grad),
            map(_set_data, self.tensors, self.data),
            map(object.__setattr__, self.objects, itertools.repeat("__class__"), self.classes),
            map(OrderedDict.update, self.ordered_filled, self.ordered_contents),
            map(OrderedDict.clear, self.ordered_dicts),
            map(dict.update, self.filled, self.contents),
            map(dict.clear, self.dicts),
        ]


# How each kind of thing is noted. What is appended to `pending` is noted next.

_Rule = Callable[[Any, _Notes, list[Any]], None]


def _rule_of(kind: type) -> _Rule | None:
    for base, rule in _RULES:
        if issubclass(kind, base):
            return rule
    return None


def _note_object(thing: Any, notes: _Notes, pending: list[Any]) -> None:
    """Class, ``__dict__``, and the attributes in ``__slots__``."""
    notes.objects.append(thing)
    notes.classes.append(type(thing))
    attributes = getattr(thing, "__dict__", None)
    if attributes is not None:
        _note_dict(attributes, notes, pending)
    for base in type(thing).__mro__:
        slots = base.__dict__.get("__slots__")
        for name in (slots,) if isinstance(slots, str) else slots or ():
            member = base.__dict__.get(name)
            if not isinstance(member, types.MemberDescriptorType):
                continue
            try:
                value = member.__get__(thing)
            except AttributeError:
                notes.calls += (functools.partial(member.__delete__, thing), functools.partial(member.__set__, thing, None))
            else:
                notes.calls.append(functools.partial(member.__set__, thing, value))
                pending.append(value)


def _note_module(module: nn.Module, notes: _Notes, pending: list[Any]) -> None:
    _note_object(module, notes, pending)
    for tensor in (*module._parameters.values(), *module._buffers.values()):
        if tensor is not None:
            notes.calls.append(registry.remembered(tensor))


def _note_script_module(module: nn.Module, notes: _Notes, pending: list[Any]) -> None:
    """Its attributes are not Python's: what can be edited of it are its mode and its tensors."""
    for part in module.modules():
        notes.calls.append(functools.partial(setattr, part, "training", part.training))
    pending += (*module.parameters(), *module.buffers())


def _note_optimizer(optimizer: Optimizer, notes: _Notes, pending: list[Any]) -> None:
    _note_object(optimizer, notes, pending)
    notes.calls += followers.remembered(optimizer)


def _note_dict(container: dict[Any, Any], notes: _Notes, pending: list[Any]) -> None:
    notes.dicts.append(container)
    if container:
        notes.filled.append(container)
        notes.contents.append(dict.copy(container))
        _look_into(container, dict.values(container), pending)


def _note_ordered_dict(container: OrderedDict[Any, Any], notes: _Notes, pending: list[Any]) -> None:
    notes.ordered_dicts.append(container)
    if container:
        notes.ordered_filled.append(container)
        notes.ordered_contents.append(dict(OrderedDict.items(container)))
        _look_into(container, OrderedDict.values(container), pending)


def _look_into(keys: Iterable[Any], values: Iterable[Any], pending: list[Any]) -> None:
    pending += [value for value in values if type(value) not in _ATOMS]
    pending += [key for key in keys if type(key) is not str and isinstance(key, Tensor)]


def _note_list(container: list[Any], notes: _Notes, pending: list[Any]) -> None:
    notes.calls.append(functools.partial(list.__setitem__, container, slice(None), list(container)))
    _look_into((), container, pending)


def _note_set(container: set[Any], notes: _Notes, pending: list[Any]) -> None:
    notes.calls += (functools.partial(set.update, container, set(container)), functools.partial(set.clear, container))


def _note_deque(container: deque[Any], notes: _Notes, pending: list[Any]) -> None:
    notes.calls += (functools.partial(deque.extend, container, list(container)), functools.partial(deque.clear, container))
    _look_into((), container, pending)


def _note_tuple(container: tuple[Any, ...], notes: _Notes, pending: list[Any]) -> None:
    _look_into((), container, pending)


def _note_tensor(tensor: Any, notes: _Notes, pending: list[Any]) -> None:
    notes.tensors.append(tensor)
    notes.data.append(tensor.data)
    if tensor.is_leaf:
        grad = tensor.grad
        notes.leaves.append(tensor)
        notes.require_grad.append(tensor.requires_grad)
        notes.grads.append(grad)
        if grad is not None:
            pending.append(grad)
        if tensor.requires_grad or isinstance(tensor, nn.Parameter):
            for name in ("_backward_hooks", "_post_accumulate_grad_hooks"):
                hooks = getattr(tensor, name)
                notes.calls.append(functools.partial(object.__setattr__, tensor, name, hooks))
                if hooks is not None:
                    pending.append(hooks)
    _note_dict(tensor.__dict__, notes, pending)


def _note_generator(generator: torch.Generator, notes: _Notes, pending: list[Any]) -> None:
    notes.calls.append(functools.partial(generator.set_state, generator.get_state()))


def _note_entry(entry: Entry, notes: _Notes, pending: list[Any]) -> None:
    _note_object(entry, notes, pending)
    pending += entry.users()


def _note_control_block(block: ControlBlock, notes: _Notes, pending: list[Any]) -> None:
    _note_object(block, notes, pending)
    pending += block.entries()
    for tensor in (block._host, *block._superseded, *(replica.tensor for replica in block._replicas.values())):
        notes.values(tensor)


_setters: Any = Tensor
_set_data, _set_grad, _set_requires_grad = _setters.data.__set__, _setters.grad.__set__, _setters.requires_grad.__set__

#: What holds nothing that could change; left out early, as most attributes are of these types.
_ATOMS = frozenset(
    (type(None), bool, int, float, str, bytes, torch.dtype, torch.device, torch.Size, type, types.FunctionType, types.BuiltinFunctionType)
)

_RULES: tuple[tuple[type, _Rule], ...] = (
    (Tensor, _note_tensor),
    (torch.jit.ScriptModule, _note_script_module),
    (nn.Module, _note_module),
    (OrderedDict, _note_ordered_dict),
    (dict, _note_dict),
    (list, _note_list),
    (tuple, _note_tuple),
    (set, _note_set),
    (deque, _note_deque),
    (Optimizer, _note_optimizer),
    (LRScheduler, _note_object),
    (Entry, _note_entry),
    (ControlBlock, _note_control_block),
    (Axis, _note_object),
    (Widths, _note_object),
    (torch.Generator, _note_generator),
)
