"""ElasticLinear against an nn.Linear of exactly the active size."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from harness import bar, interleaved, ratio, training_step

import esper_elastic as ee


@pytest.mark.parametrize("layout", ["compact", "static"])
@pytest.mark.parametrize("quarters", [1, 2, 3, 4])
def test_forward_and_backward(benchmark: Any, quarters: int, layout: str) -> None:
    size = 512 * quarters
    elastic = ee.ElasticLinear(size, size, max_in_features=2048, max_out_features=2048)
    exact = elastic.to_dense()
    elastic.layout = layout
    x = torch.randn(512, size, requires_grad=True)
    wide = torch.zeros(512, elastic.in_features)
    wide[:, :size] = x.detach()
    wide.requires_grad_()

    def check() -> None:
        torch.testing.assert_close(elastic(wide)[:, :size], exact(x), rtol=1e-4, atol=1e-4)

    speed = 1 / ratio(benchmark, training_step(elastic, wide), training_step(exact, x), check)
    what = f"`ElasticLinear` 2048 x 2048 at {quarters}/4 both sides, batch 512, {layout}, forward + backward, speed"
    bar(what, speed, "x", at_least=0.95 if layout == "compact" else 0.6)


def test_overhead_of_a_small_layer(benchmark: Any) -> None:
    elastic = ee.ElasticLinear(128, 128)
    exact = elastic.to_dense()
    x = torch.randn(32, 128)
    with torch.no_grad():
        torch.testing.assert_close(elastic(x), exact(x))
        ours, theirs = interleaved([lambda: elastic(x), lambda: exact(x)], 101, 50)
        benchmark.pedantic(elastic, (x,), rounds=3, iterations=50)
    differences = sorted(a - b for a, b in zip(ours, theirs, strict=True))
    bar("`ElasticLinear` 128 x 128, batch 32, no grad, over `nn.Linear`", differences[len(differences) // 2] * 1e6, "us", at_most=10)
