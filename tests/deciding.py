"""A small network in training, plain or elastic, and a controller that changes it."""

from __future__ import annotations

from typing import Any

import plain_net
import torch
from fingerprint import Print, fingerprint
from torch import Tensor, nn

import esper_elastic as ee
from esper_elastic.surgery import ModelSurgeon
from esper_elastic.training import Controller, Safety
from esper_elastic.training.safety import Guardian


class Scene:
    """A network after two steps, the same at each call.

    Args:
        elastic: whether its widths are data.
        safety: limits of the controller.
        state: whether it has been trained, so that the optimizer has state.
    """

    def __init__(self, elastic: bool = True, safety: Safety | None = None, state: bool = True, **hooks: Any) -> None:
        self.x = plain_net.pictures()
        self.model: nn.Module = plain_net.net()
        if elastic:
            self.model = ee.elasticize(self.model, self.x, capacity=2.0)
        kind = ee.optim.AdamW if elastic else torch.optim.AdamW
        self.optimizer: Any = kind(self.model.parameters(), lr=1e-3)
        for _ in range(2 if state else 0):
            self.train()
        ee.dims(self.model)  # which teaches layers their names for messages
        surgeon = ModelSurgeon(self.x)
        guardian = Guardian(safety if safety is not None else Safety(), self.model)
        self.controller = Controller(self.model, surgeon, guardian, {"optimizer": self.optimizer}, **hooks)

    def train(self) -> float:
        self.model.train()
        self.optimizer.zero_grad()
        loss: Tensor = self.model(self.x).square().mean()
        loss.backward()
        self.optimizer.step()
        return float(loss.detach())

    def output(self) -> Tensor:
        self.model.eval()
        with torch.no_grad():
            result: Tensor = self.model(self.x)
        return result

    def state(self) -> list[list[Tensor]]:
        """What the optimizer holds of each parameter."""
        return [[value.clone() for value in self.optimizer.state[p].values() if isinstance(value, Tensor)] for p in self.model.parameters()]

    def print(self) -> Print:
        return fingerprint(self.model, self.optimizer)

    @property
    def generation(self) -> int:
        return ee.control_block(self.model).generation

    def widths(self) -> dict[str, int]:
        return {name: dim.active for name, dim in ee.dims(self.model).items()}


def decision(kind: str, name: str | None = None, position: str | None = None, layer: Any = None, **parameters: Any) -> dict[str, Any]:
    """One, with what it needs."""
    return {"adaptation_type": kind, "layer_name": name, "position": position, "layer_spec": layer, "parameters": parameters}


def conv(channels: int, out: int | None = None) -> dict[str, Any]:
    """A convolution that keeps the resolution, as data."""
    return {"kind": "Conv2d", "arguments": {"in_channels": channels, "out_channels": out or channels, "kernel_size": 3, "padding": 1}}
