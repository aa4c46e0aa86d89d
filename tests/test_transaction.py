"""Transactions: what is edited inside succeeds or vanishes as a whole, wherever an exception arrives, and what follows goes along."""

import sys
import types
from typing import Any

import pytest
import torch
from editing import SCENES, Scene
from fingerprint import assert_same
from interrupting import Lines
from torch import nn

from esper_elastic.surgery import transaction, undo


class Verdict:
    def __init__(self, errors: tuple[str, ...] = (), warnings: tuple[str, ...] = ()) -> None:
        self.is_valid, self.errors, self.warnings = not errors, list(errors), list(warnings)


class Validators(types.ModuleType):
    """Stands in for the validators: notes what it is asked, and says what it is told to."""

    def __init__(self) -> None:
        super().__init__("esper_elastic.surgery.validators")
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
    monkeypatch.setitem(sys.modules, stand_in.__name__, stand_in)
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
    whole = build()
    lines, entered, untouched = Lines(), [], whole.print()

    def noting(model: nn.Module) -> None:
        entered.append(lines.count)
        edit(model)

    interrupted_edit(whole, noting, lines)
    assert whole.print() != untouched
    scene, twin = build(), build()
    before = scene.print()
    assert lines.count > entered[0] + 100 > 500
    for nth in (*range(1, entered[0] - 40, stride), *range(entered[0] - 40, lines.count + 1, 1 if stride == 1 else 9)):
        with pytest.raises(KeyboardInterrupt):
            interrupted_edit(scene, edit, Lines(nth, persistent=persistent))
        assert sys.gettrace() is None
        assert undo.open_transactions == []
        assert_same(scene.print(), before)
    assert_twin(scene, twin)


@pytest.mark.parametrize("persistent", [False, True], ids=["once", "persistently"])
@pytest.mark.parametrize("name", SCENES)
def test_an_interrupt_at_any_line_leaves_no_trace(name, persistent):
    assert_rolled_back_at(name, persistent, stride=401)


@pytest.mark.slow
@pytest.mark.parametrize("persistent", [False, True], ids=["once", "persistently"])
@pytest.mark.parametrize("name", SCENES)
def test_an_interrupt_at_every_line_leaves_no_trace(name, persistent):
    assert_rolled_back_at(name, persistent, stride=1)
