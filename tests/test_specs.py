"""Layer specs: what is on the allow-list comes back exactly, and nothing else gets through."""

from __future__ import annotations

import copy
import inspect
import json
import pickle
import random
import resource
from collections import OrderedDict
from collections.abc import Iterator
from typing import Any

import hostile
import pytest
import torch
from contract import norm
from torch import nn

import esper_elastic as ee
from esper_elastic.errors import SurgeryError
from esper_elastic.surgery.specs import specs
from esper_elastic.surgery.specs.kinds import KINDS
from esper_elastic.surgery.specs.specs import LayerSpec
from esper_elastic.surgery.specs.values import AsFloat, Choice, Each, Either, Flag, Integer, Nothing, Number, Spread

CONV = {"in_channels": 4, "out_channels": 8, "kernel_size": 3}


def sample(values: Any, rng: random.Random) -> Any:
    """A value that ``values`` admits, small where it is a size."""
    match values:
        case Integer(low, high):
            return rng.randint(low, min(high, low + 3))
        case Number(low, high):
            return rng.choice([rng.uniform(max(low, -2), min(high, 2)), max(int(low), 0), 1])
        case AsFloat(item):
            return rng.choice([2, 0.5])
        case Each(item, shortest, longest):
            return tuple(sample(item, rng) for _ in range(rng.randint(shortest, longest)))
        case Spread(item, _):
            return sample(item, rng)
        case Flag():
            return rng.random() < 0.5
        case Nothing():
            return None
        case Choice():
            return rng.choice(values.strings)
        case Either():
            return sample(rng.choice(values.choices), rng)
    raise AssertionError(values)


def sampled(kind: str, rng: random.Random, tries: int) -> Iterator[LayerSpec]:
    """Valid specs of a kind: sizes are equal often, since rules want them to be multiples."""
    for number in range(tries):
        arguments = {
            name: sample(argument.values, rng)
            for name, argument in KINDS[kind].arguments.items()
            if argument.required or (number and rng.random() < 0.5)
        }
        layers = ()
        if kind == "Sequential":
            layers = tuple(next(sampled(rng.choice(["Linear", "ReLU", "Conv2d", "Sequential"]), rng, 9)) for _ in range(rng.randint(0, 3)))
        try:
            yield LayerSpec(kind, arguments, layers)
        except SurgeryError:
            continue


def shapes(module: nn.Module) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in module.state_dict().items()}


def numel(module: nn.Module) -> int:
    return sum(tensor.numel() for tensor in (*module.parameters(), *module.buffers()))


@pytest.mark.filterwarnings("ignore:.*padding:UserWarning")
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_comes_back(kind):
    rng, made = random.Random(kind), 0
    for spec in sampled(kind, rng, 40):
        made += 1
        layer = spec.build()
        assert type(layer) is KINDS[kind].make and numel(layer) == spec.elements
        assert LayerSpec.of(layer) == spec
        again = LayerSpec.of(layer).build()
        assert repr(again) == repr(layer) and shapes(again) == shapes(layer)
        text = json.dumps(spec.to_json(), allow_nan=False)
        assert json.loads(text) == spec.to_json()
        assert LayerSpec.from_json(json.loads(text)) == spec
        assert json.dumps(LayerSpec.from_json(json.loads(text)).to_json()) == text
        complete = LayerSpec(kind, spec.all_arguments, spec.layers)
        assert complete == spec and hash(complete) == hash(spec)
    assert made >= 10


@pytest.mark.parametrize("kind", KINDS)
def test_defaults_are_those_of_the_class(kind):
    signature = inspect.signature(KINDS[kind].make.__init__).parameters
    arguments = KINDS[kind].arguments
    assert [name for name in signature if name in arguments] == list(arguments)
    for name, argument in arguments.items():
        if argument.required:
            continue  # stricter than the class for Softmax and its kin, whose missing dim warns
        default = signature[name].default
        if type(argument.default) is tuple:
            default = (default,) * len(argument.default)
        assert argument.default == default and type(argument.default) is type(default), name


def test_the_constructor_says_as_nn_does():
    spec = LayerSpec("Conv2d", CONV | {"padding": [1, 2], "groups": 4, "bias": False})
    assert repr(spec.build()) == repr(nn.Conv2d(4, 8, 3, padding=(1, 2), groups=4, bias=False))
    assert repr(spec) == "LayerSpec('Conv2d', in_channels=4, out_channels=8, kernel_size=(3, 3), padding=(1, 2), groups=4, bias=False)"
    assert spec.to_json() == {
        "kind": "Conv2d",
        "arguments": {"in_channels": 4, "out_channels": 8, "kernel_size": [3, 3], "padding": [1, 2], "groups": 4, "bias": False},
    }
    assert spec.elements == 8 * 1 * 9
    torch.manual_seed(0)
    mine = LayerSpec("Linear", {"in_features": 3, "out_features": 2}).build()
    torch.manual_seed(0)
    assert torch.equal(mine.weight, nn.Linear(3, 2).weight)


def test_a_spec_is_a_value():
    spec = LayerSpec("Sequential", layers=[LayerSpec("Conv2d", CONV), LayerSpec("ReLU")])
    assert repr(spec).startswith("LayerSpec('Sequential', layers=(LayerSpec('Conv2d', in_channels=4")
    for same in (copy.deepcopy(spec), pickle.loads(pickle.dumps(spec)), copy.copy(spec), spec.replace()):
        assert same == spec and hash(same) == hash(spec)
    assert len({spec, copy.copy(spec), LayerSpec("ReLU"), LayerSpec("ReLU", {"inplace": False})}) == 2
    assert spec != LayerSpec("Sequential", layers=spec.layers[::-1]) and spec != "spec"
    assert (spec.num_layers, spec.depth, spec.elements) == (3, 2, 8 * 4 * 9 + 8)
    with pytest.raises(AttributeError):
        spec.kind = "Linear"
    with pytest.raises(TypeError):
        spec.layers[0].arguments["bias"] = False
    given = dict(CONV)
    held = LayerSpec("Conv2d", given)
    given["in_channels"] = 5
    assert held.arguments["in_channels"] == 4


def test_replace_checks_as_the_constructor_does():
    spec = LayerSpec("Conv2d", CONV)
    assert spec.replace(stride=2, kernel_size=5).build().stride == (2, 2)
    with pytest.raises(SurgeryError, match=r"Conv2d: expected arguments that it has, got 'strde'. Did you mean stride\?"):
        spec.replace(strde=2)
    assert LayerSpec("MaxPool2d", {"kernel_size": 3}).all_arguments["padding"] == 0
    assert LayerSpec("MaxPool2d", {"kernel_size": 3, "stride": 3}).arguments == {"kernel_size": 3}


REFUSED: dict[str, tuple[Any, ...]] = {
    "unknown kind": (("Conv2D", CONV), r"kind: expected a layer on the allow-list, got 'Conv2D'. Did you mean Conv2d\?"),
    "no kind at all": ((3,), r"kind: expected a layer on the allow-list, got 3. Known: Linear, Conv1d"),
    "a class": ((nn.Linear,), r"kind: expected a layer on the allow-list, got a type"),
    "not allowed": (("LSTM",), r"got 'LSTM'"),
    "dunder": (("__class__",), r"got '__class__'"),
    "unknown argument": (("ReLU", {"device": "cuda"}), r"ReLU: expected arguments that it has, got 'device'. Known: inplace"),
    "key of another type": (("ReLU", {3: 4}), r"ReLU: arguments: expected names for keys, got 3"),
    "no dict": (("ReLU", [("inplace", True)]), r"ReLU: arguments: expected a dict, got a list"),
    "missing": (("Linear", {"in_features": 3}), r"Linear: out_features: expected an integer from 1 to 268435456, got nothing"),
    "bool for int": (("Conv2d", CONV | {"groups": True}), r"Conv2d: groups: expected an integer from 1 to \d+; got True"),
    "bool for number": (("Dropout", {"p": True}), r"Dropout: p: expected a number from 0 to 1; got True"),
    "int for bool": (("Conv2d", CONV | {"bias": 1}), r"Conv2d: bias: expected true or false; got 1"),
    "float for int": (("Conv2d", CONV | {"in_channels": 4.0}), r"in_channels: expected an integer.*got 4.0"),
    "tensor for int": (("Conv2d", CONV | {"in_channels": torch.tensor(4)}), r"in_channels: .* got a Tensor"),
    "huge": (("Conv2d", CONV | {"in_channels": 10**5000}), r"in_channels: .* got an integer of 16610 bits"),
    "zero": (("Conv2d", CONV | {"kernel_size": 0}), r"kernel_size: expected an integer from 1 to 65536, or a tuple of 2, each .*got 0"),
    "length": (("Conv2d", CONV | {"kernel_size": (3, 3, 3)}), r"kernel_size: .*got \(3, 3, 3\)"),
    "NaN": (("Dropout", {"p": float("nan")}), r"Dropout: p: expected a number from 0 to 1; got nan"),
    "beyond": (("Dropout", {"p": 1.5}), r"p: expected a number from 0 to 1; got 1.5"),
    "infinite": (("LeakyReLU", {"negative_slope": float("inf")}), r"negative_slope: expected a number from -1e\+30 to 1e\+30; got inf"),
    "choice": (("GELU", {"approximate": "Tanh"}), r"approximate: expected 'none' or 'tanh'; got 'Tanh'"),
    "long string": (("GELU", {"approximate": "x" * 99}), r"got 'x{60}'..., a string of 99 characters"),
    "groups": (("Conv2d", CONV | {"groups": 3}), r"in_channels: expected a multiple of the 3 groups; got 4"),
    "norm groups": (("GroupNorm", {"num_groups": 3, "num_channels": 4}), r"num_channels: expected a multiple of the 3 groups; got 4"),
    "same with stride": (("Conv2d", CONV | {"padding": "same", "stride": 2}), r"stride: expected 1, since padding is 'same'; got \(2, 2\)"),
    "output padding": (("ConvTranspose2d", CONV | {"output_padding": 1}), r"output_padding: expected less than stride or dilation"),
    "pool padding": (("MaxPool2d", {"kernel_size": 3, "padding": 2}), r"padding: expected at most half the kernel of 3; got 2"),
    "padding index": (
        ("Embedding", {"num_embeddings": 3, "embedding_dim": 2, "padding_idx": 3}),
        r"padding_idx: expected an index below the 3 embeddings; got 3",
    ),
    "both sizes": (("Upsample", {"size": 3, "scale_factor": 2}), r"size and scale_factor: expected one of the two; got 'both'"),
    "no size": (("Upsample", {}), r"size and scale_factor: expected one of the two; got 'neither'"),
    "corners": (("Upsample", {"size": 3, "align_corners": True}), r"align_corners: expected None for mode 'nearest'; got True"),
    "hardtanh": (("Hardtanh", {"min_val": 2}), r"max_val: expected more than min_val, 2; got 1.0"),
    "rrelu": (("RReLU", {"lower": 2}), r"upper: expected at least lower, 2; got 0.333"),
    "layers in a leaf": (("ReLU", {}, (LayerSpec("ReLU"),)), r"ReLU: layers: expected none, got 1. Only a Sequential holds layers"),
    "no spec": (("Sequential", {}, (nn.ReLU(),)), r"Sequential: layers: expected a tuple of LayerSpec, got a tuple"),
    "too large": (
        ("Linear", {"in_features": 2**14, "out_features": 2**14}),
        r"Linear: elements to allocate: expected at most 268435456 in all, got 268451840",
    ),
    "too large together": (
        ("Sequential", {}, (LayerSpec("Linear", {"in_features": 2**14, "out_features": 2**13}),) * 3),
        r"Sequential: elements to allocate: expected at most 268435456 in all, got 402677760",
    ),
    "too many": (("Sequential", {}, (LayerSpec("ReLU"),) * 1024), r"Sequential: layers: expected at most 1024 in all, got 1025"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused_says_why(case, monkeypatch):
    arguments, message = REFUSED[case]
    monkeypatch.setattr(nn.Module, "__init__", hostile.spring)  # a refusal makes no layer, and so allocates nothing
    with pytest.raises(SurgeryError, match=message) as caught:
        LayerSpec(*arguments)
    assert len(str(caught.value)) < 2500


def test_a_spec_is_checked_again_when_it_is_built(monkeypatch):
    spec = LayerSpec("Linear", {"in_features": 8, "out_features": 8})
    monkeypatch.setattr(specs, "BUDGET", 71)
    with pytest.raises(SurgeryError, match="elements to allocate: expected at most 71 in all, got 72"):
        spec.build()


def test_what_torch_refuses_is_refused_as_ours(monkeypatch):
    def full(*_: Any, **__: Any) -> None:
        raise RuntimeError("DefaultCPUAllocator: not enough memory")

    monkeypatch.setattr(nn.Linear, "reset_parameters", full)
    spec = LayerSpec("Linear", {"in_features": 8, "out_features": 8})
    with pytest.raises(SurgeryError, match="Linear: could not be built: DefaultCPUAllocator"):
        LayerSpec("Sequential", layers=(spec,)).build()


def bad_json() -> dict[str, tuple[Any, str]]:
    return {
        "text": ('{"kind": "ReLU"}', "content: expected a dict, got '{"),
        "none": (None, "content: expected a dict, got None"),
        "field": ({"kind": "ReLU", "device": 0}, "expected kind, and perhaps arguments and layers; got 'device'"),
        "no kind": ({"arguments": {}}, "got no kind"),
        "layers": ({"kind": "Sequential", "layers": {"0": {}}}, "layers: expected a list, got a dict"),
        "deep": (hostile.nested(20), "layers inside one another: expected at most 16, got more"),
        "very deep": (hostile.nested(10**5), "layers inside one another"),
        "cyclic": (hostile.cycle(), "layers inside one another"),
        "wide": (hostile.wide(15, 50), "layers: expected at most 1024 in all, got more"),
        "long": ({"kind": "Sequential", "layers": [{"kind": "ReLU"}] * 10**6}, "layers: expected at most 1024"),
        "surrogate": ({"kind": "\ud800"}, r"got '\\ud800'"),
        "NaN": (json.loads('{"kind": "Dropout", "arguments": {"p": NaN}}'), "p: expected a number from 0 to 1; got nan"),
        "huge": ({"kind": "Dropout", "arguments": {"p": 7**9000}}, "got an integer of 25267 bits"),
        "trapped": (hostile.TrappedDict(kind=hostile.TrappedStr("ReLU")), "got a Trapped"),
        "mapping": (hostile.TrappedMapping(), "expected a dict, got a TrappedMapping"),
    }


@pytest.mark.parametrize("case", bad_json())
def test_json_from_outside_is_refused(case):
    content, message = bad_json()[case]
    with pytest.raises(SurgeryError, match=message):
        LayerSpec.from_json(content)


@pytest.mark.parametrize("number", range(6))
def test_what_stands_for_a_dict(number):
    given = list(hostile.mappings(CONV))[number]
    if number in (0, 1, 3):  # read by the methods of dict itself
        assert LayerSpec("Conv2d", given) == LayerSpec("Conv2d", CONV)
    else:
        with pytest.raises(SurgeryError, match="arguments: expected a dict, got a"):
            LayerSpec("Conv2d", given)


# From modules


def hooked() -> nn.Module:
    layer = nn.Linear(2, 2)
    layer.register_forward_hook(lambda *_: None)
    return layer


def own_attribute() -> nn.Module:
    layer = nn.Linear(2, 2)
    layer.scale = 3
    return layer


def more_tensors() -> nn.Module:
    layer = nn.Linear(2, 2)
    layer.register_buffer("mask", torch.ones(2))
    return layer


def other_shape() -> nn.Module:
    layer = nn.Linear(2, 2)
    layer.weight = nn.Parameter(torch.ones(2, 3))
    return layer


def elastic_with_hook() -> nn.Module:
    layer = ee.ElasticLinear(2, 2)
    layer.register_forward_pre_hook(lambda *_: None)
    return layer


def deep(levels: int) -> nn.Module:
    module: nn.Module = nn.ReLU()
    for _ in range(levels):
        module = nn.Sequential(module)
    return module


def with_child() -> nn.Module:
    layer = nn.Linear(2, 2)
    layer.more = nn.ReLU()
    return layer


shared = nn.ReLU()
INEXPRESSIBLE = {
    "off the list": lambda: nn.LSTM(3, 4),
    "own class": lambda: type("Mine", (nn.Linear,), {})(3, 4),
    "same name": lambda: type("Linear", (nn.Linear,), {})(3, 4),
    "hook": hooked,
    "attribute": own_attribute,
    "buffer": more_tensors,
    "shape": other_shape,
    "parametrized": lambda: nn.utils.parametrizations.weight_norm(nn.Linear(2, 2)),
    "no dim": lambda: nn.Softmax(),
    "indices": lambda: nn.MaxPool2d(2, return_indices=True),
    "norm without bias": lambda: norm(nn.BatchNorm2d, 3, bias=False),
    "named children": lambda: nn.Sequential(OrderedDict(first=nn.ReLU())),
    "shared child": lambda: nn.Sequential(shared, shared),
    "foreign child": lambda: nn.Sequential(nn.ReLU(), nn.LSTM(3, 4)),
    "list": lambda: nn.ModuleList([nn.ReLU()]),
    "too deep": lambda: deep(20),
    "too many": lambda: nn.Sequential(*(nn.ReLU() for _ in range(2000))),
    "too large": lambda: nn.Linear(2**15, 2**14, device="meta"),
    "child of a leaf": lambda: with_child(),
    "elastic with a hook": elastic_with_hook,
    "elastic block": lambda: ee.ElasticBlock(nn.ReLU()),
}


@pytest.mark.parametrize("case", INEXPRESSIBLE)
def test_what_no_spec_says_exactly(case):
    assert LayerSpec.of(INEXPRESSIBLE[case]()) is None


@pytest.mark.parametrize(
    ("elastic", "dense"),
    [
        (lambda: ee.ElasticLinear(3, 4, max_out_features=8), nn.Linear(3, 4)),
        (lambda: ee.ElasticConv2d(4, 8, 3, groups=4, padding=1, max_in_channels=8), nn.Conv2d(4, 8, 3, groups=4, padding=1)),
        (lambda: ee.ElasticBatchNorm2d(4, max_num_features=8), nn.BatchNorm2d(4)),
        (lambda: ee.ElasticGroupNorm(2, 4), nn.GroupNorm(2, 4)),
        (lambda: ee.ElasticLayerNorm(4, bias=False), nn.LayerNorm(4, bias=False)),
        (lambda: ee.ElasticEmbedding(5, 4, padding_idx=2), nn.Embedding(5, 4, padding_idx=2)),
    ],
)
def test_an_elastic_layer_is_described_at_its_active_size(elastic, dense):
    layer = elastic()
    assert LayerSpec.of(layer) == LayerSpec.of(dense)
    assert LayerSpec.of(layer) is not None
    layer.layout = "static"
    assert LayerSpec.of(layer) == LayerSpec.of(dense)


def test_describing_draws_no_random_number_and_touches_nothing():
    layer = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Dropout(0), nn.Upsample(scale_factor=2))
    state, weight = torch.get_rng_state(), layer[0].weight
    spec = LayerSpec.of(layer.eval())
    assert torch.equal(torch.get_rng_state(), state) and layer[0].weight is weight
    assert repr(spec.build()) == repr(layer)


# Fuzz


SEQUENTIAL = next(kind for kind in KINDS if kind == "Sequential")  # by identity: a hostile kind may not be compared


def hostile_spec(rng: random.Random) -> Any:
    """A spec as JSON or arguments, of which a part or all is hostile."""
    kind = rng.choice(list(KINDS)) if rng.random() < 0.95 else hostile.value(rng)
    table = KINDS[kind].arguments if type(kind) is str and kind in KINDS else {}
    chance = rng.choice([0.0, 0.1, 0.5, 1.0])
    arguments: dict[Any, Any] = {}
    for name, argument in table.items():
        if argument.required or rng.random() < 0.4:
            arguments[name] = hostile.value(rng) if rng.random() < chance else sample(argument.values, rng)
    if rng.random() < 0.1:
        arguments[rng.choice(["device", "dtype", "", "\ud800", "_weight", 3, None])] = hostile.value(rng)
    content: dict[str, Any] = {"kind": kind, "arguments": arguments}
    if rng.random() < 0.03:
        content["arguments"] = rng.choice(list(hostile.mappings(arguments)))
    if content["kind"] is SEQUENTIAL or rng.random() < 0.01:
        content["layers"] = [hostile_spec(rng) for _ in range(rng.randint(0, 3))] if rng.random() < 0.7 else hostile.value(rng)
    if rng.random() < 0.01:
        return rng.choice(
            [hostile.value(rng), hostile.cycle(), hostile.nested(rng.choice([3, 50])), hostile.wide(6, 9), {**content, "x": 1}]
        )
    return content


@pytest.mark.wide
@pytest.mark.filterwarnings("ignore")
def test_a_hundred_thousand_hostile_specs(monkeypatch):
    monkeypatch.setattr(specs, "BUDGET", 10**4)
    rng = random.Random(5)
    built = refused = 0
    largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for number in range(10**5):
        content = hostile_spec(rng)
        try:
            if number % 2 and type(content) is dict and content.keys() == {"kind", "arguments"}:
                spec = LayerSpec(content["kind"], content["arguments"])
            else:
                spec = LayerSpec.from_json(content)
            layer = spec.build()
        except SurgeryError as error:
            refused += 1
            assert len(str(error)) < 2500
            continue
        built += 1
        assert numel(layer) == spec.elements <= specs.BUDGET
        assert LayerSpec.from_json(json.loads(json.dumps(spec.to_json()))) == spec
    assert built > 20_000 and refused > 20_000
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - largest < 64 * 2**10  # in kibibytes
