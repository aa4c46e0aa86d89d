"""The controller: requests from any thread succeed or vanish as a whole, at a boundary, in one commit where metadata serves them."""

from __future__ import annotations

import json
import random
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from typing import Any

import pytest
import torch
from deciding import Scene, conv, decision
from fingerprint import assert_same, fingerprint
from torch import nn
from training_nets import loader, trainer

import esper_elastic as ee
from esper_elastic.errors import DecisionError, ElasticError, OwnerError, TrainingError
from esper_elastic.surgery import ModelSurgeon
from esper_elastic.training import AdaptationResult, Controller, Safety, controller
from esper_elastic.training.requests import MOST_STEPS
from esper_elastic.training.safety import Guardian

RESIZE = decision("resize", "stem", width=8)
GROW = decision("grow", "layer1.0.conv1")
PRUNE = decision("prune", "layer1.1.conv1")
DISABLE = decision("disable", "layer1.1")
WINDOW = decision("modify_layer", "stem", kernel_size=5)
INSERT = decision("add_layer", position="after_layer1.1.conv1", layer=conv(28))
BAD_NAME = decision("resize", "nowhere", width=3)
BAD_WIDTH = decision("resize", "stem", width=0)
BAD_EDIT = decision("add_layer", position="after_stem", layer=conv(7))

TOGETHER = {
    "metadata and metadata": ([RESIZE, GROW, PRUNE, DISABLE], "metadata"),
    "metadata and surgery": ([RESIZE, GROW, PRUNE, WINDOW], "surgery"),
    "surgery and metadata": ([WINDOW, DISABLE, RESIZE], "surgery"),
    "surgery and surgery": ([WINDOW, INSERT], "surgery"),
    "one after the other": ([RESIZE, decision("prune", "stem", width=6), decision("grow", "stem", width=20)], "metadata"),
    "on what was added": ([INSERT, decision("remove_layer", "layer1.1.conv1.edits.after_0")], "surgery"),
}


@pytest.mark.parametrize("case", TOGETHER)
def test_several_decisions_succeed_together(case):
    decisions, mechanism = TOGETHER[case]
    scene = Scene()
    generation = scene.generation
    result = scene.controller.apply(decisions)
    assert result and result.mechanism == mechanism and not result.undone and result.error is None
    assert len(result.details) == len(result.decisions) == len(decisions) and result.milliseconds > 0
    assert result.verdict and result.verdict.mechanism == mechanism
    if case == "metadata and metadata":
        assert scene.generation == generation + 1
    scene.train()


def test_a_width_grows_beyond_its_capacity_in_the_request_that_removes_a_skip_from_it():
    """The layers of the skip live on until the request can no longer be undone."""
    run = trainer()
    made = run.apply_architecture_modification(
        run.model, {"adaptation_type": "add_skip_connection", "layer_name": "conv1", "position": "bn2"}
    )
    together = [
        {"adaptation_type": "remove_skip_connection", "layer_name": made.details[0]["name"]},
        {"adaptation_type": "grow", "layer_name": "conv2", "parameters": {"width": 40}},
    ]
    before = fingerprint(run.model, run.optimizer)
    assert not run.apply_architecture_modification(run.model, [*together, BAD_NAME])
    assert_same(fingerprint(run.model, run.optimizer), before)
    result = run.apply_architecture_modification(run.model, together)
    assert result and ee.dims(run.model)["conv2"].active == 40
    run.fit(loader(), steps=2)


@pytest.mark.parametrize("bad", [BAD_NAME, BAD_WIDTH, BAD_EDIT], ids=["name", "width", "edit"])
@pytest.mark.parametrize("case", [name for name in TOGETHER if name != "on what was added"])
def test_several_decisions_vanish_together(case, bad):
    decisions, _ = TOGETHER[case]
    scene = Scene()
    if case == "surgery and surgery":
        decisions = decisions[:1]  # an inserted module keeps what was undone
    before = scene.print()
    for failing in ([*decisions, bad], [decisions[0], bad, *decisions[1:]]):
        result = scene.controller.apply(failing)
        assert not result and result.mechanism is None and result.details == () and isinstance(result.error, ElasticError)
        assert_same(scene.print(), before)
    assert scene.controller.apply(decisions)


@pytest.mark.parametrize("given", [[GROW, PRUNE, DISABLE], [WINDOW, GROW, PRUNE]], ids=["metadata", "surgery"])
def test_a_commit_that_fails_leaves_no_weight_written(given, monkeypatch):
    scene = Scene(safety=Safety(cooldown_steps=0, additions_per_epoch=9))
    before, account = scene.print(), scene.controller.guardian.state_dict()
    keeping: Any = sys.modules["esper_elastic.growth.keep"]

    def fail(*args: Any) -> None:
        permute(*args)
        raise MemoryError("out of memory")

    permute = keeping._permute
    monkeypatch.setattr(keeping, "_permute", fail)
    result = scene.controller.apply(given)
    assert not result and result.undone and isinstance(result.error, TrainingError) and "MemoryError: out of memory" in str(result.error)
    assert_same(scene.print(), before)
    now = scene.controller.guardian.state_dict()
    assert all(now[name] == account[name] for name in ("additions", "removals", "last", "last_of"))
    # one that fails takes no other one of the same boundary with it
    futures = [scene.controller.submit(each) for each in (RESIZE, given, GROW)]
    assert [bool(each) for each in scene.controller.drain()] == [True, False, True]
    assert [bool(future.result()) for future in futures] == [True, False, True]
    assert scene.widths() == {"stem": 8, "layer1.0.conv1": 25, "layer1.1.conv1": 28}


def test_an_interruption_while_writing_is_undone_and_raised(monkeypatch):
    scene = Scene()
    before = scene.print()
    keeping: Any = sys.modules["esper_elastic.growth.keep"]

    def interrupt(*args: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(keeping, "_permute", interrupt)
    futures = [scene.controller.submit(given) for given in (GROW, PRUNE, RESIZE)]
    with pytest.raises(KeyboardInterrupt):
        scene.controller.drain()
    assert_same(scene.print(), before)
    for future in futures:
        with pytest.raises(TrainingError, match="interrupted before it was carried out"):
            future.result(timeout=0)


@pytest.mark.parametrize(
    "given",
    [RESIZE, GROW, PRUNE, DISABLE, WINDOW, INSERT, [RESIZE, PRUNE], [WINDOW, INSERT], BAD_NAME, BAD_WIDTH, BAD_EDIT, [RESIZE, BAD_EDIT], 3],
    ids=str,
)
@pytest.mark.parametrize("elastic", [True, False], ids=["elastic", "plain"])
def test_preflight_says_what_apply_does_and_changes_nothing(given, elastic):
    scene = Scene(elastic)
    before, account = scene.print(), scene.controller.guardian.state_dict()
    verdict = scene.controller.preflight(given)
    assert_same(scene.print(), before)
    assert scene.controller.guardian.state_dict() == account
    assert scene.controller.apply(given).verdict == verdict


def test_preflight_leaves_a_given_layer_as_it_is():
    scene = Scene(state=False)
    layer = nn.Conv2d(28, 28, 3, padding=1).double()
    before = [p.clone() for p in layer.parameters()]
    given = decision("add_layer", position="after_layer1.1.conv1", layer=layer)
    assert scene.controller.preflight(given)
    assert all(torch.equal(one, other) for one, other in zip(layer.parameters(), before, strict=True)) and type(layer) is nn.Conv2d
    assert scene.controller.apply(given)
    assert scene.model.get_submodule("layer1.1.conv1.edits.after_0") is layer


# Requests


def test_a_boundary_is_one_generation():
    scene = Scene()
    generation = scene.generation
    given = [
        RESIZE,
        DISABLE,
        decision("enable", "layer1.1"),
        BAD_NAME,
        [GROW, BAD_WIDTH],
        GROW,
        json.dumps(decision("resize", "stem", width=9)),
    ]
    futures = [scene.controller.submit(each, source="test") for each in given]
    assert not any(future.done() for future in futures) and scene.generation == generation and not scene.controller.idle
    results = scene.controller.drain()
    assert scene.generation == generation + 1 and scene.controller.idle
    assert [bool(result) for result in results] == [True, True, True, False, False, True, True]
    assert [future.result() for future in futures] == results and [result.request for result in results] == list(range(1, 8))
    assert scene.widths() == {"stem": 9, "layer1.0.conv1": 25, "layer1.1.conv1": 28}
    assert scene.controller.drain() == []


def test_what_surgery_serves_comes_in_its_order():
    scene = Scene(state=False)
    for given in (RESIZE, WINDOW, decision("resize", "stem", width=11), decision("prune", "stem", width=10), DISABLE):
        scene.controller.submit(given)
    results = scene.controller.drain()
    assert [result.mechanism for result in results] == ["metadata", "surgery", "metadata", "metadata", "metadata"]
    assert scene.widths()["stem"] == 10 and [result.request for result in results] == [1, 2, 3, 4, 5]


def test_what_is_submitted_meanwhile_waits():
    scene = Scene(state=False, done=lambda result: scene.controller.submit(GROW) if result.request == 1 else None)
    scene.controller.submit(RESIZE)
    assert len(scene.controller.drain()) == 1
    assert not scene.controller.idle and len(scene.controller.drain()) == 1


def test_a_cancelled_request_is_not_served():
    taken: list[int] = []
    scene = Scene(state=False, taken_up=lambda request, decisions: taken.append(request.number))
    futures = [scene.controller.submit(each) for each in (RESIZE, GROW, DISABLE)]
    assert futures[1].cancel()
    assert [result.request for result in scene.controller.drain()] == [1, 3] == taken
    assert futures[1].cancelled() and scene.widths()["layer1.0.conv1"] == 20


def test_callbacks_tell_the_story_in_order():
    story: list[Any] = []
    scene = Scene(
        state=False,
        taken_up=lambda request, decisions: story.append(("taken up", request.source, len(decisions))),
        before_change=lambda step: story.append(("before", step.name)),
        done=lambda result: story.append(("done", bool(result))),
    )
    scene.controller.apply([RESIZE, DISABLE], source="policy")
    scene.controller.apply(WINDOW)
    scene.controller.apply("no json")
    scene.controller.preflight([RESIZE, WINDOW])
    assert story == [
        ("taken up", "policy", 2),
        ("before", "stem"),
        ("before", "layer1.1"),
        ("done", True),
        ("taken up", "", 1),
        ("before", "stem"),
        ("done", True),
        ("done", False),
    ]


@pytest.mark.parametrize("given", [RESIZE, WINDOW], ids=["metadata", "surgery"])
def test_what_a_callback_raises_before_a_change_refuses_it(given):
    def refuse(*args: Any) -> None:
        raise OSError("no room for a snapshot")

    for name in ("taken_up", "before_change"):
        scene = Scene(state=False, **{name: refuse})
        before = scene.print()
        result = scene.controller.apply(given)
        assert not result and "OSError: no room for a snapshot" in str(result.error)
        assert_same(scene.print(), before)


def test_a_result_that_cannot_be_recorded_is_a_result_all_the_same(monkeypatch):
    logged: list[Any] = []
    monkeypatch.setattr(controller.LOGGER, "exception", lambda *said: logged.append(said))

    def fail(result: AdaptationResult) -> None:
        raise OSError("disk full")

    scene = Scene(state=False, done=fail)
    futures = [scene.controller.submit(each) for each in (RESIZE, WINDOW, BAD_NAME)]
    assert [bool(result) for result in scene.controller.drain()] == [True, True, False]
    assert [bool(future.result(timeout=0)) for future in futures] == [True, True, False]
    assert [request for _, request in logged] == [1, 2, 3]


def test_what_a_result_says():
    scene = Scene(state=False)
    assert str(scene.controller.apply([RESIZE, DISABLE])).startswith("resize(stem, width=8) + disable(layer1.1): metadata, ")
    refused = scene.controller.apply(BAD_NAME)
    assert str(refused).startswith("resize(nowhere, width=3): refused: decision: ") and refused.verdict.factor == "decision"
    assert refused.verdict.reason == str(refused.error) and not refused.undone
    undone = scene.controller.apply([WINDOW, BAD_EDIT])
    assert str(undone).startswith("modify_layer(stem, kernel_size=5) + add_layer(after_stem): rolled back: ") and undone.undone
    assert undone.verdict.factor == "surgeon"
    unread = scene.controller.apply({"adaptation_type": "explode"})
    assert unread.decisions == () and str(unread).startswith("a request: refused: ") and isinstance(unread.error, DecisionError)


@pytest.mark.parametrize("given", [[], [RESIZE] * (MOST_STEPS + 1), "[]", "[" * 10**5, [[RESIZE]], None], ids=lambda given: str(given)[:9])
def test_requests_that_are_none_are_refused(given):
    scene = Scene(state=False)
    result = scene.controller.apply(given)
    assert isinstance(result.error, DecisionError) and scene.controller.preflight(given) == result.verdict


def test_lists_come_as_json_too():
    scene = Scene(state=False)
    assert len(scene.controller.apply(json.dumps([RESIZE, GROW])).decisions) == 2
    assert len(scene.controller.apply(f" [{json.dumps(DISABLE)}]".encode()).decisions) == 1


def test_a_thread_that_does_not_train_is_refused():
    scene = Scene(state=False)
    results: list[AdaptationResult] = []
    thread = threading.Thread(target=lambda: results.extend(map(scene.controller.apply, (RESIZE, WINDOW))))
    thread.start()
    thread.join()
    assert [type(result.error) for result in results] == [OwnerError, OwnerError]
    assert scene.widths()["stem"] == 12


def test_a_model_of_switches_alone_and_one_of_nothing():
    blocks = nn.Sequential(ee.ElasticBlock(nn.Sequential(nn.Linear(4, 4))), nn.Linear(4, 2))
    taker = Controller(blocks, ModelSurgeon(torch.zeros(2, 4)), Guardian(Safety(), blocks))
    assert taker.apply(decision("disable", "0")).mechanism == "metadata"
    empty = nn.Sequential()
    taker = Controller(empty, ModelSurgeon(), Guardian(Safety(), empty))
    for given in (RESIZE, DISABLE, WINDOW, INSERT):
        assert isinstance(taker.apply(given).error, DecisionError)


def test_numbers_go_on_after_a_checkpoint():
    scene, other = Scene(state=False), Scene(state=False)
    scene.controller.apply(RESIZE)
    state = json.loads(json.dumps(scene.controller.state_dict()))
    other.controller.load_state_dict(state)
    assert other.controller.apply(RESIZE).request == 2


# Threads


@pytest.fixture
def fast_switching() -> Iterator[None]:
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


def hidden_layers(count: int = 4) -> nn.Module:
    dims = [ee.ElasticDim(4, 8) for _ in range(count)]
    return nn.Sequential(*(ee.ElasticLinear(3, 4, out_dim=dim) for dim in dims))


@pytest.mark.parametrize("count", [8_000, pytest.param(100_000, marks=pytest.mark.slow)])
def test_requests_of_four_threads_are_one_generation_a_boundary(count, fast_switching):
    model = hidden_layers()
    done: list[int] = []
    taker = Controller(model, ModelSurgeon(), Guardian(Safety(), model), done=lambda result: done.append(result.request))
    futures: list[list[Future[AdaptationResult]]] = [[] for _ in range(4)]

    def ask(number: int) -> None:
        rng = random.Random(number)
        for _ in range(count // 4):
            width = rng.choice([3, 4, 5, 8]) if rng.random() < 0.9 else 0
            futures[number].append(taker.submit({**decision("resize", str(number), width=width), "metadata": {"n": len(futures[number])}}))

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    block = ee.control_block(model)
    boundaries = 0
    while any(thread.is_alive() for thread in threads) or not taker.idle:
        before = {name: dim.active for name, dim in ee.dims(model).items()}
        generation = block.generation
        results = taker.drain()
        boundaries += bool(results)
        after = {name: dim.active for name, dim in ee.dims(model).items()}
        assert block.generation - generation == (before != after)
        last = {result.decisions[0].layer_name: result.decisions[0].parameters["width"] for result in results if result}
        assert all(after[name] == width for name, width in last.items() if name is not None)
    for thread in threads:
        thread.join(timeout=30)
    assert sum(map(len, futures)) == count == len(done) and sorted(done) == list(range(1, count + 1)) and boundaries > 1
    for own in futures:
        results = [future.result(timeout=0) for future in own]
        numbers = [result.request for result in results]
        assert [result.decisions[0].metadata["n"] for result in results] == list(range(count // 4)) and numbers == sorted(numbers)
        assert {bool(result) for result in results} == {True, False}
    order = {request: place for place, request in enumerate(done)}
    for own in futures:
        places = [order[future.result().request] for future in own]
        assert places == sorted(places)
