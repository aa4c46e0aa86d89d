"""Norms, optimizers and switched-off blocks: what only moves memory, against the bandwidth of a copy, on active bytes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from device import DEVICE, captured, copy_bandwidth, seconds, sized
from harness import bar
from torch import nn

import esper_elastic as ee

HALF = torch.bfloat16


def share_of_bandwidth(function: Callable[[], Any], bytes_moved: int, calls: int = 4) -> float:
    return bytes_moved * calls / seconds([captured(function, calls)])[0] / copy_bandwidth()


@pytest.mark.parametrize("quarters", [1, 2, 4])
@pytest.mark.parametrize("kind", ["layer norm", "batch norm, channels last", "batch norm"])
def test_norms(kind: str, quarters: int) -> None:
    if kind == "layer norm":
        size, shape = sized(4096, 32), (sized(32768, 8), sized(4096, 32))
        norm: nn.Module = ee.ElasticLayerNorm(size * quarters // 4, max_num_features=size, device=DEVICE)
        x = torch.randn(shape, device=DEVICE, dtype=HALF)
    else:
        size, side = sized(256, 32), sized(56, 3)
        norm = ee.ElasticBatchNorm2d(size * quarters // 4, max_num_features=size, device=DEVICE)
        order = torch.channels_last if "last" in kind else torch.contiguous_format
        x = torch.randn(sized(256, 2), size, side, side, device=DEVICE, dtype=HALF).to(memory_format=order)
    norm.layout = "static"
    x.requires_grad_()
    active_bytes = x.numel() * quarters // 4 * x.element_size()
    passes = 2 if kind == "layer norm" else 3  # batch statistics are known only after a first pass
    with torch.no_grad():
        forward = share_of_bandwidth(lambda: norm(x), passes * active_bytes)
    y = norm(x)
    grad = torch.randn_like(y)

    def step() -> None:
        torch.autograd.grad(norm(x), (x, *norm.parameters()), grad)

    both = share_of_bandwidth(step, (passes + (3 if kind == "layer norm" else 5)) * active_bytes)
    bar(f"{kind}, {quarters}/4 active, forward, share of copy bandwidth", forward, "", at_least=0.85)
    bar(f"{kind}, {quarters}/4 active, forward and backward, share of copy bandwidth", both, "", at_least=0.85)


@pytest.mark.parametrize("quarters", [1, 2, 4])
@pytest.mark.parametrize("kind", ["AdamW", "SGD"])
def test_optimizers(kind: str, quarters: int) -> None:
    size, count = sized(4096, 32), sized(12, 2)
    width = size * quarters // 4
    layers = [ee.ElasticLinear(width, width, max_in_features=size, max_out_features=size, bias=False, device=DEVICE) for _ in range(count)]
    model = nn.Sequential(*layers)
    ee.set_layout(model, "static")
    optimizer = ee.optim.AdamW(model.parameters()) if kind == "AdamW" else ee.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
        parameter.grad[:width, :width].normal_()
    active = count * width * width
    per_element = 7 * 4 + 2 * 2 if kind == "AdamW" else 5 * 4  # AdamW's step counts take 16 bits
    value = share_of_bandwidth(optimizer.step, active * per_element, calls=1)
    bar(f"{kind}, {count} weights of {size} x {size} at {quarters}/4 both sides, share of copy bandwidth", value, "", at_least=0.85)


def test_a_block_that_is_off() -> None:
    """A feed-forward block of GPT-2's size: what our kernels cost in it while it is off, and plain ops apart."""
    width, hidden, rows = sized(768, 16), sized(3072, 32), sized(8 * 1024, 6)
    inside = nn.Sequential(ee.ElasticLayerNorm(width), ee.ElasticLinear(width, hidden), ee.ElasticLinear(hidden, width))
    block = ee.ElasticBlock(inside, kind="branch").to(DEVICE, HALF)
    ee.set_layout(block, "static")
    x = torch.randn(rows, width, device=DEVICE, dtype=HALF)
    with torch.no_grad():
        ours = captured(lambda: block(x), 8)
        plain = captured(lambda: nn.functional.gelu(x.new_empty(rows, hidden)), 8)
        block.switch.set(False)
        off, gelu = (time * 1e6 / 8 for time in seconds([ours, plain]))
    bar("a feed-forward block of GPT-2's size that is off, forward, per kernel of ours (4)", off / 4, "us", at_most=2.5)
    bar("a gelu between them, which runs on", gelu, "us", at_least=0)
