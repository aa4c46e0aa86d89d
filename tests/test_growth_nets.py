"""Growth and pruning in convolutional and normed nets, and under optimizers whose state must follow."""

import copy

import pytest
import torch
from growing import Net, batch, integral, poison, refused
from torch import nn

import esper_elastic as ee
from esper_elastic import followers


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


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


@pytest.mark.parametrize(
    ("make", "steps"),
    [
        pytest.param(lambda params: ee.optim.AdamW(params, lr=1e-3), 700, id="AdamW"),
        pytest.param(lambda params: ee.optim.SGD(params, lr=1e-2, momentum=0.9, weight_decay=1e-2), 50, id="SGD"),
    ],
)
def test_one_dim_sleeps_while_the_other_is_pruned_and_grown(make, steps):
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
        train(which, optimizer, steps)
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


# Norms


class Normed(nn.Module):
    """conv -> bn -> conv with a residual sum around it -> bn -> conv, flattened and normed into a linear layer; float64."""

    def __init__(self):
        super().__init__()
        self.stem = ee.ElasticConv2d(2, 4, 3, padding=1, max_out_channels=8, dtype=torch.float64)
        self.stem_norm = ee.ElasticBatchNorm2d(4, dim=self.stem.out_dim, dtype=torch.float64)
        self.inner = ee.ElasticConv2d(4, 3, 3, padding=1, in_dim=self.stem.out_dim, max_out_channels=6, dtype=torch.float64)
        self.inner_norm = ee.ElasticBatchNorm2d(3, dim=self.inner.out_dim, dtype=torch.float64)
        self.outer = ee.ElasticConv2d(3, 4, 3, padding=1, in_dim=self.inner.out_dim, out_dim=self.stem.out_dim, dtype=torch.float64)
        self.flat_norm = ee.ElasticBatchNorm1d(36, dim=self.stem.out_dim * 9, dtype=torch.float64)
        self.head = ee.ElasticLinear(36, 5, in_dim=self.stem.out_dim * 9, dtype=torch.float64)
        self.stream, self.hidden = self.stem.out_dim, self.inner.out_dim

    def forward(self, input):
        stream = self.stem_norm(self.stem(input)).relu()
        stream = stream + self.outer(self.inner_norm(self.inner(stream)).relu())
        return self.head(self.flat_norm(stream.flatten(1)))


def experienced():
    """A ``Normed`` net whose norms have seen data and have weights that differ, dormant memory full of NaN."""
    net = Normed()
    with torch.no_grad():
        for norm in (net.stem_norm, net.inner_norm, net.flat_norm):
            norm.weight.uniform_(0.5, 1.5)
            norm.bias.uniform_(-1, 1)
    for _ in range(3):
        net(images())
    poison(*net.children())
    return net


def images():
    return torch.randn(6, 2, 3, 3, dtype=torch.float64)


def poisoned_buffers(net):
    return [name for name, buffer in net.named_buffers() if buffer.isnan().any()]


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("init", ["zero", "split"])
def test_normed_nets_keep_their_function(init, training):
    net = experienced().train(training)
    input = images()
    before, statistics = copy.deepcopy(net)(input), net.inner_norm.running_var[:3].clone()
    net.stream.grow(7, init=init)
    net.hidden.grow(6, init=init)
    assert torch.equal(net.inner_norm.running_var[:3], statistics)
    torch.testing.assert_close(net(input), before, rtol=1e-12, atol=1e-12)
    assert not [name for name in poisoned_buffers(net) if name.startswith("inner")]  # all of its capacity is active


def test_newborn_channels_of_a_batch_norm_are_the_identity():
    net = experienced()
    net.hidden.grow(5)
    norm = net.inner_norm
    for tensor, value in ((norm.weight, 1), (norm.bias, 0), (norm.running_mean, 0), (norm.running_var, 1)):
        assert tensor[3:5].eq(value).all()
        assert tensor[5:].isnan().all()


def test_split_channels_take_the_statistics_of_their_parents():
    net = experienced()
    net.hidden.grow(6, init="split")
    norm = net.inner_norm
    parents = [next(p for p in range(3) if torch.equal(kernel, net.inner.weight[p, :4])) for kernel in net.inner.weight[3:, :4]]
    for tensor in (norm.weight, norm.bias, norm.running_mean, norm.running_var, net.inner.bias):
        assert torch.equal(tensor[3:6], tensor[parents])


def test_normed_nets_keep_the_chosen_channels():
    net = experienced().eval()
    input = images()
    full = net(input)
    twin = copy.deepcopy(net)
    with torch.no_grad():
        twin.outer.weight[:, 1] = 0
        for weight in (twin.inner.weight, twin.head.weight.view(5, 8, 9)):
            weight[:, [0, 3]] = 0
    expected = twin(input)
    net.stream.keep([1, 2])
    net.hidden.keep([0, 2])
    torch.testing.assert_close(net(input), expected, rtol=1e-12, atol=1e-12)
    net.stream.resize(4)
    net.hidden.resize(3)
    torch.testing.assert_close(net(input), full, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("init", ["zero", "split"])
def test_a_layer_norm_over_the_dim_refuses_growth_unless_told(init):
    net = Net()
    net.norm = ee.ElasticLayerNorm(4, dim=net.hidden, dtype=torch.float64)
    message = r"ElasticDim: grow: ElasticLayerNorm runs over the dim and mixes all its units.*Pass exact=False"
    refused(net, lambda: net.hidden.grow(6, init=init), ee.CapacityError, message)
    poison(net.norm)
    net.hidden.grow(6, init=init, exact=False)
    net.hidden.keep([0, 5])
    assert net.third(net.second(net.norm(net.first(batch(4, 3))))).isfinite().all()
