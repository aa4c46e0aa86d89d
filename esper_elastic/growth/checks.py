"""What must hold before units are born or moved, whichever verb does it."""

from __future__ import annotations

import torch

from .. import followers
from ..control import ElasticDim
from ..errors import CapacityError, OptimizerError
from ..layers.units import Place, is_parameter, places


def writable_places(dim: ElasticDim, where: str) -> list[Place]:
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
