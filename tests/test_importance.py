"""Scores are those of the dense active slice, and the best of them make a valid choice for keep."""

import pytest
import torch
from torch import nn

import esper_elastic as ee
from esper_elastic import importance
from esper_elastic.control import Switch


class Net(nn.Module):
    """3 -> hidden (5 of 8) -> 2 of 3, with dormant memory full of NaN."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first = ee.ElasticLinear(3, 5, max_in_features=4, max_out_features=8)
        self.last = ee.ElasticLinear(5, 2, in_dim=self.first.out_dim, max_out_features=3)
        self.hidden = self.first.out_dim
        for layer in (self.first, self.last):
            for parameter, axes in ((layer.weight, (layer.out_dim, layer.in_dim)), (layer.bias, (layer.out_dim,))):
                with torch.no_grad():
                    kept = layer.active("weight" if parameter is layer.weight else "bias").clone()
                    parameter.fill_(torch.nan)
                    parameter[tuple(slice(axis.active) for axis in axes)] = kept

    def forward(self, input):
        return self.last(self.first(input).relu())


def backward(net):
    torch.manual_seed(1)
    loss = net(torch.randn(16, 3)).square().mean()
    loss.backward()
    for parameter in net.parameters():
        with torch.no_grad():
            parameter.grad[parameter.isnan()] = torch.nan
    return loss


@pytest.mark.parametrize("p", [1, 2, 3.5, torch.inf])
def test_magnitude_is_the_norm_of_the_active_producer_row(p):
    net = Net()
    expected = torch.linalg.vector_norm(net.first.active("weight"), p, dim=1)
    scores = importance.magnitude(net.hidden, p=p)
    assert not scores.requires_grad
    torch.testing.assert_close(scores, expected.detach())
    torch.testing.assert_close(importance.magnitude(net.hidden), torch.linalg.vector_norm(net.first.active("weight"), dim=1).detach())


def test_magnitude_of_several_producers_is_that_of_their_joined_rows():
    net = Net()
    other = ee.ElasticLinear(2, 5, out_dim=net.hidden)
    joined = torch.cat([net.first.active("weight"), other.active("weight")], 1).detach()
    torch.testing.assert_close(importance.magnitude(net.hidden), joined.norm(dim=1))


def test_magnitude_counts_a_tied_weight_once():
    net = Net()
    twin = ee.ElasticLinear(3, 5, out_dim=net.hidden, max_in_features=4)
    twin.weight = net.first.weight
    torch.testing.assert_close(importance.magnitude(net.hidden), net.first.active("weight").norm(dim=1).detach())


def test_magnitude_of_a_concatenation_finds_the_rows_of_each_dim():
    first, second = ee.ElasticDim(2, 3), ee.ElasticDim(4, 5)
    layer = ee.ElasticLinear(3, 6, out_dim=ee.concat(first, second))
    rows = layer.active("weight").norm(dim=1).detach()
    torch.testing.assert_close(importance.magnitude(first), rows[:2])
    torch.testing.assert_close(importance.magnitude(second), rows[2:])


@pytest.mark.parametrize("layout", ["compact", "static"])
def test_taylor_is_the_derivative_by_a_gate_on_each_unit(layout):
    net = Net()
    net.first.layout = net.last.layout = "compact"
    torch.manual_seed(1)
    input = torch.randn(16, 3)
    gate = torch.ones(5, requires_grad=True)
    net.last(net.first(input).relu() * gate).square().mean().backward()
    expected = gate.grad.abs()
    net.zero_grad()
    net.first.layout = net.last.layout = layout
    if layout == "static":
        input = torch.cat([input, torch.zeros(16, 1)], 1)
    output = net(input)
    output[:, :2].square().mean().backward()
    scores = importance.taylor(net.hidden)
    assert scores.shape == (5,)
    torch.testing.assert_close(scores, expected)


def test_taylor_of_the_last_dim_weighs_what_shapes_it():
    net = Net()
    backward(net)
    weight, bias = net.last.weight, net.last.bias
    expected = (weight * weight.grad)[:2, :5].sum(1) + (bias * bias.grad)[:2]
    torch.testing.assert_close(importance.taylor(net.last.out_dim), expected.abs().detach())


def test_taylor_sums_over_consumers_before_the_absolute_value():
    net = Net()
    other = ee.ElasticLinear(5, 2, in_dim=net.hidden)
    hidden = net.first(torch.randn(16, 3)).relu()
    (net.last(hidden).sum() - other(hidden).sum()).backward()
    expected = (net.last.active("weight") * net.last.weight.grad[:2, :5]).sum(0) + (other.weight * other.weight.grad)[:, :5].sum(0)
    torch.testing.assert_close(importance.taylor(net.hidden), expected.abs().detach())


def test_taylor_leaves_out_consumers_that_are_switched_off():
    net = Net()
    asleep = ee.ElasticLinear(5, 2, in_dim=net.hidden)
    switch = Switch(on=False)
    asleep.govern(switch)
    backward(net)
    expected = (net.last.active("weight") * net.last.weight.grad[:2, :5]).sum(0).abs()
    torch.testing.assert_close(importance.taylor(net.hidden), expected.detach())
    switch.set(True)
    with pytest.raises(ee.CapacityError, match=r"expected a gradient of ElasticLinear\.weight"):
        importance.taylor(net.hidden)


class Normed(nn.Module):
    """conv -> batch norm -> depthwise -> batch norm -> flatten -> linear, dormant memory full of NaN."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv = ee.ElasticConv2d(2, 4, 3, padding=1, max_out_channels=6)
        dim = self.conv.out_dim
        self.norm = ee.ElasticBatchNorm2d(4, dim=dim)
        self.depthwise = ee.ElasticConv2d(4, 4, 3, padding=1, groups=4, in_dim=dim)
        self.other = ee.ElasticBatchNorm2d(4, dim=dim)
        self.last = ee.ElasticLinear(36, 2, in_dim=dim * 9)
        self.dim = dim
        with torch.no_grad():
            for norm in (self.norm, self.other):
                norm.weight.uniform_(-2, 2)
                norm.weight[4:] = torch.nan
            self.conv.weight[4:] = self.depthwise.weight[4:] = torch.nan
            self.last.weight[:, 36:] = torch.nan

    def features(self, input):
        return self.other(self.depthwise(self.norm(self.conv(input)).relu())).sigmoid()

    def forward(self, input):
        return self.last(self.features(input).flatten(1))


def test_batch_norm_scale_sums_absolute_scales():
    net = Normed()
    expected = (net.norm.weight.abs() + net.other.weight.abs())[:4].detach()
    torch.testing.assert_close(importance.batch_norm_scale(net.dim), expected)


def test_batch_norm_scale_of_a_flattened_axis_sums_over_the_places_of_a_unit():
    conv = ee.ElasticConv2d(2, 4, 3, max_out_channels=6)
    norm = ee.ElasticBatchNorm1d(12, dim=conv.out_dim * 3)
    with torch.no_grad():
        norm.weight.uniform_(-2, 2)
    torch.testing.assert_close(importance.batch_norm_scale(conv.out_dim), norm.weight[:12].abs().view(4, 3).sum(1).detach())


def test_magnitude_of_channels_counts_the_whole_kernel():
    net = Normed()
    rows = torch.cat([net.conv.weight[:4].flatten(1), net.depthwise.weight[:4].flatten(1)], 1)
    torch.testing.assert_close(importance.magnitude(net.dim), rows.norm(dim=1).detach())


def test_taylor_of_normed_channels_is_the_derivative_by_a_gate_on_what_is_consumed():
    """The weights before a batch norm would all score zero, since the norm undoes their scale."""
    net = Normed()
    input = torch.randn(8, 2, 3, 3)
    gate = torch.ones(4, 1, 1, requires_grad=True)
    net.last((net.features(input) * gate).flatten(1)).square().mean().backward()
    torch.testing.assert_close(importance.taylor(net.dim), gate.grad.flatten().abs())
    assert importance.taylor(net.dim).min() > 1e-4


def test_scores_are_at_least_single_precision():
    net = Net().to(torch.bfloat16)
    assert importance.magnitude(net.hidden).dtype is torch.float32
    assert importance.magnitude(net.double().hidden).dtype is torch.float64


def test_scores_change_nothing():
    net = Net()
    backward(net)
    before = [(p._version, p.grad._version) for p in net.parameters()], net.hidden.block.generation
    importance.magnitude(net.hidden)
    importance.taylor(net.hidden)
    assert ([(p._version, p.grad._version) for p in net.parameters()], net.hidden.block.generation) == before


@pytest.mark.parametrize(
    ("scores", "k", "expected"),
    [
        pytest.param([0.5, 3.0, 1.0, 2.0], 2, [1, 3], id="highest, in order of place"),
        pytest.param([1.0, 1.0, 1.0], 2, [0, 1], id="first among equals"),
        pytest.param([2.0, -torch.inf, torch.inf], 3, [0, 1, 2], id="all"),
    ],
)
def test_top_chooses_the_highest(scores, k, expected):
    assert importance.top(torch.tensor(scores), k).tolist() == expected


def test_the_best_units_can_be_kept():
    net = Net()
    scores = importance.magnitude(net.hidden)
    net.hidden.keep(importance.top(scores, 3))
    torch.testing.assert_close(importance.magnitude(net.hidden), scores[importance.top(scores, 3)])


@pytest.mark.parametrize(
    ("score", "match"),
    [
        pytest.param(
            lambda net: importance.magnitude(net.first.in_dim), r"magnitude: expected a layer that produces the units", id="input"
        ),
        pytest.param(lambda net: importance.magnitude(net.hidden, p=0), r"magnitude: p: expected a positive number, got 0", id="p"),
        pytest.param(
            lambda net: importance.batch_norm_scale(net.hidden),
            r"expected a batch norm with a scale .*Use magnitude or taylor",
            id="no norm",
        ),
        pytest.param(
            lambda net: importance.taylor(net.hidden),
            r"ElasticDim: importance\.taylor: expected a gradient of ElasticLinear\.weight, got none\. Run a forward and backward first",
            id="no gradient",
        ),
        pytest.param(
            lambda net: importance.taylor(ee.ElasticDim(3)), r"taylor: expected a layer with weights that is switched on", id="free"
        ),
        pytest.param(lambda net: importance.top(torch.ones(4), 5), r"a vector of at least k = 5 scores", id="too many"),
        pytest.param(lambda net: importance.top(torch.ones(4), 0), r"k at least 1", id="none"),
        pytest.param(lambda net: importance.top(torch.ones(4), 2.0), r"importance\.top: k: expected an integer, got 2\.0", id="float"),
        pytest.param(lambda net: importance.top(torch.ones(4, 1), 1), r"got shape \(4, 1\)", id="matrix"),
        pytest.param(lambda net: importance.top(torch.tensor([1.0, torch.nan]), 1), r"got NaN scores. Has the training diverged", id="NaN"),
    ],
)
def test_scores_refuse(score, match):
    with pytest.raises(ee.CapacityError, match=match):
        score(Net())
