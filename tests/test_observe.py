"""Observed scores are those of gates written into the network, and watching changes nothing and leaves nothing behind."""

import gc
import weakref

import pytest
import torch
from growing import Derived, poison
from torch import nn
from torch.utils.checkpoint import checkpoint

import esper_elastic as ee
from esper_elastic.growth import observe

DOUBLE = {"dtype": torch.float64}
each_layout = pytest.mark.parametrize("layout", ["compact", "static"])


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


class Gated(nn.Module):
    """A network with a place for a gate on each unit of one dim, of shape (examples, units)."""

    def __init__(self):
        super().__init__()
        self.build()
        self.double()
        poison(*[layer for layer in self.modules() if hasattr(layer, "_widths")])

    def gated(self, x, gate, axis=1):
        """``x`` with the active units of ``axis`` multiplied by the gate of each example."""
        if gate is None:
            return x
        if x.shape[axis] > gate.shape[1]:
            gate = torch.cat([gate, gate.new_zeros(len(gate), x.shape[axis] - gate.shape[1])], 1)
        return x * gate.view([len(gate) if i == 0 else gate.shape[1] if i == axis % x.dim() else 1 for i in range(x.dim())])


class Mlp(Gated):
    shape = (6, 3)

    def build(self):
        self.one = ee.ElasticLinear(3, 4, max_out_features=7)
        self.dim = self.one.out_dim
        self.two = ee.ElasticLinear(4, 2, in_dim=self.dim)

    def forward(self, x, gate=None, look=None):
        x = self.gated(self.one(x).relu(), gate)
        if look is not None:
            look.append(x)
        return self.two(x)


class Conv(Gated):
    shape = (3, 2, 5, 5)

    def build(self):
        self.one = ee.ElasticConv2d(2, 4, 3, max_out_channels=7)
        self.dim = self.one.out_dim
        self.norm = ee.ElasticBatchNorm2d(4, dim=self.dim)
        self.two = ee.ElasticConv2d(4, 3, 2, in_dim=self.dim, max_out_channels=4)
        self.flat = ee.ElasticLinear(36, 2, in_dim=self.dim * 9)

    def forward(self, x, gate=None, look=None):
        x = self.gated(self.norm(self.one(x)).relu(), gate)
        if look is not None:
            look.append(x)
        y = self.two(x)
        return torch.cat([y.narrow(1, 0, 3).flatten(1), self.flat(x.flatten(1))], 1)


class Tokens(Gated):
    """One consumer called twice in a pass, over tokens."""

    shape = (3, 4, 2)

    def build(self):
        self.one = ee.ElasticLinear(2, 4, max_out_features=7)
        self.dim = self.one.out_dim
        self.two = ee.ElasticLinear(4, 2, in_dim=self.dim)

    def forward(self, x, gate=None, look=None):
        for _ in range(2):
            hidden = self.gated(self.one(x).tanh(), gate, 2)
            if look is not None:
                look.append(hidden)
            x = x + self.two(hidden)
        return x


class Joined(Gated):
    """A concatenation in which the dim lies behind another."""

    shape = (5, 3)

    def build(self):
        self.one = ee.ElasticLinear(3, 4, max_out_features=7)
        self.other = ee.ElasticLinear(3, 2, max_out_features=3)
        self.dim = self.one.out_dim
        self.two = ee.ElasticLinear(6, 2, in_dim=ee.concat(self.other.out_dim, self.dim))

    def forward(self, x, gate=None, look=None):
        hidden = self.gated(self.one(x).relu(), gate)
        if look is not None:
            look.append(hidden)
        return self.two(torch.cat([self.other(x), hidden], 1))


class Last(Gated):
    """A dim that nothing elastic consumes: gates stand behind its last layer, a norm."""

    shape = (3, 2, 5)

    def build(self):
        self.one = ee.ElasticConv1d(2, 4, 3, max_out_channels=7)
        self.dim = self.one.out_dim
        self.norm = ee.ElasticBatchNorm1d(4, dim=self.dim)

    def forward(self, x, gate=None, look=None):
        x = self.gated(self.norm(self.one(x)), gate)
        if look is not None:
            look.append(x)
        return x.narrow(1, 0, 4)


NETS = [Mlp, Conv, Tokens, Joined, Last]


def loss_of(y):
    return (y.flatten(1) * torch.linspace(-1, 2, y[0].numel(), **DOUBLE)).square().sum()


def gates(net, x):
    """Derivatives of the loss by a gate on each unit and example: ``(examples, units)``."""
    gate = torch.ones(len(x), net.dim.active, **DOUBLE, requires_grad=True)
    (found,) = torch.autograd.grad(loss_of(net(x, gate)), gate)
    return found


# Scores


@each_layout
@pytest.mark.parametrize("build", NETS)
def test_scores_are_those_of_gates(build, layout):
    net = build()
    ee.set_layout(net, layout)
    batches = [torch.randn(net.shape, **DOUBLE) for _ in range(3)]
    expected = [gates(net, x) for x in batches]
    look = []
    with observe(net) as seen:
        for x in batches:
            loss_of(net(x, look=look)).backward()
    torch.testing.assert_close(seen.taylor(net.dim), torch.stack([gate.sum(0).abs() for gate in expected]).sum(0))
    torch.testing.assert_close(seen.fisher(net.dim), torch.stack([gate.square().sum(0) for gate in expected]).sum(0))
    axis = look[0].dim() - 1 if build is Tokens else 1
    activations = torch.cat([x.movedim(axis, 0)[:4].flatten(1) for x in look], 1).detach()
    torch.testing.assert_close(seen.activation(net.dim), activations.abs().mean(1))
    torch.testing.assert_close(seen.zeros(net.dim), activations.eq(0).double().mean(1))
    for score in (seen.taylor, seen.fisher, seen.activation, seen.zeros):
        assert score(net.dim).shape == (4,)
        assert not score(net.dim).requires_grad
    net.dim.keep(ee.importance.top(seen.taylor(net.dim), 2))
    assert net.dim.active == 2


def test_observed_taylor_equals_that_of_weight_gradients():
    net = Conv()
    with observe(net) as seen:
        loss_of(net(torch.randn(net.shape, **DOUBLE))).backward()
    torch.testing.assert_close(seen.taylor(net.dim), ee.importance.taylor(net.dim))


def test_every_dim_is_observed_by_default_and_chosen_ones_on_request():
    net = Joined()
    x = torch.randn(net.shape, **DOUBLE)
    with observe(net) as seen, observe(net, net.dim) as one, observe(net, [net.dim, net.other.out_dim]) as two:
        loss_of(net(x)).backward()
    for dim in ee.dims(net).values():
        assert seen.taylor(dim).shape == (dim.active,)
    assert torch.equal(seen.taylor(net.dim), one.taylor(net.dim))
    assert torch.equal(seen.taylor(net.other.out_dim), two.taylor(net.other.out_dim))
    with pytest.raises(ee.CapacityError, match="expected a dim that is observed, got another.*dims="):
        one.taylor(net.other.out_dim)


def test_a_unit_with_several_places_has_one_gate():
    net = Derived("twice apart")
    x = torch.randn(5, 3, **DOUBLE)
    with observe(net) as seen:
        net(x).square().sum().backward()
    torch.testing.assert_close(seen.taylor(net.one.out_dim), ee.importance.taylor(net.one.out_dim))


def test_passes_are_told_apart_and_repeated_backwards_count():
    net = Mlp()
    x = torch.randn(net.shape, **DOUBLE)
    expected = gates(net, x).sum(0).abs()
    with observe(net) as seen:
        loss = loss_of(net(x))
        loss.backward(retain_graph=True)
        torch.testing.assert_close(seen.taylor(net.dim), expected)  # also while it goes on
        loss.backward()
    torch.testing.assert_close(seen.taylor(net.dim), 2 * expected)
    with observe(net) as seen:
        (loss_of(net(x)) - loss_of(net(x))).backward()
    torch.testing.assert_close(seen.taylor(net.dim), torch.zeros_like(expected), atol=1e-9, rtol=0)


def test_a_frozen_producer_has_scores_too():
    net = Mlp()
    x = torch.randn(net.shape, **DOUBLE)
    expected = gates(net, x)
    net.one.requires_grad_(False)
    with observe(net) as seen:
        loss_of(net(x)).backward()
    torch.testing.assert_close(seen.fisher(net.dim), expected.square().sum(0))


def test_what_sleeps_under_a_switch_is_left_out():
    net = nn.Sequential(ee.ElasticLinear(3, 4, max_out_features=5, **DOUBLE))
    inner = ee.ElasticLinear(4, 4, in_dim=net[0].out_dim, out_dim=net[0].out_dim, **DOUBLE)
    net.append(ee.ElasticBlock(inner)).append(ee.ElasticLinear(4, 2, in_dim=net[0].out_dim, **DOUBLE))
    net[1].switch.set(False)
    ee.set_layout(net, "static")
    x = torch.randn(6, 3, **DOUBLE)
    with observe(net) as seen:
        net(x).square().sum().backward()
        inner(net[0](x) * 2)  # as on a GPU, where static blocks run and give zeros
    expected = (net[2].weight * net[2].weight.grad).detach().sum(0)[:4].abs()
    torch.testing.assert_close(seen.taylor(net[0].out_dim), expected)
    torch.testing.assert_close(seen.activation(net[0].out_dim), net[0](x)[:, :4].detach().abs().mean(0))


def test_unbatched_input_is_one_example():
    net = Mlp()
    with observe(net) as seen:
        net(torch.randn(3, **DOUBLE)).square().sum().backward()
    torch.testing.assert_close(seen.fisher(net.dim), ee.importance.taylor(net.dim).square())


def test_inputs_given_by_name_are_seen():
    net = Mlp()
    x = torch.randn(net.shape, **DOUBLE)
    with observe(net) as seen:
        net.two(input=net.one(input=x).relu()).square().sum().backward()
    torch.testing.assert_close(seen.taylor(net.dim), ee.importance.taylor(net.dim))


# Watching changes nothing


def everything_of(net, x, run, watched):
    """Outputs, all gradients and buffers of two accumulated passes, watched or not."""
    net.zero_grad()
    x = x.clone().requires_grad_()
    outputs = []

    def passes():
        for _ in range(2):
            y = run(net, x)
            outputs.append(y.detach())
            y.double().square().sum().backward()

    if watched:
        with observe(net):
            passes()
    else:
        passes()
    found = [*outputs, x.grad, *(p.grad for p in net.parameters()), *net.buffers()]
    return [torch.nan_to_num(t.clone()) for t in found]


def plain(net, x):
    return net(x)


def autocast(net, x):
    with torch.autocast("cpu", torch.bfloat16):
        return net(x)


def checkpointed(net, x):
    return checkpoint(net, x, use_reentrant=False)


@each_layout
@pytest.mark.parametrize("run", [plain, autocast, checkpointed])
@pytest.mark.parametrize("build", NETS)
def test_outputs_and_gradients_are_the_same_to_the_bit(build, run, layout):
    nets = [build().eval() for _ in range(2)]
    nets[1].load_state_dict(nets[0].state_dict())
    x = torch.randn(nets[0].shape, **DOUBLE)
    if run is autocast:
        nets, x = [net.float() for net in nets], x.float()
    found = []
    for net, watched in zip(nets, (False, True), strict=True):
        ee.set_layout(net, layout)
        found.append(everything_of(net, x, run, watched))
    for ours, theirs in zip(*found, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("inplace", [False, True])
def test_relus_in_place_and_training_mode_are_no_obstacle(inplace):
    net = nn.Sequential(ee.ElasticConv2d(2, 4, 3, max_out_channels=6), nn.ReLU(inplace))
    net.insert(1, ee.ElasticBatchNorm2d(4, dim=net[0].out_dim))
    net.append(ee.ElasticConv2d(4, 3, 3, in_dim=net[0].out_dim)).append(nn.ReLU(inplace))
    x = torch.randn(3, 2, 7, 7)
    net(x).square().sum().backward()
    expected = [p.grad.clone() for p in net.parameters()]
    net.zero_grad()
    with observe(net) as seen:
        net(x).square().sum().backward()
    assert all(torch.equal(p.grad, e) for p, e in zip(net.parameters(), expected, strict=True))
    torch.testing.assert_close(seen.taylor(net[0].out_dim), ee.importance.taylor(net[0].out_dim))
    if inplace:
        with pytest.raises(ee.CapacityError, match=r"changed in place after they were computed\. Use ee\.importance\.taylor"):
            seen.taylor(net[3].out_dim)
    net[0].out_dim.grow(6, init="gradmax")


def test_recomputation_is_counted_once():
    net = Conv().eval()
    x, other = torch.randn(2, *net.shape, **DOUBLE)
    with observe(net) as seen:
        loss_of(net(x)).backward()
        loss_of(net(other)).backward()
    with observe(net) as again:
        loss_of(checkpointed(net, x)).backward()
        loss_of(net(other)).backward()
    for score in ("taylor", "fisher", "activation", "zeros"):
        assert torch.equal(getattr(seen, score)(net.dim), getattr(again, score)(net.dim))


def test_scores_under_autocast_are_close_to_those_without():
    net = Mlp().float()
    x = torch.randn(64, 3)
    with observe(net) as seen:
        net(x).square().mean().backward()
    with observe(net) as low:
        autocast(net, x).float().square().mean().backward()
    torch.testing.assert_close(low.taylor(net.dim), seen.taylor(net.dim), rtol=0.05, atol=0.01)
    assert low.taylor(net.dim).dtype is torch.float32


def test_no_activation_is_held_that_autograd_does_not_hold():
    """What is alive between forward and backward, in bytes of distinct storages."""

    def alive():
        gc.collect()
        found = {}
        for thing in gc.get_objects():
            if type(thing) in (torch.Tensor, torch.nn.Parameter) and not torch._is_functional_tensor(thing):  # what holds memory
                found[thing.untyped_storage().data_ptr()] = thing.untyped_storage().nbytes()
        return sum(found.values())

    net = Mlp()
    x = torch.randn(512, 3, **DOUBLE)
    before = alive()
    with observe(net, net.dim):
        loss = loss_of(net(x))
        held = alive() - before
        loss.backward()
        del loss
        assert alive() - before < 4_000  # gradients, scores and the matrix
    assert held < 512 * (4 + 2) * 8 + 4_000  # what the weight gradient of two and the square of the loss need


# Nothing is left behind


def hooks_of(net):
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks", "_forward_hooks_with_kwargs")
    return [len(getattr(module, kind)) for module in net.modules() for kind in kinds]


@pytest.mark.parametrize("fails", [False, True])
def test_no_hook_outlives_an_observation(fails):
    net = Conv()
    before = hooks_of(net)
    loss = None
    try:
        with observe(net) as seen:
            assert hooks_of(net) != before
            loss = loss_of(net(torch.randn(net.shape, **DOUBLE)))
            if fails:
                raise ZeroDivisionError
            loss.backward(retain_graph=True)
            taylor = seen.taylor(net.dim)
    except ZeroDivisionError:
        assert fails
    assert hooks_of(net) == before
    loss.backward()  # of a graph that was built within
    if fails:
        with pytest.raises(ee.CapacityError, match="expected a backward pass over the units, got none"):
            seen.taylor(net.dim)
    else:
        assert torch.equal(seen.taylor(net.dim), taylor)


def test_a_failing_backward_is_not_counted():
    net = Mlp()
    x = torch.randn(net.shape, **DOUBLE)

    def fail(gradient):
        raise ZeroDivisionError

    with observe(net) as seen:
        hidden = net.one(x)
        hidden.register_hook(fail)
        with pytest.raises(ZeroDivisionError):
            loss_of(net.two(hidden.relu())).backward()
        loss_of(net(x)).backward()
    torch.testing.assert_close(seen.taylor(net.dim), gates(net, x).sum(0).abs())


def test_scores_hold_no_model_and_no_graph():
    net = Conv()
    with observe(net) as seen:
        loss = loss_of(net(torch.randn(net.shape, **DOUBLE)))
        loss.backward()
    dim, model, layer = net.dim, weakref.ref(net), weakref.ref(net.one)
    del net
    gc.collect()
    assert model() is None
    assert layer() is None
    assert seen.taylor(dim).shape == (4,)
    assert loss.grad_fn is not None


# Refusals


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda net: net.dim.resize(3), id="resized"),
        pytest.param(lambda net: net.dim.grow(5), id="grown"),
        pytest.param(lambda net: (net.dim.keep([1, 2, 3]), net.dim.resize(4)), id="moved"),
        pytest.param(lambda net: (net.dim.resize(3), net.dim.grow(4)), id="born anew"),
    ],
)
def test_scores_of_other_units_are_refused(change):
    net = Mlp()
    with observe(net) as seen:
        net(torch.randn(net.shape, **DOUBLE)).square().sum().backward()
    change(net)
    for score in (seen.taylor, seen.fisher, seen.activation):
        with pytest.raises(ee.CapacityError, match=r"since they were observed: expected the width 4 of then, got \d\. Observe again"):
            score(net.dim)


def test_a_change_of_width_between_batches_voids_the_scores():
    net = Mlp()
    x = torch.randn(net.shape, **DOUBLE)
    with observe(net) as seen:
        loss_of(net(x)).backward()
        net.dim.resize(3)
        loss_of(net(x)).backward()
        net.dim.resize(4)
    with pytest.raises(ee.CapacityError, match="Observe again"):
        seen.taylor(net.dim)


def test_scores_that_came_back_by_resize_are_given():
    net = Mlp()
    with observe(net) as seen:
        loss_of(net(torch.randn(net.shape, **DOUBLE))).backward()
    taylor = seen.taylor(net.dim)
    net.dim.resize(2)
    net.dim.resize(4)
    assert torch.equal(seen.taylor(net.dim), taylor)


def test_scores_without_passes_are_refused():
    net = Mlp()
    with observe(net) as seen:
        pass
    with pytest.raises(ee.CapacityError, match=r"expected a forward pass over the units within ee\.growth\.observe, got none"):
        seen.activation(net.dim)
    with observe(net) as seen, torch.no_grad():
        net(torch.randn(net.shape, **DOUBLE))
    assert seen.activation(net.dim).shape == (4,)
    with pytest.raises(ee.CapacityError, match=r"got none\. Run it within: with ee\.growth\.observe\(model\): loss\.backward\(\)"):
        seen.taylor(net.dim)


def test_fisher_of_consumers_with_other_examples_is_refused():
    net = Tokens()
    hidden = net.one(torch.randn(net.shape, **DOUBLE))
    with observe(net) as seen:
        hidden = net.one(torch.randn(net.shape, **DOUBLE))
        (net.two(hidden).sum() + net.two(hidden.flatten(0, 1)).square().sum()).backward()
    torch.testing.assert_close(seen.taylor(net.dim), ee.importance.taylor(net.dim))
    with pytest.raises(ee.CapacityError, match="to see the same examples, got batches of different sizes.*Use taylor"):
        seen.fisher(net.dim)


@pytest.mark.parametrize(
    ("dims", "match"),
    [
        pytest.param([ee.ElasticDim(3)], "expected a dim of the model, got one of another", id="another"),
        pytest.param(["one"], r"expected dims, got 'one'\. Take them from ee\.dims", id="name"),
    ],
)
def test_observation_refuses_what_is_no_dim_of_the_model(dims, match):
    net = Mlp()
    before = hooks_of(net)
    with pytest.raises(ee.CapacityError, match=match), observe(net, dims):
        pass
    assert hooks_of(net) == before


def test_units_that_other_code_consumes_are_refused():
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.one = nn.Linear(3, 4)
            self.weight = nn.Parameter(torch.randn(2, 4))

        def forward(self, x):
            return nn.functional.linear(self.one(x).relu(), self.weight)

    net = ee.elasticize(Own(), torch.randn(2, 3), capacity=2)
    dim = ee.dims(net)["one"]
    with observe(net) as seen:
        net(torch.randn(5, 3)).square().sum().backward()
    with pytest.raises(ee.CapacityError, match=r"Own.* consumes the units in code of its own.*Use ee\.importance\.taylor"):
        seen.taylor(dim)
    assert ee.importance.taylor(dim).shape == (4,)
