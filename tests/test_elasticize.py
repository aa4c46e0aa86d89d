"""``ee.plan`` and ``ee.elasticize``: what they take, and what they refuse, in words that say what to do."""

import pytest
import torch
import torch.nn.functional as F
from converting import active_outcome, assert_same, built, inputs_of, poison, run
from plain_net import CASE, DIMS, fingerprint, net, pictures
from torch import Tensor, nn
from zoo import AWKWARD

import esper_elastic as ee
from esper_elastic.errors import CapacityError, ConversionError


class Named(nn.Module):
    """Takes two inputs by position or by name."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right, self.head = nn.Linear(7, 16), nn.Linear(5, 16), nn.Linear(16, 3)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return self.head(self.left(a) * self.right(b))


@pytest.mark.parametrize("kind", ["tuple", "list", "dict", "mixed types"])
def test_inputs_by_position_and_by_name(kind):
    a, b = torch.randn(2, 7), torch.randn(2, 5)
    inputs = {"tuple": (a, b), "list": [a, b], "dict": {"b": b, "a": a}, "mixed types": (a, b)}[kind]
    assert {dim.name: dim.size for dim in ee.plan(Named(), inputs).dims} == {"left": 16}


@pytest.mark.parametrize(
    ("inputs", "match"),
    [
        pytest.param(3, r"example_inputs: expected a tensor, a tuple of arguments or a dict .*, got int", id="number"),
        pytest.param(
            torch.randn(2, 4, 9, 11), r"module 'stem': forward failed on the example inputs, at .*channels.*Do they suit", id="shape"
        ),
        pytest.param((), r"forward failed on the example inputs.*TypeError.*missing 1 required positional argument: 'x'", id="none"),
        pytest.param({"y": torch.randn(2, 3, 9, 11)}, r"unexpected keyword argument 'y'", id="name"),
        pytest.param(torch.zeros(2, 3, 9, 11, dtype=torch.long), r"module 'stem': forward failed", id="dtype"),
    ],
)
@pytest.mark.parametrize("verb", [ee.plan, ee.elasticize])
def test_wrong_inputs_are_refused(verb, inputs, match):
    model = net(torch.float32)
    before = fingerprint(model)
    with pytest.raises(ConversionError, match=f"(?s){match}"):
        verb(model, inputs)
    assert fingerprint(model) == before


def test_what_is_no_model_is_refused():
    with pytest.raises(ConversionError, match=r"model: expected an nn.Module, got function"):
        ee.elasticize(F.relu, pictures())


# Capacity and minimum


def test_capacity_factor_rounds_up():
    assert {dim.name: dim.capacity for dim in ee.plan(net(), pictures(), capacity=1.3).dims} == {
        "stem": 16,
        "layer1.0.conv1": 26,
        "layer1.1.conv1": 37,
    }


def test_capacity_by_name_as_factor_or_units():
    capacity = {"stem": 1.5, "layer1.0.conv1": 21, "layer1.1.conv1": 2}
    plan = ee.plan(net(), pictures(), capacity=capacity)
    assert [dim.capacity for dim in plan.dims] == [18, 21, 56]
    assert [dim.capacity for dim in ee.plan(net(), pictures(), capacity={}).dims] == [12, 20, 28]


def test_capacity_is_rounded_to_multiples():
    case = AWKWARD["group_norm"]
    for dim in ee.plan(built(case), inputs_of(case), capacity=1.1).dims:
        assert dim.capacity % dim.multiple_of == 0
        assert dim.capacity >= 1.1 * dim.size


@pytest.mark.parametrize(
    ("capacity", "match"),
    [
        pytest.param(0.5, r"capacity: expected a factor of at least 1, got 0\.5", id="below one"),
        pytest.param(float("nan"), r"got nan", id="nan"),
        pytest.param(float("inf"), r"got inf", id="infinite"),
        pytest.param(True, r"got True", id="bool"),
        pytest.param("2", r"got '2'", id="string"),
        pytest.param(None, r"got None", id="none"),
        pytest.param(
            {"stem": -3}, r"capacity of 'stem': expected a factor of at least 1 or a number of units, got -3", id="negative units"
        ),
        pytest.param({"stem": 0.9}, r"of 'stem': .* got 0\.9", id="small factor"),
        pytest.param({"stan": 2.0}, r"capacity: 'stan' names no dim\. A dim is named .*The nearest: 'stem'", id="unknown name"),
        pytest.param({"norm": 2.0}, r"capacity: 'norm' names no dim", id="name of a module that produces none"),
    ],
)
@pytest.mark.parametrize("verb", [ee.plan, ee.elasticize])
def test_capacities_are_refused(verb, capacity, match):
    model = net()
    before = fingerprint(model)
    with pytest.raises(ConversionError, match=match):
        verb(model, pictures(), capacity=capacity)
    assert fingerprint(model) == before


def test_minimum():
    model = ee.elasticize(net(), pictures(), minimum=15)
    assert {name: dim.minimum for name, dim in ee.dims(model).items()} == {"stem": 12, "layer1.0.conv1": 15, "layer1.1.conv1": 15}
    with pytest.raises(CapacityError, match="minimum is 15"):
        ee.dims(model)["layer1.0.conv1"].resize(14)


# Include and exclude


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        pytest.param({"exclude": "stem"}, ["layer1.0.conv1", "layer1.1.conv1"], id="exclude a name"),
        pytest.param({"exclude": "layer1.0"}, ["layer1.1.conv1"], id="exclude what contains more"),
        pytest.param({"exclude": ["layer1.?.bn1"]}, ["stem"], id="exclude a pattern"),
        pytest.param({"exclude": ["*"]}, [], id="exclude everything"),
        pytest.param({"include": "layer1"}, ["stem", "layer1.0.conv1", "layer1.1.conv1"], id="include what contains more"),
        pytest.param({"include": "layer1.*.conv1"}, ["layer1.0.conv1", "layer1.1.conv1"], id="include a pattern"),
        pytest.param({"include": ["stem", "layer1.0.conv1"]}, ["stem", "layer1.0.conv1"], id="include names"),
        pytest.param({"include": "layer1.*.conv1", "exclude": "layer1.0"}, ["layer1.1.conv1"], id="both"),
        pytest.param({"include": None, "exclude": ()}, list(DIMS), id="neither"),
    ],
)
def test_include_and_exclude(arguments, names):
    model = ee.elasticize(net(), pictures(), **arguments)
    assert list(ee.dims(model)) == names
    for name, dim in ee.dims(model).items():
        dim.resize(DIMS[name] // 2)
    plain = ee.export(poison(model))
    assert_same(active_outcome(model, run(model, CASE, pictures(), True)), run(plain, CASE, pictures(), True))


def test_excluded_modules_stay_what_they_were():
    model = ee.elasticize(net(), pictures(), exclude="layer1.0")
    assert type(model.layer1[0].conv1) is nn.Conv2d
    assert {r.reason for r in ee.plan(net(), pictures(), exclude="layer1.0").rigid if r.tensor == "layer1.0.conv1.weight"} >= {
        "'layer1.0' is excluded"
    }


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        pytest.param({"exclude": "layer9"}, r"exclude: 'layer9' fits no module of Net", id="exclude"),
        pytest.param({"include": ["stem", "layer9.*"]}, r"include: 'layer9\.\*' fits no module of Net that produces a dim", id="include"),
        pytest.param({"include": "norm.nothing"}, r"include: 'norm.nothing' fits no module", id="below a module"),
        pytest.param({"exclude": [3]}, r"exclude: expected names or patterns, got 3 of type int", id="number"),
    ],
)
@pytest.mark.parametrize("verb", [ee.plan, ee.elasticize])
def test_names_that_fit_nothing_are_refused(verb, arguments, match):
    model = net()
    before = fingerprint(model)
    with pytest.raises(ConversionError, match=match):
        verb(model, pictures(), **arguments)
    assert fingerprint(model) == before


# Models that are refused


@pytest.mark.parametrize("verb", [ee.plan, ee.elasticize])
def test_a_model_converts_once(verb):
    model = ee.elasticize(net(), pictures())
    with pytest.raises(ConversionError, match=r"'(stem|layer1\.0)?.*' is elastic already \(.*\)\. Convert a model once; ee\.export"):
        verb(model, pictures())
    again = ee.elasticize(ee.export(model), pictures())
    assert {name: dim.active for name, dim in ee.dims(again).items()} == DIMS


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_scripted_model_is_refused():
    with pytest.raises(ConversionError, match=r"the model is scripted: its code cannot be followed\. Convert it before torch\.jit\.script"):
        ee.elasticize(torch.jit.script(nn.Linear(3, 4)), torch.randn(2, 3))


@pytest.mark.parametrize("verb", [ee.plan, ee.elasticize])
def test_decisions_by_values_are_refused_with_module_and_line(verb):
    case = AWKWARD["data_dependent"]
    inner, x = built(case), inputs_of(case)
    model = nn.Sequential(nn.Linear(14, 14), inner).double()
    before = fingerprint(model)
    with pytest.raises(
        ConversionError, match=r"module '1': its code decides by the values of tensors \(.*awkward\.py:58\).*nothing has"
    ) as e:
        verb(model, x)
    assert isinstance(e.value, ValueError)
    assert fingerprint(model) == before
