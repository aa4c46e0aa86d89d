"""What a commit costs: one dim, many layers, many dims, a switch."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
from harness import bar, cost, ratio
from torch import nn

import esper_elastic as ee


def toggling(dim: ee.ElasticDim, low: int, high: int) -> Any:
    widths = itertools.cycle((low, high))
    return lambda: dim.resize(next(widths))


def layer_of(size: int) -> ee.ElasticLinear:
    return ee.ElasticLinear(8, size // 2, max_out_features=size)


def test_resize_one_dim(benchmark: Any) -> None:
    dim = layer_of(1024).out_dim

    def check() -> None:
        dim.resize(7)
        assert dim.active == 7

    bar("`dim.resize`, one dim", cost(benchmark, toggling(dim, 256, 512), check, calls=1000), "us", at_most=5)


def test_resize_costs_the_same_for_a_large_layer(benchmark: Any) -> None:
    small, large = layer_of(1024).out_dim, layer_of(16384).out_dim
    value = ratio(benchmark, toggling(large, 256, 512), toggling(small, 256, 512), lambda: None, calls=1000)
    bar("`dim.resize`, 16k layer over 1k layer", value, "x", at_most=1.3)


def test_resize_costs_the_same_for_many_layers(benchmark: Any) -> None:
    one = ee.ElasticDim(8, 16)
    many = ee.ElasticDim(8, 16)
    layers = [ee.ElasticLinear(8, 4, in_dim=dim) for dim in (one, *(100 * [many]))]
    assert len(many.users()) == 100
    value = ratio(benchmark, toggling(many, 4, 8), toggling(one, 4, 8), lambda: None, calls=1000)
    bar("`dim.resize`, 100 attached layers over 1", value, "x", at_most=1.3)
    del layers


def test_resize_a_thousand_dims(benchmark: Any) -> None:
    model = nn.ModuleList(ee.ElasticLinear(4, 4, max_out_features=8) for _ in range(1000))
    widths = itertools.cycle([{str(i): n for i in range(1000)} for n in (5, 6)])
    control = ee.control_block(model)

    def check() -> None:
        generation = control.generation
        ee.resize(model, {str(i): 8 for i in range(1000)})
        assert control.generation == generation + 1
        assert all(layer.out_features == 8 for layer in model)

    value = cost(benchmark, lambda: ee.resize(model, next(widths)), check) / 1000
    bar("1,000 dims in one `ee.resize`", value, "ms", at_most=1)


@pytest.mark.parametrize("how", ["block.switch.set", "ee.disable / ee.enable"])
def test_switch_a_block(benchmark: Any, how: str) -> None:
    model = nn.Sequential(*[ee.ElasticBlock(ee.ElasticLinear(8, 8)) for _ in range(50)])
    switch, turns = model[7].switch, itertools.cycle((False, True))
    calls = itertools.cycle((ee.disable, ee.enable))
    by_name = how.startswith("ee")

    def check() -> None:
        ee.disable(model, "7")
        assert not model[7].on

    toggle = (lambda: next(calls)(model, "7")) if by_name else (lambda: switch.set(next(turns)))
    bar(f"switch a block, `{how}`", cost(benchmark, toggle, check, calls=1000), "us", at_most=5)
