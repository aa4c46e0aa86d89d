"""The network that edits are tried on, and what it computes."""

import torch
from torch import Tensor, nn

import esper_elastic as ee


class Block(nn.Module):
    """A residual block."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, 2 * channels, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(2 * channels)
        self.relu = nn.ReLU()
        self.conv2 = nn.Conv2d(2 * channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(x + self.conv2(self.relu(self.bn1(self.conv1(x)))))


class Net(nn.Module):
    """A small convolutional network with attributes, a Sequential, a ModuleList and residual blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 12, 3, stride=2, padding=1)
        self.bn2 = nn.BatchNorm2d(12)
        self.blocks = nn.Sequential(Block(12), Block(12))
        self.stages = nn.ModuleList([nn.Conv2d(12, 12, 1), nn.Conv2d(12, 16, 1, groups=4)])
        self.dropout = nn.Dropout(0.1)
        self.fc1 = nn.Linear(16, 10)
        self.fc2 = nn.Linear(10, 6)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.bn1(self.conv1(x)))
        x = torch.relu(self.bn2(self.conv2(x)))
        x = self.blocks(x)
        for stage in self.stages:
            x = stage(x)
        x = self.dropout(x.mean((2, 3)))
        return self.fc2(self.fc1(x))


def net(seed: int = 0) -> nn.Module:
    """A network whose norms have seen something, in double precision."""
    torch.manual_seed(seed)
    model = Net().double()
    for _ in range(3):
        model(images(seed))
    return model.eval()


def images(seed: int = 1) -> Tensor:
    return torch.randn(2, 3, 10, 10, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def surgeon() -> ee.ModelSurgeon:
    return ee.ModelSurgeon(images())


def gives(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return model(x)  # type: ignore[no-any-return]


def difference(model: nn.Module, before: Tensor, x: Tensor) -> float:
    with torch.no_grad():
        return float((model(x) - before).abs().max())
