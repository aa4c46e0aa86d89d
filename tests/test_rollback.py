"""The surgeon's edits, interrupted at lines of the package and undone: everything is as it was, and training goes on as a twin's does."""

import contextlib
import gc
import importlib
import logging
import random
import sys
import time
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from fingerprint import assert_same, fingerprint
from interrupting import PACKAGE, At, Functions, Lines
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.modules import module as module_hooks
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from training import ALONE, EDITS, Edit, Scene

import esper_elastic as ee
from esper_elastic.convert.trace import quiet
from esper_elastic.layers.state import JOURNAL, call_under_way
from esper_elastic.surgery import undo
from esper_elastic.surgery.edits.holder import Edits

pytestmark = pytest.mark.wide

FAMILIES = [name for name in EDITS if name != "tiny"]


class Interrupt(BaseException):
    """As KeyboardInterrupt, that no one else raises."""


def ask(edit: Edit, scene: Scene, given: tuple[Any, ...], alone: bool) -> Any:
    """Have an edit made; a refusal is a failure."""
    surgeon = ee.ModelSurgeon(scene.inputs)
    if alone:
        result = edit.make(surgeon, scene.model, given)
    else:
        with ee.transaction(scene.model, **scene.followers(), example_inputs=scene.inputs):
            result = edit.make(surgeon, scene.model, given)
            assert result, result.error
    assert result, result.error
    return result


def ask_in_vain(edit: Edit, scene: Scene, given: tuple[Any, ...], alone: bool, tracer: Any) -> bool:
    """Have an edit made and undone, whether ``tracer`` interrupts it or not; returns whether it did."""
    surgeon = ee.ModelSurgeon(scene.inputs)
    followers = {} if alone else scene.followers()
    try:
        with tracer, ee.transaction(scene.model, **followers, validate=not alone, example_inputs=scene.inputs):
            result = edit.make(surgeon, scene.model, given)
            assert result, result.error
            raise Interrupt
    except KeyboardInterrupt:
        return True
    except Interrupt:
        return False


def surroundings() -> list[Any]:
    """What of torch and Python runs of a model change for their time."""
    return [
        torch._C._len_torch_dispatch_stack(),
        torch._C._len_torch_function_stack(),
        torch._C._get_torch_function_state(),
        [torch._C._dispatch_tls_is_dispatch_key_excluded(key) for key in ("Python", "PythonTLSSnapshot", "PythonDispatcher")],
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.get_default_dtype(),
        torch._C._only_lift_cpu_tensors(),
        torch.utils._python_dispatch.is_in_torch_dispatch_mode(),
        logging.getLogger("torch._subclasses.fake_tensor").disabled,
        (id(warnings.filters), len(warnings.filters), warnings.showwarning),
        {name: list(hooks) for name, hooks in vars(module_hooks).items() if name.startswith("_global_") and isinstance(hooks, dict)},
        undo.open_transactions,
        sys.modules["torch._dynamo.eval_frame"]._stance if "torch._dynamo.eval_frame" in sys.modules else None,
    ]


def three_steps(scene: Scene) -> list[float]:
    torch.manual_seed(11)
    return [scene.step() for _ in range(3)]


def assert_rolled_back(name: str, once: int, persistently: int) -> None:
    """Interrupts each edit of a model at lines drawn by chance; then makes it, as on a twin that was never touched."""
    alone = name in ALONE
    scene, twin = Scene(name, alone), Scene(name, alone)
    generator = random.Random(name)
    for edit in EDITS[name]:
        given, functions = edit.fresh(), Functions()
        if name.startswith("elastic_"):
            gc.collect()  # control blocks hold dims weakly: those that nobody has any more are no part of what is compared
        around, before = surroundings(), scene.print(*given)
        assert not ask_in_vain(edit, scene, given, alone, functions)
        assert_same(scene.print(*given), before)
        interrupted = 0
        for _ in range(10 * (once + persistently)):  # a place that is not come to again, since surgery remembers, is drawn in vain
            place, persistent = functions.draw(generator), interrupted >= once
            interrupted += ask_in_vain(edit, scene, given, alone, At(*place, persistent=persistent))
            try:
                assert surroundings() == around
                assert not any(vars(tap._here) for each in scene.model.modules() if isinstance(each, Edits) for tap in each.taps)
                assert_same(scene.print(*given), before)
            except AssertionError as error:
                raise AssertionError(f"{edit.operation}, interrupted at {place}, {persistent}: {error}") from error
            if interrupted == once + persistently:
                break
        assert interrupted == once + persistently
        assert three_steps(scene) == three_steps(twin)
        results = [ask(edit, each, edit.fresh(), alone) for each in (scene, twin)]
        assert results[0].details == results[1].details
        assert scene.facts() == twin.facts(), edit.operation
    assert three_steps(scene) == three_steps(twin)
    assert scene.facts() == twin.facts()


@pytest.mark.parametrize("name", FAMILIES)
def test_an_edit_that_is_interrupted_leaves_no_trace(name):
    assert_rolled_back(name, once=2, persistently=1)


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_an_edit_that_is_interrupted_at_many_lines_leaves_no_trace(name):
    assert_rolled_back(name, once=40, persistently=20)


# Every line of one small model


#: Where what is undone is written, noted and published; elsewhere models are looked at and run on tensors without values.
WRITING = tuple(
    f"{PACKAGE}/surgery/{name}.py" for name in ("surgeon", "transaction", "undo", "surroundings", "following", "journal")
) + tuple(f"{PACKAGE}/surgery/edits/{name}.py" for name in ("edited", "holder", "insert", "remove", "modify", "skip"))


def assert_before_or_whole(edit: Edit, alone: bool, persistent: bool, samples: int) -> None:
    """Interrupts at many lines from first to last, and at each of the last ones; what is not as before must be the whole edit."""
    earlier = EDITS["tiny"][: EDITS["tiny"].index(edit)]

    def fresh() -> tuple[Scene, tuple[Any, ...]]:
        scene = Scene("tiny", alone)
        for each in earlier:
            ask(each, scene, each.fresh(), alone)
        ask_in_vain(edit, scene, edit.fresh(), alone, contextlib.nullcontext())  # what is remembered of the model is now
        return scene, edit.fresh()

    scene, given = fresh()
    lines = Lines(files=WRITING)
    with lines:
        ask(edit, scene, given, alone)
    whole, steps = scene.facts(), three_steps(scene)
    twin, _ = fresh()
    undisturbed = three_steps(twin)
    scene, given = fresh()
    around, before = surroundings(), scene.print(*given)
    rolled_back = finished = 0
    last = lines.count - 12
    for nth in (*range(1, last, last // samples + 1), *range(last, lines.count + 1)):
        with contextlib.suppress(KeyboardInterrupt), Lines(nth, persistent=persistent, files=WRITING):
            ask(edit, scene, given, alone)
        assert surroundings() == around
        if scene.print(*given) == before:
            rolled_back += 1
        else:
            assert scene.facts() == whole, f"line {nth} of {lines.count}"
            assert three_steps(scene) == steps
            finished += 1
            scene, given = fresh()
            before = scene.print(*given)
    assert three_steps(scene) == undisturbed
    assert 0 < finished + (not alone) < 10 < rolled_back


EDITS_OF_TINY = [pytest.param(edit, id=edit.operation) for edit in EDITS["tiny"]]


@pytest.mark.parametrize("edit", EDITS_OF_TINY)
@pytest.mark.parametrize(("alone", "persistent"), [(True, False), (False, True)], ids=["alone, once", "in a transaction, persistently"])
def test_an_interrupt_while_writing_undoes_all_or_nothing(edit, alone, persistent):
    assert_before_or_whole(edit, alone, persistent, samples=6)


@pytest.mark.slow
@pytest.mark.parametrize("edit", EDITS_OF_TINY)
@pytest.mark.parametrize("alone", [True, False], ids=["alone", "in a transaction"])
@pytest.mark.parametrize("persistent", [False, True], ids=["once", "persistently"])
def test_an_interrupt_at_a_thousand_lines_while_writing_undoes_all_or_nothing(edit, alone, persistent):
    assert_before_or_whole(edit, alone, persistent, samples=1000)


# What runs leave on


class Plain(TorchFunctionMode):
    """Sees functions and lets them be."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


class Below(TorchDispatchMode):
    """Sees ops and lets them be."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


def modes_out_of_order() -> Any:
    outer, inner = FakeTensorMode(), Below()
    outer.__enter__()
    inner.__enter__()
    outer.__exit__(None, None, None)
    return inner


LEFT_ON: dict[str, Callable[[], Any]] = {
    "a mode for functions": lambda: Plain().__enter__(),
    "a mode for ops": lambda: Below().__enter__(),
    "fake tensors": lambda: FakeTensorMode().__enter__(),
    "several": lambda: (FakeTensorMode().__enter__(), Below().__enter__(), Plain().__enter__(), Plain().__enter__()),
    "a mode whose outer one has ended": modes_out_of_order,
    "functions without modes": lambda: torch._C.DisableTorchFunction().__enter__(),
    "ops without modes": lambda: [(guard := torch._C._DisableTorchDispatch()), guard.__enter__()],
    "constants that stay on the CPU": lambda: torch._C._set_only_lift_cpu_tensors(True),
    "no gradients": lambda: torch.no_grad().__enter__(),
    "no compilation": lambda: torch.compiler.set_stance("force_eager"),
    "silence": quiet,
    "warnings": lambda: warnings.catch_warnings().__enter__(),
    "a hook for all modules": lambda: module_hooks.register_module_forward_hook(lambda module, args, result: None),
}


@pytest.mark.parametrize("leave", LEFT_ON.values(), ids=LEFT_ON)
def test_what_was_left_on_inside_is_off_after_a_rollback(leave):
    importlib.import_module("torch._dynamo.eval_frame")
    model, before = nn.Linear(2, 2), surroundings()
    held = None
    with pytest.raises(Interrupt), ee.transaction(model, validate=False):
        held = leave()
        assert surroundings() != before
        raise Interrupt
    assert surroundings() == before, held


class NoFunctions(TorchFunctionMode):
    """Raises at whatever is asked."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise Interrupt


class NoOps(TorchDispatchMode):
    """Raises at whatever is asked."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise Interrupt


@pytest.mark.parametrize("mode", [NoFunctions, NoOps])
def test_a_mode_that_was_left_on_after_writes_does_not_see_them_undone(mode):
    model = nn.Sequential(*(nn.Linear(2, 2) for _ in range(10)))
    before, around = fingerprint(model), surroundings()
    with pytest.raises(Interrupt), ee.transaction(model, validate=False):
        for parameter in model.parameters():
            undo.save_values(parameter)
            parameter.data.fill_(7.0)
            parameter.data = torch.zeros(3)
        mode().__enter__()
        raise Interrupt
    assert surroundings() == around
    assert_same(fingerprint(model), before)


def test_what_a_run_carried_is_let_go():
    scene = Scene("tiny", alone=True)
    surgeon = ee.ModelSurgeon(scene.inputs)
    assert surgeon.add_skip_connection(scene.model, "conv1", "conv2")
    (tap,) = scene.model.conv1.edits.taps
    for error in (None, Interrupt):
        with contextlib.suppress(Interrupt), ee.transaction(scene.model, validate=False):
            scene.model.conv1(torch.zeros(1, 3, 5, 5))
            assert tap._here.value is not None
            if error is not None:
                raise error
        assert not vars(tap._here)


# Cost


def cost_of_rollback(width: int) -> float:
    """The quickest of several rollbacks of an edit that is made, in seconds: from the exception to the end of the transaction."""
    model = nn.Sequential(*(nn.Linear(width, width) for _ in range(3)))
    optimizer = torch.optim.AdamW(model.parameters())
    for parameter in model.parameters():
        optimizer.state[parameter] = {"exp_avg": torch.zeros_like(parameter), "exp_avg_sq": torch.zeros_like(parameter)}
    surgeon = ee.ModelSurgeon(torch.zeros(2, width))
    times = []
    for _ in range(7):
        with contextlib.suppress(Interrupt), ee.transaction(model, optimizer):
            assert surgeon.add_skip_connection(model, "0", "2")
            start = time.perf_counter()
            raise Interrupt
        times.append(time.perf_counter() - start)
    return min(times)


def test_a_rollback_costs_as_much_for_sixteen_times_the_parameters():
    cost_of_rollback(16)
    assert cost_of_rollback(4096) < 2 * cost_of_rollback(1024)


# Leaks


class Own(nn.Conv2d):
    """A class that no other edited module is of: the one that is made for its edits is nobody else's."""


def commit(scene: Scene, surgeon: ee.ModelSurgeon) -> list[weakref.ref[Any]]:
    """Adds a layer and a skip, and takes both away again; returns what must be gone."""
    model, layer = scene.model, nn.Conv2d(4, 4, 1)
    assert surgeon.add_layer(model, "after_conv1", layer)
    assert surgeon.add_skip_connection(model, "conv1", "conv2")
    skip, edits = model.get_submodule("conv2.edits.skip_0"), model.get_submodule("conv2.edits")
    gone = [layer, *layer.parameters(), skip, edits, *edits.parameters(), type(model.conv1)]
    assert surgeon.remove_skip_connection(model, "conv2.edits.skip_0")
    assert surgeon.remove_layer(model, "conv1.edits.after_0")
    assert len(model.__dict__[JOURNAL]) == 4
    del model.__dict__[JOURNAL]  # the one thing that is to grow: by the text of each edit
    return [weakref.ref(thing) for thing in gone]


def roll_back(scene: Scene, surgeon: ee.ModelSurgeon) -> list[weakref.ref[Any]]:
    """Does the same in a transaction that fails, and plans an edit."""
    model, gone = scene.model, list[weakref.ref[Any]]()
    with contextlib.suppress(Interrupt), ee.transaction(model, **scene.followers(), validate=False) as used:
        gone += commit(scene, surgeon)
        assert surgeon.modify_layer(model, "conv2", {"out_channels": 6})
        raise Interrupt
    assert surgeon.plan_remove_layer(model, "conv2")
    return [*gone, weakref.ref(used), weakref.ref(used.log)]


def assert_no_leak(cycle: Callable[..., list[weakref.ref[Any]]], times: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """What edits make is gone, and Python keeps as many objects and blocks of memory after ``times`` cycles as after two fifths of them."""
    logs: weakref.WeakSet[undo.UndoLog] = weakref.WeakSet()

    class Noted(undo.UndoLog):
        def __init__(self) -> None:
            super().__init__()
            logs.add(self)

    monkeypatch.setattr(sys.modules["esper_elastic.surgery.transaction"], "UndoLog", Noted)
    scene = Scene("tiny", alone=True)
    scene.model.conv1.__class__ = Own
    surgeon = ee.ModelSurgeon(scene.inputs)
    counted = []
    for number in range(times + 1):
        gone = cycle(scene, surgeon)
        if number % (times // 5) == 0:
            gc.collect()
            assert [reference() for reference in gone] == [None] * len(gone)
            assert not logs
            del gone
            counted.append((len(gc.get_objects()), sys.getallocatedblocks()))
    _, _, (objects, blocks), *_, (later_objects, later_blocks) = counted  # what is remembered of a model has come to its size
    assert later_objects - objects < 5
    assert later_blocks - blocks < 100
    assert undo.open_transactions == []
    assert not call_under_way.inside


EDITS_IN = {commit: 4, roll_back: 6}
CYCLES = [pytest.param(commit, id="commits"), pytest.param(roll_back, id="rollbacks")]


@pytest.mark.parametrize("cycle", CYCLES)
def test_edits_leak_nothing(cycle, monkeypatch):
    assert_no_leak(cycle, 200 // EDITS_IN[cycle], monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize("cycle", CYCLES)
def test_ten_thousand_edits_leak_nothing(cycle, monkeypatch):
    assert_no_leak(cycle, 10_000 // EDITS_IN[cycle], monkeypatch)
