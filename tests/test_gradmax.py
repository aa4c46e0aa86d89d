"""GradMax: newborn units start along the left singular vectors of what was observed, keep the function, and have the largest gradient.

Two references: sums over examples, positions and taps written out, and the gradient that autograd gives newborn units of the real network.
"""

import copy
import gc
import itertools
import math
import weakref
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from growing import DERIVED, Derived, everything, poison, refused
from torch import nn
from torch.nn import functional as F

import esper_elastic as ee
from esper_elastic.growth import gradmax, observe

DOUBLE = {"dtype": torch.float64}
LAYOUTS = ["compact", "static"]


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


class Net(nn.Module):
    """Producer, what lies between, consumer; the dim has 4 of 9 units, both others sleep in part. Float64."""

    def __init__(self, kind):
        super().__init__()
        if kind == "linear":
            self.producer = ee.ElasticLinear(5, 4, max_in_features=6, max_out_features=9, **DOUBLE)
            self.dim = self.producer.out_dim
            self.consumer = ee.ElasticLinear(4, 3, in_dim=self.dim, max_out_features=5, **DOUBLE)
            self.shape, self.positions = (8, 5), ()
        else:
            self.producer = ee.ElasticConv2d(2, 4, 3, padding=1, stride=2, max_in_channels=3, max_out_channels=9, **DOUBLE)
            self.dim = self.producer.out_dim
            self.consumer = ee.ElasticConv2d(4, 3, (2, 3), padding=(0, 1), in_dim=self.dim, max_out_channels=5, **DOUBLE)
            self.shape, self.positions = (3, 2, 6, 5), (2, 3)
        self.norm = ee.ElasticBatchNorm2d(4, dim=self.dim, **DOUBLE) if "bn" in kind else None
        if self.norm is not None:
            with torch.no_grad():
                self.norm.weight.uniform_(0.5, 2)
                self.norm.bias.uniform_(-1, 1)
        poison(*self.children())

    def forward(self, x):
        x = self.producer(x)
        return self.consumer((x if self.norm is None else self.norm(x)).relu())


def static_input(layer, x):
    """``x`` as the layer takes it: in static layout at capacity."""
    axis = layer.in_dim
    if layer.layout == "compact":
        return x
    index = x.dim() - 1 if isinstance(layer, nn.Linear) else 1
    missing = list(x.shape)
    missing[index] = axis.capacity - axis.active
    return torch.cat([x, x.new_zeros(missing)], index)


class Case:
    """A net with a batch and a loss, observed once."""

    def __init__(self, kind, layout="compact", training=True):
        self.net = Net(kind).train(training)
        ee.set_layout(self.net, layout)
        self.x = torch.randn(self.net.shape, **DOUBLE)
        self.target = torch.randn(self.output().shape, **DOUBLE)
        self.net.zero_grad()
        with observe(self.net):
            self.loss().backward()

    def output(self):
        axis = self.net.consumer.out_dim
        return self.net(static_input(self.net.producer, self.x)).narrow(1, 0, axis.active)

    def loss(self):
        return (self.output() - self.target).square().sum()

    def gradient(self):
        """That of the newborn units' producer weights."""
        self.net.zero_grad()
        self.loss().backward()
        producer = self.net.producer
        return producer.weight.grad[4 : self.net.dim.active, : producer.in_dim.active]


def written_out(case, training):
    """The matrix by its definition: the consumer's output gradient at each input position and tap, times what the producer saw there."""
    net = case.net
    y = case.output().detach()
    g = 2 * (y - case.target)
    out, inputs = y.shape[1], case.x.shape[1]
    if not net.positions:
        rows = [sum(g[n, o] * case.x[n] for n in range(len(g))) for o in range(out)]
        return torch.stack(rows)
    height, width = (case.x.shape[2] - 1) // 2 + 1, (case.x.shape[3] - 1) // 2 + 1  # of the units
    rows = []
    for o, (i, j) in itertools.product(range(out), itertools.product(range(2), range(3))):
        seen = torch.zeros(len(g), height, width, **DOUBLE)
        for n, p, q in itertools.product(range(len(g)), range(y.shape[2]), range(y.shape[3])):
            if 0 <= q + j - 1 < width:
                seen[n, p + i, q + j - 1] += g[n, o, p, q]
        if net.norm is not None and training:
            seen -= seen.sum() / seen.numel()
        row = torch.zeros(inputs, 3, 3, **DOUBLE)
        for n, p, q, k, m in itertools.product(range(len(g)), range(height), range(width), range(3), range(3)):
            if 0 <= 2 * p + k - 1 < case.x.shape[2] and 0 <= 2 * q + m - 1 < case.x.shape[3]:
                row[:, k, m] += seen[n, p, q] * case.x[n, :, 2 * p + k - 1, 2 * q + m - 1]
        rows.append(row.flatten())
    return torch.stack(rows)


CASES = [("linear", True), ("conv", True), ("conv bn", True), ("conv bn", False)]
IDS = ["linear-relu-linear", "conv-relu-conv", "conv-bn-relu-conv", "conv-bn-relu-conv in eval mode"]
each_case = pytest.mark.parametrize(("kind", "training"), CASES, ids=IDS)
each_layout = pytest.mark.parametrize("layout", LAYOUTS)


@each_layout
@each_case
def test_newborn_consumers_are_the_left_singular_vectors_of_sums_written_out(kind, training, layout):
    case = Case(kind, layout, training)
    matrix = written_out(case, training)
    vectors, values, _ = torch.linalg.svd(matrix, full_matrices=False)
    consumer = case.net.consumer
    norm = torch.stack([consumer.weight[:3, unit].norm() for unit in range(4)]).mean()
    case.net.dim.grow(7, init="gradmax")
    newborn = consumer.weight[:3, 4:7].detach().transpose(0, 1).flatten(1)
    for unit in range(3):
        sign = (newborn[unit] @ vectors[:, unit]).sign()
        torch.testing.assert_close(newborn[unit], sign * norm.detach() * vectors[:, unit], rtol=1e-8, atol=1e-8)
    expected = norm.detach() * values[:3]
    torch.testing.assert_close(case.gradient().flatten(1).norm(dim=1), expected, rtol=1e-8, atol=1e-10)


@each_layout
@each_case
def test_the_function_stays_to_the_bit(kind, training, layout):
    case = Case(kind, layout, training)
    before, twin = case.output(), copy.deepcopy(case)
    case.net.dim.grow(8, init="gradmax")
    twin.net.dim.grow(8)
    assert torch.equal(case.output(), twin.output())
    torch.testing.assert_close(case.output(), before, rtol=1e-14, atol=1e-14)
    assert case.net.producer.weight[4:8].eq(0).all()  # the whole capacity of the crossing axis
    assert case.net.consumer.weight[3:, 4:8].eq(0).all()
    assert case.net.consumer.weight[3:, :4].isnan().all()
    assert case.net.producer.weight[8:].isnan().all()
    case.net.consumer.out_dim.resize(3)
    case.net.eval()
    assert case.output().isfinite().all()


@each_layout
@each_case
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("count", [1, 2])
def test_no_other_directions_of_that_norm_have_a_larger_gradient(kind, training, layout, seed, count):
    """One unit's gradient is the largest of all; several units' is the largest of all orthogonal directions."""
    case = Case(kind, layout, training)
    case.net.dim.grow(4 + count, init="gradmax")
    best = case.gradient().norm()
    torch.manual_seed(seed)
    columns = case.net.consumer.weight.detach()[:3, 4 : 4 + count]
    directions = torch.linalg.qr(torch.randn(columns[:, 0].numel(), count, **DOUBLE))[0].T * columns[:, 0].norm()
    with torch.no_grad():
        columns.copy_(directions.unflatten(1, (3, *columns.shape[2:])).transpose(0, 1))
    assert case.gradient().norm() < best


# Norm, number, precision


def test_beyond_the_rank_opposites_and_then_mixtures_are_born():
    net = nn.Sequential(ee.ElasticLinear(5, 4, max_out_features=14), nn.ReLU(), nn.LazyLinear(1))
    net[2] = ee.ElasticLinear(4, 2, in_dim=net[0].out_dim)
    with observe(net):
        net(torch.randn(8, 5)).square().sum().backward()
    x = torch.randn(8, 5)
    before = net(x)
    norm = net[2].weight[:, :4].norm(dim=0).mean()
    net[0].out_dim.grow(14, init="gradmax")
    newborn = net[2].weight[:, 4:14].detach()
    torch.testing.assert_close(newborn.norm(dim=0), norm.expand(10))
    torch.testing.assert_close(newborn[:, 2:4], -newborn[:, :2])
    assert torch.linalg.matrix_rank(newborn[:, 4:]) == 2
    torch.testing.assert_close(net(x), before)
    net.zero_grad()
    net(x).square().sum().backward()
    assert (net[0].weight.grad[4:14].norm(dim=1) > 1e-3).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_newborn_relus_learn_in_any_precision(dtype):
    net = nn.Sequential(ee.ElasticLinear(5, 4, max_out_features=6), nn.ReLU())
    net.append(ee.ElasticLinear(4, 3, in_dim=net[0].out_dim))
    net.to(dtype)
    x = torch.randn(8, 5, dtype=dtype)
    with observe(net):
        net(x).float().square().sum().backward()
    before = net(x)
    net[0].out_dim.grow(6, init="gradmax")
    torch.testing.assert_close(net(x), before)
    net.zero_grad()
    net(x).float().square().sum().backward()
    assert net[0].weight.grad[4:6].ne(0).any(1).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_newborn_relus_learn_under_autocast(dtype):
    net = nn.Sequential(ee.ElasticLinear(5, 4, max_out_features=6), nn.ReLU())
    net.append(ee.ElasticLinear(4, 3, in_dim=net[0].out_dim))
    x = torch.randn(8, 5)

    def run():
        with torch.autocast("cpu", dtype):
            return net(x)

    with observe(net):
        run().float().square().sum().backward()
    before = run()
    net[0].out_dim.grow(6, init="gradmax")
    torch.testing.assert_close(run(), before)
    net.zero_grad()
    run().float().square().sum().backward()
    assert net[0].weight.grad[4:6].ne(0).any(1).all()


@pytest.mark.parametrize(
    "make", [lambda p: ee.optim.AdamW(p, lr=1e-2), lambda p: ee.optim.SGD(p, lr=1e-2, momentum=0.9)], ids=["AdamW", "SGD"]
)
def test_newborn_units_start_without_optimizer_state_and_learn(make):
    case = Case("conv bn")
    optimizer = make(case.net.parameters())
    for _ in range(3):
        optimizer.zero_grad()
        case.loss().backward()
        optimizer.step()
    with observe(case.net):
        case.loss().backward()
    case.net.dim.grow(6, init="gradmax")
    state = {name: optimizer.state[p] for name, p in case.net.named_parameters()}
    key = "exp_avg" if "exp_avg" in state["producer.weight"] else "momentum_buffer"
    assert state["producer.weight"][key][4:6].eq(0).all()
    assert state["consumer.weight"][key][:, 4:6].eq(0).all()
    assert state["producer.weight"][key][:4, :2].ne(0).any()
    assert case.net.producer.weight.grad[4:6].eq(0).all()
    optimizer.zero_grad()
    before = case.loss()
    before.backward()
    optimizer.step()
    assert case.net.producer.weight[4:6, :2].ne(0).all()
    for _ in range(10):
        optimizer.zero_grad()
        case.loss().backward()
        optimizer.step()
    assert case.loss() < before
    assert case.net.producer.weight[:6, :2].isfinite().all()


# Which observation counts


MISSING = r"init='gradmax' needs gradients: expected an observation .* got none\. .*with ee\.growth\.observe\(model\): loss\.backward\(\)"
STALE = r"have changed since they were observed\. Observe first: with ee\.growth\.observe\(model\): loss\.backward\(\)\. .*one batch"


def test_growth_without_an_observation_is_refused():
    net = Net("linear")
    refused(net, lambda: net.dim.grow(6, init="gradmax"), ee.CapacityError, MISSING)


def test_an_observation_without_gradmax_or_without_success_gives_none():
    net = Net("linear")
    with observe(net, gradmax=False):
        net(torch.randn(8, 5, **DOUBLE)).sum().backward()
    with pytest.raises(ZeroDivisionError), observe(net):
        net(torch.randn(8, 5, **DOUBLE)).sum().backward()
        raise ZeroDivisionError
    refused(net, lambda: net.dim.grow(6, init="gradmax"), ee.CapacityError, MISSING)
    with observe(net):
        net(torch.randn(8, 5, **DOUBLE))
    refused(net, lambda: net.dim.grow(6, init="gradmax"), ee.CapacityError, MISSING)


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda net: net.dim.resize(3), id="its width"),
        pytest.param(lambda net: net.consumer.out_dim.resize(4), id="a consumer's outputs"),
        pytest.param(lambda net: net.producer.in_dim.resize(4), id="a producer's inputs"),
        pytest.param(lambda net: (net.dim.keep([1, 2, 3]), net.dim.resize(4)), id="its units"),
        pytest.param(lambda net: (net.consumer.out_dim.keep([1, 2]), net.consumer.out_dim.resize(3)), id="another dim's units"),
        pytest.param(lambda net: (net.dim.grow(5, init="gradmax"), net.dim.resize(4)), id="used"),
        pytest.param(lambda net: net.dim.grow(5), id="grown otherwise"),
        pytest.param(lambda net: (net.dim.resize(3), net.dim.grow(4)), id="born anew"),
    ],
)
def test_growth_refuses_an_observation_of_other_units(change):
    net = Case("linear").net
    change(net)
    refused(net, lambda: net.dim.grow(8, init="gradmax"), ee.CapacityError, STALE)


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda net: (net.dim.resize(3), net.dim.resize(4)), id="toggled"),
        pytest.param(lambda net: ee.optim.SGD(net.parameters(), lr=0.1).step(), id="stepped"),
        pytest.param(lambda net: net.zero_grad(), id="cleared"),
    ],
)
def test_growth_takes_an_observation_of_the_same_units(change):
    net = Case("linear").net
    change(net)
    net.dim.grow(8, init="gradmax")
    assert net.dim.active == 8


def test_the_latest_observation_counts():
    case = Case("linear")
    first = copy.deepcopy(gradmax._latest[case.net.dim].matrix())
    case.target = torch.randn_like(case.target)
    with observe(case.net):
        case.loss().backward()
    second = gradmax._latest[case.net.dim].matrix()
    assert not torch.allclose(first, second)
    torch.testing.assert_close(second, written_out(case, True))


def test_batches_and_micro_batches_add_up():
    case = Case("conv")
    whole = gradmax._latest[case.net.dim].matrix()
    with observe(case.net):
        for n in range(3):
            y = case.net(case.x[n : n + 1])
            (y - case.target[n : n + 1]).square().sum().backward()
    torch.testing.assert_close(gradmax._latest[case.net.dim].matrix(), whole)


def test_crossing_dims_grow_from_one_observation_in_a_batch():
    net = nn.Sequential(ee.ElasticLinear(3, 4, max_out_features=9), nn.ReLU())
    net.append(ee.ElasticLinear(4, 5, in_dim=net[0].out_dim, max_out_features=9)).append(nn.ReLU())
    net.append(ee.ElasticLinear(5, 3, in_dim=net[2].out_dim))
    x = torch.randn(8, 3)
    for reverse in (False, True):
        twin = copy.deepcopy(net)
        poison(twin[0], twin[2], twin[4])
        with observe(twin):
            twin(x).square().sum().backward()
        before = twin(x)
        dims = sorted(ee.dims(twin).items(), reverse=reverse)
        with ee.control_block(twin).batch():
            for name, dim in dims:
                if name != "4":
                    dim.grow(7, init="gradmax")
        torch.testing.assert_close(twin(x), before)
        twin.zero_grad()
        twin(x).square().sum().backward()
        assert twin[0].weight.grad[4:7].ne(0).any(1).all()
        assert twin[2].weight.grad[5:7, :4].ne(0).any(1).all()
        assert twin[2].weight.grad.isfinite().all()


def test_a_copy_has_to_be_observed_itself():
    case = Case("linear")
    twin = copy.deepcopy(case.net)
    refused(twin, lambda: twin.dim.grow(6, init="gradmax"), ee.CapacityError, MISSING)


def test_what_is_kept_for_growth_holds_no_model():
    case = Case("conv bn")
    net, statistics = weakref.ref(case.net.producer), len(gradmax._latest)
    del case
    gc.collect()
    assert net() is None
    assert len(gradmax._latest) < statistics


# Refusals


def make(between, **options):
    """Two linear layers with a function between them, or what ``LayerOver`` builds on their dim."""

    class Pair(nn.Module):
        def __init__(self):
            super().__init__()
            self.one = ee.ElasticLinear(5, 4, max_out_features=9, **options)
            self.dim = self.one.out_dim
            self.two = ee.ElasticLinear(4, 3, in_dim=self.dim)
            self.between = between.kind(self.dim) if isinstance(between, LayerOver) else between

        def forward(self, x):
            return self.two(self.between(self.one(x)))

    return Pair()


class LayerOver(NamedTuple):
    kind: Callable[[ee.ElasticDim], nn.Module]


@pytest.mark.parametrize(
    ("between", "options", "match"),
    [
        pytest.param(
            torch.sigmoid, {}, r"between ElasticLinear.* and ElasticLinear.*: Sigmoid lies between\. Use init='zero'", id="sigmoid"
        ),
        pytest.param(F.softplus, {}, r"Softplus lies between", id="softplus"),
        pytest.param(lambda x: x + 1, {}, r"a sum adds what no layer over the dim has produced", id="shift"),
        pytest.param(lambda x: x * x.sigmoid(), {}, r"(Mul|Sigmoid) lies between", id="gate"),
        pytest.param(lambda x: F.hardtanh(x, 0.5, 1), {}, r"Hardtanh lies between", id="clamp above zero"),
        pytest.param(
            torch.relu, {"bias": False}, r"a relu has no gradient at zero, and the layer in front of it has no bias", id="no bias"
        ),
        pytest.param(lambda x: x.roll(1, 0), {}, r"Roll lies between", id="other examples"),
        pytest.param(
            LayerOver(lambda dim: nn.Sequential(nn.Unflatten(1, (4, 1)), ee.ElasticConv1d(4, 4, 1, groups=4, in_dim=dim), nn.Flatten())),
            {},
            r"ElasticConv1d.* is over the dim; expected linear layers",
            id="depthwise",
        ),
    ],
)
def test_what_gradmax_cannot_see_through_is_refused(between, options, match):
    net = make(between, **options)
    with observe(net):
        net(torch.randn(8, 5)).square().sum().backward()
    refused(net, lambda: net.dim.grow(6, init="gradmax"), ee.CapacityError, match)
    net.dim.grow(6)


def test_a_dim_with_a_layer_norm_grows_only_inexactly():
    net = make(LayerOver(lambda dim: ee.ElasticLayerNorm(4, dim=dim)))
    with observe(net):
        net(torch.randn(8, 5)).square().sum().backward()
    refused(net, lambda: net.dim.grow(6, init="gradmax"), ee.CapacityError, r"mixes all its units.*exact=False")
    net.dim.grow(6, init="gradmax", exact=False)
    assert net(torch.randn(8, 5)).isfinite().all()


def test_ends_of_the_network_are_refused():
    net = Case("linear").net
    refused(net, lambda: net.consumer.out_dim.grow(4, init="gradmax"), ee.CapacityError, r"needs a layer that consumes the units")
    refused(net, lambda: net.producer.in_dim.grow(6, init="gradmax"), ee.CapacityError, r"needs a layer that produces the units")


def test_embeddings_are_refused():
    table = ee.ElasticEmbedding(7, 4, max_embedding_dim=6)
    head = ee.ElasticLinear(4, 7, in_dim=table._widths.axes[0], bias=False)
    net = nn.Sequential(table, head)
    with observe(net):
        net(torch.tensor([1, 2, 3])).square().sum().backward()
    refused(net, lambda: head.in_dim.grow(5, init="gradmax"), ee.CapacityError, r"ElasticEmbedding.* is over the dim")


def test_tied_weights_and_loops_are_refused():
    one = ee.ElasticLinear(3, 4, max_out_features=6)
    loop = ee.ElasticLinear(4, 4, in_dim=one.out_dim, out_dim=one.out_dim)
    two = ee.ElasticLinear(4, 3, in_dim=one.out_dim)
    three = ee.ElasticLinear(4, 3, in_dim=one.out_dim)
    three.weight = two.weight
    for net in (nn.Sequential(one, loop), nn.Sequential(one, two, three)):
        refused(net, lambda: one.out_dim.grow(5, init="gradmax"), ee.CapacityError, r"weight is tied, or holds the units in two places")
        if loop in net:
            del net[1]
            one.out_dim._users = [user for user in one.out_dim._users if user() is not loop]


@pytest.mark.parametrize("shape", ["twice", "twice apart"])
def test_units_with_two_places_in_a_consumer_are_refused(shape):
    assert shape in DERIVED
    net = Derived(shape)
    with observe(net):
        net(torch.randn(8, 3, **DOUBLE)).square().sum().backward()
    match = r"holds the units in two places|several rows for one unit"
    refused(net, lambda: net.one.out_dim.grow(5, init="gradmax"), ee.CapacityError, match)


@pytest.mark.parametrize(("factor", "match"), [(0.0, "got zeros alone"), (math.nan, "expected finite gradients")])
def test_gradients_without_a_direction_are_refused(factor, match):
    net = Net("linear")
    with observe(net):
        (net(torch.randn(8, 5, **DOUBLE)) * factor).sum().backward()
    refused(net, lambda: net.dim.grow(6, init="gradmax"), ee.CapacityError, match)


def test_an_unknown_init_names_the_known_ones():
    net = Net("linear")
    before = everything(net)
    with pytest.raises(ee.CapacityError, match="expected 'zero', 'split' or 'gradmax', got 'max'"):
        net.dim.grow(6, init="max")
    torch.testing.assert_close(everything(net)[2], before[2], rtol=0, atol=0, equal_nan=True)
