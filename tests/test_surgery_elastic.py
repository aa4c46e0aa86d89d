"""Surgery on elastic models: another capacity, layers made elastic, units beyond capacity, and edits beneath conversion and export."""

import copy
import io
import math

import pytest
import torch
import torch.nn.functional as F
from contract import active_part, dormant_mask
from converting import built, elastic_layers, inputs_of, poison
from fingerprint import assert_same, fingerprint
from torch import nn
from zoo import MODELS, call

import esper_elastic as ee
from esper_elastic.convert import PLAN
from esper_elastic.convert.trace import Example, run
from esper_elastic.errors import CapacityError, GenerationError, OptimizerError, SurgeryError, TopologyError
from esper_elastic.layers import registry
from esper_elastic.surgery.edits.edit import Edit
from esper_elastic.surgery.edits.edited import edits_of, set_removed
from esper_elastic.surgery.edits.holder import gate_name
from esper_elastic.surgery.elastic import elastic
from esper_elastic.surgery.elastic.capacity import reallocate
from esper_elastic.surgery.elastic.channels import Channels, axes_at
from esper_elastic.surgery.transaction import transaction

DOUBLE = torch.float64


class Perceptron(nn.Module):
    """3 -> 4 (of 7) -> 5 (of 5) -> 2."""

    def __init__(self):
        super().__init__()
        self.first = ee.ElasticLinear(3, 4, max_out_features=7, dtype=DOUBLE)
        self.second = ee.ElasticLinear(4, 5, in_dim=self.first.out_dim, dtype=DOUBLE)
        self.third = ee.ElasticLinear(5, 2, in_dim=self.second.out_dim, out_dim=ee.ElasticDim(2, minimum=2), dtype=DOUBLE)

    def forward(self, x):
        return self.third(self.second(self.first(x).relu()).relu())


class Residual(nn.Module):
    """Convolutions with batch norm and a residual sum, channels laid side by side, and a flatten before the head."""

    def __init__(self):
        super().__init__()
        self.stem = ee.ElasticConv2d(3, 4, 3, padding=1, max_out_channels=7, dtype=DOUBLE)
        self.norm = ee.ElasticBatchNorm2d(4, dim=self.stem.out_dim, dtype=DOUBLE)
        self.branch = ee.ElasticConv2d(4, 4, 3, padding=1, in_dim=self.stem.out_dim, out_dim=self.stem.out_dim, dtype=DOUBLE)
        self.side = ee.ElasticConv2d(3, 3, 1, max_out_channels=5, dtype=DOUBLE)
        self.beside = ee.concat(self.side.out_dim, self.stem.out_dim, self.side.out_dim)
        self.mixed = ee.ElasticConv2d(10, 6, 1, in_dim=self.beside, dtype=DOUBLE)
        self.head = ee.ElasticLinear(6 * 4, 2, in_dim=self.mixed.out_dim * 4, out_dim=ee.ElasticDim(2, minimum=2), dtype=DOUBLE)

    def forward(self, x):
        stem = self.norm(self.stem(x))
        stem = (stem + self.branch(stem)).relu()
        side = self.side(x)
        return self.head(F.adaptive_avg_pool2d(self.mixed(torch.cat([side, stem, side], 1)).relu(), 2).flatten(1))


def converted(name):
    case = MODELS[name]
    return ee.elasticize(built(case), inputs_of(case), capacity=1.5)


def case_of(name):
    """A model and its inputs."""
    torch.manual_seed(0)
    if name in HAND_BUILT:
        build, *shape = HAND_BUILT[name]
        model = build()
        ee.dims(model)  # teaches dims their names
        return model, torch.randn(shape, dtype=DOUBLE)
    return converted(name), inputs_of(MODELS[name])


HAND_BUILT = {"perceptron": (Perceptron, 4, 3), "residual": (Residual, 2, 3, 4, 4)}
NETS = ["perceptron", "residual", "resnet_basic", "vit", "densenet"]


def loss_of(model, inputs):
    outputs = call(model, inputs)
    return sum(output.square().sum() for output in (outputs if isinstance(outputs, tuple) else (outputs,)))


def train(model, optimizer, inputs, steps=2):
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        torch.manual_seed(3)
        loss = loss_of(model, inputs)
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return torch.stack(losses)


def halve(model):
    ee.resize(model, {name: max(dim.minimum, dim.active // 2 // dim.multiple_of * dim.multiple_of) for name, dim in ee.dims(model).items()})


def widths_of(model):
    return {name: dim.active for name, dim in ee.dims(model).items()}


def bits(tensor):
    return tensor.detach().flatten().contiguous().view(torch.uint8)


def every_capacity(model, change):
    with transaction(model, validate=False):
        for dim in ee.dims(model).values():
            reallocate(model, dim, change(dim))


def larger(dim):
    return dim.capacity + 3 * dim.multiple_of


def tightest(dim):
    return dim.active


def optimizer_for(kind, model):
    if kind == "ours":
        return ee.optim.AdamW(model.parameters(), lr=1e-3)
    return ee.optim.guard(torch.optim.AdamW(model.parameters(), lr=1e-3), model)


# Capacity


@pytest.mark.parametrize("name", NETS)
def test_another_capacity_changes_no_result_and_carries_what_sleeps(name):
    model, inputs = case_of(name)
    halve(model)
    poison(model)
    model.eval()
    before = call(model, inputs)
    tensors = {key: (tensor, tensor.detach().clone()) for key, tensor in (*model.named_parameters(), *model.named_buffers())}
    axes = {f"{path}.{key}".lstrip("."): own for path, layer in elastic_layers(model).items() for key, own in layer.tensor_axes().items()}
    lengths = {
        key: [None if axis is None else [s.dim.capacity * s.inner for s in axis.segments] for axis in own] for key, own in axes.items()
    }
    every_capacity(model, larger)
    fresh = 0
    now = dict((*model.named_parameters(), *model.named_buffers()))
    for key, (tensor, old) in tensors.items():
        assert now[key] is tensor
        own = axes.get(key, [None] * tensor.dim())
        index = [
            torch.arange(size)
            if axis is None
            else torch.cat([s.start + torch.arange(n) for s, n in zip(axis.segments, length, strict=True)])
            for size, axis, length in zip(tensor.shape, own, lengths.get(key, own), strict=True)
        ]
        grid = torch.meshgrid(*index, indexing="ij") if index else ()
        assert torch.equal(bits(tensor[grid]), bits(old)), f"{key}: what was there is not what it was"
        new = torch.ones(tensor.shape, dtype=torch.bool)
        new[grid] = False
        assert tensor[new].isfinite().all(), f"{key}: new dormant units"
        fresh += int(new.sum())
    assert fresh
    torch.testing.assert_close(call(model, inputs), before, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", ["ours", "guarded"])
@pytest.mark.parametrize("name", NETS[:4])
def test_training_goes_on_as_if_nothing_had_happened(name, kind):
    model, inputs = case_of(name)
    optimizer = optimizer_for(kind, model)
    train(model, optimizer, inputs)
    full = widths_of(model)
    halve(model)
    train(model, optimizer, inputs)
    twin, other = copy.deepcopy((model, optimizer))
    poison(twin), poison(model)
    every_capacity(model, larger)
    for path, layer in elastic_layers(model).items():
        before = twin.get_submodule(path)
        for key, parameter in layer.named_parameters(recurse=False):
            theirs = before._parameters[key]
            now, then = layer.tensor_axes()[key], before.tensor_axes()[key]
            assert optimizer.state[parameter].keys() == other.state[theirs].keys()
            for name in ("exp_avg", "exp_avg_sq"):
                kept, known = optimizer.state[parameter][name], other.state[theirs][name]
                assert torch.equal(active_part(kept, now), active_part(known, then)), f"{path}.{key}: {name}"
            if kind == "ours":
                kept, known = optimizer.step_counts(parameter), other.step_counts(theirs)
                assert torch.equal(active_part(kept, now), active_part(known, then)), f"{path}.{key}: counts"
                assert kept.sum() == known.sum(), "the counts of new units are zero, those of the others stay"
    torch.testing.assert_close(train(model, optimizer, inputs), train(twin, other, inputs), rtol=1e-10, atol=1e-12)
    for each in (model, twin):
        for tensor in each.state_dict(keep_vars=True).values():
            tensor.data.nan_to_num_(0.25) if tensor.is_floating_point() else None
        ee.resize(each, full)
    torch.testing.assert_close(train(model, optimizer, inputs), train(twin, other, inputs), rtol=1e-10, atol=1e-12)
    every_capacity(model, lambda dim: larger(dim))
    halve(model), halve(twin)
    torch.testing.assert_close(train(model, optimizer, inputs), train(twin, other, inputs), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", NETS[:3])
def test_capacity_goes_down_to_what_is_active_for_hand_built_models_and_to_the_size_at_conversion(name):
    model, inputs = case_of(name)
    model.eval()
    before = call(model, inputs)
    sizes = widths_of(model)
    every_capacity(model, tightest)
    assert all(dim.capacity == sizes[key] for key, dim in ee.dims(model).items())
    torch.testing.assert_close(call(model, inputs), before, rtol=1e-12, atol=1e-12)
    every_capacity(model, larger)
    halve(model)
    ee.resize(model, sizes)
    torch.testing.assert_close(call(model, inputs), before, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("name", ["perceptron", "residual", "resnet_basic", "vit"])
def test_static_layout(name, when):
    model, inputs = case_of(name)
    halve(model)
    poison(model)
    model.eval()
    before = call(model, inputs)
    if when == "before":
        ee.set_layout(model, "static")
        call(model, inputs)
    every_capacity(model, larger)
    poison(model)
    if when == "after":
        ee.set_layout(model, "static")
    loss_of(model, inputs).backward()
    for layer in elastic_layers(model).values():
        for n, axes in layer.tensor_axes().items():
            grad = None if layer._parameters.get(n) is None else layer._parameters[n].grad
            assert grad is None or not grad[dormant_mask(grad, axes)].any()
    after = call(model, inputs)[..., : before.shape[-1]]  # the head of a hand-built net has a dim too
    torch.testing.assert_close(after, before, rtol=1e-10, atol=1e-12)


def test_gradients_follow_and_old_graphs_are_refused():
    model, inputs = case_of("residual")
    loss_of(model, inputs).backward()
    grad = model.mixed.weight.grad.clone()
    graph = loss_of(model, inputs)
    generation = ee.control_block(model).generation
    reallocate(model, model.stem.out_dim, 12)
    assert ee.control_block(model).generation == generation + 1
    got = model.mixed.weight.grad
    assert got.shape == (6, 22, 1, 1)
    assert torch.equal(got[:, :9], grad[:, :9])
    assert torch.equal(got[:, 17:], grad[:, 12:])
    with pytest.raises(GenerationError):
        graph.backward()
    loss_of(model, inputs).backward()


@pytest.mark.parametrize("name", NETS[:4])
def test_an_undone_capacity_leaves_no_trace(name):
    model, inputs = case_of(name)
    optimizer = ee.optim.AdamW(model.parameters(), lr=1e-3)
    train(model, optimizer, inputs)
    halve(model)
    train(model, optimizer, inputs)
    twin, other = copy.deepcopy((model, optimizer))
    before = fingerprint(model, optimizer)
    with pytest.raises(ZeroDivisionError), transaction(model, optimizer, validate=False):
        for dim in ee.dims(model).values():
            reallocate(model, dim, larger(dim))
        for path, layer in elastic_layers(model).items():
            if hasattr(layer, "out_features") and layer.out_dim.dims[0].rigid is None and len(layer.out_dim.segments) == 1:
                elastic.grow_units(model, path, "out_features", layer.out_dim.active + layer.out_dim.segments[0].inner, preserve=False)
        raise ZeroDivisionError
    assert_same(fingerprint(model, optimizer), before)
    assert torch.equal(train(model, optimizer, inputs), train(twin, other, inputs))


@pytest.mark.parametrize("name", ["residual", "resnet_basic", "vit"])
def test_weights_of_another_capacity_travel(name, tmp_path):
    model, inputs = case_of(name)
    every_capacity(model, larger)
    halve(model)
    model.eval()
    expected = call(model, inputs)
    other = copy.deepcopy(model)
    torch.testing.assert_close(call(other, inputs), expected)
    every_capacity(other, larger)
    assert all(dim.capacity < ee.dims(other)[key].capacity for key, dim in ee.dims(model).items())
    stream = io.BytesIO()
    torch.save(model, stream)
    stream.seek(0)
    torch.testing.assert_close(call(torch.load(stream, weights_only=False), inputs), expected)
    torch.testing.assert_close(call(ee.export(model), inputs), expected, rtol=1e-10, atol=1e-12)
    if name == "residual":
        return
    ee.save(tmp_path / "file", model)
    plain = built(MODELS[name]).eval()
    ee.load(tmp_path / "file", plain)
    torch.testing.assert_close(call(plain, inputs), expected)
    assert {key: dim.capacity for key, dim in ee.dims(plain).items()} == {key: dim.capacity for key, dim in ee.dims(model).items()}


def test_a_capacity_that_is_none_is_refused():
    model, _ = case_of("residual")
    dim = model.stem.out_dim
    other = ee.ElasticLinear(4, 2, in_dim=dim, dtype=DOUBLE)
    before = fingerprint(model)
    for capacity, error, match in [
        (3, SurgeryError, "expected at least 4, as many as are active, got 3. Resize the dim first"),
        (9.5, CapacityError, "capacity: expected an integer, got 9.5"),
        (9, TopologyError, "used outside of it, by ElasticLinear. Give the model that holds all"),
    ]:
        with pytest.raises(error, match=match):
            reallocate(model, dim, capacity)
    assert_same(fingerprint(model), before)
    del other
    before = fingerprint(model)
    with dim.block.batch(), pytest.raises(SurgeryError, match="while a batch of the control block is open"):
        reallocate(model, dim, 9)
    dim.rigid = "somebody says so"
    with pytest.raises(SurgeryError, match="cannot be 9: its width is fixed at 4, since somebody says so"):
        reallocate(model, dim, 9)
    del dim.rigid
    assert_same(fingerprint(model), before)
    assert reallocate(model, dim, 7) == []


def test_a_capacity_that_splits_a_group_is_refused():
    conv = ee.ElasticConv2d(3, 8, 1, max_out_channels=12)
    conv.out_dim.multiple_of = 4
    model = nn.Sequential(conv, ee.ElasticGroupNorm(2, 8, dim=conv.out_dim))
    with pytest.raises(
        SurgeryError,
        match="expected a multiple of 4, the units that ElasticGroupNorm computes as one group, got 18. The nearest: 16 and 20",
    ):
        reallocate(model, conv.out_dim, 18)
    reallocate(model, conv.out_dim, 16)
    assert model[1].weight.shape == (16,)


def test_what_conversion_has_found_of_a_dim_holds_for_its_capacity():
    model = converted("resnet_basic")
    name, dim = next(iter(ee.dims(model).items()))
    size = dim.active
    dim.resize(size // 2)
    with pytest.raises(
        SurgeryError, match=f"expected at least {size}, the size that the model had when it was converted .* got {size - 1}"
    ):
        reallocate(model, dim, size - 1)
    plan = model.__dict__[PLAN]
    next(planned for planned in plan["dims"] if planned["name"] == name)["note"] = "its capacity is its size, since beyond it nothing works"
    with pytest.raises(SurgeryError, match="cannot be 999: its capacity is its size, since beyond it nothing works"):
        reallocate(model, dim, 999)


def test_a_tensor_that_is_computed_is_refused():
    layer = ee.ElasticLinear(3, 4, max_out_features=6)
    torch.nn.utils.parametrizations.weight_norm(layer, dim=0)
    with pytest.raises(CapacityError, match="tensor that is computed at each access"):
        reallocate(nn.Sequential(layer), layer.out_dim, 9)


def test_what_left_the_model_follows_no_more():
    model, _ = case_of("residual")
    branch = model.branch
    x = torch.randn(2, 4, 4, 4, dtype=DOUBLE)
    expected = branch(x)
    del model.branch
    elastic.let_go(branch, model)
    reallocate(model, model.stem.out_dim, 12)
    model.stem.out_dim.resize(2)
    torch.testing.assert_close(branch(x), expected)
    assert branch.in_dim is branch.out_dim
    branch.in_dim.resize(3)
    assert model.stem.out_dim.active == 2


def test_a_compiled_model_follows():
    model, inputs = case_of("residual")
    ee.set_layout(model, "static")
    compiled = torch.compile(model, backend="eager")
    for capacity in (9, 12, 10):
        torch.testing.assert_close(compiled(inputs), model(inputs))
        with transaction(model, validate=False):
            reallocate(model, model.stem.out_dim, capacity)
    model.stem.out_dim.resize(10)
    torch.testing.assert_close(compiled(inputs), model(inputs))


# Axes


@pytest.mark.parametrize(
    ("name", "layout"),
    [
        *((name, "compact") for name in ("resnet_basic", "densenet", "unet", "mobilenet_v2", "vit", "gpt2")),
        ("vit", "static"),
        ("unet", "static"),
    ],
)
def test_axes_are_those_that_activations_follow(name, layout):
    """What is said of a module at one width holds at another: the size is there."""
    case = MODELS[name]
    inputs = inputs_of(case)
    model = ee.elasticize(built(case), inputs, capacity=1.5)
    ee.set_layout(model, layout)
    recorded = run(model, Example(inputs), grad=False)
    paths = [path for path, _ in model.named_modules() if path]
    channels = Channels(recorded)
    found = {(path, side): channels.of(model.get_submodule(path), side) for path in paths for side in ("in", "out")}
    known = {place: axis for place, axis in found.items() if axis is not None}
    assert len(known) > 0.6 * len(found)
    halve(model)
    once_more = run(model, Example(inputs), grad=False)
    checked = 0
    for recorded_call in once_more.calls:
        for side, values in (("in", recorded_call.inputs), ("out", recorded_call.outputs)):
            axis = known.get((recorded_call.path, side))
            if axis is not None and values:
                assert (axis.capacity if layout == "static" else axis.active) in values[0].shape, (recorded_call.path, side, axis)
                checked += 1
    assert checked >= len(known)


def test_axes_of_blocks_activations_and_sums():
    model, _ = case_of("resnet_basic")
    assert axes_at(model, "layer1.0.conv1", "out") is model.layer1[0].conv1.out_dim
    assert axes_at(model, "layer1.0.bn1", "in") is model.layer1[0].bn1.dim
    assert axes_at(model, "relu", "out") is model.conv1.out_dim
    assert axes_at(model, "maxpool", "in") is model.conv1.out_dim
    assert axes_at(model, "layer2.0", "out") is model.layer2[0].bn2.dim
    assert axes_at(model, "layer2", "in") is model.conv1.out_dim
    assert axes_at(model, "avgpool", "out").segments == model.fc.in_dim.segments
    assert axes_at(model, "layer2.0.relu", "out") is None, "called twice, over two dims"


def test_a_run_is_recorded_once_until_something_changes():
    edit = Edit(*case_of("resnet_basic"))
    found = edit.run_around("layer1.0.conv1")
    assert found is not None and edit.run_around("layer1.0.conv2") is found and edit.run_around("layer1.0") is not found
    edit.touch("layer1.0")
    assert edit.run_around("layer1.0.conv1") is not found


def test_axes_without_inputs_are_what_layers_say():
    model, _ = case_of("residual")
    assert axes_at(model, "mixed", "in") is model.beside
    sequence = nn.Sequential(nn.Sequential(model.stem, model.norm), nn.ReLU())
    assert axes_at(sequence, "0", "in") is model.stem.in_dim
    assert axes_at(sequence, "0", "out") is model.stem.out_dim
    assert axes_at(sequence, "1", "out") is None
    embedding = ee.ElasticEmbedding(5, 3)
    assert axes_at(nn.Sequential(embedding), "0", "out") is embedding.out_dim
    assert axes_at(nn.Sequential(embedding), "0", "in") is None


# Layers made elastic

LAYERS = {
    "linear": (lambda: nn.Linear(4, 6), (2, 4), "in out"),
    "conv1d": (lambda: nn.Conv1d(4, 6, 3), (2, 4, 7), "in out"),
    "conv2d": (lambda: nn.Conv2d(4, 6, 3, bias=False), (2, 4, 5, 5), "in out"),
    "transposed": (lambda: nn.ConvTranspose2d(4, 6, 2), (2, 4, 5, 5), "in out"),
    "depthwise": (lambda: nn.Conv2d(4, 4, 3, groups=4), (2, 4, 5, 5), "in"),
    "batch norm": (lambda: nn.BatchNorm2d(4), (2, 4, 5, 5), "in"),
    "layer norm": (lambda: nn.LayerNorm(4), (2, 3, 4), "in"),
    "rms norm": (lambda: nn.RMSNorm(4), (2, 3, 4), "in"),
    "activation": (nn.GELU, (2, 4), "in"),
    "sequence": (lambda: nn.Sequential(nn.Conv2d(4, 5, 1), nn.BatchNorm2d(5), nn.ReLU(), nn.Conv2d(5, 6, 1)), (2, 4, 3, 3), "in out"),
}


@pytest.mark.parametrize("layout", ["compact", "static"])
@pytest.mark.parametrize("kind", LAYERS)
def test_a_layer_becomes_elastic_and_stays_what_it_was(kind, layout):
    torch.manual_seed(0)
    build, shape, sides = LAYERS[kind]
    layer = build().double()
    layer.register_forward_hook(lambda module, args, result: seen.append(type(module)))
    seen = []
    x = torch.randn(shape, dtype=DOUBLE)
    layer.eval()
    before = layer(x)
    own, names = [id(p) for p in layer.parameters()], list(layer.state_dict())
    into = ee.ElasticLinear(2, 4, max_out_features=7, dtype=DOUBLE)
    out = ee.ElasticLinear(6, 2, max_in_features=9, dtype=DOUBLE)
    for user in (into, out):
        user.layout = layout
    axes = {"in_axis": into.out_dim} | ({"out_axis": out.in_dim} if "out" in sides else {})
    state = torch.get_rng_state()
    assert elastic.make_elastic(layer, **axes) is layer
    assert torch.equal(torch.get_rng_state(), state)
    poison(layer)
    assert [id(p) for p in layer.parameters()] == own
    assert [name for name in layer.state_dict() if not name.startswith("_esper")] == names
    assert not layer.training
    assert all(each.layout == layout for each in elastic_layers(layer).values())
    place = x.dim() - 1 if kind in ("linear", "layer norm", "rms norm", "activation") else 1
    if layout == "static":
        missing = torch.zeros([3 if i == place else n for i, n in enumerate(x.shape)], dtype=DOUBLE)
        got = layer(torch.cat([x, missing], place)).narrow(place, 0, before.shape[place])
    else:
        got = layer(x)
    torch.testing.assert_close(got, before, rtol=1e-12, atol=1e-12)
    assert len(seen) == 2
    if layout == "compact":
        into.out_dim.resize(3)
        assert layer(x.narrow(place, 0, 3)).isfinite().all()


def test_a_new_layer_keeps_its_place_in_optimizer_and_registry():
    model, _ = case_of("residual")
    conv = nn.Conv2d(4, 4, 1).double()
    model.extra = conv
    optimizer = ee.optim.AdamW(model.parameters(), lr=1e-3)
    weight = conv.weight
    with transaction(model, optimizer, validate=False):
        elastic.make_elastic(conv, in_axis=model.stem.out_dim, out_axis=model.stem.out_dim)
    assert conv.weight is weight
    assert weight.shape == (7, 7, 1, 1)
    assert registry.lookup(weight).axes[:2] == (model.stem.out_dim, model.stem.out_dim)
    assert model.stem.out_dim.block is conv._widths.block
    plain = nn.Conv2d(4, 4, 1).double()
    before = fingerprint(plain)
    with pytest.raises(ZeroDivisionError), transaction(model, optimizer, validate=False):
        elastic.make_elastic(plain, in_axis=model.stem.out_dim, out_axis=model.stem.out_dim)
        raise ZeroDivisionError
    assert_same(fingerprint(plain), before)


@pytest.mark.parametrize(
    ("build", "error", "match"),
    [
        (lambda: nn.Linear(5, 4), CapacityError, "in_features: expected 4, the active size of the dim given, got 5"),
        (
            lambda: nn.LSTM(4, 4),
            TopologyError,
            "LSTM: has no elastic form, so it cannot follow the dims of the model. Expected one of ElasticBatch|LSTM: has no",
        ),
        (lambda: nn.BatchNorm1d(4), TopologyError, "BatchNorm1d: expected one axis, as it gives the units that it takes"),
        (lambda: nn.ReLU(), TopologyError, "ReLU: gives the units that it takes, but they are on two axes"),
    ],
    ids=["size", "kind", "norm", "activation"],
)
def test_a_layer_that_cannot_be_elastic_is_refused(build, error, match):
    layer = build()
    before = fingerprint(layer)
    with pytest.raises(error, match=match):
        elastic.make_elastic(layer, in_axis=ee.ElasticDim(4, 6), out_axis=ee.ElasticDim(4, 8))
    assert_same(fingerprint(layer), before)


def test_sizes_that_nothing_follows_are_fixed():
    layer = elastic.make_elastic(nn.Linear(4, 6), in_axis=ee.ElasticDim(4, 6))
    assert ee.dims(nn.Sequential(layer)) == {}
    with pytest.raises(CapacityError, match="its width is fixed at 6, since nothing else in the model would follow it"):
        layer.out_dim.resize(5)


# Units


@pytest.mark.parametrize("preserve", [True, False])
@pytest.mark.parametrize(
    ("path", "name", "size", "active", "capacity"),
    [
        ("stem", "out_channels", 6, 6, 7),
        ("stem", "out_channels", 11, 11, 11),
        ("norm", "num_features", 9, 9, 9),
        ("branch", "in_channels", 8, 8, 8),
    ],
    ids=["within", "beyond", "by a norm", "by a consumer"],
)
def test_more_units(path, name, size, active, capacity, preserve):
    model, inputs = case_of("residual")
    optimizer = ee.optim.AdamW(model.parameters(), lr=1e-3)
    train(model, optimizer, inputs)
    poison(model)
    model.eval()
    before = call(model, inputs)
    with transaction(model, optimizer, validate=False):
        changed = elastic.grow_units(model, path, name, size, preserve)
    dim = model.stem.out_dim
    assert (dim.active, dim.capacity) == (active, capacity)
    assert set(changed.paths) == {"stem", "norm", "branch", "mixed"}
    assert changed.function_kept == preserve
    assert changed.steps[-1] == f"ElasticDim 'stem': 4 -> {active} units active"
    torch.testing.assert_close(call(model, inputs), before, rtol=1e-12, atol=1e-12)
    assert not optimizer.step_counts(model.stem.weight)[4:].any()
    train(model.train(), optimizer, inputs)
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


def test_fewer_units_sleep():
    model, _ = case_of("residual")
    changed = elastic.grow_units(model, "stem", "out_channels", 2)
    assert (model.stem.out_dim.active, model.stem.out_dim.capacity, changed.function_kept) == (2, 7, False)
    assert elastic.grow_units(model, "stem", "out_channels", 2).steps == []


@pytest.mark.parametrize(
    ("path", "name", "size", "error", "match"),
    [
        ("mixed", "in_channels", 12, TopologyError, "it is made of several dims side by side .*'side'.*'stem'"),
        (
            "head",
            "in_features",
            26,
            SurgeryError,
            "expected a multiple of 4, as many as one unit of ElasticDim 'mixed' has here, got 26. The nearest: 24 and 28",
        ),
        ("stem", "out_channels", 13, CapacityError, "cannot activate 13 units: expected a multiple of 2. The nearest: 12"),
        ("stem", "out_channels", 0, CapacityError, "cannot activate 0 units: minimum is 1"),
    ],
    ids=["several", "part of a unit", "multiple", "minimum"],
)
def test_units_that_cannot_be_are_refused(path, name, size, error, match):
    model, _ = case_of("residual")
    ee.dims(model)["stem"].multiple_of = 2
    before = fingerprint(model)
    with pytest.raises(error, match=match):
        elastic.grow_units(model, path, name, size)
    assert_same(fingerprint(model), before)


def test_units_under_a_foreign_optimizer_are_refused_without_trace():
    model, inputs = case_of("residual")
    optimizer = torch.optim.AdamW(model.parameters())
    ee.resize(model, {name: dim.capacity for name, dim in ee.dims(model).items()})
    train(model, optimizer, inputs, 1)
    before = fingerprint(model, optimizer)
    with pytest.raises(OptimizerError, match="Guard it with"), transaction(model, optimizer, validate=False):
        elastic.grow_units(model, "stem", "out_channels", 11)
    assert_same(fingerprint(model, optimizer), before)


# One layer


@pytest.mark.parametrize(
    "build",
    [lambda: ee.ElasticConv2d(3, 4, 3, bias=False, max_out_channels=7, dtype=DOUBLE), lambda: nn.Conv2d(3, 4, 3, bias=False).double()],
)
def test_a_bias_comes_and_goes(build):
    model = nn.Sequential(build())
    conv, x = model[0], torch.randn(2, 3, 5, 5, dtype=DOUBLE)
    optimizer = ee.optim.AdamW(model.parameters(), lr=1e-2)
    before = conv(x)
    with transaction(model, optimizer, validate=False):
        bias = elastic.add_bias(conv)
    assert bias.shape == conv.weight.shape[:1]
    assert any(p is bias for group in optimizer.param_groups for p in group["params"])
    assert torch.equal(conv(x), before)
    loss_of(model, x).backward()
    optimizer.step()
    assert bias[:4].all()
    assert not bias[4:].any()
    with transaction(model, optimizer, validate=False):
        elastic.drop_bias(conv)
    assert conv.bias is None
    assert len(optimizer.param_groups[0]["params"]) == 1
    conv(x)


@pytest.mark.parametrize("size", [(5, 5), (1, 1), (2, 4), (3, 7)])
def test_another_window_at_capacity(size):
    torch.manual_seed(0)
    conv = ee.ElasticConv2d(3, 4, 3, padding=1, max_out_channels=7, dtype=DOUBLE)
    poison(conv)
    plain = ee.export(nn.Sequential(conv))[0]
    old = conv.weight.detach().clone()
    elastic.set_kernel(conv, size)
    elastic.set_kernel(plain, size)
    assert conv.weight.shape == (7, 3, *size)
    assert torch.equal(conv.active("weight"), plain.weight)
    centre = conv.weight[:, :, (size[0] - 1) // 2, (size[1] - 1) // 2]
    assert torch.equal(bits(centre), bits(old[:, :, 1, 1])), "what sleeps is carried too"
    x = torch.randn(1, 3, 9, 9, dtype=DOUBLE)
    torch.testing.assert_close(conv(x), plain(x))


def test_groups_of_elastic_layers_are_refused():
    with pytest.raises(TopologyError, match="'c' .ElasticConv2d.: groups: in an elastic layer the number of groups follows a dim"):
        elastic.require_plain_groups(ee.ElasticConv2d(4, 4, 1), "c", "groups")
    elastic.require_plain_groups(nn.Conv2d(4, 4, 1), "c", "groups")


# Edits beneath conversion and export


def insert(model, path, layer, side="after", gated=False):
    edits = edits_of(model.get_submodule(path), path)
    name = edits.free_name(side)
    getattr(edits, side).append(name)
    edits._modules[name] = layer
    if gated:
        edits.register_parameter(gate_name(name), nn.Parameter(torch.full((), 0.5, dtype=DOUBLE)))


def remove(model, path, bridge):
    parent, _, name = path.rpartition(".")
    holder = model.get_submodule(parent)
    edits = edits_of(holder, parent)
    del holder._modules[name]
    edits._modules["bridge_0"] = bridge
    edits.bridges[name] = "bridge_0"
    set_removed(holder, parent)


def edited_resnet():
    torch.manual_seed(1)
    model = built(MODELS["resnet_basic"])
    width = model.layer1[0].conv1.out_channels
    insert(model, "layer1.0.conv1", nn.Conv2d(width, width, 1).double())
    insert(model, "layer1.0.bn2", nn.Conv2d(width, width, 3, padding=1).double(), gated=True)
    insert(model, "layer1.1", nn.BatchNorm2d(width).double(), "before")
    remove(model, "layer1.0.bn1", nn.Identity())
    return model.eval()


def pickled(model):
    stream = io.BytesIO()
    torch.save(model, stream)
    stream.seek(0)
    return torch.load(stream, weights_only=False)


def test_an_edited_plain_model_becomes_elastic_with_its_edits():
    model, inputs = edited_resnet(), inputs_of(MODELS["resnet_basic"])
    expected, names = call(model, inputs), list(model.state_dict())
    ids = [id(p) for p in model.parameters()]
    ee.elasticize(model, inputs, capacity=1.5)
    poison(model)
    torch.testing.assert_close(call(model, inputs), expected, rtol=1e-10, atol=1e-12)
    assert [id(p) for p in model.parameters()] == ids
    assert [name for name in model.state_dict() if name in names] == names
    assert isinstance(model.layer1[0].conv1, ee.ElasticConv2d)
    assert isinstance(model.layer1[0].conv1.edits.after_0, ee.ElasticConv2d)
    assert isinstance(model.layer1[1].edits.before_0, ee.ElasticBatchNorm2d)
    assert isinstance(model.layer1[0].bn1, nn.Identity)
    dim = ee.dims(model)["layer1.0.conv1.edits.after_0"]
    assert dim is model.layer1[0].conv1.edits.after_0.out_dim
    halve(model)
    expected = call(model, inputs)
    for other in (copy.deepcopy(model), pickled(model), ee.export(model), pickled(ee.export(model)), copy.deepcopy(ee.export(model))):
        torch.testing.assert_close(call(other, inputs), expected, rtol=1e-10, atol=1e-12)
    twin = built(MODELS["resnet_basic"])
    assert type(ee.export(model).layer2[0].conv1) is type(twin.layer2[0].conv1)


def test_an_edited_elastic_model_exports_with_its_edits():
    torch.manual_seed(0)
    model, inputs = case_of("resnet_basic")
    model.eval()
    conv = model.layer1[0].conv1
    names = [key for key in model.state_dict() if not key.startswith("_esper")]
    insert(model, "layer1.0.conv1", nn.Conv2d(conv.out_channels, conv.out_channels, 1).double())
    elastic.make_elastic(conv.edits.after_0, in_axis=conv.out_dim, out_axis=conv.out_dim)
    remove(model, "layer1.0.bn1", nn.Identity())
    halve(model)
    poison(model)
    expected = call(model, inputs)
    plain = ee.export(model)
    assert not elastic_layers(plain)
    torch.testing.assert_close(call(plain, inputs), expected, rtol=1e-10, atol=1e-12)
    assert isinstance(plain.layer1[0].bn1, nn.Identity)
    assert isinstance(plain.layer1[0].conv1.edits.after_0, nn.Conv2d)
    assert set(names) - set(plain.state_dict()) == {key for key in names if key.startswith("layer1.0.bn1.")}
    for other in (copy.deepcopy(model), pickled(model), copy.deepcopy(plain), pickled(plain), ee.elasticize(plain, inputs)):
        torch.testing.assert_close(call(other, inputs), expected, rtol=1e-10, atol=1e-12)
    other = copy.deepcopy(model)
    ee.dims(other)["layer1.0.conv1"].resize(3)
    assert other.layer1[0].conv1.edits.after_0.in_channels == 3
    assert conv.out_channels != 3


@pytest.mark.parametrize("on", [True, False])
@pytest.mark.parametrize("hand_built", [True, False], ids=["ElasticBlock", "converted"])
def test_what_stands_around_a_block_runs_whether_it_is_on_or_off(hand_built, on):
    torch.manual_seed(0)
    if hand_built:
        inner = ee.ElasticLinear(4, 4, dtype=DOUBLE)
        model = nn.Sequential(ee.ElasticBlock(nn.Sequential(inner)), nn.Linear(4, 2).double())
        path, inputs, dim = "0", torch.randn(3, 4, dtype=DOUBLE), inner.out_dim
    else:
        model, inputs = case_of("resnet_basic")
        path, dim = "layer1.1", model.layer1[1].bn2.dim
    after = ee.ElasticBatchNorm2d(dim.active, dim=dim, dtype=DOUBLE) if not hand_built else nn.Tanh()
    insert(model, path, after, gated=True)
    elastic.govern(model)
    model.eval()
    if not on:
        ee.disable(model, path)
    expected = call(model, inputs)
    switch = model.get_submodule(path).switch
    gate = model.get_submodule(path).edits.after_0_gate
    for parameter in (gate, *after.parameters()):
        known = registry.lookup(parameter)
        assert known is None or not any(each is switch for each in known.switches)
    plain = ee.export(model)
    torch.testing.assert_close(call(plain, inputs), expected, rtol=1e-10, atol=1e-12)
    with torch.no_grad():
        gate.fill_(math.pi)
    assert not torch.allclose(torch.as_tensor(call(model, inputs)), torch.as_tensor(expected))


def test_what_is_inserted_inside_of_a_block_is_under_its_switch():
    model, _ = case_of("resnet_basic")
    conv = model.layer1[1].conv1
    insert(model, "layer1.1.conv1", nn.Conv2d(conv.out_channels, conv.out_channels, 1).double())
    new = elastic.make_elastic(conv.edits.after_0, in_axis=conv.out_dim, out_axis=conv.out_dim)
    elastic.govern(model)
    assert any(each is model.layer1[1].switch for each in registry.lookup(new.weight).switches)
