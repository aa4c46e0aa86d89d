"""summary: the numbers of a model, got without touching it."""

from __future__ import annotations

import copy
import dataclasses
import random
import weakref
from typing import Any

import pytest
import torch
from test_flops import Net, counted
from torch import Tensor, nn

import esper_elastic as ee

IMAGE = torch.randn(2, 3, 6, 6)
WIDTHS = {"left": 5, "right": 3, "mix": 7, "first": 2}


@pytest.fixture
def net() -> Net:
    torch.manual_seed(0)
    net = Net()
    ee.resize(net, WIDTHS)
    return net


def numbers(module: nn.Module) -> tuple[int, int]:
    """Parameters, and bytes with buffers."""
    tensors = [*module.parameters(), *module.buffers()]
    return sum(p.numel() for p in module.parameters()), sum(t.numel() * t.element_size() for t in tensors)


@pytest.mark.parametrize("layout", ["compact", "static"])
def test_totals_are_those_of_the_exported_model(net: Net, layout: str) -> None:
    ee.set_layout(net, layout)
    found = ee.summary(net, IMAGE)
    assert (found.parameters, found.bytes) == numbers(net)
    assert (found.active_parameters, found.active_bytes) == numbers(ee.export(net))
    plain = ee.export(net)
    assert found.active_multiply_adds == counted(lambda: plain(IMAGE), backward=False)[0] // 2
    ee.resize(net, {"left": 6, "right": 4, "mix": 8, "first": 5})
    wide = ee.export(net)
    assert found.multiply_adds == counted(lambda: wide(IMAGE), backward=False)[0] // 2
    assert found.not_counted == ""


def test_a_dim_counts_what_would_be_gone_without_its_units(net: Net) -> None:
    found = {dim.name: dim for dim in ee.summary(net).dims}
    assert list(found) == list(ee.dims(net))
    # left, depthwise, and its columns of mix; by hand
    assert found["left"].parameters == (5 * 3 * 9 + 5) + (5 * 9 + 5) + 7 * 5 * 3
    # rows and columns of the branch cross: 2 x 2 counts once
    assert found["first"].parameters == (2 * 7 * 9 + 2) + (2 * 2 + 2) + 2 * 2
    assert (found["mix"].active, found["mix"].capacity, found["mix"].minimum, found["mix"].multiple_of) == (7, 8, 1, 1)
    assert found["left"].share == found["left"].parameters / ee.summary(net).active_parameters


def test_a_dim_says_its_bounds() -> None:
    dim = ee.ElasticDim(4, 9, minimum=2, multiple_of=2)
    found = ee.summary(ee.ElasticLinear(3, 4, out_dim=dim), torch.randn(1, 3))
    assert dataclasses.astuple(found.dims[0])[1:5] == (4, 9, 2, 2)
    assert (found.active_multiply_adds, found.multiply_adds) == (3 * 4, 3 * 8)  # the widest is 8


def test_what_is_under_a_switch_that_is_off_is_not_active(net: Net) -> None:
    on = ee.summary(net, IMAGE)
    assert [dataclasses.astuple(switch) for switch in on.switches] == [("branch", True, 30, 6)]
    ee.disable(net, "branch")
    off = ee.summary(net, IMAGE)
    assert [dataclasses.astuple(switch) for switch in off.switches] == [("branch", False, 30, 0)]
    assert (off.parameters, off.active_parameters) == (on.parameters, on.active_parameters - 6)
    assert off.active_multiply_adds == on.active_multiply_adds - 2 * 2 * 2
    assert off.multiply_adds == on.multiply_adds


def test_plain_parts_of_a_block_sleep_too_and_blocks_nest() -> None:
    inner = ee.ElasticBlock(nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)))
    outer = ee.ElasticBlock(nn.Sequential(inner, nn.Linear(3, 3, bias=False)), on=False)
    model = nn.Sequential(outer, ee.ElasticLinear(3, 1))
    found = ee.summary(model)
    assert [(s.name, s.on, s.parameters, s.active_parameters) for s in found.switches] == [("0", False, 27, 0), ("0.module.0", True, 18, 0)]
    assert (found.active_parameters, found.active_bytes) == (4, 16)


def test_shared_parameters_count_once_and_are_awake_where_one_user_is() -> None:
    first, second, third = (ee.ElasticLinear(4, 4) for _ in range(3))
    second.weight = third.weight = first.weight
    model = nn.ModuleList([first, ee.ElasticBlock(second, on=False), first, third])
    found = ee.summary(model)
    assert (found.parameters, found.active_parameters) == (16 + 3 * 4, 16 + 2 * 4)
    assert (found.switches[0].parameters, found.switches[0].active_parameters) == (16 + 4, 0)


def test_a_plain_model_counts_as_it_is() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    found = ee.summary(model, torch.randn(5, 3))
    assert (found.parameters, found.active_parameters) == (3 * 4 + 4 + 8,) * 2
    assert found.bytes == found.active_bytes == 4 * (24 + 8) + 8
    assert found.active_multiply_adds == found.multiply_adds == 5 * 3 * 4
    assert (found.dims, found.switches) == ((), ())


@pytest.mark.parametrize("kind", ["tensor", "tuple", "list", "dict"])
def test_example_inputs_come_in_every_form(kind: str) -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(3, 4)

        def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
            return self.inner(x if y is None else torch.cat([x, y]))

    x, y = torch.randn(2, 3), torch.randn(1, 3)
    given: dict[str, Any] = {"tensor": x, "tuple": (x, y), "list": [x, y], "dict": {"y": y, "x": x}}
    assert ee.summary(Two(), given[kind]).multiply_adds == (2 if kind == "tensor" else 3) * 3 * 4


def test_attention_counts() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    length, width = 5, 8
    attention = 2 * length * length * width
    assert ee.summary(layer, torch.randn(1, length, width)).multiply_adds == length * (4 * width**2 + 2 * width * 16) + attention


def test_a_forward_in_eval_mode_counts() -> None:
    class Auxiliary(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(super().forward(x)) if self.training else super().forward(x)

    assert ee.summary(Auxiliary(3, 3), torch.randn(1, 3)).multiply_adds == 9


class Watchful(nn.Module):
    """Would notice being run: buffers, attributes, a random number, a hook."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = ee.ElasticLinear(4, 4, max_out_features=6)
        self.norm = ee.ElasticBatchNorm1d(4, dim=self.layer.out_dim)
        self.drop = nn.Dropout()
        self.calls = 0
        self.last: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.last = self.drop(self.norm(self.layer(x)))
        return self.last


def test_reading_leaves_no_trace() -> None:
    model, seen = Watchful(), []
    model.layer.register_forward_hook(lambda *call: seen.append(call))
    model(torch.randn(3, 4)).sum().backward()
    ee.dims(model)
    seen.clear()
    versions = {name: tensor._version for name, tensor in model.state_dict(keep_vars=True).items()}
    state, last, grad = copy.deepcopy(model.state_dict()), model.last, model.layer.weight.grad.clone()
    generators, generation = (torch.get_rng_state(), random.getstate()), ee.control_block(model).generation
    references = weakref.getweakrefcount(model.layer.weight)
    ee.summary(model, torch.randn(3, 4, generator=torch.Generator().manual_seed(0)))
    assert torch.equal(torch.get_rng_state(), generators[0]) and random.getstate() == generators[1]
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert {name: tensor._version for name, tensor in model.state_dict(keep_vars=True).items()} == versions
    assert model.training and model.norm.training and model.calls == 1 and model.last is last and seen == []
    assert torch.equal(model.layer.weight.grad, grad)
    assert ee.control_block(model).generation == generation and model.layer.out_dim.active == 4
    assert torch.backends.mha.get_fastpath_enabled()
    assert weakref.getweakrefcount(model.layer.weight) == references  # torch.utils.swap_tensors minds them


def test_without_inputs_the_table_says_why_multiply_adds_are_missing(net: Net) -> None:
    found = ee.summary(net)
    assert found.multiply_adds is found.active_multiply_adds is None
    assert "multiply-adds are not counted: no example inputs were given" in str(found)


def test_where_full_capacity_does_not_run_the_rest_is_still_counted() -> None:
    model = nn.Sequential(ee.ElasticLinear(3, 4, max_out_features=6), nn.Unflatten(1, (2, 2)))
    found = ee.summary(model, torch.randn(1, 3))
    assert (found.active_multiply_adds, found.multiply_adds) == (12, None)
    assert "at full capacity, Sequential does not run: RuntimeError" in found.not_counted


def test_inputs_that_the_model_does_not_take_are_refused(net: Net) -> None:
    message = r"summary: example_inputs: Net does not run on inputs of shape \(2, 4, 6, 6\) as tensors without values: LayoutError: .*got 4"
    with pytest.raises(ee.LayoutError, match=message):
        ee.summary(net, torch.randn(2, 4, 6, 6))


def test_it_prints_as_a_table(net: Net) -> None:
    ee.disable(net, "branch")
    lines = str(ee.summary(net, IMAGE)).splitlines()
    assert lines[0].split() == ["Net", "active", "at", "capacity"]
    assert [line.split()[0] for line in lines[1:4]] == ["parameters", "bytes", "multiply-adds"]
    assert lines[4] == "bytes are those of parameters and buffers, without gradients and optimizer state"
    assert "left        5         6        1            1                      " in "\n".join(lines)
    assert lines[-1].split() == ["branch", "off", "0", "30"]
    assert not any(line != line.rstrip() for line in lines)


def test_it_is_frozen(net: Net) -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        ee.summary(net).parameters = 0
