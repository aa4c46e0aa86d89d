"""``ee.optim.AdamW`` and ``ee.optim.SGD``: active elements alone, one step count per element, and equal to torch where all is active."""

import copy
import io
import math
import pickle

import pytest
import torch
from torch import nn

import esper_elastic as ee
from esper_elastic.control import ControlBlock, Switch
from esper_elastic.errors import OptimizerError
from esper_elastic.layers import registry
from esper_elastic.optim import base
from esper_elastic.optim.counts import StepCounts

ADAM = {"lr": 0.01, "weight_decay": 0.1}
RULES = {
    "adamw": (ee.optim.AdamW, torch.optim.AdamW, ADAM),
    "adamw-low-beta": (ee.optim.AdamW, torch.optim.AdamW, {**ADAM, "betas": (0.3, 0.4)}),
    "amsgrad": (ee.optim.AdamW, torch.optim.AdamW, {**ADAM, "amsgrad": True, "maximize": True}),
    "sgd": (ee.optim.SGD, torch.optim.SGD, {"lr": 0.1, "weight_decay": 0.1}),
    "momentum": (ee.optim.SGD, torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "dampening": 0.5, "maximize": True}),
    "nesterov": (ee.optim.SGD, torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.1}),
}
rules = pytest.mark.parametrize(("ours", "theirs", "options"), RULES.values(), ids=RULES)
backends = pytest.mark.parametrize("native", [True, False], ids=["native", "reference"])


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def parameter(shape, axes, switches=(), dtype=torch.float32, memory_format=torch.contiguous_format):
    """A parameter with elastic axes, as a layer would register it."""
    ControlBlock.merge(entry.block for axis in axes if axis is not None for entry in (*axis.dims, *switches))
    tensor = nn.Parameter(torch.randn(shape, dtype=dtype).contiguous(memory_format=memory_format))
    registry.register(tensor, axes, switches)
    return tensor


def active_mask(param):
    mask = torch.ones(param.shape, dtype=torch.bool)
    known = registry.lookup(param)
    for axis, runs in enumerate(known.runs(param.shape)):
        inside = torch.zeros(param.shape[axis], dtype=torch.bool)
        for start, length in runs:
            inside[start : start + length] = True
        mask &= inside.view([-1 if other == axis else 1 for other in range(param.dim())])
    return mask & (not known.asleep)


class Elements:
    """Every element of a parameter as a parameter of its own under ``torch.optim``, in float64: what a step count per element means."""

    def __init__(self, param, theirs, options):
        self.elements = [nn.Parameter(value.detach().double().clone()) for value in param.detach().flatten()]
        self.optimizer = theirs(self.elements, foreach=False, **options)
        self.counts = torch.zeros(param.numel(), dtype=torch.int64)

    def step(self, grad, mask):
        for element, value, active in zip(self.elements, grad.flatten(), mask.flatten(), strict=True):
            element.grad = value.double().clone() if active else None
        self.counts += mask.flatten()
        self.optimizer.step()

    def values(self, param):
        return torch.stack([element.detach() for element in self.elements]).view(param.shape)


@rules
@backends
def test_every_element_steps_as_if_it_were_alone(ours, theirs, options, native, monkeypatch):
    monkeypatch.setattr(base, "_NATIVE", native and base._NATIVE)
    torch.manual_seed(0)
    rows, columns = ee.ElasticDim(3, 7), ee.ElasticDim(2, 5)
    param = parameter((7, 5, 2), (rows, columns, None), dtype=torch.float64)
    optimizer, elements = ours([param], **options), Elements(param, theirs, options)
    for width in [(3, 2), (3, 2), (7, 1), (1, 5), (5, 3), (7, 5), (7, 5), (2, 2)]:
        rows.resize(width[0])
        columns.resize(width[1])
        param.grad = torch.randn_like(param)
        elements.step(param.grad, active_mask(param))
        optimizer.step()
    torch.testing.assert_close(param.detach(), elements.values(param), rtol=1e-12, atol=1e-12)
    if "momentum" in options or ours is ee.optim.AdamW:
        assert torch.equal(optimizer.step_counts(param).flatten(), elements.counts)


@rules
@backends
@pytest.mark.parametrize("shape", [(), (1,), (5,), (0, 3), (33, 17), (300, 129), (6, 4, 3, 3)], ids=str)
def test_at_full_width_it_is_as_exact_as_torch(ours, theirs, options, native, shape, monkeypatch):
    monkeypatch.setattr(base, "_NATIVE", native and base._NATIVE)
    torch.manual_seed(0)
    start = torch.randn(shape)
    mine, plain, exact = nn.Parameter(start.clone()), nn.Parameter(start.clone()), nn.Parameter(start.double())
    optimizers = [ours([mine], **options), theirs([plain], **options), theirs([exact], **options)]
    for _ in range(5):
        grad = torch.randn(shape)
        for param, optimizer in zip((mine, plain, exact), optimizers, strict=True):
            param.grad = grad.to(param.dtype)
            optimizer.step()
    if mine.numel():
        ulp = torch.finfo(torch.float32).eps * exact.detach().abs().max()
        assert (mine - exact).abs().max() <= 2 * (plain - exact).abs().max() + ulp


@rules
@backends
def test_dormant_memory_is_never_read_nor_written(ours, theirs, options, native, monkeypatch):
    monkeypatch.setattr(base, "_NATIVE", native and base._NATIVE)
    dim, other = ee.ElasticDim(3, 8), ee.ElasticDim(5, 9)
    params = [parameter((8, 9), (dim, other)), parameter((8,), (dim,)), parameter((12, 9), (None, other))]
    params.append(parameter((17, 3), (ee.concat(dim, other), None)))
    optimizer = ours(params, **options)
    for param in params:
        param.grad = torch.zeros_like(param)
    optimizer.step()
    hidden = []
    for param in params:
        mask = active_mask(param)
        for tensor in (param.data, param.grad, *optimizer.state[param].values()):
            if tensor.shape == param.shape and tensor.is_floating_point():
                tensor[~mask] = float("nan")
                hidden.append((tensor, mask))
    for _ in range(3):
        for param in params:
            param.grad[active_mask(param)] = 1.0
        optimizer.step()
    for tensor, mask in hidden:
        assert tensor[mask].isfinite().all()
        assert tensor[~mask].isnan().all()


@rules
def test_sleepers_come_back_bit_for_bit(ours, theirs, options):
    torch.manual_seed(0)
    layer = ee.ElasticLinear(6, 8, dtype=torch.float32)
    switch = Switch()
    layer.govern(switch)
    optimizer = ours(layer.parameters(), **options)

    def step():
        for param in layer.parameters():
            param.grad = torch.randn_like(param)
        optimizer.step()

    def memory():
        tensors = [t for p in layer.parameters() for t in (p.detach(), *optimizer.state[p].values()) if t.shape == p.shape]
        return [t.clone() for t in tensors] + [optimizer.step_counts(p) for p in layer.parameters()]

    step()
    before = memory()
    layer.out_dim.resize(5)
    layer.in_dim.resize(2)
    for _ in range(100):
        step()
    layer.out_dim.resize(8)
    layer.in_dim.resize(6)
    for old, new in zip(before, memory(), strict=True):
        assert torch.equal(old[5:], new[5:])
        assert old.dim() == 1 or torch.equal(old[:, 2:], new[:, 2:])
    before = memory()
    switch.set(False)
    for _ in range(3):
        step()
    assert all(torch.equal(a, b) for a, b in zip(before, memory(), strict=True))
    switch.set(True)
    step()
    assert not torch.equal(before[0], layer.weight)


@backends
def test_the_first_step_of_a_newborn_corner_is_lr(native, monkeypatch):
    monkeypatch.setattr(base, "_NATIVE", native and base._NATIVE)
    rows, columns = ee.ElasticDim(4, 8), ee.ElasticDim(4, 8)
    param = parameter((8, 8), (rows, columns))
    optimizer = ee.optim.AdamW([param], lr=0.01, weight_decay=0)
    for width in (4, 6):
        columns.resize(width)
        for _ in range(200):
            param.grad = torch.randn_like(param)
            optimizer.step()
    optimizer.reset_state(param, 1, 4, 8)
    rows.resize(8)
    columns.resize(8)
    before = param.detach().clone()
    param.grad = torch.randn_like(param)
    optimizer.step()
    moved = (param.detach() - before).abs()
    assert torch.allclose(moved[:, 4:], torch.tensor(0.01), rtol=1e-4)
    assert torch.allclose(moved[4:], torch.tensor(0.01), rtol=1e-4)
    assert not torch.allclose(moved[:4, :4], torch.tensor(0.01), rtol=1e-2)


@backends
def test_state_follows_a_permutation_into_single_bands(native, monkeypatch):
    monkeypatch.setattr(base, "_NATIVE", native and base._NATIVE)
    torch.manual_seed(0)
    rows, columns = ee.ElasticDim(2, 20), ee.ElasticDim(3, 30)
    param = parameter((20, 30), (rows, columns), dtype=torch.float64)
    optimizer, elements = ee.optim.AdamW([param], **ADAM), Elements(param, torch.optim.AdamW, ADAM)
    order = torch.arange(20 * 30).view(20, 30)

    def step():
        param.grad = torch.randn_like(param)
        whole, mask = torch.empty(20 * 30, dtype=torch.float64), torch.empty(20 * 30, dtype=torch.bool)
        whole[order.flatten()], mask[order.flatten()] = param.grad.flatten(), active_mask(param).flatten()
        elements.step(whole, mask)
        optimizer.step()

    for width in (9, 15, 27, 30):
        rows.resize(width // 3)
        columns.resize(width)
        step()
    for axis in (0, 1):
        shuffled = torch.randperm(param.shape[axis])
        param.data.copy_(param.data.index_select(axis, shuffled))
        optimizer.permute_state(param, axis, shuffled)
        order = order.index_select(axis, shuffled)
        step()
    assert torch.equal(optimizer.step_counts(param), elements.counts.view(20, 30).take(order))
    torch.testing.assert_close(param.detach(), elements.values(param).take(order), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=["half", "float"])
@pytest.mark.parametrize("way", ["state_dict", "deepcopy", "pickle", "save"])
def test_a_copy_goes_on_bit_for_bit(way, dtype):
    torch.manual_seed(0)
    layer = ee.ElasticLinear(4, 6, max_out_features=9, dtype=dtype)
    optimizer = ee.optim.AdamW(layer.parameters(), lr=torch.tensor(0.01))

    def step(layer, optimizer):
        generator = torch.Generator().manual_seed(1)
        for param in layer.parameters():
            param.grad = torch.randn(param.shape, generator=generator).to(dtype)
        optimizer.step()

    for width in (6, 9, 5):
        layer.out_dim.resize(width)
        step(layer, optimizer)
    for param in layer.parameters():
        StepCounts.unpack(optimizer.state[param]["step"], param.shape).table += 2**40  # beyond what a float holds
    if way == "state_dict":
        other = copy.deepcopy(layer)
        twin = ee.optim.AdamW(other.parameters())
        twin.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    elif way == "deepcopy":
        other, twin = copy.deepcopy((layer, optimizer))
    elif way == "pickle":
        other, twin = pickle.loads(pickle.dumps((layer, optimizer)))
    else:
        file = io.BytesIO()
        torch.save({"layer": layer, "optimizer": optimizer}, file)
        file.seek(0)
        loaded = torch.load(file, weights_only=False)
        other, twin = loaded["layer"], loaded["optimizer"]
    for width in (7, 9):
        for one, its in ((layer, optimizer), (other, twin)):
            one.out_dim.resize(width)
            step(one, its)
    for mine, theirs in zip(layer.parameters(), other.parameters(), strict=True):
        assert mine is not theirs
        assert torch.equal(mine, theirs)
        assert torch.equal(optimizer.step_counts(mine), twin.step_counts(theirs))


def test_state_of_torch_adamw_loads():
    mine, plain = (nn.Parameter(torch.ones(3)) for _ in range(2))
    optimizer, source = ee.optim.AdamW([mine]), torch.optim.AdamW([plain])
    for param, its in ((plain, source), (plain, source)):
        param.grad = torch.ones(3)
        its.step()
    mine.data.copy_(plain.data)
    state = source.state_dict()
    optimizer.load_state_dict({"state": copy.deepcopy(state["state"]), "param_groups": optimizer.state_dict()["param_groups"]})
    mine.grad = plain.grad = torch.ones(3)
    optimizer.step()
    source.step()
    torch.testing.assert_close(mine, plain)
    assert optimizer.step_counts(mine).tolist() == [3, 3, 3]


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=["contiguous", "channels_last"])
def test_convolution_weights_of_either_memory_format(memory_format):
    torch.manual_seed(0)
    rows, columns = ee.ElasticDim(3, 6), ee.ElasticDim(2, 5)
    param = parameter((6, 5, 3, 3), (rows, columns, None, None), memory_format=memory_format)
    plain = nn.Parameter(param.detach()[:3, :2].clone())
    optimizer, theirs = ee.optim.AdamW([param], **ADAM), torch.optim.AdamW([plain], **ADAM)
    for same_strides in (True, True, False):
        param.grad = torch.randn_like(param) if same_strides else torch.randn(5, 6, 3, 3).transpose(0, 1)
        plain.grad = param.grad[:3, :2].clone()
        optimizer.step()
        theirs.step()
    torch.testing.assert_close(param[:3, :2], plain)
    assert optimizer.state[param]["exp_avg"].stride() == param.stride()


@pytest.mark.parametrize("ours", [ee.optim.AdamW, ee.optim.SGD], ids=["adamw", "sgd"])
def test_schedulers_groups_and_closures(ours):
    layer = ee.ElasticLinear(3, 2, max_out_features=4)
    optimizer = ours([{"params": [layer.weight]}, {"params": [layer.bias], "lr": 0.5}], lr=0.1)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.1)
    before = layer.bias.detach().clone()

    def closure():
        optimizer.zero_grad()
        loss = layer(torch.ones(1, 3)).square().sum()
        loss.backward()
        return loss

    assert optimizer.step(closure) > 0
    scheduler.step()
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.01, 0.05])
    assert not torch.equal(layer.bias[:2], before[:2])
    assert torch.equal(layer.bias[2:], before[2:])
    layer.weight.grad = None
    kept = layer.weight.detach().clone()
    optimizer.step()
    assert torch.equal(layer.weight, kept)


def test_a_backward_across_a_step_raises():
    layer = ee.ElasticLinear(3, 2)
    x = torch.ones(1, 3, requires_grad=True)
    loss = layer(x).sum()
    layer.weight.grad, layer.bias.grad = torch.ones(2, 3), torch.ones(2)
    ee.optim.AdamW(layer.parameters()).step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda p: ee.optim.AdamW(p, lr=-1), "AdamW: lr: expected a number of at least 0, got -1"),
        (lambda p: ee.optim.AdamW(p, lr=torch.ones(2)), "AdamW: lr: expected one number, got a tensor of shape"),
        (lambda p: ee.optim.AdamW(p, betas=(0.9, 1.0)), r"AdamW: betas\[1\]: expected a number of at least 0 and less than 1, got 1.0"),
        (lambda p: ee.optim.AdamW(p, eps=math.nan), "AdamW: eps: expected a number"),
        (lambda p: ee.optim.SGD(p, momentum="much"), "SGD: momentum: expected a number of at least 0, got 'much'"),
        (lambda p: ee.optim.SGD(p, nesterov=True), "SGD: nesterov: expected momentum above 0"),
    ],
    ids=["lr", "lr-tensor", "beta", "eps", "momentum", "nesterov"],
)
def test_bad_hyperparameters_are_refused(build, message):
    with pytest.raises(OptimizerError, match=message):
        build([nn.Parameter(torch.ones(2))])


def test_a_sparse_gradient_is_refused_before_anything_changes():
    dense, table = nn.Parameter(torch.ones(3)), nn.Embedding(4, 2, sparse=True)
    dense.grad = torch.ones(3)
    table(torch.tensor([1])).sum().backward()
    optimizer = ee.optim.AdamW([dense, table.weight])
    with pytest.raises(OptimizerError, match=r"AdamW: parameter 1 of group 0: expected a dense gradient, got torch.sparse_coo"):
        optimizer.step()
    assert torch.equal(dense, torch.ones(3))
    assert not optimizer.state
