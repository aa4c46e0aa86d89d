"""ElasticBlock: what an off block gives, and that everything inside it sleeps."""

import copy
import pickle

import pytest
import torch
from contract import needs_kernels
from torch import nn
from torch._dynamo.testing import CompileCounter

import esper_elastic as ee
from esper_elastic import ops
from esper_elastic.errors import GenerationError
from esper_elastic.layers import registry
from esper_elastic.ops import widths as widths_module


def serve_by_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (widths_module, ops):
        monkeypatch.setattr(module, "choose", lambda device, static: "triton" if static else "reference")


def branch(width: int = 6) -> nn.Sequential:
    dim = ee.ElasticDim(width, 8)
    return nn.Sequential(ee.ElasticLinear(4, width, out_dim=dim), nn.ReLU(), ee.ElasticLinear(width, 4, in_dim=dim))


@pytest.mark.parametrize("layout", ["compact", "static"])
@pytest.mark.parametrize("kind", ["block", "branch"])
def test_an_off_block_gives_its_input_and_an_off_branch_zeros(kind: str, layout: str) -> None:
    block = ee.ElasticBlock(branch(), kind=kind)
    ee.set_layout(block, layout)
    x = torch.randn(3, 4)
    on = block(x)
    torch.testing.assert_close(on, block.module(x))
    ee.disable(block, "")
    assert torch.equal(block(x), x if kind == "block" else torch.zeros_like(x))
    ee.enable(block, "")
    assert torch.equal(block(x), on)


@pytest.mark.parametrize("backend", ["auto", pytest.param("triton", marks=needs_kernels)])
@pytest.mark.parametrize("kind", ["block", "branch"])
def test_compiled_static_block_follows_its_switch_without_a_new_frame(kind: str, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if backend == "triton":
        serve_by_triton(monkeypatch)
    block = ee.ElasticBlock(branch(), kind=kind)
    ee.set_layout(block, "static")
    counter = CompileCounter()
    compiled = torch.compile(block, backend=counter, fullgraph=True)
    for on in (True, False, True, False):
        x = torch.randn(3, 4, requires_grad=True)
        block.switch.set(on)
        output = compiled(x)
        torch.testing.assert_close(output, block(x))
        block.zero_grad()
        output.sum().backward()
        passed = torch.ones(3, 4) if kind == "block" else torch.zeros(3, 4)
        if not on:
            assert all(p.grad is None or not p.grad.any() for p in block.parameters())
            assert torch.equal(x.grad, passed)
    assert counter.frame_count == 1


@pytest.mark.parametrize("backend", ["auto", pytest.param("triton", marks=needs_kernels)])
def test_no_dormant_value_of_an_off_static_block_reaches_the_result(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if backend == "triton":
        serve_by_triton(monkeypatch)
    block = ee.ElasticBlock(branch(), kind="branch", on=False)
    ee.set_layout(block, "static")
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.fill_(float("nan"))
    x = torch.randn(3, 4, requires_grad=True)
    output = torch.compile(block, backend="aot_eager", fullgraph=True)(x)
    output.sum().backward()
    assert torch.equal(output, torch.zeros(3, 4))
    assert torch.equal(x.grad, torch.zeros(3, 4))


def test_backward_across_a_switch_raises_also_for_plain_modules() -> None:
    block = ee.ElasticBlock(nn.Linear(4, 4))
    loss = block(torch.randn(3, 4)).sum()
    block.switch.set(False)
    with pytest.raises(GenerationError, match=r"ElasticBlock: cannot run this backward.*1 commit since"):
        loss.backward()


def test_every_parameter_inside_knows_its_switches() -> None:
    inner = ee.ElasticBlock(nn.Sequential(nn.Linear(4, 4), ee.ElasticLinear(4, 4)))
    outer = ee.ElasticBlock(nn.Sequential(inner, nn.Linear(4, 4)))
    for parameter in inner.parameters():
        assert set(registry.lookup(parameter).switches) == {inner.switch, outer.switch}
    assert registry.lookup(outer.module[1].weight).switches == (outer.switch,)
    assert not registry.lookup(inner.module[0].weight).asleep
    outer.switch.set(False)
    assert all(registry.lookup(parameter).asleep for parameter in outer.parameters())


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_a_copy_has_a_switch_of_its_own(duplicate) -> None:
    block = ee.ElasticBlock(nn.Sequential(branch(), nn.Linear(4, 4)), kind="branch")
    twin = duplicate(block)
    twin.switch.set(False)
    assert block.on and not twin.on
    assert all(registry.lookup(parameter).asleep for parameter in twin.parameters())
    assert not any(registry.lookup(parameter).asleep for parameter in block.parameters())
    x = torch.randn(2, 4)
    assert twin(x).count_nonzero() == 0 and block(x).count_nonzero() > 0


def test_casting_keeps_parameters_under_the_switch() -> None:
    block = ee.ElasticBlock(nn.Sequential(branch(), nn.Linear(4, 4))).double()
    block.switch.set(False)
    assert all(registry.lookup(parameter).asleep for parameter in block.parameters())


def test_unknown_kind_is_refused() -> None:
    with pytest.raises(ee.LayoutError, match="ElasticBlock: kind: expected 'block' or 'branch', got 'skip'"):
        ee.ElasticBlock(nn.Identity(), kind="skip")


def test_static_layout_refuses_plain_running_statistics_inside() -> None:
    model = nn.Sequential(ee.ElasticLinear(4, 4), ee.ElasticBlock(nn.BatchNorm1d(4)))
    with pytest.raises(ee.LayoutError, match=r"ElasticBlock '1' cannot be static: BatchNorm1d .* running statistics"):
        ee.set_layout(model, "static")
    assert model[0].layout == "compact"
