"""``grow(n, init="gradmax")``: newborn units whose first gradient is the largest that their norm allows.

Their producers are zero and their consumers the left singular vectors of the observed matrix ``M`` (:mod:`esper_elastic.growth.statistic`):
among orthogonal vectors of one norm these maximise ``|U^T M|``, the gradient of the producers. What lies between has to give zero for zero,
and to have a derivative there:

* ``relu`` has none at zero in torch, where the paper takes one. Newborn biases are the smallest normal number, a *spark*: the unit is
  above zero, by less than any rounding.
* A batch norm of a constant channel gives its bias. In training its derivative there is ``weight / sqrt(eps)`` times the identity without
  the mean of the batch, 300 times the identity at ``weight`` one, and a channel's first step would bring it to full variance however small
  the step. The newborn channel's ``weight`` is ``sqrt(eps)``, its running statistics are those of a constant, 0 and 0: the derivative is
  one, without the mean of the batch in training, and the channel begins small.

Source: Evci, van Merrienboer, Unterthiner, Vladymyrov, Pedregosa: GradMax: Growing Neural Networks using Gradient Information (ICLR 2022);
the norm, the mean of that of existing units, as in its published code.
"""

from __future__ import annotations

import math
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..control import ElasticDim
from ..errors import CapacityError
from ..layers import ElasticLayer
from ..layers.base import write_active
from ..layers.units import Place, distinct
from .statistic import Statistic, serves

_OBSERVE = "Observe first: with ee.growth.observe(model): loss.backward()."
_ZERO = "Use init='zero'."
#: Singular values below this share of the largest are rounding.
_NOTHING = 1e-6

_latest: WeakKeyDictionary[ElasticDim, Statistic] = WeakKeyDictionary()


def publish(dim: ElasticDim, statistic: Statistic) -> None:
    """Let growth of ``dim`` begin from a statistic, until units that it speaks of change."""
    _latest[dim] = statistic


class Directions:
    """The consumer weights of newborn units, ready to be written.

    Args:
        dim: that grows.
        found: its places.
        count: of newborn units.
        active: units before.
        where: for messages.

    Raises:
        CapacityError: the structure of the dim cannot serve, or nothing valid was observed.
    """

    def __init__(self, dim: ElasticDim, found: list[Place], count: int, active: int, where: str) -> None:
        _require_structure(dim, found, where)
        statistic = _latest.get(dim)
        if statistic is None:
            raise CapacityError(f"{where}: init='gradmax' needs gradients: expected an observation of the dim, got none. {_OBSERVE}")
        if not statistic.holds() or not _same_layers(statistic, found):
            raise CapacityError(
                f"{where}: init='gradmax' needs gradients of the present units: widths or units of the dim, or of one that crosses it, "
                f"have changed since they were observed. {_OBSERVE} To grow several dims from one observation, do so in one batch."
            )
        if statistic.reason is not None:
            raise CapacityError(f"{where}: init='gradmax' cannot serve: {statistic.reason}. {_ZERO}")
        if not statistic.blocks:
            raise CapacityError(
                f"{where}: init='gradmax' needs gradients: expected a backward from a layer that consumes the units to one that produces "
                f"them, got none. {_OBSERVE}"
            )
        self.half = statistic.half
        matrix = statistic.matrix()
        if not matrix.isfinite().all():
            raise CapacityError(f"{where}: init='gradmax': expected finite gradients, got infinite ones or NaN. Observe a batch without.")
        vectors = _vectors(matrix, count)
        if vectors is None:
            raise CapacityError(f"{where}: init='gradmax': expected gradients, got zeros alone. Observe another batch, or use init='zero'.")
        norms = torch.cat([place.rows(place.tensor, active).to(vectors) for place in found if place.consumes], 1).norm(dim=1)
        vectors = vectors * norms.mean()
        self._parts: dict[int, Tensor] = {}
        offset = 0
        for index, reference in enumerate(statistic.consumers):
            out, taps = next(block.shape[:2] for (row, _), block in statistic.blocks.items() if row == index)
            self._parts[id(reference())] = vectors[offset : offset + out * taps].unflatten(0, (out, taps))
            offset += out * taps

    def write(self, found: list[Place], active: int, n: int) -> None:
        """Initialise the newborn units from ``active`` to ``n``, over the full capacity of what crosses."""
        for place in distinct(found):
            newborn = place.units(place.tensor).narrow(place.unit_axis, active, n - active)
            newborn.fill_(self._constant(place))
            part = self._parts.get(id(place.layer)) if place.consumes else None
            if part is not None:  # (out, taps, newborn) to the weight's (out, period, newborn, inner, *kernel)
                shape = (part.shape[0], 1, n - active, *newborn.shape[3:])
                axes = (place.layer.tensor_axes()[place.name][0], *[None] * (newborn.dim() - 1))
                write_active(newborn, axes, part.transpose(1, 2).reshape(shape).to(newborn))

    def _constant(self, place: Place) -> float:
        if place.name == "bias" and (place.newborn == "draw" or isinstance(place.layer, _BatchNorm)):
            return 2.0**-24 if self.half else torch.finfo(place.tensor.dtype).tiny
        if isinstance(place.layer, _BatchNorm):
            return math.sqrt(place.layer.eps) if place.name == "weight" else 0.0
        return float(place.newborn == "one")


def _require_structure(dim: ElasticDim, found: list[Place], where: str) -> None:
    weights = [place for place in found if place.name == "weight" and "draw" in place.layer.newborn.get("weight", ())]
    for layer in dim.users():
        if not (serves(layer) or isinstance(layer, _BatchNorm) or layer.mixes_units):
            raise CapacityError(
                f"{where}: init='gradmax' cannot serve: {layer._widths.label} is over the dim; expected linear layers, convolutions "
                f"without groups and batch norms. {_ZERO}"
            )
    for index, place in enumerate(weights):
        if any(place.tensor is other.tensor for other in weights[:index]):
            raise CapacityError(
                f"{where}: init='gradmax' cannot serve: {place.layer._widths.label}.weight is tied, or holds the units in two places. "
                f"{_ZERO}"
            )
        if place.outer > 1 or (place.inner > 1 and not (place.consumes and isinstance(place.layer, nn.Linear))):
            raise CapacityError(
                f"{where}: init='gradmax' cannot serve: {place.layer._widths.label}.weight has several rows for one unit. {_ZERO}"
            )
    for what, consumes in (("produces", False), ("consumes", True)):
        if not any(place.consumes is consumes for place in weights):
            raise CapacityError(f"{where}: init='gradmax' needs a layer that {what} the units: expected one, got none. {_ZERO}")


def _same_layers(statistic: Statistic, found: list[Place]) -> bool:
    over: set[ElasticLayer] = {place.layer for place in found}
    return all(reference() in over for reference in (*statistic.consumers, *statistic.producers))


def _vectors(matrix: Tensor, count: int) -> Tensor | None:
    """``count`` directions of norm one: left singular vectors, largest value first; then their opposites; then random mixtures of both.

    Opposite vectors have the same gradient turned around, from which a unit learns what a rectified one leaves out. Beyond the rank no
    other direction has any gradient at all.

    Shape:
        ``(rows, columns)`` to ``(rows, count)``; ``None`` for a matrix of zeros.
    """
    matrix = matrix.double()
    matrix = matrix / matrix.abs().max().clamp(min=torch.finfo(matrix.dtype).tiny)
    wide = matrix.shape[0] <= matrix.shape[1]
    squares, vectors = torch.linalg.eigh(matrix @ matrix.T if wide else matrix.T @ matrix)
    squares, vectors = squares.flip(0), vectors.flip(1)
    rank = int((squares > squares[0] * _NOTHING**2).sum()) if float(squares[0]) > 0 else 0
    if rank == 0:
        return None
    vectors = vectors[:, : min(rank, count)]
    if not wide:
        vectors = matrix @ vectors
        vectors = vectors / vectors.norm(dim=0)
    largest = vectors.gather(0, vectors.abs().argmax(0, keepdim=True))
    vectors = vectors * largest.sign()
    more = count - 2 * vectors.shape[1]
    if more > 0:
        mixtures = vectors @ torch.randn(vectors.shape[1], more, dtype=vectors.dtype).to(vectors.device)
        return torch.cat([vectors, -vectors, mixtures / mixtures.norm(dim=0)], 1)
    return torch.cat([vectors, -vectors], 1)[:, :count]
