"""The surgeon on elastic models: what it brings in follows the dims, in both layouts, and what sleeps neither leaks nor changes."""

import copy
import functools
import re

import pytest
import torch
from converting import elastic_layers, poison
from fingerprint import assert_same, fingerprint
from surgery_net import images
from surgery_net import net as plain_net
from test_surgery_elastic import case_of as case_of_zoo
from torch import Tensor, nn
from zoo import call

import esper_elastic as ee
from esper_elastic.layers import registry
from esper_elastic.surgery.journal import journal

EXACT = 1e-12


def case_of(name):
    """An elastic model in evaluation, and its inputs."""
    model, inputs = _made(name)
    return copy.deepcopy(model), inputs


@functools.cache
def _made(name):
    if name == "net":
        return ee.elasticize(plain_net(), images(), capacity=1.5).eval(), images(2)
    model, inputs = case_of_zoo(name)
    return model.eval(), inputs


def hand(inputs):
    return ee.ModelSurgeon(inputs)


def first(result):
    """The first tensor of a result."""
    if isinstance(result, Tensor):
        return result
    return next(iter(result.values())) if isinstance(result, dict) else result[0]


def gives(model, inputs):
    with torch.no_grad():
        return first(call(model, inputs)).clone()


def train(model, optimizer, inputs):
    """Two steps, and their losses."""
    losses = []
    for _ in range(2):
        optimizer.zero_grad()
        torch.manual_seed(3)
        loss = first(call(model, inputs)).square().sum()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return torch.stack(losses)


def add(position, build):
    def edit(surgeon, model):
        torch.manual_seed(5)
        return surgeon.add_layer(model, position, build())

    return edit


def remove(path):
    return lambda surgeon, model: surgeon.remove_layer(model, path)


def modify(path, **config):
    return lambda surgeon, model: surgeon.modify_layer(model, path, config)


def skip(source, target):
    return lambda surgeon, model: surgeon.add_skip_connection(model, source, target)


def several(*edits):
    def edit(surgeon, model):
        results = [each(surgeon, model) for each in edits]
        assert all(results), results
        return results[-1]

    return edit


def conv(channels, size=3, **options):
    return lambda: nn.Conv2d(channels, channels, size, padding=size // 2, **options)


#: Edits after which the model computes what it did, at every width.
KEEPING = {
    "net: convolution": ("net", add("after_conv1", conv(8))),
    "net: depthwise": ("net", add("after_conv2", conv(12, groups=12))),
    "net: before": ("net", add("before_blocks.1", conv(12, bias=False))),
    "net: norm": ("net", add("after_blocks.0", lambda: nn.BatchNorm2d(12))),
    "net: sequential": ("net", add("after_bn2", lambda: nn.Sequential(nn.Conv2d(12, 5, 1), nn.ReLU(), nn.Conv2d(5, 12, 1)))),
    "net: activation": ("net", add("after_blocks.0.conv1", nn.GELU)),
    "net: beside groups": ("net", add("after_stages.0", conv(12, 1))),
    "net: linear": ("net", add("before_fc1", lambda: nn.Linear(16, 16))),
    "net: layer norm": ("net", add("after_fc1", lambda: nn.LayerNorm(10))),
    "net: on the output": ("net", add("after_fc2", lambda: nn.Linear(6, 6))),
    "net: three": ("net", several(add("after_conv1", conv(8)), add("after_conv1", nn.Tanh), add("after_conv1.edits.after_0", conv(8)))),
    "net: projection": ("net", skip("conv1", "blocks.1")),
    "net: gate": ("net", skip("bn2", "blocks.1")),
    "net: gate between equal sizes": ("net", skip("blocks.0", "stages.0")),
    "net: to a linear layer": ("net", skip("blocks.0", "fc1")),
    "net: behind what was added": ("net", several(add("after_conv1", conv(8)), skip("conv1", "bn2"), add("after_bn2", conv(12)))),
    "net: bias": ("net", modify("blocks.0.conv1", bias=True)),
    "net: window": ("net", modify("conv2", kernel_size=5)),
    "net: dropout": ("net", modify("dropout", p=0.5)),
    "net: removed dropout": ("net", remove("dropout")),
    "residual: convolution": ("residual", add("after_stem", conv(4))),
    "residual: concatenation": ("residual", add("before_mixed", conv(10, 1))),
    "residual: before the head": ("residual", add("before_head", lambda: nn.Linear(24, 24))),
    "residual: projection": ("residual", skip("side", "mixed")),
    "residual: gate": ("residual", skip("stem", "branch")),
    "perceptron: linear": ("perceptron", add("after_first", lambda: nn.Linear(4, 4))),
    "perceptron: skip": ("perceptron", skip("first", "second")),
    "resnet: convolution": ("resnet_basic", add("after_layer1.0.conv1", conv(12))),
    "resnet: in a switched block": ("resnet_basic", add("after_layer1.1.bn1", conv(12))),
    "resnet: behind a switched block": ("resnet_basic", add("after_layer1.1", conv(12))),
    "resnet: skip": ("resnet_basic", skip("layer1.0", "layer3.0")),
    "vit: linear": ("vit", add("after_blocks.0.mlp.fc1", lambda: nn.Linear(40, 40))),
    "vit: block": ("vit", add("after_blocks.1", lambda: nn.Sequential(nn.LayerNorm(24), nn.Linear(24, 8), nn.GELU(), nn.Linear(8, 24)))),
    "vit: skip": ("vit", skip("blocks.0", "blocks.2.mlp.fc1")),
    "gpt2: linear": ("gpt2", add("after_transformer.h.0.mlp.c_fc", lambda: nn.Linear(40, 40))),
    "gpt2: block": ("gpt2", add("before_transformer.h.1", lambda: nn.Linear(24, 24))),
    "gpt2: skip": ("gpt2", skip("transformer.h.0.mlp", "transformer.ln_f")),
}

#: Edits that change what it computes, or only keep it at the present width.
CHANGING = {
    "net: norm removed": ("net", remove("bn1")),
    "net: convolution removed": ("net", remove("conv2")),
    "net: equal sizes of two dims": ("net", remove("stages.0")),
    "net: inner convolution removed": ("net", remove("blocks.0.conv2")),
    "net: block removed": ("net", remove("blocks.0")),
    "net: linear removed": ("net", remove("fc2")),
    "net: what was added removed": ("net", several(add("after_conv1", conv(8)), remove("conv1.edits.after_0"))),
    "net: source of a skip removed": ("net", several(skip("bn1", "blocks.1"), remove("bn1"))),
    "net: skip removed": ("net", several(skip("conv1", "blocks.1"), lambda s, m: s.remove_skip_connection(m, "blocks.1.edits.skip_0"))),
    "net: within capacity": ("net", modify("conv2", out_channels=16)),
    "net: beyond capacity": ("net", modify("conv2", out_channels=20)),
    "net: by a consumer": ("net", modify("fc2", in_features=17)),
    "net: by a norm": ("net", modify("blocks.0.bn1", num_features=40)),
    "net: fewer": ("net", modify("blocks.0.conv1", out_channels=10)),
    "net: grown with what was added": ("net", several(add("after_conv1", conv(8)), modify("conv1", out_channels=14))),
    "net: stride": ("net", modify("conv1", stride=2)),
    "net: no bias": ("net", modify("conv1", bias=False)),
    "net: eps": ("net", modify("bn1", eps=0.1)),
    "residual: branch removed": ("residual", remove("branch")),
    "residual: mixed removed": ("residual", remove("mixed")),
    "residual: grown": ("residual", modify("stem", out_channels=9)),
    "perceptron: middle removed": ("perceptron", remove("second")),
    "perceptron: grown": ("perceptron", modify("second", out_features=8)),
    "resnet: block removed": ("resnet_basic", remove("layer1.1")),
    "resnet: norm removed": ("resnet_basic", remove("layer1.0.bn1")),
    "resnet: grown": ("resnet_basic", modify("layer1.0.conv1", out_channels=20)),
    "vit: mlp removed": ("vit", remove("blocks.1.mlp.fc1")),
    "vit: norm removed": ("vit", remove("blocks.1.norm2")),
    "gpt2: removed": ("gpt2", remove("transformer.h.1.mlp")),
    "gpt2: block removed": ("gpt2", remove("transformer.h.0")),
}
EDITS = KEEPING | CHANGING

#: Edits of small models, and those that differ from them in large ones; the others are asked the longer questions by `make test-slow`.
SMALL = {key: case for key, case in EDITS.items() if case[0] in ("net", "residual", "perceptron")}
TYPICAL = SMALL | {
    key: EDITS[key] for key in ("resnet: in a switched block", "resnet: grown", "vit: block", "vit: mlp removed", "gpt2: skip")
}
GUARDED = [key for key, case in SMALL.items() if case[0] != "net" or key in ("net: convolution", "net: beyond capacity", "net: fewer")]


def table(cases, quick=None):
    """A test of each edit; of those that are not among the ``quick`` ones, a slow one."""
    quick = cases if quick is None else quick
    params = [pytest.param(*case, id=key.replace(" ", "_"), marks=() if key in quick else pytest.mark.slow) for key, case in cases.items()]
    return pytest.mark.parametrize(("name", "edit"), params)


def spread(model, which):
    """Widths for every dim: the least, the capacity, or something in between that differs from dim to dim."""
    found = {}
    for number, (name, dim) in enumerate(ee.dims(model).items()):
        step = dim.multiple_of
        least, most = -(-dim.minimum // step), dim.capacity // step
        found[name] = step * {"least": least, "most": most, "mixed": least + (3 + number) % (most - least + 1)}[which]
    return found


def widths(model):
    return {name: dim.active for name, dim in ee.dims(model).items()}


def close(one, other, message=""):
    assert one.shape == other.shape, message
    assert float((one - other).abs().max()) <= EXACT * max(1.0, float(other.abs().max())), message


def edited(name, edit):
    model, inputs = case_of(name)
    result = edit(hand(inputs), model)
    assert result, result
    return model, inputs, result


@table(KEEPING)
def test_the_function_is_kept_at_every_width(name, edit):
    model, inputs = case_of(name)
    before, present = {}, widths(model)
    for which in ("least", "most", "mixed"):
        ee.resize(model, spread(model, which))
        before[which] = widths(model), gives(model, inputs)
    ee.resize(model, present)
    expected = gives(model, inputs)
    result = edit(hand(inputs), model)
    assert result, result
    assert result.details["function_kept"], result
    close(gives(model, inputs), expected)
    for which, (sizes, outcome) in before.items():
        ee.resize(model, sizes)
        close(gives(model, inputs), outcome, which)


@table(EDITS)
def test_an_edited_model_follows_its_dims(name, edit):
    model, inputs, result = edited(name, edit)
    assert not result.details["warnings"], result
    present, expected = widths(model), gives(model, inputs)
    close(gives(ee.export(model), inputs), expected)
    for which in ("least", "most", "mixed"):
        ee.resize(model, spread(model, which))
        close(gives(ee.export(model), inputs), gives(model, inputs), which)
    other = poison(copy.deepcopy(model))
    assert torch.equal(gives(other, inputs), gives(model, inputs))
    ee.resize(model, present)
    assert torch.equal(gives(model, inputs), expected)


@table(EDITS, quick=TYPICAL)
def test_an_edit_in_static_layout_is_the_same(name, edit):
    model, inputs, _ = edited(name, edit)
    other, _ = case_of(name)
    try:
        ee.set_layout(other, "static")
    except ee.LayoutError:
        pytest.skip("compact only")
    result = edit(hand(inputs), other)
    assert result, result
    assert {layer.layout for layer in elastic_layers(other).values()} == {"static"}
    assert widths(other) == widths(model)
    torch.testing.assert_close(gives(other, inputs), gives(model, inputs), rtol=1e-9, atol=1e-11)
    ee.set_layout(other, "compact")
    torch.testing.assert_close(gives(other, inputs), gives(model, inputs), rtol=1e-9, atol=1e-11)


def optimizer_of(kind, model):
    if kind == "ours":
        return ee.optim.AdamW(model.parameters(), lr=1e-3)
    return ee.optim.guard(torch.optim.AdamW(model.parameters(), lr=1e-3), model)


@table(EDITS, quick=TYPICAL)
def test_training_goes_on(name, edit):
    assert_training_goes_on(name, edit, "ours")


@table(EDITS, quick=GUARDED)
def test_training_goes_on_under_a_guard(name, edit):
    assert_training_goes_on(name, edit, "guarded")


def assert_training_goes_on(name, edit, kind):
    model, inputs = case_of(name)
    optimizer = optimizer_of(kind, model)
    train(model.train(), optimizer, inputs)
    poison(model)
    model.eval()
    before = {key: (p, p.detach().clone(), {k: v.clone() for k, v in optimizer.state[p].items()}) for key, p in model.named_parameters()}
    with ee.transaction(model, optimizer, example_inputs=inputs):
        assert edit(hand(inputs), model)
    now = dict(model.named_parameters())
    for key, (parameter, value, state) in before.items():
        if key not in now:
            continue
        assert now[key] is parameter
        for kept, present in ((value, parameter), *((state[each], optimizer.state[parameter][each]) for each in state)):
            if kept.shape == value.shape == present.shape:
                assert ((kept == present) | kept.isnan()).all(), f"{key}: what was awake has changed"
    train(model.train(), optimizer, inputs)
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in model.parameters()}
    assert gives(model.eval(), inputs).isfinite().all()


@table(EDITS, quick=TYPICAL)
def test_a_rollback_leaves_no_trace(name, edit):
    (model, inputs), (twin, _) = case_of(name), case_of(name)
    optimizer, other = optimizer_of("ours", model), optimizer_of("ours", twin)
    for each, its in ((model, optimizer), (twin, other)):
        train(each.train(), its, inputs)
        each.eval()
    ee.dims(model)
    before = fingerprint(model, optimizer)
    with pytest.raises(ZeroDivisionError), ee.transaction(model, optimizer, validate=False):
        assert edit(hand(inputs), model)
        raise ZeroDivisionError
    assert_same(fingerprint(model, optimizer), before)
    assert torch.equal(train(model.train(), optimizer, inputs), train(twin.train(), other, inputs))


@table({key: case for key, case in SMALL.items() if "several" not in case[1].__qualname__})
def test_a_plan_leaves_no_trace(name, edit):
    model, inputs = case_of(name)
    before = fingerprint(model)

    class Planner:
        def __getattr__(self, operation):
            return getattr(hand(inputs), f"plan_{operation}")

    plan = edit(Planner(), model)
    assert plan, plan
    torch.manual_seed(0)
    now = fingerprint(model)
    drawn = {"random", "numpy.random", "torch.random"}
    assert_same([item for item in now if item[0] not in drawn], [item for item in before if item[0] not in drawn])


@table(EDITS, quick=TYPICAL)
def test_a_journal_is_replayed(name, edit):
    model, inputs, _ = edited(name, edit)
    ee.resize(model, spread(model, "mixed"))
    fresh, _ = case_of(name)
    assert ee.replay(journal(model), fresh) is fresh
    assert [path for path, _ in fresh.named_modules()] == [path for path, _ in model.named_modules()]
    assert widths(fresh).keys() == widths(model).keys()
    fresh.load_state_dict(model.state_dict())
    assert widths(fresh) == widths(model)
    assert torch.equal(gives(fresh, inputs), gives(model, inputs))
    for other in (copy.deepcopy(model), copy.deepcopy(fresh)):
        ee.resize(other, spread(other, "least"))
        ee.resize(model, spread(model, "least"))
        close(gives(other, inputs), gives(model, inputs))


def test_an_edit_between_widths_is_replayed_at_its_width():
    model, inputs = case_of("net")
    ee.resize(model, {"conv1": 5})
    assert hand(inputs).add_layer(model, "after_conv1", nn.Conv2d(5, 5, 1))
    ee.resize(model, {"conv1": 7})
    fresh, _ = case_of("net")
    ee.replay(journal(model), fresh)
    assert widths(fresh)["conv1"] == 5
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(gives(fresh, inputs), gives(model, inputs))


def test_what_is_added_is_bound_to_the_dims_of_its_neighbours():
    model, inputs = case_of("net")
    result = hand(inputs).add_layer(model, "after_conv1", nn.Conv2d(8, 8, 3, padding=1))
    made = model.get_submodule(result.details["name"])
    assert isinstance(made, ee.ElasticConv2d)
    assert made.in_dim is made.out_dim is model.conv1.out_dim
    assert registry.lookup(made.weight).axes[:2] == (model.conv1.out_dim, model.conv1.out_dim)


def test_a_removed_layer_goes_its_own_way():
    model, inputs = case_of("net")
    removed = model.conv2
    assert hand(inputs).remove_layer(model, "conv2")
    ee.dims(model)["conv1"].resize(4)
    assert (removed.in_channels, removed.in_dim is model.conv1.out_dim) == (8, False)


def test_what_comes_into_a_switched_block_is_under_its_switch():
    model, inputs = case_of("resnet_basic")
    result = hand(inputs).add_layer(model, "after_layer1.1.bn1", nn.Conv2d(12, 12, 1))
    inside = model.get_submodule(result.details["name"])
    result = hand(inputs).add_layer(model, "after_layer1.1", nn.Conv2d(12, 12, 1))
    behind = model.get_submodule(result.details["name"])
    switch = model.layer1[1].switch
    assert any(each is switch for each in registry.lookup(inside.weight).switches)
    assert not any(each is switch for each in registry.lookup(behind.weight).switches)
    ee.disable(model, "layer1.1")
    close(gives(ee.export(model), inputs), gives(model, inputs))


@pytest.mark.parametrize(
    ("name", "edit", "match"),
    [
        (
            "net",
            add("after_conv1", lambda: nn.Conv2d(8, 16, 1)),
            "Conv2d takes 8 channels and gives 16, where .*'conv1'.* runs: in an elas",
        ),
        ("net", add("after_conv1", lambda: nn.Conv2d(7, 7, 1)), "does not take an input of shape .2, 8, 10, 10."),
        ("net", add("after_conv1", lambda: nn.PReLU(8)), "PReLU: has no elastic form, so it cannot follow the dims of the model"),
        ("net", add("after_conv1", lambda: ee.ElasticConv2d(8, 8, 1)), "ElasticConv2d is elastic, with dims that are not those of the pl"),
        ("net", modify("stages.1", groups=2), "groups: in an elastic layer the number of groups follows a dim"),
        ("net", modify("fc2", out_features=7), "its width is fixed at 6"),
        ("net", modify("stages.0", out_channels=13), "expected a multiple of 3, as many as one unit"),
        ("vit", modify("blocks.0.norm1", normalized_shape=30), "mixes all its units, so newborn ones change its output"),
        ("residual", modify("mixed", in_channels=12), "it is made of several dims side by side"),
    ],
)
def test_refusals_say_why_and_leave_the_model_as_it_was(name, edit, match):
    model, inputs = case_of(name)
    ee.dims(model)
    before = fingerprint(model)
    result = edit(hand(inputs), model)
    assert not result
    assert re.search(match, str(result.error)), result.error
    drawn = {"random", "numpy.random", "torch.random"}
    now = fingerprint(model)
    assert_same([item for item in now if item[0] not in drawn], [item for item in before if item[0] not in drawn])
