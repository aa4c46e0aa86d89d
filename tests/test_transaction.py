"""Transactions: what is edited inside succeeds or vanishes as a whole, wherever an exception arrives, and what follows goes along."""

import contextlib
import copy
import gc
import sys
import threading
import time
import types
import weakref
from typing import Any

import pytest
import torch
from editing import SCENES, Scene, edit_plain, elastic, grow_plain, insert_plain, plain
from fingerprint import assert_same, fingerprint
from interrupting import Lines
from torch import nn

from esper_elastic.errors import TransactionError
from esper_elastic.surgery import transaction, undo
from esper_elastic.surgery.undo import added, moved, removed, save_objects, save_values


class Verdict:
    def __init__(self, errors: tuple[str, ...] = (), warnings: tuple[str, ...] = ()) -> None:
        self.is_valid, self.errors, self.warnings = not errors, list(errors), list(warnings)


class Validators:
    """Stands in for the validators: notes what it is asked, and says what it is told to."""

    def __init__(self) -> None:
        self.asked: list[Any] = []
        self.graph, self.dimensions = Verdict(), Verdict()

    def SurgeryValidator(self, example_inputs: Any) -> Any:
        self.asked.append(example_inputs)
        return types.SimpleNamespace(
            validate_graph_integrity=lambda model: self.graph, validate_dimension_compatibility=lambda model: self.dimensions
        )


@pytest.fixture(autouse=True)
def validators(monkeypatch):
    stand_in = Validators()
    monkeypatch.setattr(sys.modules["esper_elastic.surgery.transaction"], "SurgeryValidator", stand_in.SurgeryValidator)
    yield stand_in
    assert undo.open_transactions == []


class Interrupt(BaseException):
    """As KeyboardInterrupt, that no one else raises."""


def assert_twin(scene: Scene, twin: Scene, steps: int = 3) -> None:
    for _ in range(steps):
        assert scene.step() == twin.step()
    for one, other in zip(scene.values(), twin.values(), strict=True):
        assert torch.equal(one, other)


# Exactness


@pytest.mark.parametrize("name", SCENES)
def test_an_edit_that_fails_leaves_no_trace(name):
    build, edit = SCENES[name]
    scene, twin = build(), build()
    before = scene.print()
    with pytest.raises(Interrupt), transaction(scene.model, **scene.followers()):
        edit(scene.model)
        torch.rand(3)
        raise Interrupt
    assert_same(scene.print(), before)
    assert_twin(scene, twin)


@pytest.mark.parametrize("name", SCENES)
def test_an_edit_that_succeeds_stays_and_trains_on(name):
    build, edit = SCENES[name]
    scene = build()
    before = scene.print()
    with transaction(scene.model, **{**scene.followers(), "ema": None}):
        edit(scene.model)
    assert scene.print() != before
    held = [id(p) for group in scene.optimizer.param_groups for p in group["params"]]
    assert sorted(held) == sorted(id(p) for p in scene.model.parameters())
    old = [p.detach().clone() for p in scene.model.parameters()]
    for _ in range(2):
        scene.optimizer.zero_grad()
        scene.model(scene.inputs).square().mean().backward()
        scene.optimizer.step()
        scene.scheduler.step()
    assert all(not torch.equal(p, q) for p, q in zip(scene.model.parameters(), old, strict=True))


def interrupted_edit(scene: Scene, edit: Any, lines: Lines) -> None:
    with lines, transaction(scene.model, **scene.followers()):
        edit(scene.model)


def assert_rolled_back_at(name: str, persistent: bool, stride: int) -> None:
    """Interrupts at lines of the package, ``stride`` apart where it only looks, every one where it writes and publishes."""
    build, edit = SCENES[name]
    scene, twin, whole = build(), build(), build()
    gc.collect()  # every optimizer that is alive is looked at, in some lines
    lines, entered, untouched = Lines(), [], whole.print()

    def noting(model: nn.Module) -> None:
        entered.append(lines.count)
        edit(model)

    interrupted_edit(whole, noting, lines)
    assert whole.print() != untouched
    before = scene.print()
    assert lines.count > entered[0] + 100 > 500
    for nth in (*range(1, entered[0] - 40, stride), *range(entered[0] - 40, lines.count + 1, 1 if stride == 1 else 9)):
        with pytest.raises(KeyboardInterrupt):
            interrupted_edit(scene, edit, Lines(nth, persistent=persistent))
        assert sys.gettrace() is None
        assert undo.open_transactions == []
        assert_same(scene.print(), before)
    assert_twin(scene, twin)


@pytest.mark.wide
@pytest.mark.parametrize("persistent", [False, True], ids=["once", "persistently"])
@pytest.mark.parametrize("name", SCENES)
def test_an_interrupt_at_any_line_leaves_no_trace(name, persistent):
    assert_rolled_back_at(name, persistent, stride=401)


@pytest.mark.slow
@pytest.mark.parametrize("persistent", [False, True], ids=["once", "persistently"])
@pytest.mark.parametrize("name", SCENES)
def test_an_interrupt_at_every_line_leaves_no_trace(name, persistent):
    assert_rolled_back_at(name, persistent, stride=1)


# Publishing


def test_the_outermost_transaction_validates(validators):
    scene = plain()
    with transaction(scene.model, example_inputs=scene.inputs) as outer:
        with transaction(scene.model):
            pass
        assert validators.asked == []
        validators.dimensions = Verdict(warnings=("untried",))
    assert validators.asked == [scene.inputs]
    assert outer.warnings == ["untried"]
    with transaction(scene.model, validate=False):
        pass
    assert len(validators.asked) == 1


@pytest.mark.parametrize("check", ["graph", "dimensions"])
def test_what_is_not_valid_is_rolled_back(check, validators):
    scene, twin = plain(), plain()
    before = scene.print()
    setattr(validators, check, Verdict(errors=("conv1: 6 channels meet 8",)))
    with (
        pytest.raises(TransactionError, match=r"transaction: Net would not be valid, and is as it was before: conv1: 6 channels meet 8\."),
        transaction(scene.model, **scene.followers()),
    ):
        edit_plain(scene.model)
    assert_same(scene.print(), before)
    assert_twin(scene, twin)


def test_a_validator_that_fails_is_a_failure(monkeypatch):
    scene = plain()
    before = scene.print()
    monkeypatch.setattr(sys.modules["esper_elastic.surgery.transaction"], "SurgeryValidator", lambda example_inputs: 1 / 0)
    with pytest.raises(ZeroDivisionError), transaction(scene.model, **scene.followers()):
        edit_plain(scene.model)
    assert_same(scene.print(), before)


def test_a_parameter_that_no_group_holds_is_an_error():
    scene = plain()
    before = scene.print()
    match = r"parameter 'head.weight': expected it in 1 optimizer groups as before, got it in 0"
    with pytest.raises(TransactionError, match=match), transaction(scene.model, **scene.followers()):
        scene.optimizer.param_groups[0]["params"].pop(-2)
    assert_same(scene.print(), before)
    match = r"parameter 'more': expected it in one optimizer group, got it in 2"
    with pytest.raises(TransactionError, match=match), transaction(scene.model, scene.optimizer):
        scene.model.more = nn.Parameter(torch.zeros(2))
        scene.optimizer.param_groups[0]["params"] += [scene.model.more] * 2
    assert_same(scene.print(), before)


def test_the_exception_of_the_body_is_raised_again():
    model = nn.Linear(2, 2)
    error = KeyError("mine")
    with pytest.raises(KeyError) as raised, transaction(model):
        raise error
    assert raised.value is error


# Savepoints


def test_a_savepoint_undoes_its_own_changes_alone():
    scene, twin = plain(), plain()
    with transaction(scene.model, **{**scene.followers(), "ema": None}):
        grow_plain(scene.model)
        middle = scene.print()
        with pytest.raises(Interrupt), transaction(scene.model):
            insert_plain(scene.model)
            save_values(scene.model.head.weight)
            scene.model.head.weight.data.zero_()
            raise Interrupt
        assert_same(scene.print(), middle)
        with transaction(scene.model):
            layer = insert_plain(scene.model)
    assert scene.model.conv1.out_channels == 8
    assert scene.model.body[1]._modules["after"] is layer
    assert any(p is layer.weight for p in scene.optimizer.param_groups[0]["params"])
    assert torch.equal(scene.model.eval()(scene.inputs), twin.model.eval()(twin.inputs))


def test_an_outer_rollback_undoes_savepoints_that_succeeded():
    scene, twin = plain(), plain()
    before = scene.print()
    with pytest.raises(Interrupt), transaction(scene.model, **scene.followers()):
        scene.model.head.eval()
        with transaction(scene.model):
            edit_plain(scene.model)
        with pytest.raises(Interrupt), transaction(scene.model):
            scene.model.body.eval()
            raise Interrupt
        raise Interrupt
    assert_same(scene.print(), before)
    assert_twin(scene, twin)


def test_what_is_given_inside_is_undone_outside():
    scene, twin = plain(), plain()
    before = scene.print()
    with pytest.raises(Interrupt), transaction(scene.model):
        with transaction(scene.model, **scene.followers()):
            edit_plain(scene.model)
            scene.scheduler.last_epoch = 40
            scene.scaler.update(5.0)
        raise Interrupt
    assert_same(scene.print(), before)
    assert_twin(scene, twin)


def test_another_model_inside_vanishes_with_the_outer_one():
    outer, inner = plain(), elastic()
    before = outer.print(), inner.print()
    with pytest.raises(Interrupt), transaction(outer.model, **outer.followers()):
        with transaction(inner.model, **inner.followers()):
            SCENES["elastic"][1](inner.model)
        raise Interrupt
    assert_same(inner.print(), before[1])
    assert_same(outer.print(), before[0])


def test_objects_beside_the_model_are_undone_where_they_are_named():
    model, layer = nn.Linear(2, 2), nn.Linear(2, 2)
    before = fingerprint(layer)
    with pytest.raises(Interrupt), transaction(model):
        save_objects(layer)
        save_values(layer.weight)
        layer.requires_grad_(False).weight.data.zero_()
        layer.note = 1
        raise Interrupt
    assert_same(fingerprint(layer), before)


def test_reports_outside_a_transaction_do_nothing():
    weight = nn.Parameter(torch.zeros(2))
    save_values(weight)
    save_objects(weight)
    added(weight)
    removed(weight)
    moved(weight, (3,), lambda made, old: None)


# Misuse


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        pytest.param({"model": 3}, r"model: expected a torch\.nn\.Module, got int", id="model"),
        pytest.param({"optimizer": 3}, r"optimizer: expected a torch\.optim\.Optimizer or a list of them, got int", id="optimizer"),
        pytest.param({"optimizer": [None]}, r"optimizer: expected .* or a list of them, got NoneType", id="optimizers"),
        pytest.param({"schedulers": 3}, r"schedulers: expected schedulers of the learning rate, got int", id="schedulers"),
        pytest.param({"schedulers": torch.optim.SGD([torch.zeros(1)])}, r"schedulers: expected .*, got SGD", id="optimizer as a scheduler"),
        pytest.param({"scaler": 3}, r"scaler: expected a torch\.amp\.GradScaler, got int", id="scaler"),
        pytest.param({"ema": 3}, r"ema: expected a module that averages .*, got int", id="ema"),
        pytest.param({"ema": {"other": torch.zeros(1)}}, r"ema: expected .*, got dict", id="ema of another model"),
        pytest.param(
            {"optimizer": torch.optim.SGD([torch.zeros(1)])},
            r"optimizer: expected SGD to hold parameters of Linear, got none",
            id="stranger",
        ),
    ],
)
def test_arguments_are_checked(arguments, match):
    arguments = {"model": nn.Linear(2, 2), **arguments}
    with pytest.raises(TransactionError, match=match), transaction(**arguments):
        pytest.fail("it was entered")


def test_a_transaction_is_entered_once():
    once = transaction(nn.Linear(2, 2))
    with once:
        pass
    with pytest.raises(TransactionError, match=r"it was entered before\. Call transaction\(\.\.\.\) again"), once:
        pytest.fail("it was entered")


def test_transactions_end_in_the_order_that_they_began():
    model = nn.Linear(2, 2)
    before = fingerprint(model)
    outer, inner = transaction(model), transaction(model)
    outer.__enter__()
    inner.__enter__()
    model.note = 1
    with pytest.raises(TransactionError, match=r"another one that was entered inside is still open\. End that first"):
        outer.__exit__(None, None, None)
    assert_same(fingerprint(model), before)
    inner.__exit__(None, None, None)


def in_thread(function: Any) -> BaseException | None:
    raised: list[BaseException | None] = [None]

    def run() -> None:
        try:
            function()
        except BaseException as error:
            raised[0] = error

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    return raised[0]


def test_a_transaction_ends_in_its_thread():
    model = nn.Linear(2, 2)
    before = fingerprint(model)
    open_one = transaction(model)
    open_one.__enter__()
    model.note = 1
    error = in_thread(lambda: open_one.__exit__(None, None, None))
    assert isinstance(error, TransactionError) and "it was entered by another thread" in str(error)
    assert_same(fingerprint(model), before)


@pytest.mark.parametrize(
    "part", [lambda model: model, lambda model: model[0], lambda model: nn.Sequential(model)], ids=["same", "part", "whole"]
)
def test_two_threads_do_not_edit_one_model(part):
    model = nn.Sequential(nn.Linear(2, 2))

    def other() -> None:
        with transaction(part(model)):
            pytest.fail("it was entered")

    with transaction(model):
        error = in_thread(other)
        assert isinstance(error, TransactionError)
        assert "is being edited by another thread, in a transaction that is still open" in str(error)


def test_an_optimizer_step_inside_is_refused_and_rolled_back():
    scene, twin = plain(), plain()
    before = scene.print()
    match = r"AdamW\.step\(\) inside a transaction on Net: expected edits alone"
    with pytest.raises(TransactionError, match=match), transaction(scene.model, **scene.followers()):
        edit_plain(scene.model)
        scene.optimizer.step()
    assert_same(scene.print(), before)
    assert_twin(scene, twin)


def test_steps_of_this_model_are_refused_and_those_of_another_are_not():
    one, other = plain(), plain()
    late = torch.optim.SGD(one.model.head.parameters(), lr=0.1)
    with transaction(one.model):
        with pytest.raises(TransactionError, match=r"SGD\.step\(\) inside"):
            late.step()
        assert isinstance(in_thread(late.step), TransactionError)
        assert in_thread(other.step) is None
        layer = insert_plain(one.model)
        with pytest.raises(TransactionError, match=r"SGD\.step\(\) inside"):
            torch.optim.SGD(layer.parameters(), lr=0.1).step()
    late.step()


# Failure of the rollback itself


def test_a_rollback_that_fails_goes_on_and_poisons_the_model():
    scene = plain()
    model = scene.model
    match = r"Net could not be put back as it was: AttributeError: .*build it anew and load"
    with pytest.raises(TransactionError, match=match) as raised, transaction(model, **scene.followers()) as failing:
        failing.log.add(lambda: 1 / 0, lambda: None.gone)
        model.head.note = 1
        model.note = 1
        raise Interrupt
    assert isinstance(raised.value.__context__, AttributeError)
    assert not hasattr(model, "note") and not hasattr(model.head, "note")
    assert undo.open_transactions == []
    with pytest.raises(TransactionError, match=r"Net cannot be used: a transaction on it failed"):
        model(scene.inputs)
    with pytest.raises(TransactionError, match=r"Net cannot be used"), transaction(model):
        pytest.fail("it was entered")
    with pytest.raises(TransactionError, match=r"Net cannot be used"):
        copy.deepcopy(model)(scene.inputs)


def test_an_outer_rollback_that_succeeds_lifts_the_poison():
    scene, twin = plain(), plain()
    with pytest.raises(TransactionError), transaction(scene.model, **scene.followers()), transaction(scene.model) as failing:
        failing.log.add(lambda: 1 / 0)
        raise Interrupt
    assert_twin(scene, twin)


def test_nothing_is_poisoned_by_a_rollback_that_does_not_fail():
    model = nn.Linear(2, 2)
    with pytest.raises(Interrupt), transaction(model):
        raise Interrupt
    assert not model._forward_pre_hooks


# Cost and leaks


def cycle(scene: Scene, fail: bool) -> list[weakref.ref[Any]]:
    """Inserts a layer and takes it away again, or is interrupted; returns what must be gone."""
    try:
        with transaction(scene.model, validate=False, **{**scene.followers(), "ema": None}) as used:
            layer = nn.Linear(2, 2)
            scene.model._modules["more"] = layer
            added(layer.weight, scene.model.head.weight)
            save_values(scene.model.head.weight)
            if fail:
                raise Interrupt
        with transaction(scene.model, validate=False):
            del scene.model._modules["more"]
    except Interrupt:
        pass
    return [weakref.ref(layer), weakref.ref(layer.weight), weakref.ref(used), weakref.ref(used.log)]


def assert_no_leak(times: int) -> None:
    scene = plain()
    for fail in (False, True):
        for _ in range(20):
            references = cycle(scene, fail)
        gc.collect()
        gc.freeze()  # what is there already, of other tests too, is not counted: some of it may go meanwhile
        try:
            for _ in range(times):
                references = cycle(scene, fail)
            gc.collect()
            assert [reference() for reference in references] == [None] * len(references)
            assert len(gc.get_objects()) < 20
        finally:
            gc.unfreeze()


def test_commits_and_rollbacks_leak_nothing():
    assert_no_leak(200)


@pytest.mark.slow
def test_ten_thousand_commits_and_rollbacks_leak_nothing():
    assert_no_leak(10_000)


def rollback_time(width: int) -> float:
    """The quickest of several entries and rollbacks of an edit of one row, in seconds."""
    model = nn.Sequential(*(nn.Linear(width, width) for _ in range(3)))
    optimizer = torch.optim.AdamW(model.parameters())
    for parameter in model.parameters():
        optimizer.state[parameter] = {"exp_avg": torch.zeros_like(parameter), "exp_avg_sq": torch.zeros_like(parameter)}
    times = []
    for _ in range(15):
        start = time.perf_counter()
        with contextlib.suppress(Interrupt), transaction(model, optimizer):
            save_values(model[0].weight[:1])
            model[0].weight.data[:1] = 0
            raise Interrupt
        times.append(time.perf_counter() - start)
    return min(times)


def test_a_rollback_costs_as_much_for_sixteen_times_the_parameters():
    rollback_time(16)
    assert rollback_time(4096) < 2 * rollback_time(1024)
