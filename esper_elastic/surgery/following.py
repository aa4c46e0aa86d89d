"""What goes along with the parameters of a model: optimizers with their state, and averages of the weights.

All of it is written under the log of a transaction. State tensors stay the objects that they are and get new storage, as parameters do.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import LBFGS, Optimizer
from torch.utils.weak import WeakTensorKeyDictionary

from ..errors import OptimizerError, TransactionError
from ..followers import known_optimizers
from ..optim.base import ElasticOptimizer
from ..optim.counts import StepCounts, is_dense
from ..optim.guard import state_layout, tracked_axes
from .undo import Write

#: Where classes that average the weights keep the average: a module like the model, or a dict of tensors by name.
_AVERAGES = ("module", "ema", "ema_model", "averaged_model", "shadow")


class Following:
    """What follows the parameters of ``model`` while a transaction is open.

    Args:
        model: whose parameters they are.
        optimizers: that were given. Others that are known to have stepped the parameters go along.
        ema: an average of the weights, or ``None``.

    Attributes:
        twins: modules built like the model, that hold an average of its weights.
        average: tensors by name, that are an average of its weights.

    Raises:
        TransactionError: an optimizer holds no parameter of the model, or the average is of an unknown kind.
    """

    def __init__(self, model: nn.Module, optimizers: list[Optimizer], ema: Any = None) -> None:
        self.model = model
        self.twins: list[nn.Module] = []
        self.average: dict[str, Any] | None = None
        self.prefix = ""
        self._tensors = _named_tensors(model)  # holds them, so that no other gets the id of one
        self._names = {id(tensor): name for name, tensor in self._tensors.items()}
        self.optimizers: list[Optimizer] = []
        self._num_groups: Counter[int] = Counter()
        self.add(optimizers, ema)
        self.add(known_optimizers(model.parameters()))

    def add(self, optimizers: Iterable[Optimizer], ema: Any = None) -> None:
        """Let more follow, as what is given to a transaction inside another does."""
        for optimizer in optimizers:
            if not any(optimizer is known for known in self.optimizers):
                self._require_own(optimizer)
                self.optimizers.append(optimizer)
                self._num_groups += _count_groups(optimizer)
        if ema is not None:
            self._find_average(ema)

    # Reports

    def added(self, parameter: Tensor, near: Tensor | None) -> None:
        """Let a new parameter join a group, as :func:`esper_elastic.surgery.undo.added` says."""
        if near is not None and any(near is other for twin in self.twins for other in twin.parameters()):
            return
        if any(_place(group, parameter) is not None for optimizer in self.optimizers for group in optimizer.param_groups):
            return
        if not self.optimizers:
            _wait(parameter, near, self.model)
        for optimizer, group in _groups_for(self.optimizers, near, self.model):
            _require_sizes(optimizer)
            _join(group, parameter, self.model)

    def removed(self, parameter: Tensor) -> None:
        """Let a parameter leave its groups, its state and its entry in the average."""
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                place = _place(group, parameter)
                if place is None:
                    continue
                _require_sizes(optimizer)
                del group["params"][place]
                if "param_names" in group:
                    del group["param_names"][place]
            optimizer.state.pop(parameter, None)
            if isinstance(optimizer, ElasticOptimizer):
                optimizer._forget()
        if self.average is not None:
            self.average.pop(self._key(parameter), None)

    @torch.no_grad()
    def moved(self, parameter: Tensor, shape: tuple[int, ...], write: Write) -> None:
        """Give state and average the present shape of a parameter that had another."""
        shape = tuple(shape)
        for optimizer in self.optimizers:
            if optimizer.state.get(parameter):
                _require_sizes(optimizer)
                _move_state(optimizer, parameter, shape, write)
            if isinstance(optimizer, ElasticOptimizer):
                optimizer._forget()
        entry = None if self.average is None else self.average.get(self._key(parameter))
        if isinstance(entry, Tensor) and tuple(entry.shape) == shape:
            made = torch.empty_like(parameter, dtype=entry.dtype, device=entry.device, requires_grad=False).copy_(parameter)
            write(made, entry)
            entry.data = made

    def rewritten(self, parameter: Tensor) -> None:
        """Let the average of a parameter begin anew, at what the parameter is."""
        entry = None if self.average is None else self.average.get(self._key(parameter))
        if isinstance(entry, Tensor) and entry.shape == parameter.shape:
            entry.data = parameter.detach().to(entry, copy=True)

    # The end of a transaction

    def settle(self) -> None:
        """Bring groups and average in line with the model: what left it leaves them, what is trainable and new joins them."""
        present = _named_tensors(self.model)
        here = {id(tensor) for tensor in present.values()}
        for tensor in self._tensors.values():
            if id(tensor) not in here:
                self.removed(tensor)
        held = _count_groups(*self.optimizers)
        near = None
        for parameter in self.model.parameters():
            if id(parameter) not in self._names and parameter.requires_grad and not held[id(parameter)]:
                self.added(parameter, near)
            elif held[id(parameter)]:
                near = parameter
        names = {id(tensor): name for name, tensor in present.items()}
        for group in (group for optimizer in self.optimizers for group in optimizer.param_groups):
            for place, parameter in enumerate(group["params"] if "param_names" in group else ()):
                group["param_names"][place] = names.get(id(parameter), group["param_names"][place])
        if self.average is not None:
            buffers = any(name in self.average for name, _ in self.model.named_buffers(prefix=self.prefix.rstrip(".")))
            for name, tensor in present.items():
                if id(tensor) not in self._names and (buffers or isinstance(tensor, nn.Parameter)):
                    self.average.setdefault(self.prefix + name, tensor.detach().clone())

    def wrong_groups(self) -> list[str]:
        """What is wrong with the groups that trainable parameters are in: as many as before, or one of an optimizer if they are new."""
        if not self.optimizers:
            return []
        wrong = []
        held = [_count_groups(optimizer) for optimizer in self.optimizers]
        for name, parameter in self.model.named_parameters():
            counts = [each[id(parameter)] for each in held]
            before = self._num_groups[id(parameter)] if id(parameter) in self._names else None
            right = sum(counts) > 0 and max(counts) == 1 if before is None else sum(counts) == before
            if parameter.requires_grad and not right:
                expected = "one optimizer group" if before is None else f"{before} optimizer groups as before"
                wrong.append(f"parameter {name!r}: expected it in {expected}, got it in {sum(counts)}")
        return wrong

    # Helpers

    def _key(self, tensor: Tensor) -> str:
        return self.prefix + self._names.get(id(tensor), "")

    def _require_own(self, optimizer: Optimizer) -> None:
        if not any(id(parameter) in self._names for group in optimizer.param_groups for parameter in group["params"]):
            raise TransactionError(
                f"transaction: optimizer: expected {type(optimizer).__name__} to hold parameters of {type(self.model).__name__}, got none. "
                "Build it from model.parameters()."
            )

    def _find_average(self, ema: Any) -> None:
        names = {name for name, _ in self.model.named_parameters()}
        for found in (ema, *(getattr(ema, name, None) for name in _AVERAGES)):
            if isinstance(found, nn.Module) and any(name in names for name, _ in found.named_parameters()):
                if not any(found is twin for twin in self.twins):
                    self.twins.append(found)
                return
            for prefix in ("", "module.") if isinstance(found, dict) and not isinstance(ema, nn.Module) else ():
                if any(isinstance(found.get(prefix + name), Tensor) for name in names):
                    self.average, self.prefix = found, prefix
                    return
        raise TransactionError(
            f"transaction: ema: expected a module that averages the model's parameters, such as torch.optim.swa_utils.AveragedModel, or a "
            f"dict of tensors by their names, or an object whose .module or .shadow is one, got {type(ema).__name__}."
        )


def _named_tensors(model: nn.Module) -> dict[str, Tensor]:
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def _count_groups(*optimizers: Optimizer) -> Counter[int]:
    return Counter(id(parameter) for optimizer in optimizers for group in optimizer.param_groups for parameter in group["params"])


def _place(group: dict[str, Any], parameter: Tensor) -> int | None:
    return next((place for place, other in enumerate(group["params"]) if other is parameter), None)


def _join(group: dict[str, Any], parameter: Tensor, model: nn.Module) -> None:
    group["params"].append(parameter)
    if "param_names" in group:
        name = next((name for name, other in model.named_parameters() if other is parameter), "added")
        group["param_names"].append(name)


def _groups_for(optimizers: list[Optimizer], near: Tensor | None, model: nn.Module) -> list[tuple[Optimizer, dict[str, Any]]]:
    """The groups that hold ``near``, or else that which holds most of the model's parameters: one, unless several optimizers step them."""
    groups = [(optimizer, group) for optimizer in optimizers for group in optimizer.param_groups]
    if near is not None:
        found = [(optimizer, group) for optimizer, group in groups if _place(group, near) is not None]
        if found:
            return found
    own = {id(parameter) for parameter in model.parameters()}
    shares = [sum(id(parameter) in own for parameter in group["params"]) for _, group in groups]
    best = {id(optimizer): each for each, share in zip(groups, shares, strict=True) if share == max(shares) for optimizer in each[:1]}
    return list(best.values())


def _require_sizes(optimizer: Optimizer) -> None:
    """Refuse an optimizer whose state is one vector over all parameters."""
    if isinstance(optimizer, LBFGS):
        raise TransactionError(
            "transaction: cannot carry LBFGS: its history is one vector over all parameters at once. Edit the model before building it."
        )


# State


def _move_state(optimizer: Optimizer, parameter: Tensor, shape: tuple[int, ...], write: Write) -> None:
    kept = optimizer.state[parameter]
    layout = _layout(optimizer, parameter, shape)
    for name, value in list(kept.items()):
        if isinstance(optimizer, ElasticOptimizer) and name == "step" and not is_dense(value, shape):
            kept[name] = StepCounts.unpack(value, shape).moved(parameter.shape, write).packed
            continue
        known = layout.get(name)
        axes = tracked_axes(value, shape) if known is None else known.axes
        if axes and tuple(value.shape) == tuple(size if axis in axes else 1 for axis, size in enumerate(shape)):
            made = torch.zeros_like(parameter, dtype=value.dtype, device=value.device, requires_grad=False)
            if known is not None and known.initial is not None:
                made.copy_(known.initial)
            value.data = _written(made, value, shape, axes, write)


def _layout(optimizer: Optimizer, parameter: Tensor, shape: tuple[int, ...]) -> dict[str, Any]:
    """What is known of how an optimizer lays out its state; nothing, of one that no probe can step but that keeps plain state."""
    try:
        return state_layout(optimizer, parameter)
    except OptimizerError:
        values = [value for value in optimizer.state[parameter].values() if isinstance(value, Tensor) and value.numel() > 1]
        if all(tracked_axes(value, shape) for value in values):
            return {}
        raise


def _written(made: Tensor, value: Tensor, shape: tuple[int, ...], axes: tuple[int, ...], write: Write) -> Tensor:
    """``made`` with what is kept of ``value``, which lacks the other axes of the parameter; then so does the result."""
    write(made, value.expand(shape))
    if len(axes) == len(shape):
        return made
    kept = torch.zeros_like(made)
    write(kept, torch.ones_like(value).expand(shape))
    for axis in sorted(set(range(len(shape))) - set(axes)):
        index = int(kept.movedim(axis, 0).flatten(1).any(1).to(torch.uint8).argmax())
        made, kept = made.narrow(axis, index, 1), kept.narrow(axis, index, 1)
    return made.contiguous()


# Parameters that no optimizer is known for: they join the one that steps those beside them.

_waiting: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def _wait(parameter: Tensor, near: Tensor | None, model: nn.Module) -> None:
    _waiting[parameter] = (None if near is None else weakref.ref(near), weakref.ref(model))


def join_waiting(optimizer: Optimizer) -> None:
    """Before a step: parameters that were added when nobody knew of the optimizer yet join it."""
    if not _waiting:
        return
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    for parameter, (near, reference) in list(_waiting.items()):
        model, beside = reference(), None if near is None else near()
        own = set() if model is None else {id(other) for other in model.parameters()}
        if id(parameter) not in own or id(parameter) in held:
            del _waiting[parameter]
        elif model is not None and (id(beside) in held if beside is not None else not held.isdisjoint(own)):
            for _, group in _groups_for([optimizer], beside, model):
                _join(group, parameter, model)
            del _waiting[parameter]
