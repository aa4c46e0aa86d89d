"""What a change costs, said beforehand, is what it adds to a model, unit for unit and parameter for parameter."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from deciding import Scene, conv, decision
from torch import Tensor, nn
from zoo import MODELS

import esper_elastic as ee
from esper_elastic.model import known
from esper_elastic.summary import parameters_in_use
from esper_elastic.surgery import ModelSurgeon
from esper_elastic.surgery.specs.specs import BUDGET, LayerSpec
from esper_elastic.training import AdaptationDecision
from esper_elastic.training.cost import Cost, of_change, of_insertion, of_layer, of_switch, of_width
from esper_elastic.training.mechanisms import step_for
from esper_elastic.training.safety import count

#: With residual additions, concatenations, depthwise and grouped convolutions, heads, tied weights.
NAMES = ("resnet_basic", "densenet", "mobilenet_v2", "unet", "vit", "gpt2", "encoder")


def built(name: str) -> nn.Module:
    torch.manual_seed(0)
    return MODELS[name].build().eval()


@functools.cache
def converted(name: str) -> nn.Module:
    return ee.elasticize(built(name), MODELS[name].inputs(), capacity=1.5)


def difference(before: tuple[int, int], after: tuple[int, int]) -> Cost:
    return Cost(after[0] - before[0], after[1] - before[1])


@pytest.mark.parametrize("name", NAMES)
def test_a_width_costs_what_it_adds(name):
    model = converted(name)
    dims, blocks = known(model)
    for dim in list(dims.values())[:: 1 + len(dims) // 6]:
        least = -(-dim.minimum // dim.multiple_of) * dim.multiple_of
        for width in {least, dim.capacity - dim.capacity % dim.multiple_of, dim.active}:
            said, before = of_width(dim, dim.active, width), count(model)
            dim.resize(width)
            assert difference(before, count(model)) == said, dim
    for block in list(blocks.values())[:3]:
        for on in (False, False, True):
            said, before = of_switch(model, block.switch, on), count(model)
            block.switch.set(on)
            assert difference(before, count(model)) == said, block


def test_a_width_under_a_switch_costs_what_is_in_use():
    scene = Scene(state=False)
    dim = ee.dims(scene.model)["layer1.0.conv1"]
    ee.disable(scene.model, "layer1.0")
    assert of_width(dim, 20, 40) == Cost(0, 0)
    stem = ee.dims(scene.model)["stem"]
    said, before = of_width(stem, 12, 24), count(scene.model)
    stem.resize(24)
    assert difference(before, count(scene.model)) == said != Cost(0, 0)


def test_staged_widths_count_as_done():
    scene = Scene(state=False)
    stem, hidden = (ee.dims(scene.model)[name] for name in ("stem", "layer1.0.conv1"))
    before = count(scene.model)
    with ee.control_block(scene.model).batch():
        total = of_width(stem, 12, 20).active
        stem.resize(20)
        assert count(scene.model)[0] == before[0] + total
        total += of_width(hidden, 20, 31).active
        hidden.resize(31)
        total += of_switch(scene.model, known(scene.model)[1]["layer1.1"].switch, False).active
        ee.disable(scene.model, "layer1.1")
        assert count(scene.model)[0] == before[0] + total
        assert parameters_in_use(scene.model) == before[0]
    assert count(scene.model)[0] == parameters_in_use(scene.model) == before[0] + total


UNITS: dict[str, list[tuple[str, dict[str, Any]]]] = {
    "resnet_basic": [
        ("layer1.0.conv1", {"out_channels": 9}),
        ("conv1", {"out_channels": 8}),
        ("layer2.0.conv1", {"in_channels": 14}),
        ("bn1", {}),
    ],
    "densenet": [("features.conv0", {"out_channels": 12}), ("features.denseblock1.denselayer1.conv1", {"out_channels": 11})],
    "mobilenet_v2": [("features.0.0", {"out_channels": 12}), ("features.2.conv.0.0", {"out_channels": 20})],
    "unet": [("down1.1.double_conv.0", {"out_channels": 13}), ("inc.double_conv.0", {"out_channels": 6})],
    "vit": [("blocks.0.mlp.fc1", {"out_features": 31})],
    "encoder": [("layers.0.intermediate", {"out_features": 52}), ("word_embeddings", {"num_embeddings": 61})],
}


def made(model: nn.Module, name: str, path: str, config: dict[str, Any]) -> tuple[Cost, Cost] | str:
    """What a change would cost and what it did; or why it is refused."""
    inputs = MODELS[name].inputs()
    before = count(model)
    surgeon = ModelSurgeon(inputs)
    plan = surgeon.plan_modify_layer(model, path, config, preserve=False)
    if not plan:
        return str(plan.error)
    said = of_change(model, path, config, inputs)
    assert count(model) == before
    assert surgeon.modify_layer(model, path, config, preserve=False)
    return said, difference(before, count(model))


@pytest.mark.parametrize("name", UNITS)
def test_units_of_a_plain_model_cost_what_they_add(name):
    tried = 0
    for path, config in UNITS[name]:
        for change in (config, {key: value // 2 for key, value in config.items()}):
            found = made(built(name), name, path, change) if change else "nothing"
            if not isinstance(found, str):
                tried += 1
                assert found[0] == found[1] != Cost(), (path, change)
    assert tried


@pytest.mark.parametrize("name", ["resnet_basic", "mobilenet_v2", "encoder"])
def test_units_beyond_capacity_cost_what_they_add(name):
    model = ee.elasticize(built(name), MODELS[name].inputs())
    tried = 0
    for path, config in UNITS[name]:
        found = made(model, name, path, config) if config else "nothing"
        if not isinstance(found, str):
            tried += 1
            assert found[0] == found[1] != Cost(), (path, config)
    assert tried


CHANGES: list[tuple[str, dict[str, Any]]] = [
    ("stem", {"kernel_size": 5}),
    ("layer1.0.conv1", {"kernel_size": [1, 3]}),
    ("stem", {"bias": False}),
    ("head", {"bias": False}),
    ("layer1.1.conv1", {"out_channels": 60, "kernel_size": 5}),
    ("stem", {"stride": 1}),
    ("norm", {"eps": 0.1}),
]


@pytest.mark.parametrize("elastic", [True, False], ids=["elastic", "plain"])
@pytest.mark.parametrize(("path", "config"), CHANGES, ids=str)
def test_other_changes_cost_what_they_add(path, config, elastic):
    scene = Scene(elastic, state=False)
    before = count(scene.model)
    said = of_change(scene.model, path, config, scene.x)
    assert ModelSurgeon(scene.x).modify_layer(scene.model, path, config)
    assert difference(before, count(scene.model)) == said
    if "kernel_size" in config and config["kernel_size"] == 5:
        assert said.active > 0


def test_more_groups_and_fewer():
    model = nn.Sequential(nn.Conv2d(4, 8, 3), nn.Conv2d(8, 8, 3, groups=4))
    x = torch.zeros(1, 4, 8, 8)
    for groups in (2, 8, 1):
        before = count(model)
        said = of_change(model, "1", {"groups": groups}, x)
        assert ModelSurgeon(x).modify_layer(model, "1", {"groups": groups}, preserve=False)
        assert difference(before, count(model)) == said


@pytest.mark.parametrize(
    "layer",
    [
        conv(12),
        {"kind": "Conv2d", "arguments": {"in_channels": 12, "out_channels": 12, "kernel_size": 1, "groups": 12, "bias": False}},
        {"kind": "Sequential", "layers": [{"kind": "BatchNorm2d", "arguments": {"num_features": 12}}, {"kind": "ReLU"}]},
    ],
    ids=["convolution", "groups", "sequence"],
)
@pytest.mark.parametrize("elastic", [True, False], ids=["elastic", "plain"])
def test_a_layer_costs_what_it_adds(layer, elastic):
    scene = Scene(elastic, state=False)
    before = count(scene.model)
    said = of_layer(LayerSpec.from_json(layer))
    assert of_layer(LayerSpec.from_json(layer).build()) == said
    assert ModelSurgeon(scene.x).add_layer(scene.model, "after_stem", LayerSpec.from_json(layer), preserve=False)
    found = difference(before, count(scene.model))
    assert found.active == said.active and (elastic or found.allocated == said.allocated)


def test_a_much_wider_layer_counts_those_behind_it():
    model = nn.Sequential(nn.Linear(4, 16), nn.Linear(16, 2**14))
    narrow, wide = (LayerSpec("Linear", {"in_features": 16, "out_features": width}) for width in (32, 2**20))
    assert of_insertion(narrow, model) == of_layer(narrow)
    behind = of_insertion(wide, model).active - of_layer(wide).active
    assert behind >= 2**14 * (2**20 - 16) > BUDGET


class Tied(nn.Module):
    """A weight that two layers share."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(11, 8)
        self.mix = nn.Linear(8, 8)
        self.out = nn.Linear(8, 11, bias=False)
        self.out.weight = self.words.weight

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.out(torch.relu(self.mix(self.words(x))))
        return result


@pytest.mark.parametrize("elastic", [True, False], ids=["elastic", "plain"])
def test_a_tied_weight_counts_once(elastic):
    torch.manual_seed(0)
    model, x = Tied(), torch.zeros(2, 3, dtype=torch.long)
    if elastic:
        ee.elasticize(model, x)
    for config in ({"embedding_dim": 12}, {"embedding_dim": 5}):
        before = count(model)
        said = of_change(model, "words", config, x)
        if not ModelSurgeon(x).modify_layer(model, "words", config, preserve=False):
            pytest.fail("a tied embedding takes another size")
        assert difference(before, count(model)) == said != Cost()


@pytest.mark.parametrize(
    ("given", "direction"),
    [
        (decision("modify_layer", "stem", kernel_size=5), 1),
        (decision("modify_layer", "stem", kernel_size=1), -1),
        (decision("modify_layer", "stem", bias=False), -1),
        (decision("modify_layer", "stem", stride=1), 0),
        (decision("resize", "stem", width=50), 1),
        (decision("resize", "stem", width=12), 0),
        (decision("prune", "stem"), -1),
        (decision("disable", "layer1.0"), -1),
        (decision("enable", "layer1.0"), 0),
        (decision("add_skip_connection", "stem", "layer1"), 1),
        (decision("remove_layer", "layer1.0"), -1),
    ],
    ids=str,
)
def test_what_adds_and_what_takes_away(given, direction):
    scene = Scene(state=False)
    assert step_for(AdaptationDecision.parse(given), scene.model, ModelSurgeon(scene.x)).direction == direction
