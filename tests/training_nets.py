"""Small networks, data and trainers for the tests of ``ee.training``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import esper_elastic as ee
from esper_elastic.training import Trainer


class Net(nn.Module):
    """Two convolutions with batch norm, dropout, a block that can be switched, a head."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 8, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 8, 3, padding=1)
        self.bn2 = nn.BatchNorm2d(8)
        self.drop = nn.Dropout(0.1)
        self.fc = nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.bn1(self.conv1(x)))
        x = torch.relu(self.bn2(self.conv2(x)))
        return self.fc(self.drop(x.mean((2, 3))))


def net(elastic: bool = True) -> nn.Module:
    torch.manual_seed(0)
    model = Net()
    return ee.elasticize(model, torch.randn(2, 1, 8, 8), capacity=2.0) if elastic else model


def loader(batch_size: int = 16) -> DataLoader[Any]:
    """256 images in ten classes by their brightness, shuffled by the global generator."""
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(256, 1, 8, 8, generator=generator) + torch.arange(256)[:, None, None, None] % 10 / 3
    return DataLoader(TensorDataset(images, torch.arange(256) % 10), batch_size=batch_size, shuffle=True)


SPEC = {"kind": "Conv2d", "arguments": {"in_channels": 8, "out_channels": 8, "kernel_size": 3, "padding": 1}}


class Losses:
    """A source that decides nothing and notes the losses."""

    def __init__(self) -> None:
        self.seen: list[float] = []

    def decisions(self, state: Any) -> tuple[()]:
        self.seen.append(state.loss)
        return ()


def trainer(directory: Path | None = None, decisions: Mapping[int, Any] | None = None, *, elastic: bool = True, **settings: Any) -> Trainer:
    """A trainer with optimizer, schedule and average, and what is to change at which step."""
    model = net(elastic)
    optimizer = ee.optim.AdamW(model.parameters(), lr=1e-2) if elastic else torch.optim.AdamW(model.parameters(), lr=1e-2)
    schedulers = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=400)
    ema = torch.optim.swa_utils.AveragedModel(model)
    sources = [Losses(), ee.training.Schedule(decisions or {}), *settings.pop("sources", ())]
    given = {"schedulers": schedulers, "ema": ema, "sources": sources, "directory": directory, "example_inputs": torch.zeros(2, 1, 8, 8)}
    torch.manual_seed(1)
    return Trainer(model, optimizer, nn.functional.cross_entropy, **(given | settings))


def losses(of: Trainer) -> list[float]:
    """The losses of all steps that a trainer has made."""
    (noted,) = [source for source in of.sources if isinstance(source, Losses)]
    return noted.seen
