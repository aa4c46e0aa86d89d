"""Growth keeps the function, initialises all that a later wake may find, and refuses what it cannot do."""

import copy
import threading
from typing import ClassVar

import pytest
import torch
from growing import DERIVED, Derived, Net, assert_same, batch, everything, integral, poison, refused
from torch import nn

import esper_elastic as ee
from esper_elastic.errors import GenerationError, OptimizerError, OwnerError


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


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
@pytest.mark.parametrize("shape", DERIVED)
def test_growth_reaches_every_segment_of_a_derived_axis(shape, init):
    net = integral(Derived(shape))
    poison(*net.children())
    input = batch(5, 3)
    before = net(input)
    net.one.out_dim.grow(6, init=init)
    net.other.out_dim.grow(3, init=init)
    torch.testing.assert_close(net(input), before, rtol=0 if init == "zero" else 1e-13, atol=0 if init == "zero" else 1e-13)


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
    refused(
        net, lambda: net.hidden.grow(6, init="random"), ee.CapacityError, r"grow: init: expected 'zero', 'split' or 'gradmax', got 'random'"
    )


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


@pytest.mark.parametrize("change", [lambda dim: dim.keep([0, 2]), lambda dim: dim.grow(6), lambda dim: dim.grow(6, init="split")])
def test_a_graph_from_before_refuses_its_backward(change):
    net = Net()
    loss = net(batch(6, 3)).sum()
    change(net.hidden)
    with pytest.raises(GenerationError, match="Run the forward again"):
        loss.backward()


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
