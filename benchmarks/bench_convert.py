"""A converted model: what conversion takes, and its speed against the plain model at full width and the exported one at half."""

from __future__ import annotations

import copy
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from harness import bar, ratio
from torch import Tensor, nn

import esper_elastic as ee

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from zoo import BIG

INPUTS: dict[str, Callable[[], Tensor]] = {
    "resnet50": lambda: torch.randn(8, 3, 160, 160),
    "encoder_base": lambda: torch.randint(0, 30522, (8, 128)),
}
TITLES = {"resnet50": "ResNet-50, 8 images of 160 x 160", "encoder_base": "12-layer encoder (BERT-base), 8 x 128 tokens"}


@pytest.fixture(scope="module", params=INPUTS)
def model(request: pytest.FixtureRequest) -> tuple[str, nn.Module, nn.Module, Tensor]:
    """Its name, the converted model, the plain one that it was, and a batch."""
    torch.manual_seed(0)
    plain, x = BIG[request.param].build(), INPUTS[request.param]()
    elastic = copy.deepcopy(plain)
    start = time.perf_counter()
    ee.elasticize(elastic, BIG[request.param].inputs())
    bar(f"`ee.elasticize`, {TITLES[request.param].split(',')[0]}", time.perf_counter() - start, "s", at_most=10)
    return request.param, elastic, plain, x


def step(model: nn.Module, x: Tensor) -> Callable[[], None]:
    """One forward and backward with fresh gradients."""

    def run() -> None:
        model.zero_grad()
        model(x).square().mean().backward()

    return run


def same(elastic: nn.Module, plain: nn.Module, x: Tensor) -> Callable[[], None]:
    def check() -> None:
        torch.testing.assert_close(elastic(x), plain(x), rtol=1e-3, atol=1e-3)

    return check


def test_full_width(benchmark: Any, model: tuple[str, nn.Module, nn.Module, Tensor]) -> None:
    name, elastic, plain, x = model
    speed = 1 / ratio(benchmark, step(elastic, x), step(plain, x), same(elastic, plain, x), rounds=9)
    bar(f"{TITLES[name]}, converted, full width, forward + backward, speed", speed, "x", at_least=0.95)


def test_half_width(benchmark: Any, model: tuple[str, nn.Module, nn.Module, Tensor]) -> None:
    name, elastic, _, x = model
    dims = ee.dims(elastic)
    ee.resize(elastic, {key: max(dim.minimum, dim.capacity // 2 // dim.multiple_of * dim.multiple_of) for key, dim in dims.items()})
    exported = ee.export(elastic)
    speed = 1 / ratio(benchmark, step(elastic, x), step(exported, x), same(elastic, exported, x), rounds=9)
    bar(f"{TITLES[name]}, converted, half width against its export, forward + backward, speed", speed, "x", at_least=0.93)
