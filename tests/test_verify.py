"""What stands between a wrong rule and a wrong number: the model's own code at other widths, and what cannot be known stays."""

import random
from collections.abc import Callable

import pytest
import torch
from rule_cases import CASES
from torch import Tensor, nn

import esper_elastic as ee
from esper_elastic.convert.names import taken_name
from esper_elastic.convert.rules import RULES
from esper_elastic.convert.structure import fresh
from esper_elastic.layers import ElasticLayer, ElasticView, Switchable


def forgets(scope, node) -> None:
    """Gives axes that have nothing to do with those of the operands."""
    for output in node.outputs:
        output.axes = [fresh(n) for n in output.shape]


def leaves_in_order(scope, node) -> None:
    """Gives the axes of the first operand as they come, whatever the op does with them."""
    for output in node.outputs:
        output.axes = list(node.args[0].axes)


def takes_the_first(scope, node) -> None:
    """Gives the axes of the first of several tensors."""
    node.outputs[0].axes = list(node.args[0][0].axes)


def contracts_nothing(scope, node) -> None:
    """Multiplies matrices without saying that the axes between them are one."""
    a, b = node.args[-2:]
    scope.produce(b, -1)
    node.outputs[0].axes = [*a.axes[:-1], b.axes[-1]]


@pytest.mark.parametrize(
    ("op", "broken", "case"),
    [
        ("cat", forgets, "cat"),
        ("cat", takes_the_first, "cat_with_itself"),
        ("glu", forgets, "glu"),
        ("split", forgets, "halves_added"),
        ("repeat", forgets, "repeat"),
        ("view", forgets, "flatten_of_images"),
        ("permute", leaves_in_order, "fused_qkv"),
        ("transpose", leaves_in_order, "attention_by_hand"),
        ("slice", leaves_in_order, "without_the_first_three"),
        ("pixel_shuffle", leaves_in_order, "pixel_shuffle"),
        ("constant_pad_nd", leaves_in_order, "pad_of_channels"),
        ("addmm", contracts_nothing, "two_made_alike"),
        ("convolution", forgets, "max_pool"),
        ("native_batch_norm", forgets, "batch_norm"),
    ],
)
def test_a_wrong_rule_makes_dims_rigid_rather_than_wrong(monkeypatch, op: str, broken: Callable, case: str) -> None:
    made = CASES[case]
    assert ee.plan(made.build(), made.inputs()).dims
    monkeypatch.setitem(RULES, op, broken)
    plan = ee.plan(made.build(), made.inputs())
    assert not any("makers" in binding for dim in plan.dims for binding in dim.bindings)
    reasons = {axis.reason for axis in plan.rigid if axis.tensor.startswith("makers") and axis.axis == 0}
    known = ("code keeps its size", "is called in a way that is not understood", "no matrix product or convolution has it")
    assert all(any(why in reason for why in known) for reason in reasons), reasons


class Whimsical(nn.Module):
    """Takes another way at random."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 12), nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        return self.second(x.relu() if random.random() < 0.5 else x.exp() + 1)


def test_code_that_chooses_at_random_goes_the_same_way_in_each_run() -> None:
    random.seed(0)
    before = random.getstate()
    assert [dim.name for dim in ee.plan(Whimsical(), torch.randn(2, 4)).dims] == ["first"]
    assert random.getstate() == before


class Asserting(nn.Module):
    """A layer whose code compares sizes with what it was told, before any op."""

    def __init__(self, features: int):
        super().__init__()
        self.features = features
        self.weight = nn.Parameter(torch.rand(features))

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[-1] != self.features:
            raise ValueError(f"expected {self.features} features")
        return x * self.weight


def test_a_size_that_code_checks_follows_the_dim() -> None:
    model = nn.Sequential(nn.Linear(4, 12), nn.ReLU(), Asserting(12), nn.Linear(12, 3))
    ee.elasticize(model, torch.randn(2, 4))
    ee.dims(model)["0"].resize(7)
    assert model[2].features == 7
    assert model(torch.randn(2, 4)).shape == (2, 3)


class Block(nn.Module):
    """A block of the kind that gets a switch, with an attribute of a name to be chosen."""

    def __init__(self, name: str):
        super().__init__()
        self.weight = nn.Parameter(torch.rand(12))
        self.layers = nn.Sequential(nn.Linear(12, 10), nn.ReLU(), nn.Linear(10, 12))
        setattr(self, name, 2.0)
        self.factor = name

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x) * self.weight * getattr(self, self.factor)


class Reader(nn.Module):
    """Has a method of a name that elastic layers use."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(12))

    def active(self, x: Tensor) -> Tensor:
        return x * self.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.active(x)


@pytest.mark.parametrize("name", ["kind", "control", "switch", "static", "active", "layout", "storage", "on", "inside", "newborn", "_axes"])
def test_names_of_ours_in_a_module_of_theirs_keep_their_meaning(name: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 12), Block(name), nn.Linear(12, 3))
    inputs = torch.randn(2, 4)
    expected = model(inputs)
    plan = ee.plan(model, inputs)
    if taken_name(model[1], Switchable):
        assert plan.switches == {}
    if taken_name(model[1], ElasticView):
        assert f"1 has a {name!r} of its own" in {axis.tensor: axis.reason for axis in plan.rigid}["1.weight"]
    assert taken_name(model[1], Switchable) or taken_name(model[1], ElasticView)
    plan.apply(model)
    assert getattr(model[1], name) == 2.0
    assert torch.equal(model(inputs), expected)
    ee.dims(model)["1.layers.0"].resize(3)
    assert model(inputs).shape == (2, 3)


@pytest.mark.parametrize("name", ["size", "read", "scale"])
def test_other_names_are_free(name: str) -> None:
    model = ee.elasticize(nn.Sequential(nn.Linear(4, 12), Block(name), nn.Linear(12, 3)), torch.randn(2, 4))
    assert list(ee.dims(model)) == ["0", "1.layers.0"]
    ee.resize(model, {"0": 5, "1.layers.0": 3})
    assert getattr(model[1], name) == 2.0
    assert model(torch.randn(2, 4)).shape == (2, 3)


def test_methods_of_our_names_keep_their_meaning() -> None:
    model = nn.Sequential(nn.Linear(4, 12), Reader(), nn.Linear(12, 3))
    inputs = torch.randn(2, 4)
    expected = model(inputs)
    ee.elasticize(model, inputs)
    assert list(ee.dims(model)) == []
    assert torch.equal(model(inputs), expected)


def test_a_failure_inside_a_property_is_no_missing_attribute() -> None:
    """``nn.Module.__getattr__`` would answer with the whole storage."""
    model = ee.elasticize(CASES["prelu"].build(), CASES["prelu"].inputs())
    assert isinstance(model, ElasticLayer)
    del model._widths
    with pytest.raises(ee.ElasticError, match=r"ElasticNet\.w: reading its active part failed: .*_widths.*Is the module whole\?"):
        _ = model.w
    other = ee.elasticize(CASES["attribute_in_view"].build(), CASES["attribute_in_view"].inputs())
    del other._widths
    with pytest.raises(ee.ElasticError, match=r"Net\.size: reading its active part failed"):
        _ = other.size
