"""Which optimizers hold state for a parameter, so that whoever moves its units can move their state along.

An optimizer that understands active slices *follows* the parameters: ours by construction, those of ``torch.optim`` once they are guarded.
Others that step elastic parameters are noted when they do, warned about once, and named to :mod:`esper_elastic.growth`, which refuses to
move units under them. All of it is held weakly.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterable
from typing import Any, Protocol, cast
from weakref import WeakKeyDictionary, WeakSet

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook

from .control import ElasticDim, Switch
from .layers import registry


class Follower(Protocol):
    """What an optimizer offers so that its state follows the units of a parameter.

    Both methods cover the full capacity of the axes that cross ``axis``, and do nothing for a parameter without state. State of another
    shape than the parameter's is left alone.
    """

    def permute_state(self, param: Tensor, axis: int, order: Tensor) -> None:
        """Bring index ``order[i]`` of ``axis`` to place ``i`` in every state tensor and step count.

        Args:
            param: a parameter of the optimizer.
            axis: of the parameter, counted from 0.
            order: int64 permutation of the whole capacity of that axis.

        Effects: writes state in place; no state tensor changes its identity.
        """

    def reset_state(self, param: Tensor, axis: int, start: int, stop: int) -> None:
        """Make the state of the indices from ``start`` to ``stop`` of ``axis`` what it was before their first step.

        Effects: writes state in place; no state tensor changes its identity.
        """


_followers: WeakSet[Optimizer] = WeakSet()
_strangers: WeakKeyDictionary[Optimizer, _Watch] = WeakKeyDictionary()


class _Watch:
    """What is known of an optimizer that does not follow: the entries that its elastic parameters depend on, and whether it was warned."""

    def __init__(self, optimizer: Optimizer) -> None:
        self.num_groups = len(optimizer.param_groups)
        self.revision = registry.revision()
        self.dims: dict[int, ElasticDim] = {}
        self.switches: dict[int, Switch] = {}
        for group in optimizer.param_groups:
            for param in group["params"]:
                known = registry.lookup(param)
                if known is not None:
                    self.switches.update((id(switch), switch) for switch in known.switches)
                    self.dims.update((id(dim), dim) for axis in known.axes if axis is not None for dim in axis.dims)
        self.warned = False

    def sees_dormant(self) -> bool:
        """Whether part of a parameter is dormant now."""
        return any(dim.active < dim.capacity for dim in self.dims.values()) or any(not switch.on for switch in self.switches.values())


def follow(optimizer: Optimizer) -> None:
    """Register an optimizer that is a :class:`Follower`."""
    _strangers.pop(optimizer, None)
    _followers.add(optimizer)


def follows(optimizer: Optimizer) -> bool:
    """Whether ``optimizer`` is registered."""
    return optimizer in _followers


def followers_of(param: Tensor) -> list[Follower]:
    """The followers that hold state for ``param``."""
    return [cast(Follower, optimizer) for optimizer in _followers if param in optimizer.state]


def unguarded_with_state(param: Tensor) -> Optimizer | None:
    """An optimizer that has stepped, does not follow and holds state for ``param``; ``None`` if there is none."""
    return next((optimizer for optimizer in _strangers if optimizer.state.get(param)), None)


def known_optimizers(params: Iterable[Tensor]) -> list[Optimizer]:
    """The optimizers that hold one of ``params`` in their groups: of those that follow, and of those that have stepped."""
    wanted = {id(param) for param in params}
    known = dict.fromkeys([*_followers, *_strangers])
    return [optimizer for optimizer in known if any(id(param) in wanted for group in optimizer.param_groups for param in group["params"])]


def remembered(optimizer: Optimizer) -> list[Callable[[], Any]]:
    """Calls that let what is known of ``optimizer`` be what it is now; none runs a line of this package."""
    watch = _strangers.get(optimizer)
    follows = _followers.add if optimizer in _followers else _followers.discard
    return [
        functools.partial(follows, optimizer),
        functools.partial(_strangers.pop, optimizer, None)
        if watch is None
        else functools.partial(_strangers.__setitem__, optimizer, watch),
    ]


def _watch(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    """Before each step of any optimizer: note those that do not follow, and warn where that does harm."""
    if optimizer in _followers:
        return
    watch = _strangers.get(optimizer)
    if watch is None or watch.num_groups != len(optimizer.param_groups) or watch.revision != registry.revision():
        warned = watch is not None and watch.warned
        watch = _strangers[optimizer] = _Watch(optimizer)  # parameters become elastic while it holds them
        watch.warned = warned
    if not watch.warned and watch.sees_dormant():
        watch.warned = True
        warnings.warn(
            f"{type(optimizer).__name__} steps elastic parameters of which a part is dormant: it will decay and move what sleeps. "
            f"Use ee.optim.AdamW or ee.optim.SGD, or call ee.optim.guard(optimizer, model).",
            stacklevel=3,
        )


register_optimizer_step_pre_hook(_watch)
