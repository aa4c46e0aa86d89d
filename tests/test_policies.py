"""Policies decide what they promise in training: growth at a stall, the least of units and blocks, skips past vanished gradients."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from training_nets import loader, losses, trainer

import esper_elastic as ee
from esper_elastic import importance
from esper_elastic.errors import DecisionError
from esper_elastic.training import (
    DecisionFile,
    DecisionSource,
    DisableLeast,
    GrowOnPlateau,
    PruneLeast,
    Schedule,
    SkipVanishing,
    Trainer,
    TrainingState,
    When,
)
from esper_elastic.training.events import Applied, Refused, Requested


def applied(run: Trainer) -> list[Applied]:
    return [event for event in run.monitor.events if isinstance(event, Applied)]


def asked(source: Any, state: TrainingState, steps: range, loss: float = 1.0) -> dict[int, list[Any]]:
    """What a source decides at each of some steps, those with nothing left out."""
    found = {}
    for state.step in steps:
        state.loss = loss
        decisions = list(source.decisions(state))
        if decisions:
            found[state.step] = decisions
    return found


@pytest.fixture
def state() -> TrainingState:
    return TrainingState(trainer().model, None)


def test_all_of_them_are_sources() -> None:
    for source in (Schedule({}), When(Schedule({})), GrowOnPlateau(), PruneLeast(), DisableLeast(), SkipVanishing([]), DecisionFile("x")):
        assert isinstance(source, DecisionSource)
        assert isinstance(source.name, str)


def test_a_schedule_decides_at_its_steps(state: TrainingState) -> None:
    assert asked(Schedule({3: "a", 5: ["b", "c"]}), state, range(8)) == {3: ["a"], 5: [["b", "c"]]}


def test_when_asks_within_its_bounds(state: TrainingState) -> None:
    always = Schedule(dict.fromkeys(range(20), "x"))
    assert list(asked(When(always, first=4, last=12, every=3), state, range(20))) == [4, 7, 10]
    assert list(asked(When(always), state, range(3))) == [0, 1, 2]


# Growth


def test_it_grows_at_a_stall_and_begins_anew(state: TrainingState) -> None:
    policy = GrowOnPlateau(["conv1"], factor=1.25, window=4, min_improvement=0.05)
    found = asked(policy, state, range(30))
    assert list(found) == [7, 15, 23], "two windows of four, then anew"
    ((decision,),) = found[7]
    assert (decision.adaptation_type, decision.layer_name, decision.parameters) == ("grow", "conv1", {"width": 10})
    assert "loss stalled" in decision.metadata["reason"]


def test_it_does_not_grow_while_the_loss_falls(state: TrainingState) -> None:
    policy = GrowOnPlateau(window=4, min_improvement=0.05)
    for state.step in range(40):
        state.loss = 0.9**state.step
        assert not list(policy.decisions(state))


def test_growth_ends_at_the_capacity(state: TrainingState) -> None:
    ee.resize(state.model, {"conv1": 15, "conv2": 16})
    (found,) = asked(GrowOnPlateau(window=2), state, range(4)).values()
    assert [[(each.layer_name, each.parameters["width"]) for each in group] for group in found] == [[("conv1", 16)]]
    ee.resize(state.model, {"conv1": 16})
    assert not asked(GrowOnPlateau(window=2), state, range(20))


def test_gradmax_grows_on_what_was_observed_of_the_step_after_the_stall() -> None:
    policy = GrowOnPlateau(["conv1"], factor=1.5, window=3, min_improvement=2.0, parameters={"init": "gradmax"})
    run = trainer(sources=[policy], ema=None)
    run.fit(loader(), steps=10)
    (event,) = applied(run)
    assert (event.step, event.details["init"], event.details["to"]) == (7, "gradmax", 12)
    assert not [event for event in run.monitor.events if isinstance(event, Refused)]


# Pruning


def test_the_least_units_of_all_dims_go() -> None:
    run = trainer(ema=None)
    with torch.no_grad():
        run.model.fc.weight[:, 5] *= 1e-6
        run.model.conv2.weight[:, 2] *= 1e-6
    policy = PruneLeast(2 / 16, every=3, until=0.5)
    run.sources.append(policy)
    run.fit(loader(), steps=3)
    kept = {event.adaptation_type: event for event in applied(run)}
    assert [event.details["to"] for event in applied(run)] == [7, 7]
    asked_for = {
        event.decision["layer_name"]: event.decision["parameters"]["keep"] for event in run.monitor.events if isinstance(event, Requested)
    }
    assert asked_for == {"conv1": [0, 1, 3, 4, 5, 6, 7], "conv2": [0, 1, 2, 3, 4, 6, 7]}
    assert len(kept) == 1


def test_pruning_ends_at_the_share_that_stays() -> None:
    run = trainer(sources=[PruneLeast(0.2, every=2, until=0.5)], ema=None)
    run.fit(loader(), steps=20)
    assert sum(dim.active for dim in ee.dims(run.model).values()) == 8
    assert all(event.mechanism == "metadata" for event in applied(run))


@pytest.mark.parametrize("score", ["fisher", "activation"])
def test_scores_of_observed_steps_decide(score: str) -> None:
    policy = PruneLeast(0.25, every=6, until=0.5, score=score, sample_every=2)
    run = trainer(sources=[policy], ema=None)
    observed = []
    run.sources.insert(0, type("Looks", (), {"decisions": lambda _, state: observed.append(state.observed is not None) or ()})())
    run.fit(loader(), steps=6)
    assert observed == [False, True] * 3
    assert sum(dim.active for dim in ee.dims(run.model).values()) == 12


def test_every_dim_keeps_its_least_share() -> None:
    run = trainer(ema=None)
    with torch.no_grad():
        run.model.conv2.weight.mul_(1e-6)
    run.sources.append(PruneLeast(0.5, every=2, until=0.5, least=0.75))
    run.fit(loader(), steps=2)
    assert {name: dim.active for name, dim in ee.dims(run.model).items()} == {"conv1": 6, "conv2": 6}


@pytest.mark.parametrize("wrong", [{"share": 1.5}, {"until": -0.1}, {"least": 2}, {"score": "taste"}])
def test_numbers_that_are_no_shares_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(DecisionError, match=next(iter(wrong))):
        PruneLeast(**wrong)


# Blocks


class Blocks(nn.Module):
    """Three residual branches, the second of which hardly contributes."""

    def __init__(self) -> None:
        super().__init__()
        dim = ee.ElasticDim(6)
        self.inside = nn.Linear(64, 6)
        self.branches = nn.ModuleList(
            ee.ElasticBlock(nn.Sequential(ee.ElasticLinear(6, 6, in_dim=dim, out_dim=dim)), kind="branch") for _ in range(3)
        )
        self.outside = nn.Linear(6, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.inside(x.flatten(1))
        for index, branch in enumerate(self.branches):
            x = x + branch(x) * (1e-4 if index == 1 else 1.0)
        return self.outside(x)


def test_the_block_that_contributes_least_is_switched_off() -> None:
    torch.manual_seed(0)
    model = Blocks()
    optimizer = ee.optim.AdamW(model.parameters(), lr=1e-3)
    run = Trainer(model, optimizer, nn.functional.cross_entropy, sources=[DisableLeast(every=4, keep=2)])
    run.fit(loader(), steps=20)
    assert [(event.step, event.layer_name, event.mechanism) for event in applied(run)] == [(4, "branches.1", "metadata")]
    assert [branch.on for branch in model.branches] == [True, False, True]


# Skips


class Deep(nn.Module):
    """Too many layers for its initialisation."""

    def __init__(self, depth: int = 24) -> None:
        super().__init__()
        self.first = nn.Linear(64, 16)
        self.body = nn.Sequential(*(nn.Sequential(nn.Linear(16, 16), nn.ReLU()) for _ in range(depth)))
        self.last = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.body(torch.relu(self.first(x.flatten(1)))))


def test_skips_let_a_network_train_whose_gradients_vanish() -> None:
    ends = []
    for pairs in ([], [(f"body.{index}", f"body.{index + 2}") for index in range(0, 22, 2)]):
        torch.manual_seed(0)
        model = Deep()
        optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
        policy = SkipVanishing(pairs, ratio=1e-2, patience=3, preserve=False)
        run = Trainer(model, optimizer, nn.functional.cross_entropy, sources=[policy], input_shape=(1, 8, 8))
        torch.manual_seed(1)
        run.fit(loader(64), steps=160)
        ends.append(sum(list(run.state.losses)[-10:]) / 10)
        assert len(applied(run)) == len(pairs)
    assert ends[1] < 0.5 * ends[0], ends
    assert "of the largest" in next(e for e in run.monitor.events if isinstance(e, Requested)).decision["metadata"]["reason"]


# From outside


def test_decisions_come_from_a_file_that_another_process_writes(tmp_path: Path) -> None:
    path = tmp_path / "decisions.jsonl"

    def lines() -> Iterator[str]:
        yield json.dumps({"step": 4, "adaptation_type": "grow", "layer_name": "conv1", "parameters": {"width": 10}}) + "\n"
        yield '{"adaptation_type": "resize", "layer_name": "conv2", "parameters": {"wi'
        yield 'dth": 5}}\n'
        yield "no decision\n\n"
        yield json.dumps([{"adaptation_type": "resize", "layer_name": "conv1", "parameters": {"width": 9}}] * 2) + "\n"

    written = lines()

    class Writes:
        def decisions(self, state: TrainingState) -> tuple[()]:
            with path.open("a") as file:
                file.write(next(written, ""))
            return ()

    run = trainer(sources=[Writes(), DecisionFile(path)])
    run.fit(loader(), steps=8)
    assert [(event.step, event.layer_name, event.details["to"]) for event in applied(run)] == [
        (3, "conv2", 5),
        (4, "conv1", 10),
        (5, "conv1", 9),
        (5, "conv1", 9),
    ]
    assert [(event.step, event.by) for event in run.monitor.events if isinstance(event, Refused)] == [(4, "decision")]


def test_a_file_that_is_begun_anew_is_read_from_its_beginning(tmp_path: Path) -> None:
    path = tmp_path / "decisions.jsonl"
    source, state = DecisionFile(path), TrainingState(torch.nn.Linear(1, 1), None)
    path.write_text('{"adaptation_type": "resize", "layer_name": "a", "parameters": {"width": 1000}}\n')
    assert [each["layer_name"] for each in source.decisions(state)] == ["a"]
    path.write_text('{"adaptation_type": "enable", "layer_name": "b"}\n')
    assert [each["layer_name"] for each in source.decisions(state)] == ["b"]
    assert list(source.decisions(state)) == []


def test_of_decisions_that_vanish_together_each_is_counted(tmp_path: Path) -> None:
    run = trainer()
    run.apply_architecture_modification(
        run.model,
        [{"adaptation_type": "resize", "layer_name": "conv1", "parameters": {"width": 5}}, {"adaptation_type": "grow", "layer_name": "?"}],
    )
    refused = [(event.adaptation_type, event.layer_name) for event in run.monitor.events if isinstance(event, Refused)]
    assert refused == [("resize", "conv1"), ("grow", "?")]
    assert all(run.monitor.counts[kind]["requested"] == run.monitor.counts[kind]["refused"] == 1 for kind in ("resize", "grow"))


# Checkpoints


@pytest.mark.parametrize(
    "make",
    [
        lambda path: GrowOnPlateau(window=4, min_improvement=2.0),
        lambda path: GrowOnPlateau(["conv1"], window=4, min_improvement=2.0, parameters={"init": "gradmax"}),
        lambda path: PruneLeast(0.1, every=7, until=0.5),
        lambda path: When(PruneLeast(0.1, every=5, until=0.5, score="fisher"), first=3),
        lambda path: SkipVanishing([("conv1", "bn2")], ratio=2.0, patience=9),
        lambda path: DecisionFile(path),
    ],
    ids=["grow", "gradmax", "prune", "prune by fisher", "skip", "file"],
)
def test_a_policy_goes_on_after_a_resumption(make: Any, tmp_path: Path) -> None:
    path = tmp_path / "decisions.jsonl"
    path.write_text("".join(json.dumps({"step": step, "adaptation_type": "grow", "layer_name": "conv1"}) + "\n" for step in (3, 12)))
    whole = trainer(tmp_path / "run", sources=[make(path)], checkpoint_every=8, keep_checkpoints=9)
    whole.fit(loader(), steps=24)
    assert applied(whole)
    (later,) = (tmp_path / "run").glob("checkpoint-*16")
    run = trainer(sources=[make(path)])
    assert run.resume(later)
    run.fit(loader(), steps=24)
    assert losses(run) == losses(whole)[16:]
    assert [event.step for event in applied(run)] == [event.step for event in applied(whole) if event.step > 16]


def test_scores_are_those_of_importance(state: TrainingState) -> None:
    model, policy, total = state.model, PruneLeast(0.5, every=3, until=0.5), torch.zeros(8)
    for _ in range(2):
        model(torch.randn(4, 1, 8, 8)).square().sum().backward()
        total += importance.taylor(ee.dims(model)["conv1"])
        assert not list(policy.decisions(state))
    assert torch.allclose(policy._scores["conv1"], total)
