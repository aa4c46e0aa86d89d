"""Limits of a run: each refuses exactly at its bound, names itself, and does so before anything is allocated."""

from __future__ import annotations

import json
import random
from typing import Any

import hostile
import pytest
import torch
from deciding import Scene, conv, decision
from fingerprint import assert_same
from torch import nn

import esper_elastic as ee
from esper_elastic.errors import DecisionError, ElasticError, SafetyError
from esper_elastic.summary import parameters_in_use
from esper_elastic.training import Safety
from esper_elastic.training.controller import AdaptationResult
from esper_elastic.training.decisions import TYPES
from esper_elastic.training.safety import Guardian, count

UP = decision("resize", "stem", width=13)
DOWN = decision("resize", "layer1.0.conv1", width=19)
OFF = decision("disable", "layer1.1")
WINDOW = decision("modify_layer", "stem", kernel_size=5)


def scene_of(**limits: Any) -> Scene:
    return Scene(safety=Safety(**limits), state=False)


def tried(scene: Scene, given: Any) -> AdaptationResult:
    """Apply, after preflight has said the same and changed nothing."""
    before = scene.print()
    verdict = scene.controller.preflight(given)
    assert_same(scene.print(), before)
    result = scene.controller.apply(given)
    assert result.verdict == verdict and bool(result) == bool(verdict)
    if not result:
        assert_same(scene.print(), before)
    return result


def refused(scene: Scene, given: Any, factor: str, reason: str = "") -> None:
    result = tried(scene, given)
    assert not result and result.verdict.factor == factor and reason in result.verdict.reason
    assert isinstance(result.error, SafetyError) and str(result.error).startswith(f"safety: {factor}: ") and not result.undone


# When


@pytest.mark.parametrize("field", ["confidence", "urgency"])
def test_thresholds_take_what_reaches_them(field):
    scene = scene_of(**{f"min_{field}": 0.5})
    refused(scene, UP | {field: 0.49999}, f"min_{field}", f"{field} 0.5 is below 0.5")
    assert tried(scene, UP | {field: 0.5})
    refused(scene, [DOWN, OFF | {field: 0.1}], f"min_{field}")


def test_only_allowed_types_are_heard():
    scene = scene_of(allowed={"resize"})
    assert tried(scene, UP)
    refused(scene, OFF, "allowed", "disable is not among what this run allows: resize")
    refused(scene_of(allowed=()), UP, "allowed", "nothing")


@pytest.mark.parametrize(("limit", "given", "free"), [("widths_from", UP, WINDOW), ("topology_from", WINDOW, UP)])
def test_widths_and_topology_open_at_their_step(limit, given, free):
    scene = scene_of(**{limit: 10})
    scene.controller.step = 9
    refused(scene, given, limit, "opens at step 10, and this is step 9")
    assert tried(scene, free)
    scene.controller.step = 10
    assert tried(scene, given)


def test_cooldown_of_a_run():
    scene = scene_of(cooldown_steps=5)
    scene.controller.step = 3
    assert tried(scene, [UP, OFF])
    for step in (3, 7):
        scene.controller.step = step
        refused(scene, DOWN, "cooldown_steps", f"{step - 3} of 5 steps since the last change")
    scene.controller.step = 8
    assert tried(scene, DOWN)


def test_cooldown_at_one_boundary():
    scene = scene_of(cooldown_steps=1)
    for given in (decision("resize", "nowhere", width=3), UP, DOWN):
        scene.controller.submit(given)
    assert [result.verdict.factor for result in scene.controller.drain()] == ["decision", "", "cooldown_steps"]


def test_cooldown_of_a_layer_under_whatever_name():
    scene = scene_of(cooldown_of_layer=5)
    assert tried(scene, UP)
    scene.controller.step = 4
    refused(scene, decision("grow", "norm"), "cooldown_of_layer", "4 of 5 steps since stem changed")
    refused(scene, WINDOW, "cooldown_of_layer")
    assert tried(scene, DOWN)
    scene.controller.step = 5
    assert tried(scene, decision("grow", "norm"))


# How often


@pytest.mark.parametrize(
    ("limit", "counted", "free"),
    [
        ("additions_per_epoch", [UP, decision("grow", "layer1.0.conv1"), decision("enable", "layer1.0")], DOWN),
        ("removals_per_epoch", [DOWN, decision("prune", "layer1.1.conv1"), OFF], decision("resize", "stem", width=13)),
    ],
)
def test_additions_and_removals_are_counted_by_epoch(limit, counted, free):
    scene = scene_of(**{limit: 2})
    ee.disable(scene.model, "layer1.0")
    for given in counted[:2]:
        assert tried(scene, given)
    assert tried(scene, decision("modify_layer", "stem", stride=1))  # neither
    for _ in range(2):  # a refusal counts for nothing
        refused(scene, counted[2], limit, "2 of 2 in epoch 0")
    assert tried(scene, free)
    scene.controller.epoch = 1
    assert tried(scene, counted[2])


def test_each_decision_of_a_request_counts():
    scene = scene_of(additions_per_epoch=2)
    steps = [UP, decision("grow", "layer1.0.conv1"), decision("grow", "layer1.1.conv1")]
    refused(scene, steps, "additions_per_epoch", "2 of 2 in epoch 0")
    assert tried(scene, steps[:2])
    refused(scene, steps[2], "additions_per_epoch")
    refused(scene_of(removals_per_epoch=0), DOWN, "removals_per_epoch", "0 of 0")


# How small


@pytest.mark.parametrize("elastic", [True, False], ids=["elastic", "plain"])
def test_every_width_keeps_a_minimum(elastic):
    scene = Scene(elastic, Safety(minimum_width=8), state=False)
    for given in (
        decision("resize", "stem", width=7),
        decision("prune", "stem", width=7),
        decision("modify_layer", "stem", out_channels=7),
    ):
        refused(scene, given, "minimum_width", "stem would have 7 units, of at least 8")
    assert tried(scene, decision("prune", "stem", width=8))
    narrow = Scene(elastic, Safety(minimum_width=40), state=False)
    assert tried(narrow, decision("grow", "stem", width=14)), "what is below may grow"


# How large


def size_after(given: Any, elastic: bool) -> tuple[int, int, int]:
    """Parameters in use before, those in use and those held after."""
    scene = Scene(elastic, state=False)
    before = parameters_in_use(scene.model)
    assert scene.controller.apply(given)
    return (before, *count(scene.model))


LARGER = {
    "width": decision("resize", "stem", width=20),
    "grow": decision("grow", "layer1.0.conv1"),
    "beyond capacity": decision("grow", "stem", width=31),
    "window": WINDOW,
    "layer": decision("add_layer", position="after_stem", layer=conv(12)),
    "skip": decision("add_skip_connection", "stem", "layer1"),
    "several": [decision("grow", "stem", width=14), decision("grow", "layer1.0.conv1", width=24)],
    "several, by surgery": [decision("grow", "stem", width=14), WINDOW],
    "down and up": [decision("resize", "layer1.0.conv1", width=1), decision("resize", "stem", width=24)],
}


@pytest.mark.parametrize("elastic", [True, False], ids=["elastic", "plain"])
@pytest.mark.parametrize("case", LARGER)
def test_parameters_in_use_stay_within_their_bound(case, elastic):
    given = LARGER[case]
    before, after, _ = size_after(given, elastic)
    assert case == "down and up" or before < after
    for most, fits in ((after - 1, False), (after, True)):
        scene = Scene(elastic, Safety(max_parameters=most), state=False)
        result = tried(scene, given)
        assert bool(result) == fits, result
        assert fits or result.verdict.factor == "max_parameters"
        assert parameters_in_use(scene.model) <= max(most, before)


def test_what_is_switched_on_counts():
    scene = Scene(state=False)
    whole = parameters_in_use(scene.model)
    for most, fits in ((whole - 1, False), (whole, True)):
        scene = scene_of(max_parameters=most)
        ee.disable(scene.model, "layer1.1")
        assert bool(tried(scene, decision("enable", "layer1.1"))) == fits


def test_requests_of_one_boundary_share_the_room():
    _, after, _ = size_after(decision("resize", "stem", width=16), True)
    scene = scene_of(max_parameters=after)
    generation = scene.generation
    for width in (14, 16, 17, 15):
        scene.controller.submit(decision("resize", "stem", width=width))
    assert [bool(result) for result in scene.controller.drain()] == [True, True, False, True]
    assert scene.generation == generation + 1


@pytest.mark.parametrize("elastic", [True, False], ids=["elastic", "plain"])
def test_bytes_of_what_is_held_stay_within_their_bound(elastic):
    _, _, held = size_after(LARGER["beyond capacity"], elastic)
    for most, fits in ((held * 8 * 4 - 1, False), (held * 8 * 4, True)):
        scene = Scene(elastic, Safety(max_bytes=most), state=False)
        result = tried(scene, LARGER["beyond capacity"])
        assert bool(result) == fits and (fits or result.verdict.factor == "max_bytes")


def test_what_takes_no_more_is_never_too_large():
    for limits in ({"max_parameters": 10}, {"max_bytes": 10}):
        scene = scene_of(**limits)
        for given in (DOWN, OFF, decision("modify_layer", "stem", bias=False), decision("remove_layer", "layer1.1")):
            assert tried(scene, given)
    scene = scene_of(max_bytes=10)
    assert tried(scene, UP), "within capacity nothing is allocated"
    refused(scene, decision("resize", "stem", width=25), "max_bytes", "of at most 10")


def test_by_default_a_model_may_grow_to_eight_times_its_size():
    scene = Scene(state=False)
    assert scene.controller.guardian.most == 2**27
    assert Guardian(Safety(), nn.Linear(2**12, 2**13, device="meta")).most == 8 * (2**25 + 2**13)


ABSURD = {
    "units": decision("modify_layer", "stem", out_channels=10**9),
    "width": decision("resize", "stem", width=10**9),
    "many units": decision("resize", "stem", width=2**20),
    "factor": decision("grow", "stem", factor=1000.0),
    "inputs": decision("modify_layer", "head", out_features=2**20),
    "window": decision("modify_layer", "layer1.0.conv1", kernel_size=1023),
    "window and units": decision("modify_layer", "layer1.0.conv1", kernel_size=255, out_channels=1000),
    "layer": decision("add_layer", position="after_stem", layer=conv(12, 2**18)),
    "layer beyond limits": decision("add_layer", position="after_stem", layer=conv(12, 2**24)),
    "both": [UP, decision("grow", "stem", factor=1024.0)],
}


@pytest.mark.parametrize("elastic", [True, False], ids=["elastic", "plain"])
@pytest.mark.parametrize("case", ABSURD)
def test_the_absurd_is_refused_before_it_is_allocated(case, elastic, monkeypatch):
    scene = Scene(elastic, Safety(max_parameters=10**6), state=False)
    before = scene.print()

    def watched(make: Any) -> Any:
        def allocate(*args: Any, **kwargs: Any) -> Any:
            made = make(*args, **kwargs)
            assert made.is_meta or type(made) is not torch.Tensor or made.numel() < 2**22, "it was allocated"
            return made

        return allocate

    with torch.device("meta"):
        torch.empty(1)  # which has torch collect the functions that it sends there
    for name in ("empty", "zeros"):
        monkeypatch.setattr(torch, name, watched(getattr(torch, name)))
    result = scene.controller.apply(ABSURD[case])
    assert not result and isinstance(result.error, ElasticError), result
    assert "it was allocated" not in str(result.error)
    assert_same(scene.print(), before)


# What is said of limits themselves


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        ({"min_confidence": 1.5}, "Safety: min_confidence: expected a number from 0 to 1, got 1.5"),
        ({"min_urgency": float("nan")}, "Safety: min_urgency: expected a number from 0 to 1, got nan"),
        ({"cooldown_steps": -1}, "Safety: cooldown_steps: expected an integer of at least 0, got -1"),
        ({"widths_from": None}, "Safety: widths_from: expected an integer of at least 0, got None"),
        ({"max_parameters": 1e6}, "Safety: max_parameters: expected an integer of at least 0, got 1000000.0"),
        ({"minimum_width": True}, "Safety: minimum_width: expected an integer of at least 0, got True"),
        ({"allowed": {"explode"}}, "Safety: allowed: expected types of decisions .*, got 'explode'"),
        ({"allowed": "grow", "cooldown_steps": -1}, "Safety: cooldown_steps"),
        ({"allowed": None}, "Safety: allowed: expected types of decisions .*, got None"),
        ({"allowed": [3, "grow"]}, "Safety: allowed: .*got 3"),
    ],
    ids=str,
)
def test_wrong_limits_are_refused(limits, message):
    with pytest.raises(DecisionError, match=message):
        Safety(**limits)


def test_account_goes_on_after_a_checkpoint():
    limits = {"additions_per_epoch": 1, "cooldown_of_layer": 5}
    scene = scene_of(**limits)
    assert tried(scene, UP) and tried(scene, DOWN)
    other = scene_of(**limits)
    other.controller.guardian.load_state_dict(json.loads(json.dumps(scene.controller.guardian.state_dict())))
    assert other.controller.guardian.state_dict() == scene.controller.guardian.state_dict()
    refused(other, UP, "cooldown_of_layer")
    refused(other, decision("grow", "layer1.1.conv1"), "additions_per_epoch")


# Whatever comes

NAMES = ("stem", "norm", "layer1.0.conv1", "layer1_1_conv1", "layer1.0", "layer1", "head", "layer1.1.bn1", "", "a.b", "stem.edits.after_0")
WORDS = (
    "width",
    "factor",
    "delta",
    "keep",
    "by",
    "init",
    "exact",
    "preserve",
    "kernel_size",
    "out_channels",
    "bias",
    "groups",
    "from_layer",
)


def fuzzed(rng: random.Random) -> Any:
    """A decision that is nearly one, or hardly."""
    value = hostile.value
    if rng.random() < 0.1:
        return rng.choice([UP, DOWN, OFF, decision("prune", "stem"), decision("grow", "layer1.0.conv1"), *LARGER.values()])
    kind = rng.choice(TYPES) if rng.random() < 0.97 else value(rng)
    parameters: dict[Any, Any] = {}
    for _ in range(rng.choice([0, 0, 1, 1, 1, 2])):
        parameters[rng.choice(WORDS)] = (
            value(rng) if rng.random() < 0.3 else rng.choice([1, 2, 9, 13, 40, 0.5, 1.5, True, [0, 1, 2], "taylor"])
        )
    position = rng.choice(["after_stem", "before_layer1.0.conv1", "layer1", "after_", "after_norm", None, value(rng)])
    layer = rng.choice([conv(12), conv(4), {"kind": "ReLU"}, nn.Identity(), value(rng)])
    given = decision(kind, rng.choice(NAMES) if rng.random() < 0.97 else value(rng), position, layer)
    given["parameters"] = parameters if rng.random() < 0.97 else value(rng)
    for name in ("confidence", "urgency", "metadata", "timestamp", "unknown"):
        if rng.random() < 0.03:
            given[name] = value(rng)
    return [given] * rng.randint(1, 2) if rng.random() < 0.05 else given


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("elastic", "number"),
    [
        (True, 700),
        (False, 300),
        pytest.param(True, 70_000, marks=pytest.mark.slow),
        pytest.param(False, 30_000, marks=pytest.mark.slow),
    ],
)
def test_whatever_is_decided_is_done_or_refused_and_the_budget_kept(elastic, number):
    rng = random.Random(number)
    succeeded = done = 0
    scene = Scene(elastic)
    while done < number:
        if done % 500 == 0:  # edits pile up
            most = 2 * parameters_in_use(Scene(elastic, state=False).model)
            scene = Scene(elastic, Safety(max_parameters=most, minimum_width=3, additions_per_epoch=40))
        done += 1
        scene.controller.step, scene.controller.epoch = done, done // 100
        given = fuzzed(rng)
        if rng.random() < 0.1:
            assert isinstance(scene.controller.preflight(given).reason, str)
        result = scene.controller.apply(given)
        assert isinstance(result, AdaptationResult) and (result.error is None) == result.success
        assert result.success or (isinstance(result.error, ElasticError) and result.verdict.factor), result
        succeeded += bool(result)
        if result:
            assert parameters_in_use(scene.model) <= most
            assert all(width >= 3 for width in scene.widths().values())
            assert torch.isfinite(scene.output()).all()
    assert number // 50 < succeeded < number
