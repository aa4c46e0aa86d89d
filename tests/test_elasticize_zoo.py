"""Every architecture of the zoo, made elastic: the same model at full width, its exported twin at every other.

A model is converted once, in float64 and with room to grow; each test works on a copy. Dormant memory is full of NaN.
"""

import copy
import json
import pickle
import types
from typing import Any, NamedTuple

import pytest
import torch
from contract import active_indices
from converting import (
    Outcome,
    active_outcome,
    assert_close,
    assert_same,
    built,
    elastic_layers,
    inputs_of,
    poison,
    random_widths,
    run,
    valid_widths,
)
from torch import Tensor, nn
from zoo import MODELS, Case, Inputs, call

import esper_elastic as ee
from esper_elastic.control import Axis
from esper_elastic.convert.elasticize import plan_of
from esper_elastic.layers import ElasticBlock

pytestmark = pytest.mark.wide

#: Modules through which a unit passes alone, from what produces it to the weights that look at it.
SEPARATE = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.ConvTranspose2d, nn.BatchNorm1d, nn.BatchNorm2d, nn.Embedding, nn.PReLU)
#: Without a dim all of whose places are such modules.
NOT_SEPARATE = ("gpt2", "gpt2_eager", "graph_convolution", "graph_attention")

EXPORTED = ("resnet_basic", "densenet", "mobilenet_v3", "shufflenet_v2", "convnext", "vit_multihead", "swin", "t5", "lstm")


class Converted(NamedTuple):
    """A case, its plain model, the same converted with capacity 1.5, and the plan of that."""

    case: Case
    inputs: Inputs
    plain: nn.Module
    elastic: nn.Module
    plan: ee.Plan

    def copies(self) -> tuple[nn.Module, nn.Module]:
        return copy.deepcopy(self.elastic), copy.deepcopy(self.plain)

    def outcome(self, model: nn.Module, training: bool) -> Outcome:
        return active_outcome(model, run(model, self.case, self.inputs, training))

    def output(self, model: nn.Module) -> list[Tensor]:
        with torch.no_grad():
            return self.case.outputs(call(model.eval(), self.inputs))


@pytest.fixture(scope="module", params=MODELS)
def converted(request: pytest.FixtureRequest) -> Converted:
    case = MODELS[request.param]
    model, inputs = built(case), inputs_of(case)
    plain = copy.deepcopy(model)
    assert ee.elasticize(model, inputs, capacity=1.5) is model
    plan = plan_of(model)
    assert plan is not None
    return Converted(case, inputs, plain, model, plan)


def assert_bits(one: list[Tensor], other: list[Tensor]) -> None:
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_parameters_are_the_objects_that_they_were(converted):
    """Carries out the plan on a second model, as it was read from JSON, without room to grow: there nothing is allocated anew."""
    content = json.loads(json.dumps(converted.plan.to_json()))
    for dim in content["dims"]:
        dim["capacity"] = dim["size"]
    model = copy.deepcopy(converted.plain)
    parameters, buffers = list(model.named_parameters()), list(model.named_buffers())
    modules, storages = dict(model.named_modules()), {name: tensor.data_ptr() for name, tensor in (*parameters, *buffers)}
    keys = list(model.state_dict())
    classes = {path: type(module) for path, module in modules.items()}
    ee.Plan.from_json(content).apply(model)
    assert len(converted.plan.dims) == len(ee.dims(model)) > 0
    for now, then in ((model.named_parameters(), parameters), (model.named_buffers(), buffers)):
        assert [(name, id(tensor)) for name, tensor in now] == [(name, id(tensor)) for name, tensor in then]
    assert storages == {name: tensor.data_ptr() for name, tensor in (*model.named_parameters(), *model.named_buffers())}
    assert {path: id(module) for path, module in model.named_modules()} == {path: id(module) for path, module in modules.items()}
    assert all(isinstance(module, classes[path]) for path, module in modules.items())
    assert list(model.state_dict()) == keys == list(converted.elastic.state_dict())[: len(keys)]
    for training in (False, True):
        expected = converted.outcome(copy.deepcopy(converted.plain), training)
        assert_same(converted.outcome(model, training), expected)


def test_names_and_order_stay_with_room_to_grow(converted):
    elastic, plain = converted.elastic, converted.plain
    assert [name for name, _ in elastic.named_parameters()] == [name for name, _ in plain.named_parameters()]
    assert [name for name, _ in elastic.named_buffers()] == [name for name, _ in plain.named_buffers()]
    assert [path for path, _ in elastic.named_modules()] == [path for path, _ in plain.named_modules()]
    assert [type(p) for p in elastic.parameters()] == [type(p) for p in plain.parameters()]
    assert [p.requires_grad for p in elastic.parameters()] == [p.requires_grad for p in plain.parameters()]
    grown = [dim for dim in converted.plan.dims if dim.capacity > dim.size]
    assert len(grown) >= 0.9 * len(converted.plan.dims), [dim.note for dim in converted.plan.dims if dim.note]


def test_the_plan_says_what_is_made(converted):
    tensors: dict[int, str] = {}
    for name, tensor in (*converted.elastic.named_parameters(), *converted.elastic.named_buffers()):
        tensors.setdefault(id(tensor), name)  # tied ones go by their first name
    for planned, (name, dim) in zip(converted.plan.dims, ee.dims(converted.elastic).items(), strict=True):
        assert (planned.size, planned.capacity) == (dim.active, dim.capacity)
        assert (planned.minimum, planned.multiple_of) == (dim.minimum, dim.multiple_of)
        assert set(planned.bindings) == {f"{tensors[id(binding.tensor)]}[{binding.axis}]" for binding in dim.bindings}
        assert planned.name == name


def test_full_width_equals_the_plain_model(converted):
    elastic, plain = converted.copies()
    poison(elastic)
    for training in (False, True):
        assert_same(converted.outcome(elastic, training), converted.outcome(plain, training))


@pytest.mark.parametrize("widths", [1, 2, "capacity"])
def test_any_width_equals_the_exported_model(converted, widths):
    elastic = copy.deepcopy(converted.elastic)
    dims = ee.dims(elastic)
    ee.resize(elastic, {name: dim.capacity for name, dim in dims.items()} if widths == "capacity" else random_widths(elastic, widths))
    poison(elastic)
    plain = ee.export(elastic)
    for training in (False, True):
        assert_same(converted.outcome(elastic, training), converted.outcome(plain, training))


def test_each_dim_equals_the_original_with_consumers_that_do_not_look(converted):
    """Not by way of ``export``: the plain model keeps its width, and zeros in what consumes a unit hide it."""
    elastic, plain = converted.copies()
    poison(elastic)
    shown = converted.output(plain)
    layers, modules = elastic_layers(elastic), dict(plain.named_modules())
    paths = {id(layer): path for path, layer in layers.items()}
    checked = []
    for planned, (name, dim) in zip(converted.plan.dims, ee.dims(elastic).items(), strict=True):
        consumers = [
            (modules[path].weight, 0 if getattr(modules[path], "transposed", False) else 1, layer.tensor_axes()["weight"])
            for path, layer in layers.items()
            if type(modules[path]) in (nn.Linear, nn.Conv1d, nn.Conv2d, nn.ConvTranspose2d) and getattr(modules[path], "groups", 1) == 1
        ]
        consumers = [(weight, axis, axes[axis]) for weight, axis, axes in consumers if axes[axis] is not None and dim in axes[axis].dims]
        separate = all(type(modules[paths[id(binding.layer)]]) in SEPARATE for binding in dim.bindings)
        if planned.mixed is not None or not separate or not consumers:
            continue
        full = dim.active
        before = {id(weight): weight.detach().clone() for weight, _, _ in consumers}
        dim.resize(valid_widths(dim, full)[len(valid_widths(dim, full)) // 2])
        for weight, axis, units in consumers:
            asleep = torch.ones(weight.shape[axis], dtype=torch.bool)
            asleep[present_indices(units, dim, full)] = False
            weight.detach().movedim(axis, 0)[asleep] = 0.0
        for got, expected in zip(converted.output(elastic), converted.output(plain), strict=True):
            assert_close(got, expected, f"output with {dim.active} of {full} units of {name!r}")
        dim.resize(full)
        for weight, _, _ in consumers:
            weight.detach().copy_(before[id(weight)])
        checked.append(name)
    assert_bits(shown, converted.output(plain))
    assert bool(checked) == (converted.case.name not in NOT_SEPARATE)


def present_indices(axis: Axis, dim: ee.ElasticDim, full: int) -> Tensor:
    """The active indices of an axis, as they are numbered in the plain model, where ``dim`` has ``full`` units and all dims their sizes."""
    active = set(active_indices(axis).tolist())
    now = dim.active
    dim.resize(full)
    every = active_indices(axis).tolist()
    dim.resize(now)
    return torch.tensor([place for place, index in enumerate(every) if index in active])


def test_waking_restores_the_function_bit_for_bit(converted):
    elastic = poison(copy.deepcopy(converted.elastic))
    shown, widths = converted.output(elastic), {name: dim.active for name, dim in ee.dims(elastic).items()}
    ee.resize(elastic, {name: dim.minimum for name, dim in ee.dims(elastic).items()})
    converted.outcome(elastic.eval(), training=False)
    ee.resize(elastic, widths)
    assert_bits(shown, converted.output(elastic))


def test_export_leaves_nothing_elastic(converted):
    elastic, plain = converted.copies()
    poison(elastic)
    exported = ee.export(elastic)
    originals = dict(plain.named_modules())
    for path, module in exported.named_modules():
        original = originals[path]
        assert type(module) is type(original), path
        assert module.__dict__.keys() == original.__dict__.keys(), path
        for name, value in module.__dict__.items():
            if isinstance(value, int | float | str | tuple | types.NoneType):
                assert value == original.__dict__[name], f"{path}.{name}"
    assert foreign(exported) == []
    assert all(type(tensor) in (nn.Parameter, Tensor) for tensor in (*exported.parameters(), *exported.buffers()))
    plain.load_state_dict({key: torch.full_like(value, 0) for key, value in plain.state_dict().items()})
    assert plain.load_state_dict(exported.state_dict()).missing_keys == []
    assert_bits(converted.output(plain), converted.output(copy.deepcopy(converted.plain)))


def foreign(root: nn.Module) -> list[str]:
    """Where anything of this package is left below a module: objects, classes, functions, wherever an attribute or container holds them."""
    found: list[str] = []
    seen: set[int] = set()
    pending: list[tuple[str, Any]] = [("", root)]
    while pending:
        where, thing = pending.pop()
        if id(thing) in seen or isinstance(thing, types.ModuleType):
            continue
        seen.add(id(thing))
        classes = thing.__mro__ if isinstance(thing, type) else type(thing).__mro__
        named = [*classes, thing] if callable(thing) else classes
        if any((getattr(item, "__module__", None) or "").split(".")[0] == "esper_elastic" for item in named):
            found.append(f"{where}: {thing!r}"[:200])
        if isinstance(thing, type | types.FunctionType | types.BuiltinFunctionType):
            continue
        if isinstance(thing, dict):
            pending += [(f"{where}[{key!r}]", value) for key, value in thing.items()]
        elif isinstance(thing, list | tuple | set | frozenset):
            pending += [(f"{where}[{index}]", value) for index, value in enumerate(thing)]
        if hasattr(thing, "__dict__"):
            pending += [(f"{where}.{key}", value) for key, value in vars(thing).items()]
    return found


def test_a_residue_of_this_package_would_be_found():
    block = nn.Sequential(nn.Linear(2, 2))
    assert foreign(block) == []
    block[0].note = {"kept": [ee.ElasticDim(3)]}
    assert foreign(block)[0] == "._modules['0'].note['kept'][0]: ElasticDim(active=3, capacity=3)"
    assert foreign(ElasticBlock(nn.ReLU()))


def test_a_copy_is_the_same_and_independent(converted):
    elastic = copy.deepcopy(converted.elastic)
    ee.resize(elastic, random_widths(elastic, 3))
    widths = {name: dim.active for name, dim in ee.dims(elastic).items()}
    shown = converted.output(elastic)
    twin = copy.deepcopy(elastic)
    assert [type(module) for module in twin.modules()] == [type(module) for module in elastic.modules()]
    assert {name: dim.active for name, dim in ee.dims(twin).items()} == widths
    assert_bits(shown, converted.output(twin))
    others = random_widths(twin, 5)
    ee.resize(twin, others)
    narrow = converted.output(poison(twin))
    assert {name: dim.active for name, dim in ee.dims(elastic).items()} == widths
    assert_bits(shown, converted.output(poison(elastic)))
    fresh = copy.deepcopy(converted.elastic)
    ee.resize(fresh, others)
    assert_bits(narrow, converted.output(fresh))


def test_a_pickled_model_is_the_same(converted):
    elastic = copy.deepcopy(converted.elastic)
    ee.resize(elastic, random_widths(elastic, 3))
    twin = pickle.loads(pickle.dumps(poison(elastic)))
    assert [type(module) for module in twin.modules()] == [type(module) for module in elastic.modules()]
    assert {name: dim.active for name, dim in ee.dims(twin).items()} == {name: dim.active for name, dim in ee.dims(elastic).items()}
    for training in (False, True):
        assert_same(converted.outcome(twin, training), converted.outcome(elastic, training), tolerance=0.0)


@pytest.mark.filterwarnings("ignore:The tensor attribute:UserWarning")  # nn.LSTM assigns tensors while it runs
@pytest.mark.parametrize("converted", EXPORTED, indirect=True)
def test_exported_models_trace(converted):
    elastic = copy.deepcopy(converted.elastic)
    ee.resize(elastic, random_widths(elastic, 4))
    plain = ee.export(elastic).eval()
    args, kwargs = ((), converted.inputs) if isinstance(converted.inputs, dict) else (converted.inputs, {})
    program = torch.export.export(plain, args if isinstance(args, tuple) else (args,), kwargs, strict=False)
    with torch.no_grad():
        traced = converted.case.outputs(call(program.module(), converted.inputs))
    for got, expected in zip(traced, converted.output(plain), strict=True):
        assert_close(got, expected, "output")
