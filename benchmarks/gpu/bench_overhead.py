"""What the host pays: a layer in eager compact layout over its nn twin, and a width change under a captured graph."""

from __future__ import annotations

import torch
from device import DEVICE, captured, host_microseconds, sized
from harness import bar
from torch import nn

import esper_elastic as ee


def test_eager_layers() -> None:
    pairs = {
        "ElasticLinear": (ee.ElasticLinear(128, 128), nn.Linear(128, 128), torch.randn(32, 128)),
        "ElasticConv2d": (ee.ElasticConv2d(16, 16, 3), nn.Conv2d(16, 16, 3), torch.randn(2, 16, 8, 8)),
        "ElasticBatchNorm2d": (ee.ElasticBatchNorm2d(16), nn.BatchNorm2d(16), torch.randn(2, 16, 8, 8)),
        "ElasticLayerNorm": (ee.ElasticLayerNorm(128), nn.LayerNorm(128), torch.randn(32, 128)),
    }
    for name, (elastic, plain, x) in pairs.items():
        elastic, plain, x = elastic.to(DEVICE), plain.to(DEVICE), x.to(DEVICE)
        over = min(host_microseconds(lambda m=elastic, x=x: m(x)) - host_microseconds(lambda m=plain, x=x: m(x)) for _ in range(3))
        bar(f"`{name}`, eager, compact, host time of a forward over its nn layer", over, "us", at_most=10)


def test_width_change_under_a_graph() -> None:
    size = sized(1024, 32)
    hidden = ee.ElasticDim(size)
    model = nn.Sequential(ee.ElasticLinear(size, size, out_dim=hidden), nn.ReLU(), ee.ElasticLinear(size, size, in_dim=hidden)).to(DEVICE)
    ee.set_layout(model, "static")
    x = torch.randn(64, size, device=DEVICE)
    results: list[torch.Tensor] = []
    with torch.no_grad():
        replay = captured(lambda: results.append(model(x)))
        wrong = 0
        for round in range(sized(1000, 2)):
            hidden.resize(1 + (round * 37) % size)
            replay()
            if round % 100 == 0:
                wrong += not torch.allclose(results[-1], model(x), rtol=1e-3, atol=1e-4)
        widths = iter(range(1, 10**9))
        host = host_microseconds(lambda: hidden.resize(1 + next(widths) % size))
    bar("wrong results at the replay after a width change, of ten looked at in 1,000", wrong, "", at_most=0)
    bar("width change under a captured graph, host", host, "us", at_most=10)
