"""A small network and changes of its capacity: trained twice, one way and another, and compared."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

import esper_elastic as ee


class Net(nn.Module):
    """Two linear layers round a norm, and a branch that can be switched off."""

    def __init__(self) -> None:
        super().__init__()
        hidden = ee.ElasticDim(64, name="hidden")
        inside = ee.ElasticDim(48, name="inside")
        self.first = ee.ElasticLinear(32, 64, out_dim=hidden)
        self.norm = ee.ElasticLayerNorm(64, dim=hidden)
        branch = nn.Sequential(
            ee.ElasticLinear(64, 48, in_dim=hidden, out_dim=inside), nn.GELU(), ee.ElasticLinear(48, 64, in_dim=inside, out_dim=hidden)
        )
        self.branch = ee.ElasticBlock(branch, kind="branch")
        self.last = ee.ElasticLinear(64, 16, in_dim=hidden)

    @property
    def hidden(self) -> ee.ElasticDim:
        return self.first.out_dim

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.first(x)))
        return self.last(x + self.branch(x))


def loss_of(net: nn.Module, x: Tensor, target: Tensor) -> Tensor:
    return nn.functional.mse_loss(net(x), target)


#: Changes of capacity that a captured training step has to follow.
CHANGES: list[Callable[[Net], None]] = [
    *(lambda n, width=width: n.hidden.resize(width) for width in (64, 40, 1, 63, 8, 64)),
    lambda n: n.branch.switch.set(False),
    lambda n: n.branch.switch.set(True),
    lambda n: n.hidden.keep([5, 0, 33, 2]),
    lambda n: n.hidden.resize(50),
    lambda n: ee.resize(n, {"first": 20, "branch.module.0": 7}),
]
