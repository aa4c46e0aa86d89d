"""Conv2d by Triton and by cuDNN on slices, against cuDNN at exactly the active size, bf16, channels_last."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from device import DEVICE, DRY, sized, speed
from harness import bar
from torch import Tensor, nn

import esper_elastic as ee

HALF = torch.bfloat16
CHANNELS, BATCH = sized(256, 16), sized(64, 1)


def images(channels: int, side: int) -> Tensor:
    return torch.randn(BATCH, channels, side, side, device=DEVICE, dtype=HALF).to(memory_format=torch.channels_last)


def backward(layer: nn.Module, x: Tensor, grad: Tensor) -> Callable[[], Any]:
    """Forward and both gradients."""
    x = x.detach().requires_grad_()
    return lambda: torch.autograd.grad(layer(x), (x, *layer.parameters()), grad)


@pytest.mark.parametrize("layout", ["compact", "static"])
@pytest.mark.parametrize("quarters", [2] if DRY else [1, 2, 3, 4])
@pytest.mark.parametrize("side", [sized(56, 3), sized(14, 2)])
def test_three_by_three(side: int, quarters: int, layout: str) -> None:
    width = CHANNELS * quarters // 4
    elastic = ee.ElasticConv2d(
        width, width, 3, padding=1, max_in_channels=CHANNELS, max_out_channels=CHANNELS, device=DEVICE, dtype=HALF
    ).to(memory_format=torch.channels_last)
    elastic.layout = layout
    exact = elastic.to_dense().to(memory_format=torch.channels_last)
    x, grad = images(width, side), images(width, side)
    wide, wide_grad = x, grad
    if layout == "static":
        wide, wide_grad = torch.zeros_like(images(CHANNELS, side)), torch.zeros_like(images(CHANNELS, side))
        wide[:, :width], wide_grad[:, :width] = x, grad
    with torch.no_grad():
        got, expected = elastic(wide)[:, :width].float(), exact(x).float()
        assert (got - expected).norm() / expected.norm() < 1e-2
        forward = speed(lambda: elastic(wide), lambda: exact(x))
    both = speed(backward(elastic, wide, wide_grad), backward(exact, x, grad), calls=2)
    name = f"Conv2d 3x3, {quarters}/4 of {CHANNELS} channels both sides, {side} x {side}, batch {BATCH}, {layout}"
    least = 0.95 if layout == "compact" else 0.75
    bar(f"{name}, forward and backward, speed", both, "x", at_least=least)
    bar(f"{name}, forward, speed", forward, "x", at_least=least)
