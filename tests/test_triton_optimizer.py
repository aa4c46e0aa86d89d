"""AdamW, SGD and ``clip_grad_norm_`` through Triton's kernels: against torch, against the path of the CPU, and for any widths.

Without a GPU the kernels run in Triton's interpreter.
"""

import copy
import math
import pickle

import pytest
import torch
from contract import assert_as_exact
from kernels import DEVICE
from test_optim import RULES, Elements, active_mask, parameter, rules
from torch import nn
from triton.runtime import interpreter

import esper_elastic as ee
from esper_elastic.control import Switch
from esper_elastic.errors import OptimizerError
from esper_elastic.ops import optimizer as ops
from esper_elastic.optim import base
from esper_elastic.optim.counts import StepCounts, dense_counts
from esper_elastic.triton_kernels import launch
from esper_elastic.triton_kernels import optimizer as kernels

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


class Chosen:
    """Whether kernels serve at the moment."""

    on = True


@pytest.fixture(autouse=True)
def chosen(monkeypatch):
    torch.manual_seed(0)
    now = Chosen()
    monkeypatch.setattr(ops, "triton_steps", lambda device: now.on and device.type == DEVICE.type)
    return now


def elastic(shape, axes, switches=(), **options):
    """A parameter with elastic axes, where the kernels run."""
    param = parameter(shape, axes, switches, **options)
    param.data = param.data.to(DEVICE)
    return param


def params_of_all_kinds(dtype=torch.float32):
    """Parameters of many layouts, the dims and the switch that they depend on."""
    rows, columns, switch = ee.ElasticDim(5, 8), ee.ElasticDim(11, 24), Switch()
    plain = nn.Parameter(torch.randn(37, 3, device=DEVICE, dtype=dtype))
    odd = nn.Parameter(torch.randn(200, device=DEVICE, dtype=dtype)[1:193].view(8, 24))  # begins off the grid of 16 bytes
    params = [
        elastic((8, 24), (rows, columns), dtype=dtype),
        elastic((70, 24), (None, columns), dtype=dtype),
        elastic((8,), (rows,), dtype=dtype),
        elastic((8, 24, 3, 3), (rows, columns, None, None), dtype=dtype),
        elastic((8, 24, 3, 3), (rows, columns, None, None), dtype=dtype, memory_format=torch.channels_last),
        elastic((8 * 4 + 24, 48), (ee.concat(rows * 4, columns), ee.concat(columns, columns)), dtype=dtype),
        elastic((24, 8), (columns, rows), (switch,), dtype=dtype),
        plain,
        odd,
    ]
    base.registry.register(odd, (rows, columns), ())
    return params, rows, columns, switch


def fill_gradients(params, generator=None):
    """Random where active, NaN where dormant."""
    for param in params:
        grad = torch.randn(param.shape, generator=generator).to(DEVICE)
        param.grad = torch.empty_like(param).copy_(torch.where(awake(param), grad, math.nan))


def awake(param):
    """Which elements are active, of plain parameters too."""
    elastic = base.registry.lookup(param) is not None
    return (active_mask(param) if elastic else torch.ones(param.shape, dtype=torch.bool)).to(DEVICE)


@rules
def test_every_element_steps_as_if_it_were_alone(ours, theirs, options):
    rows, columns = ee.ElasticDim(3, 7), ee.ElasticDim(2, 5)
    param = elastic((7, 5, 2), (rows, columns, None))
    optimizer, elements = ours([param], **options), Elements(param.cpu(), theirs, options)
    for width in [(3, 2), (3, 2), (7, 1), (1, 5), (5, 3), (7, 5), (7, 5), (2, 2)]:
        rows.resize(width[0])
        columns.resize(width[1])
        fill_gradients([param])
        elements.step(param.grad.cpu(), active_mask(param))
        optimizer.step()
    torch.testing.assert_close(param.detach().cpu().double(), elements.values(param), rtol=1e-6, atol=1e-6)
    if ours is ee.optim.AdamW or options.get("dampening"):
        assert torch.equal(optimizer.step_counts(param).cpu().flatten(), elements.counts)
    else:
        assert "step" not in optimizer.state.get(param, {})


@rules
@pytest.mark.parametrize("shape", [(), (1,), (0, 3), (33, 17), (6, 4, 3, 3), (1700,)], ids=str)
def test_at_full_width_it_is_as_exact_as_torch(ours, theirs, options, shape):
    check_exactness(ours, theirs, options, shape, torch.float32)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("rule", ["adamw", "amsgrad", "momentum", "nesterov"])
def test_narrow_types(rule, dtype):
    ours, theirs, options = RULES[rule]
    check_exactness(ours, theirs, options, (33, 17), dtype)


def check_exactness(ours, theirs, options, shape, dtype):
    start = torch.randn(shape).to(dtype)
    mine = nn.Parameter(start.to(DEVICE))
    plain, exact = nn.Parameter(start.clone()), nn.Parameter(start.double())
    optimizers = [ours([mine], **options), theirs([plain], **options), theirs([exact], **options)]
    for _ in range(5):
        grad = torch.randn(shape).to(dtype)
        for param, optimizer in zip((mine, plain, exact), optimizers, strict=True):
            param.grad = grad.to(param)
            optimizer.step()
    assert_as_exact(mine.detach().cpu(), plain.detach(), exact.detach())


@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.0, 0.9), (0.5, 0.99999), (0.99, 0.9999999)], ids=str)
@pytest.mark.parametrize("count", [0, 9, 700, 65534, 10**6])
def test_bias_correction_is_as_exact_as_torchs(betas, count):
    grad = torch.randn(64)
    results = []
    for kind, dtype in ((ee.optim.AdamW, torch.float32), (torch.optim.AdamW, torch.float32), (torch.optim.AdamW, torch.float64)):
        param = nn.Parameter(torch.zeros(64, dtype=dtype, device=DEVICE if kind is ee.optim.AdamW else "cpu"))
        optimizer = kind([param], lr=1.0, betas=betas)
        param.grad = grad.to(param)
        if count:
            moments = {"exp_avg": torch.zeros_like(param), "exp_avg_sq": torch.zeros_like(param)}
            optimizer.state[param] = {"step": torch.tensor(float(count)), **moments}
        optimizer.step()
        results.append(param.detach().cpu())
        if kind is ee.optim.AdamW:
            few = max(betas) ** 65535 < 2**-25
            assert optimizer.state[param]["step"].dtype == (torch.int16 if few else torch.int32)
            assert (optimizer.step_counts(param) == (min(count + 1, 65535) if few else count + 1)).all()
    assert_as_exact(*results)


@pytest.mark.parametrize("rule", ["sgd", "amsgrad", "momentum"])
def test_dormant_memory_is_never_read_nor_written(rule):
    ours, _, options = RULES[rule]
    params, rows, _, switch = params_of_all_kinds()
    optimizer = ours(params, **options)
    fill_gradients(params)
    optimizer.step()
    switch.set(False)
    rows.resize(3)
    hidden = []
    for param in params:
        mask = awake(param)
        for tensor in (param.data, *optimizer.state.get(param, {}).values()):
            tensor[~mask] = -1 if tensor.dtype == torch.int16 else math.nan
            hidden.append((tensor, mask))
    for _ in range(2):
        fill_gradients(params)
        ee.optim.clip_grad_norm_(params, 0.1)
        optimizer.step()
    for tensor, mask in hidden:
        assert tensor[mask].isfinite().all()
        assert (tensor[mask] >= 0).all() or tensor.dtype != torch.int16
        assert (tensor[~mask] == -1).all() if tensor.dtype == torch.int16 else tensor[~mask].isnan().all()
    for param in params:
        assert torch.equal(param.grad.isfinite(), awake(param))


def test_what_is_active_steps_and_nothing_else():
    params, rows, columns, switch = params_of_all_kinds()
    optimizer = ee.optim.SGD(params, lr=1.0)
    for width, on in ((1, True), (8, True), (4, False), (5, True)):
        rows.resize(width)
        columns.resize(3 * width)
        switch.set(on)
        before = [param.detach().clone() for param in params]
        for param in params:
            param.grad = torch.ones_like(param)
        optimizer.step()
        for param, old in zip(params, before, strict=True):
            mask = awake(param)
            assert torch.equal(param.detach(), torch.where(mask, old - 1, old))


@pytest.mark.parametrize("rule", ["amsgrad", "momentum", "nesterov"])
def test_any_sequence_does_what_it_does_on_the_cpu(rule, chosen):
    ours, _, options = RULES[rule]
    net = Net()
    nets = net.to(DEVICE), copy.deepcopy(net).cpu()
    optimizers = [ours(each.parameters(), **options) for each in nets]
    random = torch.Generator().manual_seed(1)

    def draw(low, high):
        return int(torch.randint(low, high + 1, (), generator=random))

    for number in range(18):
        kind, width, seed = draw(0, 5), draw(1, 9), draw(0, 99)
        for by_kernels, net, optimizer in zip((True, False), nets, optimizers, strict=True):
            chosen.on = by_kernels
            torch.manual_seed(seed)
            dim = net.hidden if number % 2 else net.wide
            if kind == 0:
                dim.resize(width)
            elif kind == 1:
                net.branch.switch.set(not net.branch.switch.on)
            elif kind == 2:
                dim.grow(max(dim.active, width), init="split" if number % 3 else "zero")
            elif kind == 3:
                dim.keep(sorted(torch.randperm(dim.active)[: max(1, dim.active - 1)].tolist()))
            fill_gradients(net.parameters(), torch.Generator().manual_seed(seed))
            before = [param.detach().clone() for param in net.parameters()]
            optimizer.step()
            for param, old in zip(net.parameters(), before, strict=True):
                mask = active_mask(param).to(param.device)
                assert torch.equal(param[~mask], old[~mask])
                assert mask.sum() == 0 or not torch.equal(param[mask], old[mask])
        for mine, its in zip(nets[0].parameters(), nets[1].parameters(), strict=True):
            torch.testing.assert_close(mine.cpu(), its, rtol=1e-5, atol=1e-6)
            if "step" in optimizers[0].state.get(mine, {}):
                assert torch.equal(optimizers[0].step_counts(mine).cpu(), optimizers[1].step_counts(its))


class Net(nn.Module):
    """Shared dims, a switched branch, a concatenation."""

    def __init__(self):
        super().__init__()
        self.hidden, self.wide = ee.ElasticDim(4, 9), ee.ElasticDim(9, 9)
        self.first = ee.ElasticLinear(5, 4, out_dim=self.hidden)
        self.branch = ee.ElasticBlock(ee.ElasticLinear(4, 9, in_dim=self.hidden, out_dim=self.wide), kind="branch")
        self.last = ee.ElasticLinear(13, 3, in_dim=ee.concat(self.hidden, self.wide))


@pytest.mark.parametrize("rule", [name for name in RULES if name != "sgd"])
@pytest.mark.parametrize("way", ["state_dict", "pickle"])
@pytest.mark.parametrize("first", [True, False], ids=["from kernels", "to kernels"])
def test_state_goes_from_one_form_to_the_other_and_back(rule, way, first, chosen):
    ours, _, options = RULES[rule]
    dim = ee.ElasticDim(9, 9)
    param = elastic((9, 12), (dim, None))
    optimizer = ours([param], **options)
    plain = nn.Parameter(param.detach().clone())
    base.registry.register(plain, (dim, None), ())
    same = ours([plain], **options)

    for by_kernels, widths in ((first, (4, 3)), (not first, (9, 6)), (first, (9, 7))):
        for width in widths:
            dim.resize(width)
            plain.grad = param.grad = torch.randn(param.shape, device=DEVICE)
            chosen.on = by_kernels
            optimizer.step()
            chosen.on = False
            same.step()
        state = copy.deepcopy(optimizer.state_dict())
        state = pickle.loads(pickle.dumps(state)) if way == "pickle" else state
        optimizer = ours([param], **options)
        optimizer.load_state_dict(state)
        torch.testing.assert_close(param, plain, rtol=1e-5, atol=1e-6)
        if rule != "nesterov":
            assert torch.equal(optimizer.step_counts(param).cpu(), same.step_counts(plain))


def test_counts_of_either_form_are_the_same():
    param = nn.Parameter(torch.randn(4, 6, 3, 3).contiguous(memory_format=torch.channels_last))
    counts = StepCounts(param.shape).advance([[(0, 3)], [(2, 3)], [(0, 3)], [(0, 3)]])
    counts.table[1:, 1:] += 70000
    for dtype, most in ((torch.int16, 65535), (torch.int32, 2**31 - 1)):
        dense = dense_counts(param, counts.packed, dtype)
        assert dense.dtype == dtype and dense.stride() == param.stride()
        assert torch.equal(StepCounts.unpack(dense, param.shape).dense(), counts.dense().clamp(max=most))
        assert dense_counts(param, dense, dtype) is dense
    assert dense_counts(param, dense, torch.int16) is dense
    assert dense_counts(param, dense_counts(param, counts.packed, torch.int16), torch.int32).max() == 65535
    counts.table += 2**40
    assert dense_counts(param, counts.packed, torch.int32).max() == 2**31 - 1


def test_betas_that_take_larger_counts_are_heard_at_the_next_step():
    param = nn.Parameter(torch.ones(5, device=DEVICE))
    optimizer = ee.optim.AdamW([param])
    for beta, dtype in ((0.999, torch.int16), (0.999999, torch.int32), (0.999, torch.int32)):
        optimizer.param_groups[0]["betas"] = (0.9, beta)
        param.grad = torch.ones_like(param)
        optimizer.step()
        assert optimizer.state[param]["step"].dtype == dtype
    assert optimizer.step_counts(param).tolist() == [3] * 5


def test_counts_stop_at_the_largest_value():
    param = nn.Parameter(torch.ones(5, device=DEVICE))
    for betas, dtype, most in (((0.9, 0.999), torch.int16, 65535), ((0.9, 0.999999), torch.int32, 2**31 - 1)):
        optimizer = ee.optim.AdamW([param], betas=betas)
        param.grad = torch.ones_like(param)
        optimizer.step()
        optimizer.state[param]["step"].fill_(most - 1 if dtype == torch.int32 else -2)
        for _ in range(2):
            optimizer.step()
            assert optimizer.step_counts(param).tolist() == [most] * 5
        assert optimizer.state[param]["step"].dtype == dtype


def test_permutation_and_birth_write_counts_in_place():
    dim = ee.ElasticDim(4, 6)
    param = elastic((6, 3), (dim, None))
    optimizer = ee.optim.AdamW([param])
    for width in (6, 4, 2):
        dim.resize(width)
        param.grad = torch.ones_like(param)
        optimizer.step()
    before = dict(optimizer.state[param])
    optimizer.permute_state(param, 0, torch.tensor([5, 0, 1, 2, 3, 4]))
    assert optimizer.step_counts(param)[:, 0].tolist() == [1, 3, 3, 2, 2, 1]
    optimizer.reset_state(param, 0, 1, 3)
    assert optimizer.step_counts(param)[:, 0].tolist() == [1, 0, 0, 2, 2, 1]
    assert all(optimizer.state[param][name] is tensor for name, tensor in before.items())


def test_the_first_step_of_a_newborn_corner_is_lr():
    rows, columns = ee.ElasticDim(4, 8), ee.ElasticDim(4, 8)
    param = elastic((8, 8), (rows, columns))
    optimizer = ee.optim.AdamW([param], lr=0.01, weight_decay=0)
    for width in (4, 6):
        columns.resize(width)
        for _ in range(20):
            fill_gradients([param])
            optimizer.step()
    optimizer.reset_state(param, 1, 4, 8)
    rows.resize(8)
    columns.resize(8)
    before = param.detach().clone()
    fill_gradients([param])
    optimizer.step()
    step = (param.detach() - before).abs().cpu()
    assert torch.allclose(step[:, 4:], torch.tensor(0.01), rtol=1e-4)
    assert torch.allclose(step[4:], torch.tensor(0.01), rtol=1e-4)
    assert not torch.allclose(step[:4, :4], torch.tensor(0.01), rtol=1e-2)


@pytest.mark.parametrize("rule", ["adamw", "momentum", "sgd"])
def test_launches_that_were_recorded_follow_widths_switches_and_the_learning_rate(rule, monkeypatch, chosen):
    """What a CUDA graph does: the same launches again, on the same tables, with no Python in between."""
    ours, _, options = RULES[rule]
    lr = torch.tensor([0.1], device=DEVICE)
    rows, columns, switch = ee.ElasticDim(3, 8), ee.ElasticDim(24, 24), Switch()
    params = [elastic((8, 24), (rows, columns)), elastic((8,), (rows,), (switch,)), nn.Parameter(torch.randn(700, device=DEVICE))]
    optimizer = ours(params, **{**options, "lr": lr})
    fill_gradients(params)
    launches = recorded(monkeypatch)
    ee.optim.clip_grad_norm_(params, 1.0)
    optimizer.step()
    monkeypatch.undo()
    assert len(launches) == 4 + 2
    for width, on, rate in ((8, True, 0.1), (2, True, 0.01), (5, False, 0.2)):
        rows.resize(width)
        switch.set(on)
        lr.fill_(rate)
        twins, its = copy_of(params, optimizer, rate)
        for param, twin in zip(params, twins, strict=True):
            grad = param.grad
            fill_gradients([param])
            twin.grad = param.grad.clone()
            param.grad = grad.copy_(param.grad)
        chosen.on = False
        ee.optim.clip_grad_norm_(twins, 1.0)
        its.step()
        for again in launches:
            again()
        for param, twin in zip(params, twins, strict=True):
            torch.testing.assert_close(param, twin, rtol=1e-6, atol=1e-6)
            torch.testing.assert_close(param.grad, twin.grad, rtol=1e-5, atol=0, equal_nan=True)
            if "step" in optimizer.state.get(param, {}):
                assert torch.equal(optimizer.step_counts(param), its.step_counts(twin))


def copy_of(params, optimizer, rate):
    """Parameters of the same axes, and an optimizer in the same state."""
    twins = [nn.Parameter(param.detach().clone()) for param in params]
    for twin, param in zip(twins, params, strict=True):
        known = base.registry.lookup(param)
        if known is not None:
            base.registry.register(twin, known.axes, known.switches)
    its = type(optimizer)(twins, **{**optimizer.defaults, "lr": rate})
    its.load_state_dict({**copy.deepcopy(optimizer.state_dict()), "param_groups": its.state_dict()["param_groups"]})
    return twins, its


def recorded(monkeypatch):
    """From now on, a list of all launches, each as a call that does it again."""
    launches = []

    def record(kernel):
        run = kernel.run

        def noted(*args, **kwargs):
            launches.append(lambda: run(*args, **kwargs))
            return run(*args, **kwargs)

        monkeypatch.setattr(kernel, "run", noted)

    for name, kernel in vars(kernels).items():
        if name.endswith("_kernel"):
            record(kernel)
    return launches


@pytest.mark.skipif(DEVICE.type != "cuda", reason="needs a GPU to capture a graph on")
@pytest.mark.gpu
@pytest.mark.parametrize("rule", ["adamw", "momentum"])
def test_a_captured_graph_follows_widths_switches_and_the_learning_rate(rule):
    ours, _, options = RULES[rule]
    lr = torch.tensor([0.1], device=DEVICE)
    params, rows, columns, switch = params_of_all_kinds()
    optimizer = ours(params, **{**options, "lr": lr})
    given = [torch.zeros_like(param) for param in params]

    def step():
        for param, grad in zip(params, given, strict=True):
            param.grad = grad.clone()  # in memory of the graph, as after a captured backward
        ee.optim.clip_grad_norm_(params, 1.0)
        optimizer.step()

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    for width, on, rate in ((8, True, 0.1), (2, True, 0.01), (5, False, 0.2)):
        rows.resize(width)
        columns.resize(3 * width)
        switch.set(on)
        lr.fill_(rate)
        twins, its = copy_of(params, optimizer, rate)
        for grad, twin in zip(given, twins, strict=True):
            twin.grad = grad.copy_(torch.randn_like(grad)).clone()
        ee.optim.clip_grad_norm_(twins, 1.0)
        torch.cuda.set_sync_debug_mode("error")
        try:
            its.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        graph.replay()
        for param, twin in zip(params, twins, strict=True):
            assert torch.equal(param, twin)


def test_state_is_not_allocated_in_a_graph(monkeypatch):
    param = nn.Parameter(torch.ones(5, device=DEVICE))
    param.grad = torch.ones_like(param)
    optimizer = ee.optim.AdamW([param])
    monkeypatch.setattr(ops, "capturing", lambda device: True)
    with pytest.raises(OptimizerError, match=r"AdamW: state of a parameter of shape \(5,\) would be allocated by a CUDA graph"):
        optimizer.step()
    assert not optimizer.state[param]
    monkeypatch.undo()
    assert torch.equal(param, torch.ones_like(param))


def test_tables_of_a_graph_are_its_own_or_kept_for_good(monkeypatch):
    mirror, large = ops._Mirror(DEVICE), [2**62 + 1, -1, 7]
    before = mirror.hold(large)
    assert mirror.hold(list(large)) is before
    monkeypatch.setattr(ops, "capturing", lambda device: True)
    monkeypatch.setattr(ops, "_read_by_graphs", set())
    assert mirror.hold(large) is before and before in ops._read_by_graphs
    other = mirror.hold([2**62 + 3, 5, 6])
    assert other.tolist() == [2**62 + 3, 5, 6] and other not in ops._read_by_graphs
    monkeypatch.setattr(ops, "capturing", lambda device: False)
    assert mirror.hold(large) is before and before.tolist() == large


def test_tables_are_sent_again_only_when_addresses_change():
    params, *_ = params_of_all_kinds()
    optimizer = ee.optim.AdamW(params)
    tables = []
    for _ in range(2):
        for param in params:
            param.grad = torch.ones_like(param) if param.grad is None else param.grad.fill_(1)
        optimizer.step()
        (_, batch), *others = optimizer._batches.values()
        assert not others
        tables.append([mirror._table for mirror in (batch._pieces, batch._tensors, batch._addresses)])
    assert all(a is b for a, b in zip(*tables, strict=True))
    kept = params[0].grad
    params[0].grad = kept.clone()
    optimizer.step()
    assert batch._addresses._table is not tables[0][2] and batch._tensors._table is tables[0][1]
    optimizer.state[params[0]]["exp_avg"] = optimizer.state[params[0]]["exp_avg"].clone()
    params[1].data = params[1].data.clone()
    optimizer.step()
    (_, batch), *_ = optimizer._batches.values()
    assert batch._tensors._table[0].item() == params[0].data_ptr()
    assert batch._tensors._table[1].item() == params[1].data_ptr()


def test_gradients_and_state_that_lie_otherwise_are_copied_into_place():
    dim = ee.ElasticDim(4, 6)
    param, twin = (elastic((6, 4), (dim, None)) for _ in range(2))
    twin.data.copy_(param.data)
    optimizer, its = ee.optim.AdamW([param]), ee.optim.AdamW([twin])
    for number in range(3):
        grad = torch.randn(4, 6, device=DEVICE).T
        param.grad, twin.grad = grad, grad.contiguous()
        optimizer.step()
        its.step()
        if number == 0:
            state = optimizer.state_dict()
            for name, tensor in state["state"][0].items():
                state["state"][0][name] = tensor.T.contiguous().T
            optimizer.load_state_dict(state)
    assert torch.equal(param, twin)
    assert optimizer.state[param]["exp_avg"].is_contiguous()
    optimizer.state[param]["exp_avg"] = torch.zeros(4, 6, device=DEVICE)
    with pytest.raises(OptimizerError, match=r"of a parameter of shape \(6, 4\): expected that shape, got \(4, 6\)"):
        optimizer.step()


def test_what_kernels_do_not_serve_goes_on_as_before():
    dims = [ee.ElasticDim(2, 3) for _ in range(3)]
    three = elastic((3, 3, 3), dims)
    double = elastic((3, 3), dims[:2], dtype=torch.float64)
    inside = elastic((2, 3, 3), (None, *dims[:2]))
    gaps = nn.Parameter(torch.randn(4, 6, device=DEVICE)[:, ::2])
    served = elastic((3,), dims[:1])
    params = [three, double, inside, gaps, served]
    optimizer = ee.optim.AdamW(params, lr=0.01, weight_decay=0)
    before = [param.detach().clone() for param in params]
    fill_gradients(params)
    ee.optim.clip_grad_norm_(params, 1.0)
    optimizer.step()
    assert [optimizer._plans[param].pieces is None for param in params] == [True, True, True, True, False]
    for param, old in zip(params, before, strict=True):
        mask = awake(param)
        assert torch.allclose((param.detach() - old).abs()[mask].float(), torch.tensor(0.01, device=DEVICE), rtol=1e-3)
        assert torch.equal(param[~mask], old[~mask])


def test_a_backward_across_a_step_raises():
    weight = nn.Parameter(torch.ones(3, device=DEVICE))
    loss = (weight * weight).sum()
    weight.grad = torch.ones_like(weight)
    ee.optim.AdamW([weight]).step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_many_pieces_are_counted_in_turns(monkeypatch):
    monkeypatch.setattr(kernels, "_PIECES", 4)
    dims = [ee.ElasticDim(width, 40) for width in (40, 3, 17, 1, 29)]
    param = elastic((200, 80), (ee.concat(*dims), ee.concat(dims[0], dims[1])))
    mask = active_mask(param)
    optimizer = ee.optim.SGD([param], lr=1.0)
    before = param.detach().clone().cpu()
    fill_gradients([param])
    optimizer.step()
    assert torch.equal(param.detach().cpu(), torch.where(mask, before - param.grad.cpu(), before))


NORMS = (1.0, 2.0, math.inf, 3.0)


@pytest.mark.parametrize("by_kernels", [True, False], ids=["kernels", "views"])
@pytest.mark.parametrize("norm_type", NORMS)
@pytest.mark.parametrize("max_norm", [0.5, 1e6], ids=["clipped", "left"])
def test_clipping_is_torchs_on_the_active_part(by_kernels, norm_type, max_norm, chosen):
    chosen.on = by_kernels
    params, _, _, switch = params_of_all_kinds()
    fill_gradients(params)
    for on in (True, False):
        switch.set(on)
        masks = [awake(param) for param in params]
        grads = [param.grad.clone() for param in params]
        dense = [nn.Parameter(torch.empty(int(mask.sum()), device=DEVICE)) for mask in masks if mask.any()]
        for param, grad in zip(dense, [grad[mask] for grad, mask in zip(grads, masks, strict=True) if mask.any()], strict=True):
            param.grad = grad
        expected = torch.nn.utils.clip_grad_norm_(dense, max_norm, norm_type)
        got = ee.optim.clip_grad_norm_((param for param in params), max_norm, norm_type)
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=0)
        rest = iter(dense)
        for param, grad, mask in zip(params, grads, masks, strict=True):
            if mask.any():
                torch.testing.assert_close(param.grad[mask], next(rest).grad, rtol=1e-5, atol=0)
            assert torch.equal(param.grad[~mask].view(torch.int32), grad[~mask].view(torch.int32))


@pytest.mark.parametrize("norm_type", NORMS[:3])
def test_clipping_of_several_types_and_unserved_gradients_at_once(norm_type):
    params = [nn.Parameter(torch.ones(300, device=DEVICE, dtype=dtype)) for dtype in (*DTYPES, torch.float64)]
    twins = [nn.Parameter(param.detach().clone()) for param in params]
    for param, twin in zip(params, twins, strict=True):
        param.grad = torch.randn(300, device=DEVICE).to(param.dtype)
        twin.grad = param.grad.clone()
    got = ee.optim.clip_grad_norm_(params, 0.1, norm_type)
    expected = torch.nn.utils.clip_grad_norm_(twins, 0.1, norm_type)
    assert got.dtype == expected.dtype and got.shape == expected.shape
    torch.testing.assert_close(got, expected, rtol=1e-2, atol=0)
    for param, twin in zip(params, twins, strict=True):
        torch.testing.assert_close(param.grad, twin.grad, rtol=2e-2, atol=0)


@pytest.mark.parametrize("by_kernels", [True, False], ids=["kernels", "views"])
@pytest.mark.parametrize("norm_type", NORMS[:3])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_clipping_of_what_is_not_finite(by_kernels, norm_type, bad, chosen):
    chosen.on = by_kernels
    param, twin = (nn.Parameter(torch.ones(700, device=DEVICE)) for _ in range(2))
    for each in (param, twin):
        each.grad = torch.ones_like(each)
        each.grad[5] = bad
    with pytest.raises(RuntimeError, match=rf"total norm of order {norm_type} of the active gradients is non-finite \({bad}\)"):
        ee.optim.clip_grad_norm_(param, 1.0, norm_type, error_if_nonfinite=True)
    assert param.grad[0] == 1
    got = ee.optim.clip_grad_norm_(param, 1.0, norm_type)
    torch.testing.assert_close(got, torch.nn.utils.clip_grad_norm_(twin, 1.0, norm_type), equal_nan=True)
    torch.testing.assert_close(param.grad, twin.grad, equal_nan=True)


def test_without_gradients_the_norm_is_zero():
    assert ee.optim.clip_grad_norm_([nn.Parameter(torch.ones(3, device=DEVICE))], 1.0) == 0
    assert ee.optim.clip_grad_norm_([], 1.0) == 0


def test_a_parameter_that_is_given_twice_counts_once():
    param = nn.Parameter(torch.ones(4, device=DEVICE))
    param.grad = torch.ones_like(param)
    assert ee.optim.clip_grad_norm_([param, param], 1.4).item() == pytest.approx(2)
    assert torch.allclose(param.grad, torch.full_like(param, 0.7))


def test_the_norm_is_the_same_in_every_run():
    params, *_ = params_of_all_kinds()
    fill_gradients(params)
    norms = {ee.optim.clip_grad_norm_(params, 1e9).item() for _ in range(3)}
    assert len(norms) == 1


def test_active_gradients_are_made_zero():
    dim = ee.ElasticDim(3, 8)
    param = elastic((8, 5), (dim, None))
    param.grad = torch.full_like(param, math.nan)
    batch = ops.Batch([ops.pieces_of(param, (dim, None), ())], param.numel(), param.device, param.dtype)
    grads = batch.gradients(dim.block, [param.grad.data_ptr()])
    kernels.scale(grads, kernels.count_tiles(grads), None)
    assert (param.grad[:3] == 0).all() and param.grad[3:].isnan().all()


@pytest.mark.skipif(not launch.INTERPRETED, reason="looks into the interpreter")
def test_what_the_compiler_is_told_of_alignment_is_true(monkeypatch):
    told = set()

    def check(handle, name, values):
        told.add((name, *values))
        assert (handle.data % values[0] == 0).all()

    monkeypatch.setattr(interpreter.TensorHandle, "set_attr", check)
    params, rows, columns, _ = params_of_all_kinds()
    optimizer = ee.optim.SGD(params, lr=0.1)
    for width in (1, 5, 8):
        rows.resize(width)
        columns.resize(3 * width)
        fill_gradients(params)
        optimizer.step()
    assert told == {("tt.divisibility", multiple) for multiple in (1, 4, 16)}
