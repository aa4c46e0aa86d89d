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
        pytest.param({"exclude": "layer9"}, r"exclude: 'layer9' fits no module of Net\. The nearest: 'layer1'", id="exclude"),
        pytest.param({"exclude": "?"}, r"exclude: '\?' fits no module of Net\. There are 'stem', 'norm', .* more\.", id="nothing near"),
        pytest.param(
            {"include": "layer1.0.conv2", "exclude": "norm"}, r"include: .* The units of 'layer1\.0\.conv2' stay: 'norm'", id="rigid"
        ),
        pytest.param(
            {"include": "head"}, r"include: 'head' .* The units of 'head' stay: it is an axis of the model's output\. ", id="output"
        ),
        pytest.param({"include": 3}, r"include: expected names or patterns of modules, got 3 of type int", id="no names"),
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


@pytest.mark.parametrize("minimum", [0, -3, 2.5, "a", None, True])
def test_a_minimum_that_is_none_is_refused(minimum):
    model = net()
    before = fingerprint(model)
    with pytest.raises(ConversionError, match=rf"minimum: expected an integer of at least 1, got {minimum!r}"):
        ee.elasticize(model, pictures(), minimum=minimum)
    assert fingerprint(model) == before


@pytest.mark.parametrize(
    ("wrap", "match"),
    [
        pytest.param(
            nn.DataParallel, r"the model, of type DataParallel, wraps a model: convert the one inside \(its \.module\)", id="parallel"
        ),
        pytest.param(torch.compile, r"of type OptimizedModule, wraps a model: .* \(its \._orig_mod\), then wrap", id="compiled"),
        pytest.param(lambda m: nn.Sequential(nn.DataParallel(m)), r"'0' \(DataParallel\) wraps a model", id="inside"),
        pytest.param(lambda m: nn.Sequential(m, nn.LazyLinear(3)), r"'1' \(LazyLinear\) has no sizes yet. Run the model once", id="lazy"),
        pytest.param(lambda m: type(m), r"model: expected an nn\.Module, got the class Net", id="class"),
        pytest.param(lambda m: m.state_dict(), r"model: expected an nn\.Module, got OrderedDict", id="state_dict"),
    ],
)
@pytest.mark.parametrize("verb", [ee.plan, ee.elasticize])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_wrapped_and_unfinished_models_are_refused(verb, wrap, match):
    inner = net()
    model = wrap(inner)
    before = fingerprint(inner)
    with pytest.raises(ConversionError, match=match):
        verb(model, pictures())
    assert fingerprint(inner) == before


@pytest.mark.parametrize("model", [nn.Linear(6, 4), nn.Sequential(nn.ReLU())], ids=["alone", "without parameters"])
def test_a_model_on_which_nothing_can_change_says_so(model):
    inputs = torch.randn(3, 6, generator=torch.Generator())
    with pytest.warns(UserWarning, match=r"has no dim that can change: (it is an axis of the model's output; |it has no parameters)"):
        ee.elasticize(model, inputs)
    assert dict(ee.dims(model)) == {}
    assert type(ee.export(model)) is type(model)


# Circumstances


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_any_dtype(dtype):
    model, twin = net(dtype).eval(), net(dtype).eval()
    ee.elasticize(model, pictures(dtype), capacity=2.0)
    assert all(p.dtype == dtype for p in model.parameters())
    with torch.no_grad():
        expected = twin(pictures(dtype))
        assert (poison(model)(pictures(dtype)) - expected).abs().max() <= 2 * torch.finfo(dtype).eps * expected.abs().max()
    ee.dims(model)["stem"].resize(5)
    assert model(pictures(dtype)).isfinite().all()


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode], ids=["no_grad", "inference_mode"])
def test_conversion_within_a_context_without_autograd(context):
    model, twin = net(), net()
    with context():
        assert [dim.name for dim in ee.plan(model, pictures()).dims] == list(DIMS)
        ee.elasticize(model, pictures(), capacity=2.0)
    assert not any(p.is_inference() for p in model.parameters())
    assert_same(active_outcome(model, run(model, CASE, pictures(), True)), run(twin, CASE, pictures(), True))


def test_a_model_in_eval_mode_stays_in_it_and_trains_with_dropout():
    model = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Dropout(0.5), nn.Linear(16, 4)).eval()
    x = torch.randn(3, 6, generator=torch.Generator())
    ee.elasticize(model, x)
    assert not any(module.training for module in model.modules())
    assert torch.equal(model(x), model(x))
    model.train()
    ee.dims(model)["0"].resize(9)
    assert not torch.equal(model(x), model(x))


def test_a_model_that_compiles_itself():
    """``Module.compile`` leaves the module what it is; it is recorded as its code says."""
    model = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 4))
    model.compile(backend="eager")
    compiled = model._compiled_call_impl
    ee.elasticize(model, torch.randn(3, 6, generator=torch.Generator()))
    assert model._compiled_call_impl is compiled
    assert list(ee.dims(model)) == ["0"]
