"""The demo's network, twice: on elastic layers, and on plain ``nn`` modules of any fixed size for the baselines.

Both have one forward and the same parameter names, so that what is exported from the one loads into the other. Owns the arithmetic of
its cost (multiply-adds, active parameters); refuses nothing.

Shape legend: B batch, 1 input channel, 28 x 28 pixels; the stem and stage 1 work at 14 x 14, stage 2 and the block at 7 x 7.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import esper_elastic as ee

Module = TypeVar("Module", bound=nn.Module)
NUM_CLASSES = 10
_KERNEL = 9  # taps of a 3 x 3 convolution
_STAGE1_PIXELS = 14 * 14
_STAGE2_PIXELS = 7 * 7


class Widths(NamedTuple):
    """Channels of each part that are in use, and whether the residual block is on."""

    stem: int
    stage1: int
    stage2: int
    inner: int
    block: bool

    def __str__(self) -> str:
        inner = f"+{self.inner}" if self.block else "+off"
        return f"{self.stem}-{self.stage1}-{self.stage2}{inner}"

    def multiply_adds(self) -> int:
        """Multiply-adds of one image's forward pass through the convolutions and the head."""
        stage1 = _STAGE1_PIXELS * _KERNEL * self.stem * (1 + self.stage1)
        stage2 = _STAGE2_PIXELS * _KERNEL * self.stage2 * (self.stage1 + 2 * self.inner * self.block)
        return stage1 + stage2 + NUM_CLASSES * self.stage2

    def parameters(self) -> int:
        """Parameters that take part in a forward pass: kernels, batch-norm scales and shifts, the head."""
        kernels = _KERNEL * (self.stem * (1 + self.stage1) + self.stage2 * (self.stage1 + 2 * self.inner * self.block))
        norms = 2 * (self.stem + self.stage1 + self.stage2 + (self.inner + self.stage2) * self.block)
        return kernels + norms + NUM_CLASSES * (self.stage2 + 1)


class Network(nn.Module):
    """Stem, two stages and a residual block of 3 x 3 convolutions with batch norm, then a mean over pixels and a linear head.

    Shape: ``(B, 1, 28, 28)`` to ``(B, 10)``.
    """

    def __init__(self, stem: nn.Module, stage1: nn.Module, stage2: nn.Module, block: nn.Module | None, head: nn.Module) -> None:
        super().__init__()
        self.stem = stem
        self.stage1 = stage1
        self.stage2 = stage2
        self.block = block
        self.head = head

    def forward(self, images: Tensor) -> Tensor:
        features = F.relu(self.stem(images))
        features = F.relu(self.stage1(features))
        features = F.relu(self.stage2(features))
        if self.block is not None:
            features = F.relu(features + self.block(features))
        return self.head(features.mean((2, 3)))


def plain_network(widths: Widths) -> Network:
    """The network of exactly ``widths`` on plain ``nn`` modules."""
    stem, stage1, stage2, inner, block = widths

    def conv_norm(in_channels: int, out_channels: int, stride: int = 1) -> nn.Sequential:
        conv = nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)
        return _named(conv, nn.BatchNorm2d(out_channels))

    branch = nn.Sequential(conv_norm(stage2, inner), nn.ReLU(), conv_norm(inner, stage2)) if block else None
    return start_block_at_zero(
        Network(
            conv_norm(1, stem, stride=2),
            conv_norm(stem, stage1),
            conv_norm(stage1, stage2, stride=2),
            branch,
            nn.Linear(stage2, NUM_CLASSES),
        )
    )


def elastic_network(start: Widths, capacity: Widths) -> Network:
    """The network on elastic layers: room for ``capacity``, of which ``start`` is in use."""

    def conv_norm(in_dim: ee.ElasticDim | None, out_dim: ee.ElasticDim, stride: int = 1) -> nn.Sequential:
        in_channels = 1 if in_dim is None else in_dim.active
        conv = ee.ElasticConv2d(in_channels, out_dim.active, 3, stride, padding=1, bias=False, in_dim=in_dim, out_dim=out_dim)
        return _named(conv, ee.ElasticBatchNorm2d(out_dim.active, dim=out_dim))

    stem, stage1, stage2, inner = (ee.ElasticDim(active, most) for active, most in zip(start[:4], capacity[:4], strict=True))
    branch = ee.ElasticBlock(nn.Sequential(conv_norm(stage2, inner), nn.ReLU(), conv_norm(inner, stage2)), kind="branch", on=start.block)
    head = ee.ElasticLinear(stage2.active, NUM_CLASSES, in_dim=stage2)
    return start_block_at_zero(
        Network(conv_norm(None, stem, stride=2), conv_norm(stem, stage1), conv_norm(stage1, stage2, stride=2), branch, head)
    )


def placed(network: Module, device: torch.device) -> Module:
    """``network`` moved to ``device``, in the memory format that convolutions of few channels run best in."""
    return network.to(device=device, memory_format=torch.channels_last)  # type: ignore[call-overload]


def _named(conv: nn.Module, norm: nn.Module) -> nn.Sequential:
    return nn.Sequential(OrderedDict(conv=conv, norm=norm))


def start_block_at_zero(network: Network) -> Network:
    """Zero the scale of the block's last norm: the block adds nothing until it has learned to, so switching it on changes no output."""
    norms = [module for module in network.block.modules() if isinstance(module, nn.BatchNorm2d)] if network.block is not None else []
    if norms:
        nn.init.zeros_(norms[-1].weight)
    return network
