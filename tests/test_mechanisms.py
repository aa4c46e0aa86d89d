"""How a decision is served: by a write to the control block where that can do it, else by the surgeon; and what names mean."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from deciding import Scene, conv, decision
from torch import Tensor, nn

import esper_elastic as ee
from esper_elastic.errors import CapacityError, DecisionError
from esper_elastic.surgery import ModelSurgeon
from esper_elastic.training import AdaptationDecision
from esper_elastic.training.mechanisms import step_for
from esper_elastic.training.names import resolve

KEPT = {"grow", "add_layer", "add_skip_connection"}
BOTH = ("metadata", "surgery")

#: What is decided, and what serves it on an elastic and on a plain network; ``None`` where it is refused.
SERVED: dict[str, tuple[dict[str, Any], str | None, str | None]] = {
    "resize down": (decision("resize", "stem", width=8), *BOTH),
    "resize up": (decision("resize", "layer1.0.conv1", factor=1.5), *BOTH),
    "resize beyond capacity": (decision("resize", "layer1.0.conv1", width=44), "surgery", "surgery"),
    "grow": (decision("grow", "layer1.0.conv1", delta=3), *BOTH),
    "grow a residual width": (decision("grow", "stem", width=17), *BOTH),
    "grow in shares": (decision("grow", "layer1.0.conv1", width=23, init="split"), "metadata", None),
    "grow to capacity": (decision("grow", "stem", width=24), *BOTH),
    "grow beyond capacity": (decision("grow", "stem", width=25), "surgery", "surgery"),
    "prune": (decision("prune", "layer1.1.conv1"), *BOTH),
    "prune by units": (decision("prune", "layer1.1.conv1", keep=[0, 3, 4]), "metadata", None),
    "prune by gradients": (decision("prune", "layer1.0.conv1", width=9, by="taylor"), "metadata", None),
    "disable": (decision("disable", "layer1.1"), "metadata", None),
    "enable": (decision("enable", "layer1.1"), "metadata", None),
    "add a layer": (decision("add_layer", position="after_layer1.1.conv1", layer=conv(28)), "surgery", "surgery"),
    "add a layer before": (decision("add_layer", "stem", "before", conv(3), preserve=True), "surgery", "surgery"),
    "add a wider layer": (decision("add_layer", position="after_layer1.0.conv1", layer=conv(20, 24)), None, "surgery"),
    "remove a layer": (decision("remove_layer", "layer1.1"), "surgery", "surgery"),
    "modify units": (decision("modify_layer", "layer1.0.conv1", out_channels=22), *BOTH),
    "modify units to fewer": (decision("modify_layer", "layer1.0.conv1", out_channels=6), *BOTH),
    "modify units beyond capacity": (decision("modify_layer", "layer1.0.conv1", out_channels=41), "surgery", "surgery"),
    "modify a window": (decision("modify_layer", "stem", kernel_size=5), "surgery", "surgery"),
    "add a skip": (decision("add_skip_connection", "stem", "layer1"), "surgery", "surgery"),
    "add a skip by parameters": (decision("add_skip_connection", from_layer="stem", to_layer="layer1.0"), "surgery", "surgery"),
}


@pytest.mark.parametrize("elastic", [True, False], ids=["elastic", "plain"])
@pytest.mark.parametrize("case", SERVED)
def test_the_cheapest_mechanism_serves(case, elastic):
    given, *expected = SERVED[case]
    scene = Scene(elastic)
    before, generation = scene.output(), scene.generation if elastic else 0
    names = [name for name, _ in scene.model.named_parameters()]
    result = scene.controller.apply(given)
    assert result.mechanism == expected[not elastic], str(result)
    assert bool(result) == (result.mechanism is not None) and bool(result.error) != bool(result)
    if not result:
        assert result.details == () and torch.equal(scene.output(), before)
        return
    (details,) = result.details
    assert details["name"]
    after = scene.output()
    assert after.shape == before.shape
    if given["adaptation_type"] in KEPT or case in ("modify units", "modify a window", "modify units beyond capacity"):
        assert torch.allclose(after, before, rtol=1e-12, atol=1e-14)
    if result.mechanism == "metadata":
        assert scene.generation == generation + (case != "enable")  # which it is already
        assert [name for name, _ in scene.model.named_parameters()] == names
    scene.train()
    assert all(torch.isfinite(p).all() for p in scene.model.parameters())


def test_details_say_what_changed():
    scene = Scene()
    assert scene.controller.apply(decision("resize", "stem", width=8)).details == ({"name": "stem", "from": 12, "to": 8},)
    assert scene.controller.apply(decision("grow", "stem")).details == ({"name": "stem", "from": 8, "to": 10, "init": "zero"},)
    assert scene.controller.apply(decision("prune", "stem")).details == ({"name": "stem", "from": 10, "to": 8, "by": "magnitude"},)
    assert scene.controller.apply(decision("disable", "layer1.0")).details == ({"name": "layer1.0", "from": True, "to": False},)
    added = scene.controller.apply(decision("add_layer", position="after_stem", layer=conv(8))).details[0]
    assert isinstance(scene.model.get_submodule(added["name"]), nn.Conv2d) and added["function_kept"]


@pytest.mark.parametrize(
    ("given", "width"),
    [
        ({"width": 9}, 9),
        ({"factor": 0.5}, 6),
        ({"factor": 1.01}, 13),
        ({"factor": 0.99}, 11),
        ({"factor": 1}, 12),
        ({"factor": 1e-9}, 1),
        ({"delta": -5}, 7),
        ({"delta": 12}, 24),
    ],
)
def test_a_width_is_said_in_three_ways(given, width):
    scene = Scene(state=False)
    assert scene.controller.apply(decision("resize", "stem", **given))
    assert scene.widths()["stem"] == width


def test_a_width_keeps_to_the_multiple_of_its_dim():
    hidden = ee.ElasticDim(8, 32, minimum=4, multiple_of=4, name="hidden")
    model = nn.Sequential(ee.ElasticLinear(6, 8, out_dim=hidden), nn.ReLU(), ee.ElasticLinear(8, 2, in_dim=hidden))
    for given, width in (("grow", 12), ("prune", 4)):
        step = step_for(AdaptationDecision.parse(decision(given, "0")), model, ModelSurgeon())
        assert step.width == width
    assert step_for(AdaptationDecision.parse(decision("resize", "hidden", factor=1.1)), model, ModelSurgeon()).width == 12


def test_optimizer_state_follows_units():
    scene = Scene()
    # of Adam's averages of what stays, nothing is lost: the units that go to sleep and return have what they had
    before = scene.state()
    scene.controller.apply(decision("resize", "stem", width=5))
    scene.controller.apply(decision("resize", "stem", width=12))
    for one, other in zip(itertools.chain(*before), itertools.chain(*scene.state()), strict=True):
        assert torch.equal(one, other)
    weight: Any = scene.model.get_submodule("layer1.0.conv1").weight
    average = scene.optimizer.state[weight]["exp_avg"].clone()
    scene.controller.apply(decision("prune", "layer1.0.conv1", keep=[19, 2, 7]))
    assert torch.equal(scene.optimizer.state[weight]["exp_avg"][:3, :12], average[[2, 7, 19], :12])


@pytest.mark.parametrize("elastic", [True, False], ids=["elastic", "plain"])
def test_optimizer_state_survives_surgery(elastic):
    scene = Scene(elastic)
    weight: Any = scene.model.get_submodule("layer1.0.conv1").weight
    average = scene.optimizer.state[weight]["exp_avg"][:20, :12].clone()
    for given in (decision("grow", "layer1.0.conv1", width=50), decision("add_layer", position="after_stem", layer=conv(12))):
        assert scene.controller.apply(given)
    assert weight is scene.model.get_submodule("layer1.0.conv1").weight
    assert torch.equal(scene.optimizer.state[weight]["exp_avg"][:20, :12], average)
    assert {id(p) for p in scene.model.parameters()} == {id(p) for group in scene.optimizer.param_groups for p in group["params"]}


# What names mean


class Named(nn.Module):
    """Layers whose paths can be taken for one another."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.ModuleDict({"b": ee.ElasticLinear(4, 6, max_out_features=8)})
        self.a_b = nn.Linear(6, 5)
        self.c = nn.ModuleDict({"d_e": nn.Linear(5, 5)})
        self.c_d = nn.ModuleDict({"e": nn.Linear(5, 3)})

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.c_d["e"](self.c["d_e"](self.a_b(self.a["b"](x))))
        return result


def name_of(given: dict[str, Any], model: nn.Module) -> str:
    return step_for(AdaptationDecision.parse(given), model, ModelSurgeon(torch.zeros(2, 4))).name


@pytest.mark.parametrize(
    ("said", "meant"),
    [("a.b", "a.b"), ("a_b", "a_b"), ("c.d_e", "c.d_e"), ("c_d.e", "c_d.e")],
)
def test_a_name_in_full_goes_first(said, meant):
    for kind in ("remove_layer", "resize"):
        assert name_of(decision(kind, said, **({"width": 3} if kind == "resize" else {})), Named()) == meant


def test_underscores_stand_for_dots_where_that_is_clear():
    scene = Scene(state=False)
    for kind, parameters in (
        ("resize", {"width": 7}),
        ("prune", {}),
        ("grow", {}),
        ("remove_layer", {}),
        ("modify_layer", {"bias": False}),
    ):
        assert name_of(decision(kind, "layer1_0_conv1", **parameters), scene.model) == "layer1.0.conv1"
    assert name_of(decision("disable", "layer1_0"), scene.model) == "layer1.0"
    assert name_of(decision("add_layer", position="after_layer1_0_conv1", layer=conv(20)), scene.model) == "layer1.0.conv1"
    assert name_of(decision("add_skip_connection", "layer1_0", "after_layer1_1"), scene.model) == "layer1.0"


def test_any_layer_of_a_dim_names_it():
    scene = Scene(state=False)
    for name in ("stem", "norm", "layer1.1.conv2"):
        assert name_of(decision("resize", name, width=7), scene.model) == "stem"


UNKNOWN: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "ambiguous": (decision("remove_layer", "c_d_e"), DecisionError, "expected one meaning, got 2: c.d_e, c_d.e. Write it with dots"),
    "ambiguous width": (decision("resize", "c_d_e", width=2), DecisionError, "expected one meaning, got 2"),
    "unknown": (decision("resize", "a.c", width=2), DecisionError, "'a.c': the model has none of that name. The nearest: 'a.b'"),
    "unknown block": (decision("disable", "nowhere"), DecisionError, "'nowhere': the model has none of that name. It has no block at all"),
    "no switch": (decision("enable", "a_b"), DecisionError, r"a_b has no switch. Put it into an ee.ElasticBlock, or remove it"),
    "unknown place": (decision("add_layer", position="after_x", layer=conv(3)), DecisionError, "layer 'x': the model has none"),
    "no side": (
        decision("add_layer", position="beside_a", layer=conv(3)),
        DecisionError,
        'expected "after_<path>" or "before_<path>", got',
    ),
    "no end of a skip": (decision("add_skip_connection", "a_b"), DecisionError, "where it ends .position., got 'a_b' and None"),
    "no units": (decision("resize", "c", width=3), DecisionError, "a ModuleDict has no units of its own"),
    "choice on a plain layer": (decision("prune", "a_b", keep=[0]), DecisionError, "no elastic layer: which units stay cannot be chosen"),
    "word of another type": (decision("resize", "a.b", by="taylor"), DecisionError, "parameters: expected .*width, got 'by'"),
    "word at all": (decision("remove_layer", "a_b", now=True), DecisionError, "parameters: expected none, got 'now'"),
    "two widths": (
        decision("resize", "a.b", width=3, factor=2),
        DecisionError,
        "expected one of width, factor, delta and keep, got width and",
    ),
    "no width": (decision("resize", "a.b"), DecisionError, "expected width, factor or delta among the parameters, got none"),
    "width of another type": (decision("resize", "a.b", width=3.0), DecisionError, r"width: expected an integer, got 3\.0"),
    "width yes": (decision("resize", "a.b", width=True), DecisionError, "width: expected an integer, got True"),
    "factor 0": (decision("grow", "a.b", factor=0), DecisionError, "factor: expected a number above 0 and at most 1024, got 0"),
    "factor none": (decision("grow", "a.b", factor=float("nan")), DecisionError, "factor: expected .* got nan"),
    "grow to less": (decision("grow", "a.b", width=5), DecisionError, "expected a width of at least 6, got 5"),
    "prune to more": (decision("prune", "a.b", width=7), DecisionError, "expected a width of at most 6, got 7"),
    "grow to less, plain": (decision("grow", "a_b", width=4), DecisionError, "expected a width of at least 5, got 4"),
    "by what": (decision("prune", "a.b", by="mood"), DecisionError, "by: expected one of magnitude, taylor, batch_norm_scale, got 'mood'"),
    "init of another type": (decision("grow", "a.b", init=3), DecisionError, "init: expected a name, got 3"),
    "exact of another type": (decision("grow", "a.b", exact=1), DecisionError, "exact: expected True or False, got 1"),
    "keep of another type": (decision("prune", "a.b", keep="01"), DecisionError, "keep: expected a list of the indices of units, got '01'"),
    "width 0": (decision("resize", "a.b", width=0), CapacityError, "cannot activate 0 units: minimum is 1"),
    "shares beyond capacity": (
        decision("grow", "a.b", width=9, init="split"),
        CapacityError,
        "capacity is 8, and units beyond it begin at",
    ),
    "nothing to modify": (decision("modify_layer", "a_b"), DecisionError, "parameters: expected the new configuration, got none"),
    "absurd size": (
        decision("modify_layer", "a_b", out_features=2**20 + 1),
        DecisionError,
        "out_features: expected an integer from 1 to 1048576",
    ),
    "absurd size of an elastic layer": (decision("resize", "a.b", width=10**9), DecisionError, "expected an integer from 1 to 1048576"),
}


@pytest.mark.parametrize("case", UNKNOWN)
def test_what_cannot_be_meant_is_refused_and_said(case):
    given, kind, message = UNKNOWN[case]
    with pytest.raises(kind, match=message):
        step_for(AdaptationDecision.parse(given), Named(), ModelSurgeon(torch.zeros(2, 4)))


def test_resolve_says_what_a_name_means():
    assert resolve("a_b", ["a.b", "c"], "layer") == "a.b"
    assert resolve("a.b", iter(["a_b"]), "layer") == "a_b"
    with pytest.raises(DecisionError, match="layer 'x': the model has none of that name. It has no layer at all"):
        resolve("x", [], "layer")


def test_what_a_skip_begins_in_stays_on():
    scene = Scene(state=False)
    assert scene.controller.apply(decision("add_skip_connection", "layer1.0.conv1", "layer1.1"))
    for given in (decision("disable", "layer1.0"), [decision("enable", "layer1.0"), decision("disable", "layer1.0")]):
        result = scene.controller.apply(given)
        assert "where the skip layer1.1.edits.skip_0 begins, which would find no input" in str(result.error)
    assert scene.controller.apply(decision("disable", "layer1.1"))
    assert torch.isfinite(scene.output()).all()
    assert scene.controller.apply([decision("remove_skip_connection", "layer1.1.edits.skip_0"), decision("disable", "layer1.0")])
    assert torch.isfinite(scene.output()).all()


def test_a_fixed_width_says_why():
    scene = Scene(state=False)
    with pytest.raises(DecisionError, match="'head': expected a layer whose width can change, got one whose width is fixed, since"):
        name_of(decision("resize", "head", width=4), scene.model)


def test_a_layer_of_several_dims_names_them():
    one, other = ee.ElasticDim(4, 8), ee.ElasticDim(6, 8)
    both = ee.concat(one, other)
    parts = nn.ModuleList([ee.ElasticLinear(3, 4, out_dim=one), ee.ElasticLinear(3, 6, out_dim=other), ee.ElasticBatchNorm1d(10, dim=both)])
    with pytest.raises(DecisionError, match="got a layer whose units are those of several: 0, 1. Name one of those"):
        name_of(decision("resize", "2", width=4), parts)


def test_a_guarded_optimizer_keeps_what_sleeps():
    scene = Scene(state=False)
    scene.optimizer = ee.optim.guard(torch.optim.AdamW(scene.model.parameters(), lr=1e-3), scene.model)
    scene.train()
    before = scene.state()
    assert scene.controller.apply(decision("resize", "stem", width=5))
    scene.train()
    assert scene.controller.apply(decision("resize", "stem", width=12))
    weight: Any = scene.model.get_submodule("stem").weight
    number = next(index for index, p in enumerate(scene.model.parameters()) if p is weight)
    kept = [(one, other) for one, other in zip(before[number], scene.state()[number], strict=True) if one.shape == weight.shape]
    assert kept and all(torch.equal(one[5:], other[5:]) for one, other in kept)


def test_an_unguarded_optimizer_keeps_units_from_moving():
    scene = Scene(state=False)
    scene.optimizer = torch.optim.AdamW(scene.model.parameters(), lr=1e-3)
    scene.train()
    for given in (decision("grow", "stem"), decision("prune", "stem")):
        result = scene.controller.apply(given)
        assert not result and "Guard it with ee.optim.guard" in str(result.error)
        assert not scene.controller.preflight(given)
    assert scene.controller.apply(decision("resize", "stem", width=13))
