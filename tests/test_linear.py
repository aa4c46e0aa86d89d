"""``ElasticLinear``: the contract, and what only this layer promises."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from contract import LAYOUTS, MANY, NARROW, AxisCase, Contract, allocations, needs_library, poison
from torch import Tensor, nn

import esper_elastic as ee
from esper_elastic.control import Axis


class TestLinear(Contract):
    kernels = "all"

    def make(self, *axes: Axis, **factory: Any) -> nn.Module:
        out_dim, in_dim = axes
        return ee.ElasticLinear(in_dim.active, out_dim.active, in_dim=in_dim, out_dim=out_dim, **factory)

    def dense(self, *sizes: int, **factory: Any) -> nn.Module:
        return nn.Linear(sizes[1], sizes[0], **factory)

    def input(self, size: int) -> Tensor:
        return torch.rand(3, 5, size, dtype=torch.float64) + 0.25


class TestLinearWithoutBias(TestLinear):
    def make(self, *axes: Axis, **factory: Any) -> nn.Module:
        return super().make(*axes, bias=False, **factory)

    def dense(self, *sizes: int, **factory: Any) -> nn.Module:
        return super().dense(*sizes, bias=False, **factory)

    @classmethod
    def narrow_cases(cls) -> Iterator[tuple[AxisCase, ...]]:
        yield (MANY, NARROW)


def wide(rows: Axis | None = None, columns: Axis | None = None, **factory: Any) -> ee.ElasticLinear:
    """A layer of 127 x 125 whose active part is much larger than its activations."""
    rows, columns = rows or ee.ElasticDim(61, 127), columns or ee.ElasticDim(59, 125)
    layer = ee.ElasticLinear(columns.active, rows.active, in_dim=columns, out_dim=rows, **factory)
    poison(layer)
    return layer


RUNS = {
    "one run": (lambda: None, lambda: None),
    "several": (
        lambda: ee.concat(ee.ElasticDim(30, 60), ee.ElasticDim(31, 67)),
        lambda: ee.concat(ee.ElasticDim(30, 60), ee.ElasticDim(29, 65)),
    ),
}


def large_allocations(layer: nn.Module, autocast: bool) -> tuple[list[int], list[int]]:
    """The allocations of a forward and of a backward of three samples that have a byte or more for each active weight of ``wide()``."""
    x = torch.zeros(3, layer.in_features, requires_grad=True)
    outputs: list[Tensor] = []

    def forward() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            outputs.append(layer(x))

    forward()
    outputs.pop().sum().backward()
    layer.zero_grad()
    forwards = allocations(forward)
    g = torch.ones_like(outputs[-1])
    backwards = allocations(lambda: outputs[-1].backward(g))
    return sorted(size for size in forwards if size >= 61 * 59), sorted(size for size in backwards if size >= 61 * 59)


@needs_library
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("runs", RUNS)
@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "autocast"])
def test_native_allocates_what_a_dense_layer_of_the_active_size_does(layout: str, runs: str, autocast: bool) -> None:
    """Beside its gradient, which has the capacity; under autocast one more cast of the active slice in backward."""
    layer = wide(*(build() for build in RUNS[runs]))
    layer.layout = layout
    forward, backward = large_allocations(layer, autocast)
    dense_forward, dense_backward = large_allocations(nn.Linear(59, 61), autocast)
    cast, gradient = 2 * 61 * 59 if autocast else 0, 4 * layer.weight.numel()
    if runs == "one run":
        assert forward == dense_forward
    # bfloat16 sums over several runs bring the active slice together once more
    more = 0 if runs == "one run" else 6 * cast
    assert sum(forward) <= sum(dense_forward) + more, (forward, dense_forward)
    assert sum(backward) <= sum(dense_backward) + gradient + cast + more, (backward, dense_backward)
    largest = max([4 * 61 * 59, *dense_forward, *dense_backward])
    assert all(size <= largest for size in forward), (forward, dense_forward)
    assert all(size <= largest or size == gradient for size in backward), (backward, dense_backward)


@pytest.mark.parametrize("native", [False, pytest.param(True, marks=needs_library)], ids=["reference", "native"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_bfloat16_sums_over_several_runs_are_rounded_once(native: bool, layout: str) -> None:
    first, second = ee.ElasticDim(8, 9), ee.ElasticDim(8, 9)
    layer = ee.ElasticLinear(16, 16, in_dim=ee.concat(first, second), out_dim=ee.concat(first, second), dtype=torch.bfloat16)
    layer.layout = layout
    layer._widths.backend = "native" if native else "reference"
    inside = torch.cat([torch.arange(8), 9 + torch.arange(8)])
    w = torch.randn(8, 8, dtype=torch.bfloat16)
    with torch.no_grad():  # what the first run adds, the second takes away
        layer.weight[inside[:, None], inside] = torch.cat([torch.cat([w, -w], 1), torch.cat([-w, w], 1)])
        layer.bias.fill_(0)
    part = torch.randn(1, 8, dtype=torch.bfloat16) * 100
    x = torch.zeros(1, layer.in_features, dtype=torch.bfloat16)
    columns = inside if layout == "static" else torch.arange(16)
    x[:, columns] = torch.cat([part, part], 1)
    x.requires_grad_()
    y = layer(x)
    assert (y == 0).all()
    y.backward(x.detach())
    assert (x.grad == 0).all()


@pytest.mark.parametrize("native", [False, pytest.param(True, marks=needs_library)], ids=["reference", "native"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_complex_weights(native: bool, layout: str) -> None:
    layer = ee.ElasticLinear(3, 5, max_in_features=7, max_out_features=8, dtype=torch.complex128)
    dense = layer.to_dense()
    layer.layout = layout
    layer._widths.backend = "native" if native else "reference"
    x = torch.randn(4, 3, dtype=torch.complex128, requires_grad=True)
    x_dense = x.detach().clone().requires_grad_()
    y = layer(torch.nn.functional.pad(x, (0, 4)) if layout == "static" else x)[:, :5]
    g = torch.randn_like(y)
    for create_graph in (False, True):
        got = torch.autograd.grad(y, (x, layer.weight, layer.bias), g, retain_graph=True, create_graph=create_graph)
        expected = torch.autograd.grad(dense(x_dense), (x_dense, dense.weight, dense.bias), g)
        for ours, theirs in zip(got, expected, strict=True):
            torch.testing.assert_close(ours[tuple(slice(size) for size in theirs.shape)], theirs)


@pytest.mark.parametrize("shape", [(), (0,), (1,), (2, 0), (2, 3, 1)], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("native", [False, pytest.param(True, marks=needs_library)], ids=["reference", "native"])
def test_any_batch_shape(shape: tuple[int, ...], layout: str, native: bool) -> None:
    layer = ee.ElasticLinear(3, 5, max_in_features=7, max_out_features=8)
    dense = layer.to_dense()
    layer.layout = layout
    layer._widths.backend = "native" if native else "reference"
    x = torch.randn(*shape, 3)
    x_wide = torch.nn.functional.pad(x, (0, 4)) if layout == "static" else x
    y, expected = layer(x_wide)[..., :5], dense(x)
    torch.testing.assert_close(y, expected)
    y.sum().backward()
    expected.sum().backward()
    torch.testing.assert_close(layer.weight.grad[:5, :3], dense.weight.grad)
    torch.testing.assert_close(layer.bias.grad[:5], dense.bias.grad)


def test_an_input_without_features_is_refused() -> None:
    with pytest.raises(ee.LayoutError, match=r"ElasticLinear: input: expected at least one axis, the features, got a single number"):
        ee.ElasticLinear(3, 5)(torch.tensor(1.0))
