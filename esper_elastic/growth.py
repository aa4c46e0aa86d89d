"""Birth and pruning of units: what ``ElasticDim.grow`` and ``ElasticDim.keep`` do to weights, gradients and optimizer state.

Both check everything before they touch anything, then write in place, over the full capacity of every axis that crosses the dim: a unit
of another dim that sleeps now must find its part initialised and aligned when it wakes. Widths are published by the control block, which
this file asks and never writes.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from . import followers
from .control import ElasticDim, exact_int, install_verb
from .errors import CapacityError, OptimizerError
from .layers.units import Place, blocks, distinct, is_parameter, places

#: Raw shares of split consumer columns are drawn from here, before those of one parent are scaled to sum to one.
_SHARE_RANGE = (0.5, 1.5)


def grow(dim: ElasticDim, n: int, init: str = "zero", exact: bool = True) -> None:
    """What :meth:`ElasticDim.grow` does.

    ``"zero"``: weights that produce the newborn units are drawn from their layer's own law at its present width, with the global generator;
    weights that consume them become zero, norms become the identity. The function stays as it was, exactly.

    ``"split"``: each newborn unit copies an active one, all of which have had as many copies, give or take one, in random order. Every
    consumer weight of a parent is divided among it and its copies in random shares, each weight by shares of its own, so that their
    gradients are not multiples of each other and no optimizer keeps them equal. The parent takes what rounding left over: the function
    stays as it was within rounding. (A unit that feeds a single weight has a single share; its copies part only through the size of steps.)
    """
    where = f"{dim.label}: grow"
    if init not in ("zero", "split"):
        raise CapacityError(f"{where}: init: expected 'zero' or 'split', got {init!r}.")
    active = dim.staged
    n = dim.admit(n)
    if n < active:
        raise CapacityError(
            f"{where}: cannot grow to {n} units: {active} are active. "
            "Use resize to put the last ones to sleep, or keep to choose which ones stay."
        )
    if n == active:
        return
    found = _checked(dim, where)
    if exact:
        _require_exact(dim, found, init, where)

    def give_birth() -> None:
        with torch.no_grad():
            current = places(dim, where)
            if init == "zero":
                _draw(current, active, n)
            else:
                _split(current, active, n, math.lcm(*(size for _, size in blocks(dim))))
            _start_afresh(current, active, n)

    dim.block.stage(dim, n, give_birth)


def keep(dim: ElasticDim, indices: Iterable[Any] | Tensor) -> None:
    """What :meth:`ElasticDim.keep` does."""
    where = f"{dim.label}: keep"
    active = dim.staged
    chosen = _chosen(dim, indices, active, where)
    if len(chosen) == active:
        return
    staying = set(chosen)
    _checked(dim, where)
    _require_whole_blocks(dim, staying, active, where)
    order = torch.tensor(chosen + [unit for unit in range(active) if unit not in staying])

    def move() -> None:
        with torch.no_grad():
            _permute(places(dim, where), order)

    dim.block.stage(dim, len(chosen), move)


# Checks


def _checked(dim: ElasticDim, where: str) -> list[Place]:
    """The places of a dim, if all of them can be written."""
    found = places(dim, where)
    for place in found:
        grad = place.tensor.grad if is_parameter(place) else None
        if grad is not None and grad.layout is not torch.strided:
            raise CapacityError(
                f"{where}: gradient of {place.layer._widths.label}.{place.name}: expected a dense one, got {grad.layout}. "
                "Step or clear it first (optimizer.zero_grad())."
            )
        stranger = followers.unguarded_with_state(place.tensor) if is_parameter(place) else None
        if stranger is not None:
            raise OptimizerError(
                f"{where}: {type(stranger).__name__} holds state for {place.layer._widths.label}.{place.name} and does not know of units: "
                "its state would stay behind. Guard it with ee.optim.guard(optimizer, model), or use ee.optim.AdamW or ee.optim.SGD."
            )
    return found


def _require_exact(dim: ElasticDim, found: list[Place], init: str, where: str) -> None:
    if found and dim.mixed is not None:
        raise CapacityError(
            f"{where}: plain code mixes all its units, so newborn ones change what it gives: {dim.mixed}. "
            "Pass exact=False to grow all the same."
        )
    mixing = next((layer for layer in dim.users() if layer.mixes_units), None)
    if mixing is not None:
        raise CapacityError(
            f"{where}: {mixing._widths.label} runs over the dim and mixes all its units, so newborn ones change its output. "
            "Pass exact=False to grow all the same."
        )
    if init == "split":
        consumed = {place.span for place in found if place.consumes}
        tied = next((place for place in found if not place.consumes and place.span in consumed), None)
        if tied is not None:
            raise CapacityError(
                f"{where}: {tied.layer._widths.label}.{tied.name} is tied: one layer produces the units with it and another consumes them, "
                "so it cannot be copied and divided at once. Use init='zero', or pass exact=False."
            )


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


# Birth


def _draw(found: list[Place], active: int, n: int) -> None:
    """Random producers first, constants after: where both meet (a weight with the dim on both axes, a tied weight) the zeros count.

    A weight that several layers produce the units with follows the law of the oldest.
    """
    produced = distinct([place for place in found if place.newborn == "draw"])
    for place in (*produced, *(place for place in found if place.newborn != "draw")):
        newborn = place.units(place.tensor).narrow(place.unit_axis, active, n - active)
        if place.newborn == "draw":
            place.layer.draw(newborn, axis=place.axis)
        else:
            newborn.fill_(place.newborn == "one")


def _split(found: list[Place], active: int, n: int, size: int) -> None:
    """Copies of producers, shares of consumers; each over the full capacity of what crosses, so that their order does not matter.

    Units are copied in blocks of ``size``, which layers compute as one.

    Source: Chen, Goodfellow, Shlens: Net2Net (ICLR 2016), section 2.3, with shares in the place of its noise.
    """
    count = n - active
    families = torch.randperm(active // size).repeat(-(-count // active))[: count // size]
    parents = (families[:, None] * size + torch.arange(size)).flatten()
    for place in distinct(found):
        axis, units = place.unit_axis, place.units(place.tensor)
        here = parents.to(units.device)
        copies = units.index_select(axis, here)
        if place.consumes:
            copies *= _shares(units, axis, here, active)
            units.narrow(axis, 0, active).index_add_(axis, here, copies, alpha=-1)
        units.narrow(axis, active, count).copy_(copies)


def _shares(units: Tensor, axis: int, parents: Tensor, active: int) -> Tensor:
    """Random shares of the copies, per weight; those of one parent's copies and its own sum to one."""
    shape = list(units.shape)
    shape[axis] = active + len(parents)
    raw = torch.empty(shape, dtype=torch.promote_types(units.dtype, torch.float32), device=units.device).uniform_(*_SHARE_RANGE)
    total, copies = raw.split([active, len(parents)], axis)
    total.index_add_(axis, parents, copies)
    return (copies / total.index_select(axis, parents)).to(units.dtype)


def _start_afresh(found: list[Place], active: int, n: int) -> None:
    """No gradient and no optimizer state for the newborn units."""
    for place in found:
        if not is_parameter(place):
            continue
        if place.tensor.grad is not None:
            place.units(place.tensor.grad).narrow(place.unit_axis, active, n - active).zero_()
        for follower in followers.followers_of(place.tensor):
            for period in range(place.outer):
                first = place.start + period * place.capacity * place.inner
                follower.reset_state(place.tensor, place.axis, first + active * place.inner, first + n * place.inner)


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


install_verb("grow", grow)
install_verb("keep", keep)
