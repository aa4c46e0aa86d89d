"""``ee.optim.guard``: every optimizer of ``torch.optim`` on active slices, with nothing else about it changed."""

import copy
import io
import pickle
import warnings

import pytest
import torch
from torch import nn

import esper_elastic as ee
from esper_elastic import followers
from esper_elastic.control import ControlBlock, Switch
from esper_elastic.errors import OptimizerError
from esper_elastic.layers import registry

OPTIMIZERS = {
    "Adadelta": {"lr": 0.1, "weight_decay": 0.1},
    "Adafactor": {"lr": 0.1, "weight_decay": 0.1},
    "Adagrad": {"lr": 0.1, "weight_decay": 0.1, "initial_accumulator_value": 0.5},
    "Adam": {"lr": 0.01, "weight_decay": 0.1, "amsgrad": True},
    "AdamW": {"lr": 0.01, "weight_decay": 0.1},
    "Adamax": {"lr": 0.01, "weight_decay": 0.1},
    "ASGD": {"lr": 0.1, "weight_decay": 0.1, "t0": 1},
    "Muon": {"lr": 0.1, "weight_decay": 0.1},
    "NAdam": {"lr": 0.01, "weight_decay": 0.1},
    "RAdam": {"lr": 0.01, "weight_decay": 0.1},
    "RMSprop": {"lr": 0.01, "weight_decay": 0.1, "momentum": 0.9, "centered": True},
    "Rprop": {"lr": 0.01},
    "SGD": {"lr": 0.1, "weight_decay": 0.1, "momentum": 0.9},
}
REFUSED = {"LBFGS", "SparseAdam"}
every_optimizer = pytest.mark.parametrize(("name", "options"), OPTIMIZERS.items(), ids=OPTIMIZERS)


def build(name, params, **more):
    params = [param for param in params if name != "Muon" or param.dim() == 2]
    return getattr(torch.optim, name)(params, **OPTIMIZERS[name], **more)


def model(rows=3, columns=4, max_rows=7, max_columns=9):
    torch.manual_seed(0)
    return ee.ElasticLinear(columns, rows, max_in_features=max_columns, max_out_features=max_rows)


def give_gradients(optimizer, seed):
    generator = torch.Generator().manual_seed(seed)
    for group in optimizer.param_groups:
        for param in group["params"]:
            param.grad = torch.randn(param.shape, generator=generator, dtype=param.dtype)


def step(optimizer, seed=0):
    give_gradients(optimizer, seed)
    optimizer.step()


def memory(optimizer):
    """Every tensor of parameter shape, and the parameter."""
    found = []
    for group in optimizer.param_groups:
        for param in group["params"]:
            state = optimizer.state.get(param, {})
            found += [(param, t) for t in (param.data, *state.values()) if isinstance(t, torch.Tensor) and t.shape == param.shape]
    return found


def active(param, tensor):
    """The active part of a tensor of the parameter's shape, copied."""
    mask = torch.ones(param.shape, dtype=torch.bool)
    for axis, runs in enumerate(registry.lookup(param).runs(param.shape)):
        outside = torch.ones(param.shape[axis], dtype=torch.bool)
        for start, length in runs:
            outside[start : start + length] = False
        mask.index_fill_(axis, outside.nonzero().flatten(), False)
    return tensor[mask], tensor[~mask]


def test_every_optimizer_of_torch_is_covered():
    public = {name for name in torch.optim.__all__ if name[0].isupper()} - {"Optimizer"}
    assert public == set(OPTIMIZERS) | REFUSED


@every_optimizer
@pytest.mark.parametrize("foreach", [False, True], ids=["loop", "foreach"])
def test_active_slices_step_as_parameters_of_that_size(name, options, foreach):
    layer = model()
    more = {} if name == "Muon" else {"foreach": foreach}
    optimizer = ee.optim.guard(build(name, layer.parameters(), **more), layer)
    dense = [nn.Parameter(layer.active("weight").detach().clone()), nn.Parameter(layer.active("bias").detach().clone())]
    plain = build(name, dense, **more)
    for seed in range(4):
        give_gradients(optimizer, seed)
        for mine, its in zip((layer.weight, layer.bias), dense, strict=True):
            if mine.grad is not None:
                its.grad = active(mine, mine.grad)[0].view(its.shape)
        optimizer.step()
        plain.step()
    for mine, its in zip((layer.weight, layer.bias), dense, strict=True):
        torch.testing.assert_close(active(mine, mine.detach())[0], its.detach().flatten(), rtol=1e-6, atol=1e-7)


@every_optimizer
def test_at_full_width_it_equals_the_plain_optimizer(name, options):
    layer = model(7, 9)
    dense = layer.to_dense()
    optimizer, plain = ee.optim.guard(build(name, layer.parameters()), layer), build(name, dense.parameters())
    for seed in range(3):
        step(optimizer, seed)
        step(plain, seed)
    for mine, its in zip(memory(optimizer), memory(plain), strict=True):
        assert torch.equal(mine[1], its[1])


@every_optimizer
def test_dormant_memory_is_never_read_nor_written(name, options):
    layer, dim = model(), ee.ElasticDim(2, 5)
    several = nn.Parameter(torch.randn(12, 3))
    ControlBlock.merge((dim.block, layer.out_dim.block))
    registry.register(several, (ee.concat(dim, layer.out_dim), None), ())
    optimizer = ee.optim.guard(build(name, [*layer.parameters(), several]), layer)
    step(optimizer)
    for param, tensor in memory(optimizer):
        for axis, runs in enumerate(registry.lookup(param).runs(param.shape)):
            inside = [index for start, length in runs for index in range(start, start + length)]
            outside = [index for index in range(param.shape[axis]) if index not in inside]
            tensor.index_fill_(axis, torch.tensor(outside, dtype=torch.int64), float("nan"))
    for seed in range(3):
        give_gradients(optimizer, seed)
        for group in optimizer.param_groups:
            for param in group["params"]:
                param.grad[param.detach().isnan()] = float("nan")
        optimizer.step()
    assert len(memory(optimizer)) >= 2
    for param, tensor in memory(optimizer):
        inside, outside = active(param, tensor)
        assert inside.isfinite().all()
        assert outside.isnan().all()


@every_optimizer
def test_sleepers_come_back_bit_for_bit(name, options):
    layer = model(7, 9)
    switch = Switch()
    layer.govern(switch)
    optimizer = ee.optim.guard(build(name, layer.parameters()), layer)
    step(optimizer)
    layer.out_dim.resize(2)
    layer.in_dim.resize(5)
    before = [tensor.clone() for _, tensor in memory(optimizer)]
    asleep = [active(param, tensor)[1] for param, tensor in memory(optimizer)]
    for seed in range(100):
        step(optimizer, seed)
    for (param, tensor), old in zip(memory(optimizer), asleep, strict=True):
        assert torch.equal(active(param, tensor)[1], old)
    assert not torch.equal(layer.weight, before[0])
    switch.set(False)
    frozen = copy.deepcopy(list(optimizer.state.values())), layer.weight.detach().clone()
    step(optimizer)
    for now, then in zip(optimizer.state.values(), frozen[0], strict=True):
        assert all(torch.equal(now[key], then[key]) for key in then)
    assert torch.equal(layer.weight, frozen[1])
    switch.set(True)
    layer.out_dim.resize(7)
    layer.in_dim.resize(9)
    step(optimizer)
    assert all(tensor.isfinite().all() for _, tensor in memory(optimizer))


@every_optimizer
def test_state_begins_where_torch_would_begin_it(name, options):
    layer = model()
    optimizer = ee.optim.guard(build(name, layer.parameters()), layer)
    step(optimizer)
    expected = {"step_size": 0.01, "sum": 0.5, "exp_inf": 1e-8}  # Adamax adds eps to what it compares with, so eps counts as nothing
    for _, state in optimizer.state.items():
        for key, tensor in state.items():
            if torch.is_tensor(tensor) and tensor.shape == layer.weight.shape:
                assert (tensor[3:] == expected.get(key, 0.0)).all()
                assert (tensor[:, 4:] == expected.get(key, 0.0)).all()
    optimizer.reset_state(layer.weight, 1, 2, 4)
    for key, tensor in optimizer.state[layer.weight].items():
        if torch.is_tensor(tensor) and tensor.shape == layer.weight.shape:
            assert (tensor[:, 2:] == expected.get(key, 0.0)).all()
    layer.out_dim.resize(7)
    step(optimizer)
    assert all(tensor.isfinite().all() for _, tensor in memory(optimizer))


@every_optimizer
def test_state_follows_a_permutation(name, options):
    layer = model(7, 9)
    optimizer = ee.optim.guard(build(name, layer.parameters()), layer)
    step(optimizer)
    order = torch.randperm(9)
    before = copy.deepcopy(optimizer.state[layer.weight])
    optimizer.permute_state(layer.weight, 1, order)
    for key, tensor in optimizer.state[layer.weight].items():
        moves = torch.is_tensor(tensor) and tensor.dim() == 2 and tensor.shape[1] == 9
        assert torch.equal(tensor, before[key][:, order] if moves else before[key])


@pytest.mark.parametrize("way", ["state_dict", "deepcopy", "pickle", "save"])
def test_a_copy_goes_on_bit_for_bit(way):
    layer = model()
    optimizer = ee.optim.guard(build("AdamW", layer.parameters()), layer)
    step(optimizer)
    if way == "state_dict":
        other = copy.deepcopy(layer)
        twin = ee.optim.guard(build("AdamW", other.parameters()), other)
        twin.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    elif way == "deepcopy":
        other, twin = copy.deepcopy((layer, optimizer))
    elif way == "pickle":
        other, twin = pickle.loads(pickle.dumps((layer, optimizer)))
    else:
        file = io.BytesIO()
        torch.save((layer, optimizer), file)
        file.seek(0)
        other, twin = torch.load(file, weights_only=False)
    assert type(twin) is type(optimizer)
    assert followers.follows(twin)
    for width in (3, 5):
        for its, stepper in ((layer, optimizer), (other, twin)):
            its.out_dim.resize(width)
            step(stepper, width)
    assert torch.equal(layer.weight, other.weight)
    assert layer.weight is not other.weight


def test_it_is_the_same_optimizer_and_guarding_twice_changes_nothing():
    layer = model()
    optimizer = torch.optim.AdamW(layer.parameters())
    state, groups = optimizer.state, optimizer.param_groups
    assert ee.optim.guard(ee.optim.guard(optimizer, layer), layer) is optimizer
    assert isinstance(optimizer, torch.optim.AdamW)
    assert repr(optimizer).startswith("AdamW (")
    params = groups[0]["params"]
    step(optimizer)
    assert optimizer.state is state
    assert optimizer.param_groups is groups
    assert groups[0]["params"] is params
    own = ee.optim.AdamW(layer.parameters())
    assert ee.optim.guard(own, layer) is own
    assert type(own) is ee.optim.AdamW


@pytest.mark.parametrize("before", [True, False], ids=["scheduler-first", "guard-first"])
def test_schedulers_hooks_and_closures(before):
    layer = model()
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    if not before:
        ee.optim.guard(optimizer, layer)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
        ee.optim.guard(optimizer, layer)
        seen = []
        optimizer.register_step_pre_hook(lambda its, args, kwargs: seen.append(its.param_groups[0]["params"][0] is layer.weight))
        optimizer.register_step_post_hook(lambda its, args, kwargs: seen.append(its.param_groups[0]["params"][0] is layer.weight))
        sleeping = layer.weight.detach()[3:].clone()
        weight = layer.weight.detach().clone()

        def closure():
            optimizer.zero_grad()
            loss = layer(torch.ones(2, 4)).square().sum()
            loss.backward()
            return loss

        assert optimizer.step(closure) > 0
        scheduler.step()
    assert seen == [True, True]
    assert optimizer.param_groups[0]["lr"] == 0.05
    assert torch.equal(layer.weight[3:], sleeping)
    assert not torch.equal(layer.weight, weight)


def test_gradient_scaling_and_fused_kernels():
    layer = model()
    optimizer = ee.optim.guard(torch.optim.AdamW(layer.parameters(), fused=True), layer)
    dense = layer.to_dense()
    plain = torch.optim.AdamW(dense.parameters(), fused=False)
    sleeping = layer.weight.detach()[:, 4:].clone()
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    for bad in (False, True, False):
        for its, stepper in ((layer, optimizer), (dense, plain)):
            stepper.zero_grad()
            loss = its(torch.ones(2, 4)).square().sum() * (float("inf") if bad else 1)
            scaler.scale(loss).backward()
            scaler.step(stepper)
        scaler.update()
    torch.testing.assert_close(layer.active("weight"), dense.weight)
    assert torch.equal(layer.weight[:, 4:], sleeping)


def test_an_exception_in_the_step_leaves_parameters_and_state_in_place():
    class Failing(torch.optim.SGD):
        def step(self, closure=None):
            if self.param_groups[0]["params"][0].shape[0] == 3 and self.armed:
                raise KeyboardInterrupt
            return super().step(closure)

    layer = model()
    optimizer = Failing(layer.parameters(), lr=0.1, momentum=0.9)
    optimizer.armed = False
    ee.optim.guard(optimizer, layer)
    step(optimizer)
    state, optimizer.armed = optimizer.state, True
    with pytest.raises(KeyboardInterrupt):
        step(optimizer)
    assert optimizer.state is state
    assert optimizer.param_groups[0]["params"] == [layer.weight, layer.bias]
    assert optimizer.state[layer.weight]["momentum_buffer"].shape == layer.weight.shape


class Whitening(torch.optim.Optimizer):
    """Keeps a square matrix per parameter, which no slice can be taken of."""

    def __init__(self, params):
        super().__init__(params, {})

    def step(self, closure=None):
        for group in self.param_groups:
            for param in group["params"]:
                self.state[param]["square"] = torch.zeros(param.numel(), param.numel())


def replaced(layer):
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    optimizer.step = lambda closure=None: None
    return optimizer


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda layer: torch.optim.LBFGS(layer.parameters()), "guard: cannot serve LBFGS: its direction is one product"),
        (lambda layer: torch.optim.SparseAdam(layer.parameters()), "guard: cannot serve SparseAdam: it takes sparse gradients only"),
        (lambda layer: Whitening(layer.parameters()), "guard: cannot serve Whitening: state 'square' of a parameter"),
        (lambda layer: torch.optim.SGD(layer.parameters(), differentiable=True), "guard: cannot serve SGD with differentiable=True"),
        (lambda layer: torch.optim.SGD(nn.Linear(2, 2).parameters()), "guard: expected SGD to hold parameters of the model, got none"),
        (lambda layer: "adam", "guard: expected a torch.optim.Optimizer, got str"),
        (replaced, "guard: cannot serve SGD: its step was replaced on the instance"),
    ],
    ids=["LBFGS", "SparseAdam", "square-state", "differentiable", "other-model", "no-optimizer", "replaced-step"],
)
def test_what_cannot_be_served_is_refused_unchanged(make, message):
    layer = model()
    optimizer = make(layer)
    kind = type(optimizer)
    with pytest.raises(OptimizerError, match=message):
        ee.optim.guard(optimizer, layer)
    assert type(optimizer) is kind


def test_unguarded_optimizers_are_noted_and_warned_about_once():
    layer = model()
    optimizer = torch.optim.AdamW(layer.parameters())
    assert followers.unguarded_with_state(layer.weight) is None
    with pytest.warns(UserWarning, match=r"AdamW steps elastic parameters of which a part is dormant.*ee\.optim\.guard"):
        step(optimizer)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        step(optimizer)
        assert followers.unguarded_with_state(layer.weight) is optimizer
        ee.optim.guard(optimizer, layer)
        step(optimizer)
        wide = model(7, 9)
        step(torch.optim.AdamW(wide.parameters()))
    assert followers.unguarded_with_state(layer.weight) is None
    assert followers.followers_of(layer.weight) == [optimizer]
    own = ee.optim.AdamW(layer.parameters())
    assert own not in followers.followers_of(layer.weight)
    step(own)
    assert own in followers.followers_of(layer.weight)
