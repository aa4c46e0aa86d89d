"""ElasticConv2d against an nn.Conv2d of exactly the active size."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from harness import bar, ratio, training_step

import esper_elastic as ee


@pytest.mark.parametrize("layout", ["compact", "static"])
@pytest.mark.parametrize("quarters", [1, 2, 3, 4])
def test_forward_and_backward(benchmark: Any, quarters: int, layout: str) -> None:
    size = 64 * quarters
    elastic = ee.ElasticConv2d(size, size, 3, padding=1, max_in_channels=256, max_out_channels=256)
    exact = elastic.to_dense()
    elastic.layout = layout
    x = torch.randn(16, size, 32, 32, requires_grad=True)
    wide = torch.zeros(16, elastic.in_channels, 32, 32)
    wide[:, :size] = x.detach()
    wide.requires_grad_()

    def check() -> None:
        torch.testing.assert_close(elastic(wide)[:, :size], exact(x), rtol=1e-4, atol=1e-4)

    speed = 1 / ratio(benchmark, training_step(elastic, wide), training_step(exact, x), check, rounds=15)
    what = f"`ElasticConv2d` 3x3, 256 channels at {quarters}/4 both sides, 32 x 32, batch 16, {layout}, forward + backward, speed"
    bar(what, speed, "x", at_least=0.93 if layout == "compact" else 0.85 if quarters > 1 else 0.70)
