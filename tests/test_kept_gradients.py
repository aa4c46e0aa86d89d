"""Gradients that are written into memory kept from the step before: what is in them is that of the last backward and nothing else."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from contract import LAYOUTS, allocations, needs_library
from torch import Tensor, nn

import esper_elastic as ee
from esper_elastic.layers.base import write_active

pytestmark = needs_library

BATCHES = [torch.tensor(batch) for batch in ([[0, 4], [4, 2]], [[1, 1]], [[3, 0]], [[2, 4], [0, 1]], [[4, 4]])]


def drop(layer: nn.Module) -> None:
    layer.weight.grad = None


def scale(layer: nn.Module) -> None:
    layer.weight.grad.mul_(3)
    drop(layer)


def fill_all(layer: nn.Module) -> None:
    layer.weight.grad.add_(7)
    drop(layer)


def zero_in_place(layer: nn.Module) -> None:
    layer.weight.grad.zero_()


def accumulate(layer: nn.Module) -> None:
    pass


def narrow_vectors(layer: nn.Module) -> None:
    layer.out_dim.resize(2)
    drop(layer)


def narrow_table(layer: nn.Module) -> None:
    layer.in_dim.resize(5)
    drop(layer)


def widen(layer: nn.Module) -> None:
    layer.in_dim.resize(9)
    layer.out_dim.resize(6)
    drop(layer)


BETWEEN: list[Callable[[nn.Module], None]] = [drop, scale, fill_all, zero_in_place, accumulate, narrow_vectors, narrow_table, widen]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("padding_idx", [None, 4], ids=["all trained", "padding"])
@pytest.mark.parametrize(("first", "second"), list(itertools.product(BETWEEN, BETWEEN)), ids=lambda action: action.__name__)
def test_a_table_gets_the_gradient_of_the_last_batch(
    first: Callable[..., None], second: Callable[..., None], padding_idx: int | None, layout: str
) -> None:
    layer = ee.ElasticEmbedding(7, 4, padding_idx=padding_idx, max_num_embeddings=9, max_embedding_dim=6)
    layer.layout = layout
    expected = torch.zeros(9, 6)
    for batch, between in zip(BATCHES, itertools.cycle([first, second]), strict=False):
        width = layer.out_dim.active
        dense = nn.Embedding(layer.in_dim.active, width, padding_idx=padding_idx)
        grad = torch.randn(*batch.shape, width)
        dense(batch).backward(grad)
        expected[: len(dense.weight), :width] += dense.weight.grad
        layer(batch)[..., :width].backward(grad)
        torch.testing.assert_close(layer.weight.grad, expected)
        between(layer)
        if between is not accumulate:
            expected.zero_()


LAYERS: dict[str, tuple[Callable[[], Any], Tensor]] = {
    "linear": (lambda: ee.ElasticLinear(3, 2, max_in_features=4, max_out_features=3), torch.ones(1, 3)),
    "conv2d": (lambda: ee.ElasticConv2d(3, 2, 1, max_in_channels=4, max_out_channels=3), torch.ones(1, 3, 2, 2)),
    "conv1d": (lambda: ee.ElasticConv1d(3, 2, 1, max_in_channels=4, max_out_channels=3), torch.ones(1, 3, 2)),
    "embedding": (lambda: ee.ElasticEmbedding(3, 2, max_num_embeddings=4, max_embedding_dim=3), torch.tensor([2, 0])),
}


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("write", ["add_", "fill_", "copy_", "foreach"])
def test_what_someone_writes_to_a_gradient_is_gone_in_the_next(name: str, write: str) -> None:
    build, x = LAYERS[name]
    layer = build()
    layer(x).sum().backward()
    expected = layer.weight.grad.clone()
    if write == "foreach":
        torch._foreach_add_([layer.weight.grad], 7.0)
    else:
        getattr(layer.weight.grad, write)(torch.tensor(7.0))
    layer.weight.grad = None
    layer(x).sum().backward()
    assert torch.equal(layer.weight.grad, expected)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_gradient_that_someone_holds_is_left_alone(layout: str) -> None:
    layer = ee.ElasticEmbedding(7, 4, max_num_embeddings=9)
    layer.layout = layout
    held: list[tuple[Tensor, Tensor]] = []
    for batch in BATCHES:
        layer.zero_grad()
        layer(batch).sum().backward()
        held.append((layer.weight.grad, layer.weight.grad.clone()))
    assert all(torch.equal(grad, copy) for grad, copy in held)


def test_a_tied_weight_is_looked_up_and_multiplied() -> None:
    """One parameter, whose gradient a table and a matrix product write in turn and together."""
    table = ee.ElasticEmbedding(7, 4, max_num_embeddings=9, max_embedding_dim=6)
    head = ee.ElasticLinear(4, 7, bias=False, in_dim=table.out_dim, out_dim=table.in_dim)
    head.weight = table.weight
    dense = nn.Embedding.from_pretrained(table.active("weight").detach().clone(), freeze=False)
    x = torch.randn(3, 4)

    def looked_up(table: nn.Module, multiply: Callable[[Tensor], Tensor], batch: Tensor) -> Tensor:
        return table(batch).square().sum()

    def multiplied(table: nn.Module, multiply: Callable[[Tensor], Tensor], batch: Tensor) -> Tensor:
        return multiply(x).square().sum()

    def both(table: nn.Module, multiply: Callable[[Tensor], Tensor], batch: Tensor) -> Tensor:
        return multiply(table(batch)).square().sum()

    for loss in (looked_up, multiplied, looked_up, both, looked_up, looked_up, both):
        for batch in BATCHES[:2]:
            table.weight.grad = dense.weight.grad = None
            loss(table, head, batch).backward()
            loss(dense, lambda x: x @ dense.weight.t(), batch).backward()
            torch.testing.assert_close(table.weight.grad[:7, :4], dense.weight.grad)
            assert table.weight.grad[7:].eq(0).all()
            assert table.weight.grad[:, 4:].eq(0).all()


@pytest.mark.parametrize("width", [64, 48], ids=["full", "narrow"])
def test_a_large_table_costs_what_was_looked_up(width: int) -> None:
    layer = ee.ElasticEmbedding(5000, width, max_embedding_dim=64)
    table = 5000 * width * 4

    def step(batch: Tensor) -> None:
        layer(batch).sum().backward()
        layer.zero_grad()

    for batch in BATCHES[:2]:
        step(batch)
    assert max(allocations(lambda: step(BATCHES[2]))) < table
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True) as profile:
        step(BATCHES[3])
    written = {"aten::zero_", "aten::fill_", "aten::copy_", "aten::add_", "aten::mul_"}
    whole = [event.name for event in profile.events() if event.name in written and [5000, width] in event.input_shapes]
    assert whole == []


@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "autocast"])
def test_a_convolution_copies_its_active_weight_once(autocast: bool) -> None:
    """Forward makes it dense; backward, which needs it as it was, takes the same copy."""
    layer = ee.ElasticConv2d(48, 40, 3, max_in_channels=64, max_out_channels=64)
    x = torch.randn(1, 48, 3, 3, requires_grad=True)
    dense = layer.to_dense()

    def step(module: Any) -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            y = module(x)
        y.sum().backward()
        module.zero_grad()

    step(layer)
    step(dense)
    active = 48 * 40 * 9 * (2 if autocast else 4)
    ours, theirs = ([size for size in allocations(partial(step, module)) if size >= active] for module in (layer, dense))
    assert sum(ours) <= sum(theirs) + active, (ours, theirs)


def test_a_convolution_remembers_the_weight_of_its_forward() -> None:
    """As with any saved weight, an in-place write between forward and backward is an error and not another gradient."""
    layer = ee.ElasticConv2d(3, 5, 3, max_in_channels=4, max_out_channels=6)
    y = layer(torch.randn(1, 3, 4, 4, requires_grad=True))
    with torch.no_grad():
        write_active(layer.weight, layer.tensor_axes()["weight"], torch.zeros(5, 3, 3, 3))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()
