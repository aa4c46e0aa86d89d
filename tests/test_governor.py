"""The governor and its snapshots: a run is put back to before a change that its loss does not survive, bit for bit, and goes on."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from fingerprint import assert_same, fingerprint
from torch import nn
from training_nets import SPEC, loader, losses, trainer

import esper_elastic as ee
from esper_elastic.errors import DecisionError, GenerationError
from esper_elastic.training import Governor, TrainingState
from esper_elastic.training.events import Restored, SnapshotTaken
from esper_elastic.training.governor import Watch
from esper_elastic.training.snapshot import Snapshot, size_of_all

RESIZE = {"adaptation_type": "resize", "layer_name": "conv1", "parameters": {"width": 4}}
CHANGES: dict[str, Any] = {
    "metadata": RESIZE,
    "grow": {"adaptation_type": "grow", "layer_name": "conv1", "parameters": {"width": 12}},
    "prune": {"adaptation_type": "prune", "layer_name": "conv2", "parameters": {"width": 5}},
    "beyond capacity": {"adaptation_type": "grow", "layer_name": "conv2", "parameters": {"width": 40}},
    "a layer": {"adaptation_type": "add_layer", "position": "after_conv2", "layer_spec": SPEC},
    "a layer removed": {"adaptation_type": "remove_layer", "layer_name": "drop"},
    "a skip": {"adaptation_type": "add_skip_connection", "layer_name": "conv1", "position": "bn2"},
    "several": [RESIZE, {"adaptation_type": "modify_layer", "layer_name": "conv2", "parameters": {"kernel_size": 5}}],
}


def without_commits(of: Any) -> list[Any]:
    """A fingerprint without control blocks, in which a restoration is a commit of its own."""
    return [(path, value) for path, value in of if "[block]." not in path]


@pytest.mark.parametrize("elastic", [True, False], ids=["elastic", "plain"])
@pytest.mark.parametrize("name", CHANGES)
def test_a_snapshot_undoes_any_change_and_the_training_after_it(name: str, elastic: bool) -> None:
    run, twin = (trainer(elastic=elastic) for _ in range(2))
    for each in (run, twin):
        torch.manual_seed(3)
        each.fit(loader(), steps=5)
    followers = [run.optimizer, *run.schedulers, run.ema]
    before, state, widths = (
        fingerprint(run.model, *followers),
        torch.get_rng_state(),
        ee.control_block(twin.model).digest() if elastic else "",
    )
    snapshot = Snapshot(run.model, followers, run.state.step)
    assert snapshot.bytes == size_of_all(run.model, followers)
    assert run.apply_architecture_modification(run.model, CHANGES[name])
    run.fit(loader(), steps=12)
    snapshot.restore()
    torch.set_rng_state(state)
    assert_same(*(without_commits(each) for each in (fingerprint(run.model, *followers), before)))
    if elastic:
        assert ee.control_block(run.model).digest() == widths
    run.state.load_state_dict(twin.state.state_dict())
    ends = []
    for each in (run, twin):
        torch.manual_seed(4)
        each.state.epoch, each.state.batch = 0, 0
        each.fit(loader(), steps=15)
        ends.append(losses(each)[-10:])
    assert ends[0] == ends[1]


def test_a_graph_from_before_a_restoration_is_void() -> None:
    run = trainer()
    snapshot = Snapshot(run.model, [run.optimizer], 0)
    generation = ee.control_block(run.model).generation
    loss = run.model(torch.zeros(2, 1, 8, 8)).sum()
    snapshot.restore()
    assert ee.control_block(run.model).generation > generation
    with pytest.raises((GenerationError, RuntimeError)):
        loss.backward()


def poisoned(run: Any, at: int, value: float) -> None:
    """Adds ``value`` to the losses of a trainer from a step on, until it is put back."""
    plain = run.compute_loss

    def compute(batch: Any) -> torch.Tensor:
        loss = plain(batch)
        return loss + value if run.state.step >= at and not restored(run) else loss

    run.compute_loss = compute


def restored(run: Any) -> list[Restored]:
    return [event for event in run.monitor.events if isinstance(event, Restored)]


@pytest.mark.parametrize("value", [math.nan, math.inf, 100.0])
def test_a_loss_that_leaves_its_band_after_a_change_is_put_back(value: float) -> None:
    run = trainer(decisions={10: CHANGES["a layer"]}, governor=Governor(settle=3))
    poisoned(run, 13, value)
    run.fit(loader(), steps=30)
    (event,) = restored(run)
    assert (event.request, event.snapshot_step) == (1, 10)
    assert event.step == (14 if not math.isfinite(value) else 15), "at once, or when the median of three is beyond"
    assert "after_0" not in " ".join(name for name, _ in run.model.named_modules())
    assert math.isfinite(losses(run)[-1]) and losses(run)[-1] < losses(run)[0]
    assert run.monitor.counts["add_layer"]["restored"] == 1


def test_without_a_change_or_long_after_one_nothing_is_put_back() -> None:
    run = trainer(decisions={3: RESIZE}, governor=Governor(horizon=5))
    poisoned(run, 12, 100.0)
    run.fit(loader(), steps=20)
    assert not restored(run)


def test_one_bad_batch_decides_nothing() -> None:
    run = trainer(decisions={10: RESIZE}, governor=Governor())
    plain = run.compute_loss
    run.compute_loss = lambda batch: plain(batch) + (1000.0 if run.state.step == 13 else 0.0)
    run.fit(loader(), steps=25)
    assert not restored(run)


def test_a_snapshot_serves_several_changes_in_close_order() -> None:
    run = trainer(
        decisions={step: {**RESIZE, "parameters": {"width": 4 + step % 3}} for step in range(5, 40)}, governor=Governor(refresh=10)
    )
    run.fit(loader(), steps=40)
    taken = [event.step for event in run.monitor.events if isinstance(event, SnapshotTaken)]
    assert taken == [5, 16, 27, 38]


def test_a_model_above_the_cap_changes_without_a_snapshot() -> None:
    run = trainer(decisions={5: RESIZE}, governor=Governor(max_bytes=1000))
    poisoned(run, 8, math.nan)
    run.fit(loader(), steps=12)
    assert not restored(run)
    assert run._watch is not None and run._watch.too_large is not None and run._watch.too_large > 1000
    assert ee.dims(run.model)["conv1"].active == 4


def test_it_gives_up_after_so_many_restorations() -> None:
    run = trainer(
        decisions={step: {**RESIZE, "parameters": {"width": 3 + step % 2}} for step in range(5, 40)}, governor=Governor(max_restores=2)
    )
    run.compute_loss = lambda batch, plain=run.compute_loss: plain(batch) * (math.nan if run.state.step > 5 else 1.0)
    run.fit(loader(), steps=20)
    assert len(restored(run)) == 2


@pytest.mark.parametrize(("name", "value"), [("window", 0), ("deviations", -1.0), ("share", math.nan), ("horizon", "5"), ("settle", True)])
def test_numbers_out_of_bounds_are_refused(name: str, value: Any) -> None:
    with pytest.raises(DecisionError, match=f"Governor: {name}"):
        Governor(**{name: value})


def test_the_band_is_that_of_before_the_first_of_several_changes() -> None:
    model = nn.Linear(2, 2)
    state, watch = TrainingState(model, None), Watch(Governor(settle=1, share=0.5, deviations=0.0, window=4), [])
    state.losses.extend([1.0] * 4)
    watch.before_change(state)
    watch.changed(state, 1)
    state.losses.extend([1.4] * 4)
    watch.changed(state, 2)
    for loss, expected in ((1.45, False), (1.55, True)):
        state.step, state.loss = state.step + 1, loss
        assert (watch.verdict(state) is not None) == expected
