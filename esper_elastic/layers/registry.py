"""Which axes of which parameter are elastic, so that an optimizer can ask with nothing but the parameter in hand.

Keyed weakly by tensor identity. Attributes on parameters would vanish in deepcopy, and optimizers are built from parameters alone.
"""

from __future__ import annotations

import functools
import itertools
import operator
from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from ..control import Axis, Runs, Switch


class ParameterAxes:
    """The axes of one parameter, and the switches above it.

    Attributes:
        axes: one per tensor axis; ``None`` where the size is fixed.
        switches: those of the blocks around it; the whole parameter is dormant while one is off.
    """

    __slots__ = ("axes", "switches")

    def __init__(self, axes: tuple[Axis | None, ...], switches: tuple[Switch, ...]) -> None:
        self.axes = axes
        self.switches = switches

    @property
    def asleep(self) -> bool:
        """Whether a switch above is off."""
        return any(not switch.on for switch in self.switches)

    def runs(self, shape: Iterable[int]) -> tuple[Runs, ...]:
        """The active indices of each axis of a tensor of ``shape``, as ``(start, length)`` runs."""
        return tuple([(0, size)] if axis is None else axis.runs() for axis, size in zip(self.axes, shape, strict=True))


_registry: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
_revision = 0

#: Raise the revision. Built in, as :func:`remembered` says; never back to a number that was, by which something else may be known.
renew: Callable[[], Any] = functools.partial(next, map(functools.partial(operator.setitem, globals(), "_revision"), itertools.count(1)))


def revision() -> int:
    """A number that changes whenever the axes or switches of a parameter do, so that what was looked up need not be again."""
    return _revision


def _note(parameter: Tensor, known: ParameterAxes) -> None:
    _registry[parameter] = known
    renew()


def register(parameter: Tensor, axes: tuple[Axis | None, ...], switches: tuple[Switch, ...]) -> None:
    """Note the axes of ``parameter``, replacing what was known of it."""
    _note(parameter, ParameterAxes(axes, switches))


def add_switch(parameter: Tensor, switch: Switch) -> None:
    """Put ``parameter``, elastic or plain, under one more switch."""
    known = _registry.get(parameter) or ParameterAxes((None,) * parameter.dim(), ())
    if not any(other is switch for other in known.switches):
        _note(parameter, ParameterAxes(known.axes, (*known.switches, switch)))


def forget(parameter: Tensor) -> None:
    """Drop what is known of ``parameter``, until it is registered again."""
    _registry.pop(parameter, None)
    renew()


def lookup(parameter: Tensor) -> ParameterAxes | None:
    """The axes of ``parameter``, or ``None`` if no elastic layer or block holds it."""
    found: ParameterAxes | None = _registry.get(parameter)
    return found


def remembered(parameter: Tensor) -> Callable[[], Any]:
    """A call that lets what is known of ``parameter`` be what it is now, without running a line of this package; :data:`renew` after it."""
    known = _registry.get(parameter)
    if known is None:
        return functools.partial(_registry.pop, parameter, None)
    return functools.partial(_registry.__setitem__, parameter, known)
