"""``ee.training.Trainer``: its steps are those of a loop by hand, changes happen between them, and a resumed run goes on bit for bit."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import statistics
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from training_nets import SPEC, Net, loader, losses, net, trainer

import esper_elastic as ee
from esper_elastic.errors import CheckpointError, ElasticError, TrainingError
from esper_elastic.training import Governor, Trainer, checkpoints
from esper_elastic.training.events import Applied, Effect, Evaluated, Progress, Refused, Requested, Resumed, Saved

GROW = {"adaptation_type": "grow", "layer_name": "conv1", "parameters": {"width": 12}}
ADD = {"adaptation_type": "add_layer", "position": "after_conv2", "layer_spec": SPEC}
#: Changes of all kinds on the way.
CHANGES: dict[int, Any] = {
    4: GROW,
    9: ADD,
    14: {"adaptation_type": "grow", "layer_name": "conv2", "parameters": {"width": 24}},
    19: [
        {"adaptation_type": "prune", "layer_name": "conv1", "parameters": {"width": 10, "by": "taylor"}},
        {"adaptation_type": "add_skip_connection", "layer_name": "conv1", "position": "bn2"},
    ],
    24: {"adaptation_type": "resize", "layer_name": "conv2", "parameters": {"width": 9}},
    29: {"adaptation_type": "modify_layer", "layer_name": "conv2", "parameters": {"kernel_size": 5}},
    33: {"adaptation_type": "remove_layer", "layer_name": "conv2.edits.after_0"},
}


def events(of: Trainer, kind: type) -> list[Any]:
    return [event for event in of.monitor.events if isinstance(event, kind)]


# Steps


@pytest.mark.parametrize("accumulate", [1, 3])
def test_steps_are_those_of_a_loop_by_hand(accumulate: int) -> None:
    ours = trainer(accumulate=accumulate, clip_norm=0.5)
    ours.fit(loader(), steps=20)
    theirs = trainer()
    model, optimizer, (schedule,), ema = theirs.model, theirs.optimizer, theirs.schedulers, theirs.ema
    expected, window = list[float](), list[float]()
    while len(expected) < 20:
        for x, y in loader():
            if not window:
                optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(x), y)
            (loss / accumulate).backward()
            window.append(loss.item())
            if len(window) < accumulate:
                continue
            ee.optim.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], 0.5)
            optimizer.step()
            schedule.step()
            ema.update_parameters(model)
            expected.append(sum(window) / accumulate)
            window.clear()
            if len(expected) == 20:
                break
    assert losses(ours) == pytest.approx(expected, rel=1e-12)
    for mine, other in zip(ours.ema.parameters(), ema.parameters(), strict=True):
        assert torch.equal(mine, other)


def test_mixed_precision_under_a_scaler_is_that_of_a_loop_by_hand() -> None:
    """With changes on the way, and a scale so large that the first gradients overflow and their steps are left out."""
    changes = {8: GROW, 12: ADD, 16: {"adaptation_type": "resize", "layer_name": "conv2", "parameters": {"width": 6}}}
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**20, growth_interval=4)
    ours = trainer(scaler=scaler, autocast=torch.float16, clip_norm=0.5, decisions=changes)
    ours.fit(loader(), steps=20)
    assert len(events(ours, Applied)) == 3
    theirs = trainer()
    model, optimizer, (schedule,), ema = theirs.model, theirs.optimizer, theirs.schedulers, theirs.ema
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**20, growth_interval=4)
    expected, scales = list[float](), list[float]()
    while len(expected) < 20:
        for x, y in loader():
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.float16):
                loss = nn.functional.cross_entropy(model(x), y)
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            ee.optim.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], 0.5)
            scaler.step(optimizer)
            scaler.update()
            schedule.step()
            ema.update_parameters(model)
            expected.append(loss.item())
            scales.append(scaler.get_scale())
            if len(expected) in changes:
                assert theirs.apply_architecture_modification(model, changes[len(expected)])
            if len(expected) == 20:
                break
    assert scales[0] < 2.0**20 and len(set(scales)) > 2
    assert losses(ours) == pytest.approx(expected, rel=1e-12)
    assert ours.scaler.get_scale() == scaler.get_scale()
    for mine, other in zip(ours.model.parameters(), model.parameters(), strict=True):
        assert torch.equal(mine, other)


def test_nothing_changes_within_a_step() -> None:
    run = trainer(accumulate=2)
    control, seen = ee.control_block(run.model), list[tuple[str, int, int]]()
    moments = {"forward": run.model.conv2, "backward": run.model.conv1}

    def ask(moment: str) -> None:
        seen.append((moment, run.state.step, control.generation))
        done = threading.Thread(
            target=lambda: run.request({"adaptation_type": "resize", "layer_name": "conv1", "parameters": {"delta": 1}})
        )
        done.start()
        done.join()

    moments["forward"].register_forward_hook(lambda *_: ask("forward"))
    moments["backward"].register_full_backward_hook(lambda *_: ask("backward"))
    run.optimizer.register_step_post_hook(lambda *_: ask("step"))
    run.fit(loader(), steps=1)
    assert [moment for moment, _, _ in seen] == [*["forward", "backward"] * 2, "step"]
    assert {generation for _, _, generation in seen} == {control.generation - 1}, "one commit, at the boundary"
    assert ee.dims(run.model)["conv1"].active == 8 + 5, "five asked for within the step"


def test_gradients_of_the_last_step_are_there_for_who_decides() -> None:
    class Looks:
        def decisions(self, state: Any) -> tuple[()]:
            assert all(parameter.grad is not None for parameter in state.model.parameters())
            return ()

    trainer(sources=[Looks()]).fit(loader(), steps=2)


def test_evaluation_leaves_modes_and_random_numbers() -> None:
    def evaluate(model: nn.Module) -> dict[str, float]:
        assert not model.training and not torch.is_grad_enabled()
        return {"noise": float(torch.rand(1))}

    runs = [trainer(), trainer()]
    runs[0].model.bn1.eval()
    runs[1].model.bn1.eval()
    for run, settings in zip(runs, ({"evaluate": evaluate, "evaluate_every": 3}, {}), strict=True):
        torch.manual_seed(5)
        run.fit(loader(), steps=20, **settings)
    assert losses(runs[0]) == losses(runs[1])
    assert not runs[0].model.bn1.training and runs[0].model.bn2.training
    assert [event.step for event in events(runs[0], Evaluated)] == [3, 6, 9, 12, 15, 18, 20]


def test_a_second_fit_goes_on_within_the_epoch() -> None:
    whole = trainer()
    whole.fit(loader(), steps=23)
    parts = trainer()
    for steps in (5, 16, 17, 23):
        parts.fit(loader(), steps=steps)
    assert losses(parts) == losses(whole)
    assert (parts.state.epoch, parts.state.batch) == (1, 7)


def test_what_it_cannot_do_is_said() -> None:
    with pytest.raises(TrainingError, match="optimizer: expected one"):
        Trainer(net()).fit(loader(), steps=1)
    with pytest.raises(TrainingError, match="expected epochs or steps"):
        trainer().fit(loader())
    with pytest.raises(TrainingError, match="expected batches, got none"):
        trainer().fit([], steps=1)
    with pytest.raises(TrainingError, match=r"loss\(outputs, targets\)"):
        Trainer(net(), torch.optim.SGD(net().parameters(), 1e-2)).fit(loader(), steps=1)
    for wrong in ({"accumulate": 0}, {"checkpoint_every": 5}, {"report_every": True}):
        with pytest.raises(TrainingError, match=next(iter(wrong))):
            Trainer(net(), **wrong)


@pytest.mark.parametrize("shape", [(1, 8, 8), (2, 1, 8, 8), [1, 8, 8]])
def test_an_input_shape_serves_where_no_input_is_at_hand(shape: Any) -> None:
    run = Trainer(Net(), input_shape=shape)
    assert run.controller.surgeon.example_inputs.shape[-3:] == (1, 8, 8)
    result = run.apply_architecture_modification(run.model, ADD)
    assert result and not result.details[0]["warnings"]


@pytest.mark.parametrize("shape", [(3, 8, 8), "8", (1, -8, 8), (1, 2**19, 2**19), (True, 8, 8)])
def test_an_input_shape_that_does_not_fit_is_refused(shape: Any) -> None:
    with pytest.raises(TrainingError, match="input_shape"):
        Trainer(Net(), input_shape=shape)


# Decisions


def test_a_decision_can_be_applied_between_steps() -> None:
    run = trainer()
    assert run.apply_architecture_modification(run.model, GROW)
    refused = asyncio.run(run._apply_architecture_modification(run.model, {**GROW, "layer_name": "nowhere"}))
    assert not refused and "nowhere" in str(refused.error)
    assert not run.apply_architecture_modification(run.model, "no decision")
    other = Net()
    assert asyncio.run(run._apply_architecture_modification(other, {**GROW, "layer_name": "fc", "parameters": {"width": 11}}))
    assert other.fc.out_features == 11 and run.model.fc.out_features == 10


def test_a_decision_within_a_step_fails() -> None:
    run, results = trainer(), list[Any]()
    run.model.conv1.register_forward_hook(lambda *_: results.append(run.apply_architecture_modification(run.model, GROW)))
    run.fit(loader(), steps=1)
    assert len(results) == 1 and not results[0] and "a step is under way" in str(results[0].error)
    assert ee.dims(run.model)["conv1"].active == 8


def test_other_threads_wait_for_the_boundary() -> None:
    run = trainer()
    results: list[Any] = []

    def ask() -> None:
        results.append(run.apply_architecture_modification(run.model, GROW))
        results.append(asyncio.run(run._apply_architecture_modification(run.model, ADD)))

    asking = threading.Thread(target=ask)
    run.model.conv1.register_forward_hook(lambda *_: asking.start() if run.state.step == 1 and not asking.ident else None)

    class Waits:
        def decisions(self, state: Any) -> tuple[()]:
            if state.step > 2 and len(results) < 2:
                time.sleep(0.02)
            return ()

    run.sources.append(Waits())
    run.fit(loader(), steps=40)
    asking.join(10)
    assert all(results) and len(results) == 2, results


def test_the_whole_path_from_a_policy_to_the_story_of_the_run(tmp_path: Path) -> None:
    policy = ee.training.GrowOnPlateau(["conv1"], factor=1.5, window=4, min_improvement=2.0)
    skip = {"adaptation_type": "add_skip_connection", "layer_name": "conv1", "position": "bn2", "confidence": 0.2}
    run = trainer(
        tmp_path,
        {12: skip, 13: {**skip, "confidence": 0.9}},
        sources=[policy],
        safety=ee.training.Safety(min_confidence=0.5),
        governor=Governor(),
        checkpoint_every=None,
    )
    run.fit(loader(), steps=40)
    run.monitor.close()
    story = [type(event).__name__ for event in run.monitor.events if isinstance(event, Requested | Refused | Applied | Effect)]
    assert story[:2] == ["Requested", "Applied"], "the loss never falls to less than nothing"
    grown = events(run, Applied)[0]
    assert (grown.step, grown.adaptation_type, grown.mechanism, grown.widths["conv1"]) == (8, "grow", "metadata", 12)
    assert [(event.step, event.by) for event in events(run, Refused)] == [(12, "min_confidence")]
    assert [event.step for event in events(run, Applied) if event.mechanism == "surgery"] == [13]
    assert {event.request for event in events(run, Effect)} >= {1}
    assert "skip" in " ".join(name for name, _ in run.model.named_modules())
    lines = (tmp_path / "events.jsonl").read_text().splitlines()
    assert len(lines) == len(run.monitor.events)
    assert losses(run)[-1] < losses(run)[0]


def test_the_record_tells_losses_before_and_after_a_change_and_counts_parameters_anew() -> None:
    run = trainer(decisions={25: GROW})
    run.fit(loader(), steps=50)
    (effect,) = events(run, Effect)
    assert effect.step == 45
    assert effect.loss_before == pytest.approx(statistics.fmean(losses(run)[5:25]))
    assert effect.loss_after == pytest.approx(statistics.fmean(losses(run)[25:45]))
    counted = {event.step: event.parameters for event in events(run, Progress)}
    assert counted[30] == counted[50] == ee.summary(run.model).active_parameters > counted[20] == counted[10]


def test_what_is_asked_for_when_training_ends_is_not_left_waiting() -> None:
    run, futures = trainer(), list[Any]()

    class AsksTooLate:
        def decisions(self, state: Any) -> tuple[()]:
            return ()

        def outcome(self, result: Any) -> None:
            if len(futures) < 2:
                futures.append(run.request({**GROW, "parameters": {"delta": 1}}))

    run.sources.append(AsksTooLate())
    first = run.request(GROW)
    run.fit(loader(), steps=1)
    assert first.result(0) and futures[0].result(0)
    waiting = threading.Thread(target=lambda: futures.append(run.apply_architecture_modification(run.model, GROW)))
    run._trained_by = -1  # as if another thread were training, which then ends without coming to a boundary again
    waiting.start()
    time.sleep(0.2)
    run._trained_by = None
    waiting.join(5)
    assert not futures[-1] and "training ended" in str(futures[-1].error)


def test_what_waits_when_a_step_fails_is_refused() -> None:
    run, asked = trainer(), list[Any]()

    def fails(*_: Any) -> None:
        asked.append(run.request(GROW))
        raise RuntimeError("no more data")

    run.model.conv2.register_forward_hook(fails)
    with pytest.raises(RuntimeError, match="no more data"):
        run.fit(loader(), steps=1)
    assert not asked[0].result(0) and "ended within a step" in str(asked[0].result(0).error)
    assert ee.dims(run.model)["conv1"].active == 8


def test_another_model_may_take_other_inputs() -> None:
    run, other = trainer(), nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    layer = {"kind": "Linear", "arguments": {"in_features": 4, "out_features": 4}}
    assert run.apply_architecture_modification(other, {"adaptation_type": "add_layer", "position": "after_1", "layer_spec": layer})
    assert other(torch.zeros(1, 3)).shape == (1, 2)


@pytest.mark.parametrize("kind", ["module", "dict"])
def test_the_average_of_the_weights_follows_its_units(kind: str) -> None:
    decisions = [
        {"adaptation_type": "prune", "layer_name": "conv1", "parameters": {"keep": [1, 2, 5, 7]}},
        {"adaptation_type": "grow", "layer_name": "conv1", "parameters": {"width": 6}},
        {"adaptation_type": "resize", "layer_name": "conv2", "parameters": {"width": 5}},
    ]
    model = net()
    ema = torch.optim.swa_utils.AveragedModel(model) if kind == "module" else {n: p.detach().clone() for n, p in model.named_parameters()}
    run = Trainer(model, ema=ema, example_inputs=torch.zeros(2, 1, 8, 8))
    layer = {**ADD, "layer_spec": {"kind": "Conv2d", "arguments": SPEC["arguments"] | {"in_channels": 5, "out_channels": 5}}}
    for decision in (*decisions, decisions[1:], layer, {**GROW, "layer_name": "conv2"}):
        result = run.apply_architecture_modification(model, decision)
        assert result, result
        averages = dict(ema.module.named_parameters()) if kind == "module" else ema
        for name, parameter in model.named_parameters():  # which was not trained: its average is itself, wherever its units are
            assert torch.equal(averages[name], parameter), name
        if kind == "module":
            x = torch.randn(2, 1, 8, 8)
            assert torch.equal(ema.eval()(x), model.eval()(x))


# Checkpoints


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Trainer:
    run = trainer(tmp_path_factory.mktemp("run"), CHANGES, checkpoint_every=3, keep_checkpoints=100)
    run.fit(loader(), steps=40)
    assert len(events(run, Applied)) == len(CHANGES) + 1, "all changes were made"
    return run


@pytest.mark.parametrize("step", range(3, 40, 3))
def test_a_resumed_run_is_the_uninterrupted_one(whole: Trainer, step: int, tmp_path: Path) -> None:
    assert whole.directory is not None
    name = checkpoints.name_of(step)
    shutil.copytree(whole.directory / name, tmp_path / name)
    shutil.copy(whole.directory / "events.jsonl", tmp_path)
    run = trainer(tmp_path, CHANGES, checkpoint_every=3, keep_checkpoints=100)
    torch.manual_seed(99)
    assert run.resume()
    assert run.state.step == step
    run.fit(loader(), steps=40)
    assert losses(run) == losses(whole)[step:]
    for mine, other in zip(
        (*run.model.parameters(), *run.ema.parameters()), (*whole.model.parameters(), *whole.ema.parameters()), strict=True
    ):
        assert torch.equal(mine, other)
    for mine, other in zip(run.model.buffers(), whole.model.buffers(), strict=True):
        assert torch.equal(mine, other)
    told = [[line.split('"')[3] for line in (folder / "events.jsonl").read_text().splitlines()] for folder in (tmp_path, whole.directory)]
    assert [kind for kind in told[0] if kind != "Resumed"] == told[1]
    assert len(events(run, Resumed)) == 1


def test_a_run_without_a_checkpoint_begins(tmp_path: Path) -> None:
    assert not trainer(tmp_path).resume()
    assert not Trainer(net()).resume()


def test_only_the_last_checkpoints_stay(tmp_path: Path) -> None:
    run = trainer(tmp_path, checkpoint_every=2, keep_checkpoints=3)
    (tmp_path / ".checkpoint-000000001.abc.partial").mkdir()
    run.fit(loader(), steps=11)
    assert sorted(path.name for path in tmp_path.iterdir()) == [*(checkpoints.name_of(step) for step in (6, 8, 10)), "events.jsonl"]
    assert [event.step for event in events(run, Saved)] == [2, 4, 6, 8, 10]


def test_a_checkpoint_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    run = trainer(tmp_path)
    run.fit(loader(), steps=2)
    path = run.save()
    for other in (trainer(tmp_path, ema=None), trainer(tmp_path, governor=Governor()), trainer(tmp_path, schedulers=())):
        with pytest.raises(CheckpointError, match="expected a run with"):
            other.resume()
    (path / "run.json").write_text("{")
    with pytest.raises(CheckpointError, match="expected a checkpoint of a run"):
        trainer(tmp_path).resume()
    with pytest.raises(ElasticError, match="directory"):
        trainer().save()


KILLED = """
import sys; sys.path[:0] = {paths!r}
import torch; torch.set_num_threads(1)
from pathlib import Path
from test_trainer import CHANGES
from training_nets import loader, losses, trainer
run = trainer(Path({directory!r}), CHANGES, checkpoint_every=3)
run.resume()
start = run.state.step
print("ready", flush=True)
run.fit(loader(), steps=40)
print(start, losses(run), flush=True)
"""


def assert_survives_being_killed(whole: Trainer, tmp_path: Path, points: int, longest: float) -> None:
    """Kills a run again and again, each time somewhat later after its start; what finishes in the end is the uninterrupted run."""
    script = textwrap.dedent(KILLED.format(paths=[str(Path(__file__).parent), *sys.path], directory=str(tmp_path)))
    killed = 0
    for point in range(points):
        process = subprocess.Popen(
            [sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}
        )
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        time.sleep(longest * (point + 1) / points)
        process.send_signal(signal.SIGKILL)
        killed += process.wait() == -signal.SIGKILL
        process.stdout.close()
        if point % 10 == 9:
            for path in tmp_path.glob("checkpoint-*"):
                shutil.rmtree(path)  # so that the next ones are killed early in the run as well
    assert killed > points // 2
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    start, _, told = done.stdout.splitlines()[-1].partition(" ")
    assert [float(number) for number in told.strip("[]").split(",") if number] == losses(whole)[int(start) :]


def test_a_killed_run_goes_on_from_its_last_checkpoint(whole: Trainer, tmp_path: Path) -> None:
    assert_survives_being_killed(whole, tmp_path, points=2, longest=0.6)


@pytest.mark.slow
def test_a_run_killed_at_two_hundred_moments_goes_on(whole: Trainer, tmp_path: Path) -> None:
    assert_survives_being_killed(whole, tmp_path, points=200, longest=1.5)
