"""Birth: what ``ElasticDim.grow`` does to weights, gradients and optimizer state."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .. import followers
from ..control import ElasticDim
from ..errors import CapacityError
from ..layers.units import Place, blocks, distinct, is_parameter, places
from .checks import writable_places
from .gradmax import Directions
from .revision import units_changed

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

    ``"gradmax"``: producers are zero, consumers the directions along which :func:`observe` saw the largest gradients; see
    :mod:`esper_elastic.growth.gradmax`. The function stays as it was, but for sums that are smaller than the smallest normal number.
    """
    where = f"{dim.label}: grow"
    if init not in ("zero", "split", "gradmax"):
        raise CapacityError(f"{where}: init: expected 'zero', 'split' or 'gradmax', got {init!r}.")
    active = dim.staged
    n = dim.admit(n)
    if n < active:
        raise CapacityError(
            f"{where}: cannot grow to {n} units: {active} are active. "
            "Use resize to put the last ones to sleep, or keep to choose which ones stay."
        )
    if n == active:
        return
    found = writable_places(dim, where)
    if exact:
        _require_exact(dim, found, init, where)
    directions = Directions(dim, found, n - active, active, where) if init == "gradmax" else None

    def give_birth() -> None:
        with torch.no_grad():
            current = places(dim, where)
            if directions is not None:
                directions.write(current, active, n)
            elif init == "zero":
                _draw(current, active, n)
            else:
                _split(current, active, n, math.lcm(*(size for _, size in blocks(dim))))
            _start_afresh(current, active, n)
        units_changed(dim)

    dim.block.stage(dim, n, give_birth)


# Checks


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
