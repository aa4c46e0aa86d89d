"""Growth keeps the function, pruning keeps the chosen units, and both leave nothing behind that a later wake would trip over."""

import copy
import threading
from typing import ClassVar

import numpy as np
import pytest
import torch
from torch import nn

import esper_elastic as ee
from esper_elastic import followers
from esper_elastic.errors import GenerationError, OptimizerError, OwnerError

# What the tests share


class Net(nn.Module):
    """3 -> hidden (4 of 9) -> middle (5 of 8) -> 2, in float64."""

    def __init__(self):
        super().__init__()
        self.first = ee.ElasticLinear(3, 4, max_out_features=9, dtype=torch.float64)
        self.second = ee.ElasticLinear(4, 5, in_dim=self.first.out_dim, max_out_features=8, dtype=torch.float64)
        self.third = ee.ElasticLinear(5, 2, in_dim=self.second.out_dim, dtype=torch.float64)
        self.hidden, self.middle = self.first.out_dim, self.second.out_dim

    def forward(self, input):
        return self.third(self.second(self.first(input).relu()).relu())


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@torch.no_grad()
def integral(*layers):
    """Make all weights small integers, so that float64 computes without rounding and functions can be compared for equality."""
    for layer in layers:
        for parameter in layer.parameters():
            parameter.copy_(torch.randint(-4, 5, parameter.shape))
    return layers[0]


@torch.no_grad()
def poison(*layers):
    """Fill all dormant memory with NaN."""
    for layer in layers:
        for name, axes in layer.tensor_axes().items():
            tensor = getattr(layer, name)
            if tensor is not None:
                mask = active_mask(tensor, axes)
                tensor[~mask] = torch.nan


def active_mask(tensor, axes):
    mask = torch.ones(tensor.shape, dtype=torch.bool)
    for index, axis in enumerate(axes):
        here = torch.zeros(tensor.shape[index], dtype=torch.bool)
        for start, length in [(0, tensor.shape[index])] if axis is None else axis.runs():
            here[start : start + length] = True
        mask &= here.view([-1 if i == index else 1 for i in range(tensor.dim())])
    return mask


def batch(*shape):
    return torch.randint(-3, 4, shape).double()


def everything(module):
    """All that a refusal must leave as it was."""
    generation = {id(dim.block): dim.block.generation for dim in dims_of(module)}
    state = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    grads = {name: None if p.grad is None else p.grad.clone() for name, p in module.named_parameters()}
    versions = [p._version for p in module.parameters()]
    return generation, [dim.active for dim in dims_of(module)], state, grads, versions, torch.get_rng_state()


def dims_of(module):
    return [dim for layer in module.modules() if hasattr(layer, "_widths") for axis in layer._widths.axes for dim in axis.dims]


def assert_same(before, after):
    torch.testing.assert_close(after, before, rtol=0, atol=0, equal_nan=True)


# Growth with zero columns


@pytest.mark.parametrize("layout", ["compact", "static"])
@pytest.mark.parametrize("n", [5, 8, 9])
def test_zero_growth_keeps_the_function_exactly(n, layout):
    net = Net()
    integral(net.first, net.second, net.third)
    poison(net.first, net.second, net.third)
    for layer in (net.first, net.second, net.third):
        layer.layout = layout
    input = batch(7, 3)
    before = net(input)
    net.hidden.grow(n)
    net.middle.grow(7)
    assert (net.hidden.active, net.middle.active) == (n, 7)
    assert torch.equal(net(input), before)


def test_zero_growth_initialises_the_full_capacity_of_crossing_axes():
    net = Net()
    poison(net.first, net.second, net.third)
    net.hidden.grow(6)
    assert net.first.weight[4:6].isfinite().all()
    assert net.first.bias[4:6].isfinite().all()
    assert torch.equal(net.second.weight[:, 4:6], torch.zeros(8, 2, dtype=torch.float64))
    assert net.second.weight[5:, :4].isnan().all()  # asleep on both sides of the commit
    assert net.first.weight[6:].isnan().all()
    net.middle.grow(8)
    assert net.second.weight[5:8, :].isfinite().all()
    assert net.second.weight[5:8, 6:].ne(0).all()  # where the other dim sleeps too
    assert torch.equal(net.third.weight[:, 5:8], torch.zeros(2, 3, dtype=torch.float64))
    net.hidden.resize(9)
    assert net.second.weight[:5, 6:].isnan().all()
    assert net.second.weight[5:].isfinite().all()


def test_newborn_producers_are_drawn_from_the_law_of_the_layer():
    wide = ee.ElasticLinear(16, 1, max_out_features=4001)
    with torch.no_grad():
        wide.weight.fill_(torch.nan)
    wide.out_dim.grow(4001)
    newborn = wide.weight[1:].detach()
    assert newborn.abs().max() <= 0.25
    assert newborn.abs().max() > 0.2499
    assert abs(newborn.std().item() - 0.25 / 3**0.5) < 0.002


@pytest.mark.parametrize("init", ["zero", "split"])
def test_growth_repeats_with_the_seed(init):
    net = Net()
    twin, other = copy.deepcopy(net), copy.deepcopy(net)
    for which, seed in ((net, 1), (twin, 1), (other, 2)):
        torch.manual_seed(seed)
        which.hidden.grow(9, init=init)
    assert torch.equal(net.first.weight, twin.first.weight)
    assert torch.equal(net.second.weight, twin.second.weight)
    assert not torch.equal(net.first.weight, other.first.weight)


@pytest.mark.parametrize("init", ["zero", "split"])
def test_growth_to_the_present_width_does_nothing(init):
    net = Net()
    before = everything(net)
    net.hidden.grow(4, init=init)
    assert_same(before, everything(net))


def test_growth_replaces_no_parameter():
    net = Net()
    before = [(id(p), p.data_ptr(), p.shape) for p in net.parameters()]
    net.hidden.grow(7)
    net.hidden.grow(9, init="split")
    net.hidden.keep([8, 0, 3])
    assert [(id(p), p.data_ptr(), p.shape) for p in net.parameters()] == before


def test_growth_clears_the_gradient_of_newborn_units_alone():
    net = Net()
    for parameter in net.parameters():
        parameter.grad = torch.ones_like(parameter)
    net.hidden.grow(6)
    assert net.first.weight.grad[4:6].eq(0).all()
    assert net.first.bias.grad[4:6].eq(0).all()
    assert net.second.weight.grad[:, 4:6].eq(0).all()
    assert net.first.weight.grad[:4].eq(1).all()
    assert net.first.weight.grad[6:].eq(1).all()
    assert net.second.weight.grad[:, [0, 1, 2, 3, 6, 7, 8]].eq(1).all()
    assert net.third.weight.grad.eq(1).all()


def test_a_dim_that_nothing_consumes_widens_the_output():
    layer = integral(ee.ElasticLinear(3, 2, max_out_features=5, dtype=torch.float64))
    poison(layer)
    input = batch(4, 3)
    before = layer(input)
    layer.out_dim.grow(4)
    after = layer(input)
    assert after.shape == (4, 4)
    assert torch.equal(after[:, :2], before)
    assert after.isfinite().all()


@pytest.mark.parametrize("init", ["zero", "split"])
def test_a_weight_with_the_dim_on_both_axes_keeps_its_function(init):
    first = ee.ElasticLinear(3, 4, max_out_features=7, dtype=torch.float64)
    loop = ee.ElasticLinear(4, 4, in_dim=first.out_dim, out_dim=first.out_dim, dtype=torch.float64)
    last = ee.ElasticLinear(4, 2, in_dim=first.out_dim, dtype=torch.float64)
    integral(first, loop, last)
    poison(first, loop, last)

    def run(input):
        hidden = first(input)
        for _ in range(3):
            hidden = loop(hidden).relu() + hidden
        return last(hidden)

    input = batch(5, 3)
    before = run(input)
    first.out_dim.grow(6, init=init)
    if init == "zero":
        assert torch.equal(run(input), before)
        assert loop.weight[:, 4:6].eq(0).all()
        assert loop.weight[4:6, :4].ne(0).all()
    else:
        torch.testing.assert_close(run(input), before, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("init", ["zero", "split"])
@pytest.mark.parametrize("shape", ["flatten", "beside others", "twice", "twice apart"])
def test_growth_reaches_every_segment_of_a_derived_axis(shape, init):
    first = ee.ElasticLinear(3, 4, max_out_features=7, dtype=torch.float64)
    other = ee.ElasticLinear(3, 2, max_out_features=3, dtype=torch.float64)
    d, e = first.out_dim, other.out_dim
    axis, join = {
        "flatten": (d * 3, lambda f, o: f.repeat_interleave(3, -1)),
        "beside others": (ee.concat(e, d, e * 2), lambda f, o: torch.cat([o, f, o.repeat_interleave(2, -1)], -1)),
        "twice": (ee.concat(d, d), lambda f, o: torch.cat([f, f], -1)),
        "twice apart": (ee.concat(d, e, d), lambda f, o: torch.cat([f, o, f], -1)),
    }[shape]
    last = ee.ElasticLinear(axis.active, 2, in_dim=axis, dtype=torch.float64)
    integral(first, other, last)
    poison(first, other, last)
    input = batch(5, 3)

    def run():
        return last(join(first(input), other(input)))

    before = run()
    d.grow(6, init=init)
    e.grow(3, init=init)
    torch.testing.assert_close(run(), before, rtol=0 if init == "zero" else 1e-13, atol=0 if init == "zero" else 1e-13)


@pytest.mark.parametrize("init", ["zero", "split"])
def test_producers_and_consumers_that_share_a_dim_grow_together(init):
    """A residual sum: two producers and two consumers of one dim."""
    stem = ee.ElasticLinear(3, 4, max_out_features=9, dtype=torch.float64)
    inner = ee.ElasticLinear(4, 5, in_dim=stem.out_dim, max_out_features=6, dtype=torch.float64)
    outer = ee.ElasticLinear(5, 4, in_dim=inner.out_dim, out_dim=stem.out_dim, dtype=torch.float64)
    head = ee.ElasticLinear(4, 2, in_dim=stem.out_dim, dtype=torch.float64)
    integral(stem, inner, outer, head)
    poison(stem, inner, outer, head)
    input = batch(5, 3)

    def run():
        stream = stem(input)
        return head(stream + outer(inner(stream).relu()))

    before = run()
    stem.out_dim.grow(9, init=init)
    inner.out_dim.grow(6, init=init)
    torch.testing.assert_close(run(), before, rtol=0 if init == "zero" else 1e-13, atol=0 if init == "zero" else 1e-13)
    stem.out_dim.keep([8, 1, 4])
    assert run().isfinite().all()


# Growth by splitting


@pytest.mark.parametrize("n", [5, 9, 14])
def test_split_copies_producers_and_divides_consumers(n):
    first = ee.ElasticLinear(3, 4, max_out_features=14, dtype=torch.float64)
    last = ee.ElasticLinear(4, 6, in_dim=first.out_dim, dtype=torch.float64)
    rows, columns = first.active("weight").detach().clone(), last.active("weight").detach().clone()
    input = torch.randn(5, 3, dtype=torch.float64)
    before = last(first(input).relu())
    first.out_dim.grow(n, init="split")
    torch.testing.assert_close(last(first(input).relu()), before, rtol=1e-13, atol=1e-13)
    parents = [next(p for p in range(4) if torch.equal(row, rows[p])) for row in first.active("weight")]
    assert parents[:4] == [0, 1, 2, 3]
    counts = [parents.count(p) for p in range(4)]
    assert max(counts) - min(counts) <= 1
    for parent, count in enumerate(counts):
        family = last.active("weight")[:, [i for i, p in enumerate(parents) if p == parent]]
        torch.testing.assert_close(family.sum(1), columns[:, parent])
        shares = family / columns[:, parent : parent + 1]
        assert count == 1 or ((shares > 0.5 / (0.5 + 1.5 * (count - 1)) - 1e-12).all() and shares.unique().numel() == shares.numel())


def test_split_copies_what_sleeps_beside_the_parent():
    net = Net()
    sleeping = net.second.weight[:, 4:].clone()
    net.middle.grow(8, init="split")
    parents = [next(p for p in range(5) if torch.equal(row, net.second.weight[p, :4])) for row in net.second.weight[5:8, :4]]
    assert torch.equal(net.second.weight[5:8, 4:], sleeping[parents])
    before = sleeping[:5].clone()
    net.hidden.resize(9)
    assert torch.equal(net.second.weight[:5, 4:], before)


@pytest.mark.parametrize("make", [lambda p: torch.optim.SGD(p, lr=0.1), lambda p: torch.optim.Adam(p, lr=0.01)], ids=["SGD", "Adam"])
def test_split_breaks_symmetry(make):
    first = ee.ElasticLinear(3, 4, max_out_features=8, dtype=torch.float64)
    last = ee.ElasticLinear(4, 6, in_dim=first.out_dim, dtype=torch.float64)
    first.out_dim.grow(8, init="split")
    optimizer = make([*first.parameters(), *last.parameters()])
    input, target = torch.randn(32, 3, dtype=torch.float64), torch.randn(32, 6, dtype=torch.float64)
    for _ in range(5):
        optimizer.zero_grad()
        (last(first(input).tanh()) - target).square().mean().backward()
        optimizer.step()
    distances = torch.pdist(first.weight.detach())
    assert distances.min() > 1e-4


# Refusals


def refused(net, change, error, match):
    before = everything(net)
    with pytest.raises(error, match=match):
        change()
    assert_same(before, everything(net))


@pytest.mark.parametrize("init", ["zero", "split"])
@pytest.mark.parametrize(
    ("n", "match"),
    [
        pytest.param(3, r"ElasticDim: grow: cannot grow to 3 units: 4 are active\. Use resize to put .* or keep to choose", id="narrower"),
        pytest.param(10, r"cannot activate 10 units: capacity is 9", id="beyond capacity"),
        pytest.param(0, r"minimum is 1", id="zero"),
        pytest.param(True, r"expected an integer, got True", id="bool"),
        pytest.param(6.0, r"expected an integer, got 6\.0 of type float", id="float"),
    ],
)
def test_growth_refuses_widths(n, match, init):
    net = Net()
    refused(net, lambda: net.hidden.grow(n, init=init), ee.CapacityError, match)


def test_growth_refuses_an_unknown_init():
    net = Net()
    refused(net, lambda: net.hidden.grow(6, init="random"), ee.CapacityError, r"grow: init: expected 'zero' or 'split', got 'random'")


def test_growth_refuses_a_layer_that_mixes_units_unless_told():
    class Mixing(ee.ElasticLinear):
        mixes_units = True

    net = Net()
    net.norm = Mixing(4, 4, in_dim=net.hidden, out_dim=net.hidden, dtype=torch.float64)
    refused(net, lambda: net.hidden.grow(6), ee.CapacityError, r"grow: \w+ runs over the dim and mixes all its units.*Pass exact=False")
    net.hidden.grow(6, exact=False)
    assert net.hidden.active == 6
    net.hidden.keep([1, 5])


def test_growth_and_pruning_refuse_a_parametrized_weight():
    net = Net()
    nn.utils.parametrizations.weight_norm(net.second)
    for change in (lambda: net.hidden.grow(6), lambda: net.hidden.keep([0, 1])):
        refused(net, change, ee.CapacityError, r"weight: expected a parameter or buffer, got a tensor that is computed.*remove_parametr")


def test_growth_refuses_a_sparse_gradient():
    net = Net()
    net.first.weight.grad = torch.zeros(9, 3, dtype=torch.float64).to_sparse()
    for change in (lambda: net.hidden.grow(6), lambda: net.hidden.keep([0, 1])):
        with pytest.raises(
            ee.CapacityError, match=r"gradient of ElasticLinear\.weight: expected a dense one, got torch\.sparse_coo.*zero_grad"
        ):
            change()
    assert net.hidden.active == 4


@pytest.mark.filterwarnings("ignore:SGD steps elastic parameters")
def test_growth_and_pruning_refuse_while_an_unguarded_optimizer_holds_state():
    net = Net()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    net.hidden.grow(5)  # no state yet
    net(batch(4, 3)).sum().backward()
    optimizer.step()
    for change in (lambda: net.hidden.grow(6), lambda: net.hidden.keep([0, 1])):
        refused(net, change, OptimizerError, r"(grow|keep): SGD holds state for ElasticLinear\.\w+ and does not know.*ee\.optim\.guard")
    net.hidden.resize(6)


def test_a_change_from_another_thread_is_refused():
    net = Net()
    before, errors = everything(net), []

    def change(verb, *args):
        try:
            verb(*args)
        except OwnerError as error:
            errors.append(error)

    for verb, args in ((net.hidden.grow, (6,)), (net.hidden.keep, ([0, 1],))):
        thread = threading.Thread(target=change, args=(verb, *args))
        thread.start()
        thread.join()
    assert len(errors) == 2
    assert_same(before, everything(net))


# Pruning


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


@pytest.mark.parametrize("shape", ["flatten", "beside others", "twice", "twice apart"])
def test_keep_reaches_every_segment_of_a_derived_axis(shape):
    first = ee.ElasticLinear(3, 4, max_out_features=7, dtype=torch.float64)
    other = ee.ElasticLinear(3, 2, max_out_features=3, dtype=torch.float64)
    d, e = first.out_dim, other.out_dim
    axis, join = {
        "flatten": (d * 3, lambda f, o: f.repeat_interleave(3, -1)),
        "beside others": (ee.concat(e, d, e * 2), lambda f, o: torch.cat([o, f, o.repeat_interleave(2, -1)], -1)),
        "twice": (ee.concat(d, d), lambda f, o: torch.cat([f, f], -1)),
        "twice apart": (ee.concat(d, e, d), lambda f, o: torch.cat([f, o, f], -1)),
    }[shape]
    last = ee.ElasticLinear(axis.active, 2, in_dim=axis, dtype=torch.float64)
    integral(first, other, last)
    poison(first, other, last)
    input = batch(5, 3)
    full = last(join(first(input), other(input)))
    dropped = first(input).clone()
    dropped[:, [1, 2]] = 0
    expected = last(join(dropped, other(input)))
    d.keep([3, 0])
    assert torch.equal(last(join(first(input), other(input))), expected)
    d.resize(4)
    assert torch.equal(last(join(first(input), other(input))), full)


def test_keep_moves_gradients_with_their_units():
    net = Net()
    net(batch(6, 3)).sum().backward()
    rows, columns = net.first.weight.grad.clone(), net.second.weight.grad.clone()
    net.hidden.keep([2, 3])
    order = [2, 3, 0, 1, 4, 5, 6, 7, 8]
    assert torch.equal(net.first.weight.grad, rows[order])
    assert torch.equal(net.second.weight.grad, columns[:, order])


@pytest.mark.parametrize("change", [lambda dim: dim.keep([0, 2]), lambda dim: dim.grow(6), lambda dim: dim.grow(6, init="split")])
def test_a_graph_from_before_refuses_its_backward(change):
    net = Net()
    loss = net(batch(6, 3)).sum()
    change(net.hidden)
    with pytest.raises(GenerationError, match="Run the forward again"):
        loss.backward()


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


def test_a_tied_consumer_is_divided_once():
    first = ee.ElasticLinear(3, 4, max_out_features=6, dtype=torch.float64)
    one = ee.ElasticLinear(4, 2, in_dim=first.out_dim, dtype=torch.float64)
    two = ee.ElasticLinear(4, 2, in_dim=first.out_dim, dtype=torch.float64)
    two.weight = one.weight
    input = torch.randn(5, 3, dtype=torch.float64)
    before = one(first(input)) * two(first(input).relu())
    first.out_dim.grow(6, init="split")
    torch.testing.assert_close(one(first(input)) * two(first(input).relu()), before, rtol=1e-12, atol=1e-12)


def test_a_weight_that_produces_and_consumes_the_same_units_is_not_split():
    first = ee.ElasticLinear(6, 4, max_out_features=6, dtype=torch.float64)
    square = ee.ElasticLinear(4, 6, in_dim=first.out_dim, dtype=torch.float64)

    class Turned(ee.ElasticLinear):
        newborn: ClassVar = {"weight": ("zero", "draw"), "bias": ("draw",)}

    turned = Turned(6, 4, out_dim=first.out_dim, bias=False, dtype=torch.float64)
    turned.weight = first.weight
    with pytest.raises(ee.CapacityError, match=r"weight is tied: .* Use init='zero', or pass exact=False"):
        first.out_dim.grow(5, init="split")
    first.out_dim.grow(5)
    assert first.weight[4].eq(0).all()  # where both meet, the function counts
    assert square.weight[:, 4].eq(0).all()
    first.out_dim.grow(6, init="split", exact=False)


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


# Batches


def test_a_batch_moves_units_at_its_end_in_one_commit():
    net = Net()
    integral(net.first, net.second, net.third)
    input = batch(6, 3)
    expected = net(input)
    rows = net.first.weight.clone()
    generation = net.hidden.block.generation
    with net.hidden.block.batch():
        net.hidden.grow(7)
        net.middle.grow(8)
        assert net.hidden.active == 4
        assert torch.equal(net.first.weight, rows)
        net.hidden.keep([0, 6, 1, 2, 3])  # counted among the seven that are staged
    assert net.hidden.block.generation == generation + 1
    assert (net.hidden.active, net.middle.active) == (5, 8)
    assert torch.equal(net.first.weight[:4], rows[:4])
    assert torch.equal(net(input), expected)


def test_a_batch_that_raises_changes_nothing():
    net = Net()
    before = everything(net)

    def change():
        with net.hidden.block.batch():
            net.middle.keep([0, 4])
            net.hidden.grow(6, init="split")
            net.hidden.grow(5)

    with pytest.raises(ee.CapacityError, match="6 are active"):
        change()
    assert_same(before, everything(net))


@pytest.mark.parametrize("hidden_first", [True, False], ids=["hidden first", "middle first"])
@pytest.mark.parametrize("init", ["zero", "split"])
def test_two_dims_that_cross_grow_in_one_batch_in_any_order(init, hidden_first):
    net = Net()
    integral(net.first, net.second, net.third)
    poison(net.first, net.second, net.third)
    input = batch(6, 3)
    before = net(input)
    with net.hidden.block.batch():
        for dim in (net.hidden, net.middle) if hidden_first else (net.middle, net.hidden):
            dim.grow(8, init=init)
    tolerance = 0 if init == "zero" else 1e-13
    torch.testing.assert_close(net(input), before, rtol=tolerance, atol=tolerance)


# Convolutions


class Images(nn.Module):
    """Two convolutions, a depthwise one between them, flattened into a linear layer; float64."""

    def __init__(self):
        super().__init__()
        self.first = ee.ElasticConv2d(2, 4, 3, padding=1, max_out_channels=9, dtype=torch.float64)
        self.depthwise = ee.ElasticConv2d(4, 4, 3, padding=1, groups=4, in_dim=self.first.out_dim, dtype=torch.float64)
        self.second = ee.ElasticConv2d(4, 3, 3, in_dim=self.first.out_dim, max_out_channels=6, dtype=torch.float64)
        self.head = ee.ElasticLinear(12, 5, in_dim=self.second.out_dim * 4, dtype=torch.float64)
        self.hidden, self.last = self.first.out_dim, self.second.out_dim

    def forward(self, input):
        return self.head(self.second(self.depthwise(self.first(input)).relu()).relu().flatten(1))


@pytest.mark.parametrize("layout", ["compact", "static"])
@pytest.mark.parametrize("init", ["zero", "split"])
def test_convolutions_keep_their_function(init, layout):
    net = integral(Images())
    poison(*net.children())
    for layer in net.children():
        layer.layout = layout
    input = batch(3, 2, 4, 4)
    before = net(input)
    net.hidden.grow(7, init=init)
    net.last.grow(6, init=init)
    tolerance = 0 if init == "zero" else 1e-12
    torch.testing.assert_close(net(input), before, rtol=tolerance, atol=tolerance)
    if init == "zero":
        for layer in (net.first, net.depthwise):
            assert layer.weight[4:7].isfinite().all()
        assert net.second.weight[:3, 4:7].eq(0).all()
        assert net.head.weight[:, 12:].eq(0).all()


def test_convolutions_keep_the_chosen_channels():
    net = integral(Images())
    poison(*net.children())
    input = batch(3, 2, 4, 4)
    full = net(input)
    twin = copy.deepcopy(net)
    with torch.no_grad():
        for channel in (0, 2):
            twin.second.weight[:, channel] = 0
        twin.head.weight[:, 4:8] = 0  # channel 1 of the flattened ones
    expected = twin(input)
    net.hidden.keep([3, 1])
    net.last.keep([0, 2])
    assert torch.equal(net(input), expected)
    net.hidden.resize(4)
    net.last.resize(3)
    assert torch.equal(net(input), full)


class Grouped(nn.Module):
    """A grouped convolution over a dim that counts channels, two of which are a group."""

    def __init__(self):
        super().__init__()
        dim = ee.ElasticDim(6, 12, multiple_of=2, name="channels")
        self.first = ee.ElasticConv2d(2, 6, 1, out_dim=dim, dtype=torch.float64)
        self.grouped = ee.ElasticConv2d(6, 6, 1, groups=3, in_dim=dim, dtype=torch.float64)
        self.last = ee.ElasticConv2d(6, 4, 1, in_dim=dim, dtype=torch.float64)
        self.dim = dim

    def forward(self, input):
        return self.last(self.grouped(self.first(input)).relu())


@pytest.mark.parametrize("init", ["zero", "split"])
def test_groups_are_born_whole(init):
    net = integral(Grouped())
    poison(*net.children())
    input = batch(3, 2, 4, 4)
    before = net(input)
    net.dim.grow(10, init=init)
    tolerance = 0 if init == "zero" else 1e-12
    torch.testing.assert_close(net(input), before, rtol=tolerance, atol=tolerance)


def test_groups_are_pruned_whole():
    net = integral(Grouped())
    input = batch(3, 2, 4, 4)
    refused(
        net,
        lambda: net.dim.keep([0, 1, 2, 5]),
        ee.CapacityError,
        r"'channels': keep: ElasticConv2d computes the units in groups of 2: expected all or none of units 2 to 3, got 2 alone",
    )
    twin = copy.deepcopy(net)
    with torch.no_grad():
        twin.last.weight[:, 2:4] = 0
    net.dim.keep([0, 1, 4, 5])
    assert torch.equal(net(input), twin(input))


def test_a_dim_of_groups_moves_all_channels_of_a_group():
    grouped = ee.ElasticConv2d(6, 9, 1, groups=3, max_in_channels=12, dtype=torch.float64)
    first = ee.ElasticConv2d(2, 6, 1, out_dim=grouped.in_dim, dtype=torch.float64)
    last = ee.ElasticConv2d(9, 4, 1, in_dim=grouped.out_dim, dtype=torch.float64)
    integral(first, grouped, last)
    poison(first, grouped, last)
    (groups,) = grouped.in_dim.dims
    input = batch(3, 2, 4, 4)
    before = last(grouped(first(input)).relu())
    groups.grow(4)
    assert torch.equal(last(grouped(first(input)).relu()), before)
    groups.grow(6, init="split")
    torch.testing.assert_close(last(grouped(first(input)).relu()), before, rtol=1e-12, atol=1e-12)
    groups.keep([0, 2])
    assert grouped.weight.shape == (18, 2, 1, 1)
    assert last(grouped(first(input)).relu()).isfinite().all()


# Optimizers


class FollowingSGD(torch.optim.SGD):
    """Momentum that follows its units, by the plainest means."""

    def __init__(self, params):
        super().__init__(params, lr=0.1, momentum=0.9)
        followers.follow(self)

    def permute_state(self, param, axis, order):
        assert order.tolist() != list(range(param.shape[axis]))
        assert sorted(order.tolist()) == list(range(param.shape[axis]))
        momentum = self.state[param]["momentum_buffer"]
        momentum.copy_(momentum.index_select(axis, order))

    def reset_state(self, param, axis, start, stop):
        self.state[param]["momentum_buffer"].narrow(axis, start, stop - start).zero_()


@pytest.mark.parametrize("verb", ["keep", "zero", "split"])
def test_optimizer_state_follows_its_units(verb):
    """The state is that of a twin whose momentum is the weights themselves, whatever moves."""
    first = ee.ElasticLinear(3, 4, max_out_features=7, max_in_features=4)
    d, e = first.out_dim, ee.ElasticDim(2, 3)
    axis = ee.concat(d * 2, e, d, d)
    last = ee.ElasticLinear(axis.active, 2, in_dim=axis, max_out_features=3)
    optimizer = FollowingSGD([*first.parameters(), *last.parameters()])
    for parameter in (first.weight, first.bias, last.weight):
        optimizer.state[parameter]["momentum_buffer"] = parameter.detach().clone()
    if verb == "keep":
        d.keep([3, 1])
        for parameter in (first.weight, first.bias, last.weight):
            assert torch.equal(optimizer.state[parameter]["momentum_buffer"], parameter)
    else:
        before = {p: optimizer.state[p]["momentum_buffer"].clone() for p in (first.weight, first.bias, last.weight)}
        d.grow(6, init=verb)
        columns = torch.tensor([8, 9, 10, 11, 21, 22, 28, 29])  # 4 and 5 of: d * 2 at 0, d at 17, d at 24
        for parameter, index in ((first.weight, 0), (first.bias, 0), (last.weight, 1)):
            newborn = torch.tensor([4, 5]) if parameter is not last.weight else columns
            expected = before[parameter].index_fill(index, newborn, 0)
            assert torch.equal(optimizer.state[parameter]["momentum_buffer"], expected)


def test_a_follower_without_state_is_left_alone():
    net = Net()
    optimizer = FollowingSGD(net.parameters())
    net.hidden.grow(6)
    net.hidden.keep([0, 5])
    assert not optimizer.state


def train(net, optimizer, steps):
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        input = torch.randn(16, 3, dtype=torch.float64, generator=generator)
        optimizer.zero_grad()
        (net(input) - input[:, :2].sin()).square().mean().backward()
        optimizer.step()


@torch.no_grad()
def middle_permuted(net, order):
    """A copy of a ``Net`` whose middle units stand in another order, by plain indexing."""
    twin = copy.deepcopy(net)
    twin.second.weight.copy_(net.second.weight[order])
    twin.second.bias.copy_(net.second.bias[order])
    twin.third.weight.copy_(net.third.weight[:, order])
    return twin


OPTIMIZERS = {
    "AdamW": lambda params: ee.optim.AdamW(params, lr=1e-3),
    "SGD": lambda params: ee.optim.SGD(params, lr=1e-2, momentum=0.9, weight_decay=1e-2),
}


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS.keys())
def test_one_dim_sleeps_while_the_other_is_pruned_and_grown(make):
    """Against a twin whose middle units were in the right order from the start, so that it needs no keep."""
    net = Net()
    twin = middle_permuted(net, [1, 3, 4, 0, 2, 5, 6, 7])
    for which, prune in ((net, lambda dim: dim.keep([4, 1, 3])), (twin, lambda dim: dim.resize(3))):
        optimizer = make(which.parameters())
        train(which, optimizer, 100)
        which.hidden.resize(2)
        train(which, optimizer, 50)
        prune(which.middle)
        train(which, optimizer, 50)
        which.middle.resize(5)  # the pruned units wake with their state, whatever the twin calls them
        train(which, optimizer, 50)
        torch.manual_seed(2)
        which.middle.grow(8)
        train(which, optimizer, 700)
        which.hidden.resize(4)
        train(which, optimizer, 50)
        which.hidden.grow(9)
        train(which, optimizer, 50)
    for one, other in zip(net.parameters(), twin.parameters(), strict=True):
        assert one.isfinite().all()
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-9)


def test_the_first_step_of_a_newborn_corner_is_the_learning_rate():
    net = Net()
    net.hidden.resize(4)
    optimizer = ee.optim.AdamW(net.parameters(), lr=1e-3, weight_decay=0, eps=1e-12)
    train(net, optimizer, 200)
    net.hidden.resize(2)
    net.middle.grow(8)
    train(net, optimizer, 100)
    net.hidden.resize(4)
    corner = (slice(5, 8), slice(2, 4))
    before = net.second.weight[corner].detach().clone()
    assert before.isfinite().all()
    train(net, optimizer, 1)
    moved = (net.second.weight[corner] - before).abs()[net.second.weight.grad[corner] != 0]
    assert moved.numel() > 0
    torch.testing.assert_close(moved, torch.full_like(moved, 1e-3), rtol=1e-6, atol=0)
    assert (optimizer.step_counts(net.second.weight)[corner] == 1).all()
    assert (optimizer.step_counts(net.second.weight)[:5, :2] == 301).all()
