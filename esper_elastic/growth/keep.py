"""Pruning: what ``ElasticDim.keep`` does to weights, gradients and optimizer state."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from .. import followers
from ..control import ElasticDim, exact_int
from ..errors import CapacityError
from ..layers.units import Place, blocks, distinct, is_parameter, places
from .checks import writable_places
from .revision import units_changed


def keep(dim: ElasticDim, indices: Iterable[Any] | Tensor) -> None:
    """What :meth:`ElasticDim.keep` does."""
    where = f"{dim.label}: keep"
    active = dim.staged
    chosen = _chosen(dim, indices, active, where)
    if len(chosen) == active:
        return
    staying = set(chosen)
    writable_places(dim, where)
    _require_whole_blocks(dim, staying, active, where)
    order = torch.tensor(chosen + [unit for unit in range(active) if unit not in staying])

    units_changed(dim)

    def move() -> None:
        with torch.no_grad():
            _permute(places(dim, where), order)

    dim.block.stage(dim, len(chosen), move)


# Checks


def _chosen(dim: ElasticDim, indices: Any, active: int, where: str) -> list[int]:
    """The indices in ascending order, if they are a valid choice among ``active`` units."""
    what = f"expected distinct indices of active units, from 0 to {active - 1}"
    if isinstance(indices, Tensor):
        if indices.dim() != 1:
            raise CapacityError(f"{where}: {what}, got a tensor of shape {tuple(indices.shape)}. Pass a vector.")
        indices = indices.tolist()
    try:
        values = list(indices)
    except TypeError:
        raise CapacityError(
            f"{where}: {what}, got {indices!r} of type {type(indices).__name__}. To keep the first n units, call resize(n)."
        ) from None
    if not values:
        raise CapacityError(f"{where}: {what}, got none. To switch a layer off, put it in an ElasticBlock.")
    if any(type(value).__name__.rstrip("_") == "bool" for value in values):  # bool, and numpy's bool or bool_
        raise CapacityError(f"{where}: {what}, got a mask. Pass its indices: mask.nonzero().flatten().")
    chosen = sorted(exact_int(value, where, "index") for value in values)
    outside = sorted({value for value in chosen if not 0 <= value < active})
    if outside:
        raise CapacityError(f"{where}: {what}, got {_listed(outside)}. Wake sleeping units with resize before choosing among them.")
    repeated = sorted({a for a, b in itertools.pairwise(chosen) if a == b})
    if repeated:
        raise CapacityError(f"{where}: {what}, got {_listed(repeated)} more than once. Name each unit once.")
    dim.admit(len(chosen))
    return chosen


def _require_whole_blocks(dim: ElasticDim, staying: set[int], active: int, where: str) -> None:
    for layer, size in blocks(dim):
        for first in range(0, active, size):
            here = [unit for unit in range(first, first + size) if unit in staying]
            if here and len(here) < size:
                raise CapacityError(
                    f"{where}: {layer._widths.label} computes the units in groups of {size}: expected all or none of units "
                    f"{first} to {first + size - 1}, got {_listed(here)} alone. Choose whole groups."
                )


def _listed(values: list[int]) -> str:
    return ", ".join(str(value) for value in values[:5]) + (f" and {len(values) - 5} more" if len(values) > 5 else "")


# Pruning


def _permute(found: list[Place], order: Tensor) -> None:
    """Bring unit ``order[i]`` to place ``i``, among the units that ``order`` counts; the sleepers behind them stay."""
    for place in distinct(found):
        _permute_units(place, place.tensor, order)
        if not is_parameter(place):
            continue
        if place.tensor.grad is not None:
            _permute_units(place, place.tensor.grad, order)
        for follower in followers.followers_of(place.tensor):
            follower.permute_state(place.tensor, place.axis, _order_of_axis(place, order))
    for place in found:
        if place.name == "weight":
            place.layer.renumber(place.axis, _order_of_axis(place, order))


def _order_of_axis(place: Place, order: Tensor) -> Tensor:
    """Which index comes to each place of the axis."""
    indices = torch.arange(place.tensor.shape[place.axis])
    _permute_units(place._replace(axis=0), indices, order)
    return indices


def _permute_units(place: Place, tensor: Tensor, order: Tensor) -> None:
    units = place.units(tensor).narrow(place.unit_axis, 0, len(order))
    units.copy_(units.index_select(place.unit_axis, order.to(units.device)))
