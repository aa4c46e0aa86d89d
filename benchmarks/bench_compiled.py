"""A compiled model in static layout through width changes."""

from __future__ import annotations

import itertools
import statistics
import time
from typing import Any

import torch
from harness import bar
from torch import nn
from torch._dynamo.utils import counters

import esper_elastic as ee


def test_sixty_four_width_changes(benchmark: Any) -> None:
    hidden = ee.ElasticDim(512, 1024)
    model = nn.Sequential(ee.ElasticLinear(256, 512, out_dim=hidden), nn.GELU(), ee.ElasticLinear(512, 256, in_dim=hidden))
    ee.set_layout(model, "static")
    torch._dynamo.reset()
    counters.clear()
    compiled = torch.compile(model, fullgraph=True)
    x = torch.randn(256, 256)

    def step() -> float:
        start = time.perf_counter()
        compiled(x).sum().backward()
        elapsed = time.perf_counter() - start
        model.zero_grad()
        return elapsed

    torch.testing.assert_close(compiled(x), model(x))
    step()
    after, steady = [], []
    for width in itertools.islice(itertools.cycle((128, 1024, 512, 768)), 64):
        hidden.resize(width)
        first = step()
        later = [step() for _ in range(4)]
        after.append(first / statistics.median(later))
        steady += later
    benchmark.pedantic(step, rounds=3)
    bar("compilations of a static model over 64 width changes", counters["stats"]["unique_graphs"], "", at_most=1)
    bar("compiled step right after a width change over a steady one", statistics.median(after), "x", at_most=1.1)
