"""Pruning keeps the chosen units and puts the others to sleep behind them, aligned everywhere."""

import numpy as np
import pytest
import torch
from growing import DERIVED, Derived, Net, assert_same, batch, everything, integral, poison, refused

import esper_elastic as ee
from esper_elastic.errors import GenerationError


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


INDICES = {
    "list": [3, 0],
    "tuple": (0, 3),
    "range": range(0, 4, 3),
    "tensor": torch.tensor([3, 0]),
    "int32 tensor": torch.tensor([3, 0], dtype=torch.int32),
    "numpy": np.array([3, 0]),
    "numpy integers": [np.int64(3), np.int32(0)],
}


@pytest.mark.parametrize("indices", INDICES.values(), ids=INDICES.keys())
def test_keep_equals_the_dense_model_of_the_chosen_units(indices):
    net = Net()
    poison(net.first, net.second, net.third)
    first, second, third = net.first.to_dense(), net.second.to_dense(), net.third.to_dense()
    input = torch.randn(6, 3, dtype=torch.float64)
    with torch.no_grad():
        chosen = first(input)[:, [0, 3]].relu()
        expected = third((chosen @ second.weight[:, [0, 3]].T + second.bias).relu())
    net.hidden.keep(indices)
    assert net.hidden.active == 2
    torch.testing.assert_close(net(input), expected, rtol=1e-13, atol=1e-13)


def test_pruned_units_sleep_behind_in_order_and_wake_aligned():
    net = Net()
    integral(net.first, net.second, net.third)
    rows, columns, bias = net.first.weight.clone(), net.second.weight.clone(), net.first.bias.clone()
    input = batch(6, 3)
    before = net(input)
    net.hidden.keep([3, 1])
    order = [1, 3, 0, 2, 4, 5, 6, 7, 8]
    assert torch.equal(net.first.weight, rows[order])
    assert torch.equal(net.first.bias, bias[order])
    assert torch.equal(net.second.weight, columns[:, order])  # dormant rows of the other dim too
    net.hidden.resize(4)
    assert torch.equal(net(input), before)


@pytest.mark.parametrize("shape", DERIVED)
def test_keep_reaches_every_segment_of_a_derived_axis(shape):
    net = integral(Derived(shape))
    poison(*net.children())
    input = batch(5, 3)
    full = net(input)
    pruned = net.one(input).index_fill(1, torch.tensor([1, 2]), 0)
    expected = net.last(net.join(pruned, net.other(input)))
    net.one.out_dim.keep([3, 0])
    assert torch.equal(net(input), expected)
    net.one.out_dim.resize(4)
    assert torch.equal(net(input), full)


def test_keep_moves_gradients_with_their_units():
    net = Net()
    net(batch(6, 3)).sum().backward()
    rows, columns = net.first.weight.grad.clone(), net.second.weight.grad.clone()
    net.hidden.keep([2, 3])
    order = [2, 3, 0, 1, 4, 5, 6, 7, 8]
    assert torch.equal(net.first.weight.grad, rows[order])
    assert torch.equal(net.second.weight.grad, columns[:, order])


def test_a_graph_from_before_refuses_its_backward_though_the_width_came_back():
    net = Net()
    net.hidden.resize(5)
    loss = net(batch(6, 3)).sum()
    with net.hidden.block.batch():
        net.hidden.keep([1, 2])
        net.hidden.resize(5)
    with pytest.raises(GenerationError, match="Run the forward again"):
        loss.backward()


def test_keep_of_everything_does_nothing():
    net = Net()
    before = everything(net)
    net.hidden.keep([3, 1, 0, 2])
    assert_same(before, everything(net))


def test_a_tied_weight_moves_once():
    net = Net()
    twin = ee.ElasticLinear(3, 4, out_dim=net.hidden, dtype=torch.float64)
    twin.weight = net.first.weight
    twin.bind_control()
    rows = net.first.weight.clone()
    net.hidden.keep([1, 2])
    assert torch.equal(net.first.weight, rows[[1, 2, 0, 3, 4, 5, 6, 7, 8]])
    net.hidden.grow(4, init="split")
    assert {tuple(row.tolist()) for row in net.first.weight[:4]} == {tuple(row.tolist()) for row in rows[[1, 2]]}


@pytest.mark.parametrize(
    ("indices", "match"),
    [
        pytest.param([], r"keep: expected distinct indices of active units, from 0 to 3, got none\. To switch .* ElasticBlock", id="none"),
        pytest.param(torch.tensor([], dtype=torch.long), r"got none", id="no element"),
        pytest.param([1, 4], r"got 4\. Wake sleeping units with resize", id="asleep"),
        pytest.param([-1, 0], r"got -1\.", id="negative"),
        pytest.param(list(range(20)), r"got 4, 5, 6, 7, 8 and 11 more\.", id="many asleep"),
        pytest.param([1, 2, 1], r"got 1 more than once\. Name each unit once", id="repeated"),
        pytest.param([True, False, True, False], r"got a mask\. Pass its indices: mask\.nonzero\(\)\.flatten\(\)", id="list of bools"),
        pytest.param(torch.tensor([True, False, True, False]), r"got a mask.*nonzero", id="bool tensor"),
        pytest.param(np.array([True, False, True, False]), r"got a mask.*nonzero", id="numpy bools"),
        pytest.param([np.bool_(True)], r"got a mask.*nonzero", id="numpy bool"),
        pytest.param([0, 1.0], r"index: expected an integer, got 1\.0 of type float", id="float"),
        pytest.param(torch.tensor([0.0, 1.0]), r"index: expected an integer, got 0\.0 of type float", id="float tensor"),
        pytest.param([torch.tensor(1)], r"index: expected an integer, got tensor\(1\)", id="list of tensors"),
        pytest.param("02", r"index: expected an integer, got '0' of type str", id="string"),
        pytest.param(2, r"got 2 of type int\. To keep the first n units, call resize\(n\)", id="a number"),
        pytest.param(torch.tensor(2), r"got a tensor of shape \(\)\. Pass a vector", id="scalar tensor"),
        pytest.param(torch.tensor([[0, 1]]), r"got a tensor of shape \(1, 2\)\. Pass a vector", id="matrix"),
    ],
)
def test_keep_refuses_indices(indices, match):
    net = Net()
    refused(net, lambda: net.hidden.keep(indices), ee.CapacityError, match)


def test_keep_refuses_a_number_of_units_that_is_no_width():
    dim = ee.ElasticDim(8, 12, minimum=4, multiple_of=4, name="heads")
    layer = ee.ElasticLinear(3, 8, out_dim=dim)
    refused(layer, lambda: dim.keep([0, 1, 2, 3, 4]), ee.CapacityError, r"'heads': cannot activate 5 units: expected a multiple of 4")
    dim.keep([7, 6, 5, 0])
    assert dim.active == 4
