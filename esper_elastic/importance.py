"""Scores of a dim's active units, and the choice of the best: what to hand to :meth:`ElasticDim.keep`.

Scores read active slices alone, of every axis that crosses the dim, and change nothing. Higher is more important. They can be compared
within a dim; across dims only as far as their source says so.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from .control import ElasticDim, exact_int
from .errors import CapacityError
from .layers.units import distinct, is_parameter, places


@torch.no_grad()
def magnitude(dim: ElasticDim, p: float = 2.0) -> Tensor:
    """The p-norm of the weights that produce each unit, over all layers that do, biases and norms left out.

    Shape:
        ``(dim.active,)``.

    Raises:
        CapacityError: no layer produces the units, as for the input of a network; or ``p`` is not positive.

    Source: Li, Kadav, Durdanovic, Samet, Graf: Pruning filters for efficient convnets (ICLR 2017), there with p = 1.
    """
    where = f"{dim.label}: importance.magnitude"
    if not p > 0:
        raise CapacityError(f"{where}: p: expected a positive number, got {p!r}.")
    producers = [place for place in distinct(places(dim, where)) if place.newborn == "draw" and place.tensor.dim() > 1]
    if not producers:
        raise CapacityError(f"{where}: expected a layer that produces the units, got none. Score a dim that is some layer's output.")
    return torch.linalg.vector_norm(_beside([place.rows(place.tensor, dim.active) for place in producers]), p, dim=1)


@torch.no_grad()
def batch_norm_scale(dim: ElasticDim) -> Tensor:
    """The absolute scale that batch norms give each unit, summed over those that the dim runs through.

    Shape:
        ``(dim.active,)``.

    Raises:
        CapacityError: no batch norm with a scale runs over the dim.

    Source: Liu, Li, Shen, Huang, Yan, Zhang: Learning efficient convolutional networks through network slimming (ICCV 2017).
    """
    where = f"{dim.label}: importance.batch_norm_scale"
    scales = [place for place in distinct(places(dim, where)) if place.name == "weight" and isinstance(place.layer, _BatchNorm)]
    if not scales:
        raise CapacityError(f"{where}: expected a batch norm with a scale over the dim, got none. Use magnitude or taylor.")
    return _beside([place.rows(place.tensor, dim.active) for place in scales]).abs().sum(1)


@torch.no_grad()
def taylor(dim: ElasticDim) -> Tensor:
    """How much the loss changes without each unit, to first order: ``|sum weight * grad|``, from the gradients that are there.

    The sum runs over the weights that consume the unit, in all layers that do: for a linear or convolutional consumer that is the
    derivative of the loss by a gate on the unit, whatever lies between it and its producers. (Over the weights before a batch norm the sum
    would be zero, since the norm undoes their scale.) Units that nothing consumes are scored by all that shapes them: producers,
    biases, norms. Layers asleep under a switch are left out. Gradients that several passes have added up are scored as their sum;
    :meth:`esper_elastic.growth.Observation.taylor` scores each pass.

    Shape:
        ``(dim.active,)``.

    Raises:
        CapacityError: a gradient is missing.

    Source: Molchanov, Mallya, Tyree, Frosio, Kautz: Importance estimation for neural network pruning (CVPR 2019), equation 8
        without the square, and section 3.2 for gates.
    """
    where = f"{dim.label}: importance.taylor"
    awake = [p for p in places(dim, where) if is_parameter(p) and all(switch.on for switch in p.layer._widths.switches)]
    found = distinct([place for place in awake if place.consumes] or awake)
    if not found:
        raise CapacityError(f"{where}: expected a layer with weights that is switched on, got none. Enable one first.")
    terms = []
    for place in found:
        grad = place.tensor.grad
        if grad is None:
            raise CapacityError(
                f"{where}: expected a gradient of {place.layer._widths.label}.{place.name}, got none. "
                "Run a forward and backward first, and call this before optimizer.zero_grad()."
            )
        terms.append(place.rows(place.tensor, dim.active) * place.rows(grad, dim.active))
    return _beside(terms).sum(1).abs()


def top(scores: Tensor, k: int) -> Tensor:
    """The indices of the ``k`` highest scores, in ascending order; of equal ones the first.

    Shape:
        Scores ``(active,)``, result ``(k,)`` int64 on the same device.

    Raises:
        CapacityError: ``k`` is not between 1 and the number of scores, or a score is NaN.
    """
    k = exact_int(k, "importance.top", "k")
    if scores.dim() != 1 or not 1 <= k <= scores.numel():
        raise CapacityError(f"importance.top: expected a vector of at least k = {k} scores, k at least 1, got shape {tuple(scores.shape)}.")
    if scores.isnan().any():
        raise CapacityError("importance.top: expected numbers, got NaN scores. Has the training diverged?")
    return scores.argsort(descending=True, stable=True)[:k].sort().values


def _beside(rows: list[Tensor]) -> Tensor:
    """The rows of several tensors side by side, on the device of the first."""
    return torch.cat([part.to(rows[0].device) for part in rows], 1)
