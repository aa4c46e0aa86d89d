"""``ElasticLinear``: the contract, and what only this layer promises."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from contract import LAYOUTS, NARROW, Contract, allocations, poison
from torch import Tensor, nn

import esper_elastic as ee
from esper_elastic.control import Axis


class TestLinear(Contract):
    def make(self, *axes: Axis, **factory: Any) -> nn.Module:
        out_dim, in_dim = axes
        return ee.ElasticLinear(in_dim.active, out_dim.active, in_dim=in_dim, out_dim=out_dim, **factory)

    def dense(self, *sizes: int, **factory: Any) -> nn.Module:
        return nn.Linear(sizes[1], sizes[0], **factory)

    def input(self, size: int) -> Tensor:
        return torch.rand(3, 5, size, dtype=torch.float64) + 0.25


class TestLinearWithoutBias(TestLinear):
    def make(self, *axes: Axis, **factory: Any) -> nn.Module:
        return super().make(*axes, bias=False, **factory)

    def dense(self, *sizes: int, **factory: Any) -> nn.Module:
        return super().dense(*sizes, bias=False, **factory)
