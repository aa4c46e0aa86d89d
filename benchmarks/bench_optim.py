"""Our AdamW on the active part against torch's fused AdamW at capacity."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from harness import bar, ratio

import esper_elastic as ee


@pytest.mark.parametrize(
    ("rows", "columns", "most"), [(512, 2048, 0.30), (512, 512, 0.10), (2048, 2048, 1.05)], ids=["one-quarter", "sixteenth", "full"]
)
def test_adamw_step(benchmark: Any, rows: int, columns: int, most: float) -> None:
    layer = ee.ElasticLinear(columns, rows, bias=False, max_in_features=2048, max_out_features=2048)
    dense = torch.nn.Parameter(layer.weight.detach().clone())
    dense.grad = torch.randn(2048, 2048)
    layer.weight.grad = dense.grad.clone()
    ours = ee.optim.AdamW([layer.weight], lr=1e-3)
    theirs = torch.optim.AdamW([dense], lr=1e-3, fused=True)

    def check() -> None:
        for _ in range(3):
            ours.step()
            theirs.step()
        torch.testing.assert_close(layer.active("weight"), dense[:rows, :columns])

    # In runs of ten, so that each side finds its own data in the caches; alternating single steps, ours starts cold.
    value = ratio(benchmark, ours.step, theirs.step, check, rounds=31, calls=10)
    bar(f"`ee.optim.AdamW`, {rows} x {columns} active of 2048 x 2048, over torch's fused AdamW at capacity", value, "x", at_most=most)
