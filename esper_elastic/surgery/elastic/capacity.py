"""Another capacity for a dim: every tensor that it runs through gets new storage, in one commit, and stays the object that it is.

Shapes of parameters change here and nowhere else in the life of an elastic model. What follows a parameter's shape, as the state of
optimizers does, is told through :mod:`undo`: call this inside a transaction.
"""

from __future__ import annotations

import copy
import gc
import itertools
import warnings
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ...control import Axis, DerivedAxis, ElasticDim, exact_int, keep_for_graphs, segments_at, set_capacity
from ...convert import PLAN
from ...errors import SurgeryError, TopologyError
from ...layers import ElasticLayer
from ...layers.units import blocks, places
from ..widths.tensors import replace_storage, zeros

#: What of an axis stays: ``(start before, start afterwards, length)`` of each stretch.
Moves = tuple[tuple[int, int, int], ...]


def reallocate(model: nn.Module, dim: ElasticDim, capacity: int) -> list[str]:
    """Give a dim another capacity, through every tensor of the model that it runs through.

    Args:
        model: that holds every layer of the dim.
        dim: whose width stays as it is.
        capacity: in units of the dim, at least those that are active.

    Returns:
        the paths of the layers whose tensors changed their shape; none if the dim had that capacity.

    Effects:
        Allocates each of these tensors anew. What they hold of units that stay, active and dormant, is carried bit for bit, with gradients;
        what optimizers and averages hold follows through :func:`undo.moved`. New dormant units get finite values by the law of their
        layer, from a generator of its own. Axes derived from the dim that modules hold begin where they belong; one commit. The plan that
        a converted model carries takes up the new capacity.

    Raises:
        SurgeryError: the capacity is below what is active, or no number of units; the dim is fixed; a module outside of the model uses it,
            or a batch is open. Nothing has changed.
        CapacityError: it is no integer, or a tensor is computed anew at each access. Nothing has changed.
        OwnerError: the calling thread does not own the control block. Nothing has changed.
    """
    where = f"{dim.label}: capacity"
    capacity = exact_int(capacity, dim.label, "capacity")
    if capacity == dim.capacity:
        return []
    _require_possible(model, dim, capacity, where)
    layers = dim.users()
    made = _storages(layers, dim, capacity, where)
    plans = list(_plans(model, dim, capacity, where))
    for storage in made:
        if storage.tensor.is_cuda:
            keep_for_graphs(storage.tensor.data)
        replace_storage(storage.tensor, storage.made, storage.write)
    set_capacity(dim, capacity, _derived(model, dim))
    for layer in layers:
        layer.bind_control()
    for holder, plan in plans:
        holder.__dict__[PLAN] = plan
    _warn_of_graphs(dim)
    dim.block.commit((), moved=True)
    changed = {id(layer) for layer in layers}
    return [path for path, module in model.named_modules() if id(module) in changed]


# Checks


def _require_possible(model: nn.Module, dim: ElasticDim, capacity: int, where: str) -> None:
    if dim.rigid is not None:
        raise SurgeryError(f"{where}: cannot be {capacity}: its width is fixed at {dim.active}, since {dim.rigid}.")
    if capacity < dim.active:
        raise SurgeryError(f"{where}: expected at least {dim.active}, as many as are active, got {capacity}. Resize the dim first.")
    block = dim.block
    block._require_owner()
    block._require_writable()
    if block._batch is not None:
        raise SurgeryError(f"{where}: cannot change while a batch of the control block is open. Leave the batch first.")
    for layer, size in blocks(dim):
        if capacity % size:
            near = f"{capacity - capacity % size} and {capacity - capacity % size + size}"
            raise SurgeryError(
                f"{where}: expected a multiple of {size}, the units that {layer._widths.label} computes as one group, got {capacity}. "
                f"The nearest: {near}."
            )
    strangers = _strangers(model, dim)
    if strangers:
        gc.collect()  # what nobody holds any more may still be alive
        strangers = _strangers(model, dim)
    if strangers:
        names = ", ".join(sorted({layer._widths.label for layer in strangers}))
        raise TopologyError(
            f"{where}: cannot change through {type(model).__name__} alone: the dim is used outside of it, by {names}. "
            "Give the model that holds all of its layers."
        )
    places(dim, where)  # refuses tensors that are computed


def _strangers(model: nn.Module, dim: ElasticDim) -> list[Any]:
    own = {id(module) for module in model.modules()}
    return [user for user in dim.users() if id(user) not in own]


# Tensors


class _Storage(NamedTuple):
    """A tensor and what it will hold."""

    tensor: Tensor
    made: Tensor
    moves: tuple[Moves | None, ...]

    def write(self, made: Tensor, old: Tensor) -> None:
        """Copy what is kept from a tensor of the old shape to one of the new."""
        carry(made, old, self.moves)


def carry(made: Tensor, old: Tensor, moves: Iterable[Moves | None]) -> None:
    """Copy what stays of each axis; all of an axis without moves."""
    stretches = [((0, 0, size),) if kept is None else kept for size, kept in zip(old.shape, moves, strict=True)]
    for corner in itertools.product(*stretches):
        source = tuple(slice(start, start + length) for start, _, length in corner)
        target = tuple(slice(start, start + length) for _, start, length in corner)
        made[target] = old[source]


def moves_of(axis: Axis, dim: ElasticDim, capacity: int) -> Moves:
    """What of an axis stays if the dim gets another capacity."""
    return tuple(
        (old.start, new.start, old.inner * (min(dim.capacity, capacity) if old.dim is dim else old.dim.capacity))
        for old, new in zip(axis.segments, segments_at(axis, dim, capacity), strict=True)
    )


@torch.no_grad()
def _storages(layers: list[Any], dim: ElasticDim, capacity: int, where: str) -> list[_Storage]:
    """The new storage of every tensor that the dim runs through, written; nothing is changed."""
    found: dict[int, _Storage] = {}
    for layer in layers:
        for name, axes in layer.tensor_axes().items():
            tensor = layer.storage(name)
            if tensor is None or not any(axis is not None and dim in axis.dims for axis in axes):
                continue
            moves = tuple(moves_of(axis, dim, capacity) if axis is not None and dim in axis.dims else None for axis in axes)
            known = found.get(id(tensor))
            if known is None:
                found[id(tensor)] = _Storage(tensor, _written(layer, name, tensor, axes, moves, dim, capacity), moves)
            elif known.moves != moves:
                raise TopologyError(
                    f"{where}: {layer._widths.label}.{name} is shared with a layer that sees other units along its axes. Untie it first."
                )
    return list(found.values())


def _written(
    layer: Any,
    name: str,
    tensor: Tensor,
    axes: tuple[Axis | None, ...],
    moves: tuple[Moves | None, ...],
    dim: ElasticDim,
    capacity: int,
) -> Tensor:
    growth = capacity - dim.capacity
    shape = tuple(
        size if axis is None else size + growth * sum(segment.inner for segment in axis.segments if segment.dim is dim)
        for size, axis in zip(tensor.shape, axes, strict=True)
    )
    made = zeros(tensor.detach(), shape)
    if growth > 0 and not made.is_meta:
        layer._fill_dormant(name, made)
    carry(made, tensor.detach(), moves)
    return made


# Axes, plans, graphs


def _derived(model: nn.Module, dim: ElasticDim) -> list[DerivedAxis]:
    """The axes derived from the dim that modules hold among their attributes, as layers hold theirs."""
    held = (axis for module in model.modules() for axis in _axes_in(vars(module).values()))
    return list({id(axis): axis for axis in held if dim in axis.dims}.values())


def _axes_in(held: Iterable[Any]) -> Iterator[DerivedAxis]:
    for value in held:
        if isinstance(value, DerivedAxis):
            yield value
        elif isinstance(value, list | tuple):
            yield from _axes_in(value)
        elif type(value) is dict:
            yield from _axes_in(value.values())


def _plans(model: nn.Module, dim: ElasticDim, capacity: int, where: str) -> Iterator[tuple[nn.Module, dict[str, Any]]]:
    """The plans of converted parts of the model that know the dim, with its new capacity.

    Raises:
        SurgeryError: conversion has found that no width beyond the present capacity works, or the model could not be converted anew.
    """
    for holder in model.modules():
        plan = holder.__dict__.get(PLAN)
        index = None if plan is None else _index_of(holder, plan, dim)
        if plan is None or index is None:
            continue
        planned = plan["dims"][index]
        if planned["note"] is not None and capacity > planned["capacity"]:
            raise SurgeryError(f"{where}: cannot be {capacity}: {planned['note']}.")
        if capacity < planned["size"]:
            raise SurgeryError(
                f"{where}: expected at least {planned['size']}, the size that the model had when it was converted and that checkpoints "
                f"are read by, got {capacity}. Export the model and convert it anew."
            )
        plan = copy.deepcopy(plan)
        plan["dims"][index]["capacity"] = capacity
        yield holder, plan


def _index_of(holder: nn.Module, plan: dict[str, Any], dim: ElasticDim) -> int | None:
    """Which dim of a plan it is: the one at its place in an axis of a module of the plan."""
    modules = dict(holder.named_modules())
    for planned in plan["modules"]:
        module = modules.get(planned["path"])
        if not isinstance(module, ElasticLayer):
            continue
        pairs = [(getattr(module, name, None), stretches) for name, stretches in planned["axes"].items()]
        for name, own in planned["tensors"].items():
            pairs += zip(module.tensor_axes().get(name, ()), own, strict=False)
        for axis, stretches in pairs:
            if not isinstance(axis, Axis) or stretches is None or len(axis.segments) != len(stretches):
                continue
            for segment, (index, _) in zip(axis.segments, stretches, strict=True):
                if segment.dim is dim and index is not None:
                    return int(index)
    return None


def _warn_of_graphs(dim: ElasticDim) -> None:
    if any(replica.captured for replica in dim.block._replicas.values()):
        warnings.warn(
            f"esper_elastic: {dim.label} has moved to another capacity, and CUDA graphs captured before go on reading the old weights. "
            "Capture them again.",
            stacklevel=3,
        )
