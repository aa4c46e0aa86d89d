"""Models as they were: what modules hold is noted by reference, and put back after a run or after a conversion that failed.

Contexts for the time of a run are :class:`contextlib.ExitStack`, and no generators: one whose end an exception keeps from being reached
does nothing then, whereas a generator comes to its end when it is collected, and would put back what a rollback has long undone.
"""

from __future__ import annotations

import contextlib
import operator
import random
import sys
from collections import deque
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..layers import registry

_CONTAINERS = (dict, list, set, deque)


class Snapshot:
    """Classes and attributes of a model's modules, and what the containers among the attributes hold.

    Tensors are noted, not copied; objects of the user's own are left to the user.
    """

    def __init__(self, model: nn.Module) -> None:
        self._modules = [(module, type(module), dict(vars(module))) for module in plain_modules(model)]
        self._containers: list[tuple[Any, Any]] = []
        seen: set[int] = set()
        pending = [value for _, _, attributes in self._modules for value in attributes.values() if isinstance(value, _CONTAINERS)]
        while pending:
            value = pending.pop()
            if id(value) not in seen:
                seen.add(id(value))
                kept = dict(value) if isinstance(value, dict) else list(value)
                self._containers.append((value, kept))
                if kept:
                    pending += [item for item in (kept.values() if isinstance(kept, dict) else kept) if isinstance(item, _CONTAINERS)]

    def restore(self) -> None:
        """Let every module be of the class, and hold the objects, that it was and held."""
        for module, kind, attributes in self._modules:
            if type(module) is not kind:
                module.__class__ = kind
            _refill(vars(module), attributes)
        for container, kept in self._containers:
            _refill(container, kept)


def plain_modules(model: nn.Module) -> list[nn.Module]:
    """The modules whose attributes are Python's own; those of scripted parts are not."""
    return [module for module in model.modules() if not isinstance(module, torch.jit.ScriptModule)]


def _refill(container: Any, kept: Any) -> None:
    """Put back what a container held, in its order, if it holds anything else."""
    if not container and not kept:
        return
    same = len(container) == len(kept) and all(map(operator.is_, container, kept))
    if same and isinstance(container, dict):
        same = all(map(operator.is_, container.values(), kept.values()))
    if not same:
        container.clear()
        if isinstance(container, dict | set):
            container.update(kept)
        else:
            container.extend(kept)


def as_it_was(model: nn.Module) -> contextlib.ExitStack:
    """Put back, at the end, whatever is written to the model meanwhile, and the state of every random generator of the host."""
    end = generators_kept()
    end.callback(Snapshot(model).restore)
    return end


def generators_kept() -> contextlib.ExitStack:
    """Put the random generators of the host back, at the end, to where they are now."""
    end = contextlib.ExitStack()
    end.callback(torch.set_rng_state, torch.get_rng_state())
    end.callback(random.setstate, random.getstate())
    numpy = sys.modules.get("numpy")
    if numpy is not None:
        end.callback(numpy.random.set_state, numpy.random.get_state())
    return end


@contextlib.contextmanager
def or_nothing(model: nn.Module, optimizers: list[Optimizer]) -> Iterator[None]:
    """Put everything back if the body fails: modules, tensors with their gradients, optimizers with their state."""
    snapshot = Snapshot(model)
    tensors: dict[int, tuple[Tensor, Tensor, Tensor | None]] = {}
    for module in plain_modules(model):
        for tensor in (*module._parameters.values(), *module._buffers.values()):
            if tensor is not None:
                tensors[id(tensor)] = (tensor, tensor.data, tensor.grad if tensor.is_leaf else None)
    known = [(tensor, registry.lookup(tensor)) for tensor, _, _ in tensors.values()]
    stepped = [_OptimizerSnapshot(optimizer) for optimizer in optimizers]
    try:
        yield
    except BaseException:
        for tensor, data, grad in tensors.values():
            if tensor.data_ptr() != data.data_ptr() or tensor.shape != data.shape:
                tensor.grad = None
                tensor.data = data
            if tensor.is_leaf and tensor.grad is not grad:
                tensor.grad = grad
        snapshot.restore()
        for tensor, axes in known:
            registry.forget(tensor)
            if axes is not None:
                registry.register(tensor, axes.axes, axes.switches)
        for each in stepped:
            each.restore()
        raise


class _OptimizerSnapshot:
    """The class, attributes, groups and state of an optimizer, by reference."""

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer = optimizer
        self.kind = type(optimizer)
        self.attributes = dict(vars(optimizer))
        self.state = {param: dict(kept) for param, kept in optimizer.state.items()}

    def restore(self) -> None:
        self.optimizer.__class__ = self.kind
        _refill(vars(self.optimizer), self.attributes)
        for param, kept in self.state.items():
            _refill(self.optimizer.state[param], kept)
