"""The main job end to end on a small synthetic set, and each of its parts on its own."""

from __future__ import annotations

import io
import json
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import esper_elastic as ee
from esper_elastic import cli, demo
from esper_elastic.datasets import ImageData
from esper_elastic.demo import capacity, data, network, plan, train
from esper_elastic.errors import ElasticError
from esper_elastic.training import AdaptationDecision
from esper_elastic.training.policies import plateau

picture = pytest.importorskip("esper_elastic.demo.picture", reason="needs matplotlib", exc_type=ImportError)
report = pytest.importorskip("esper_elastic.demo.report", reason="needs rich", exc_type=ImportError)

CPU = torch.device("cpu")
START = network.Widths(stem=3, stage1=4, stage2=5, inner=6, block=False)
CAPACITY = network.Widths(stem=6, stage1=8, stage2=10, inner=12, block=True)


@pytest.fixture(scope="module")
def stripes() -> ImageData:
    """Ten classes of noisy stripes."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(600) % 10
    waves = torch.sin(torch.arange(28) * (labels[:, None] + 1) * 0.2)[:, None, None, :].expand(-1, 1, 28, -1)
    images = (128 + 60 * waves + 20 * torch.randn(600, 1, 28, 28, generator=generator)).clamp(0, 255).byte()
    return ImageData("stripes", "made here", images[:500], labels[:500], images[500:], labels[500:])


@pytest.fixture
def images(stripes: ImageData) -> data.Images:
    return data.Images(stripes, CPU)


@pytest.fixture
def dial() -> capacity.Dial:
    torch.manual_seed(0)
    return capacity.Dial(network.elastic_network(START, CAPACITY))


@pytest.fixture
def probe(images: data.Images) -> torch.Tensor:
    return images.prepare(images.test_images[:16])


def outputs(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
    model.eval()
    with torch.no_grad():
        logits = model(batch)
    model.train()
    return logits


def one_step(dial: capacity.Dial, images: data.Images, optimizer: torch.optim.Optimizer) -> None:
    for batch, labels in images.batches(1, 64, seed=1):
        optimizer.zero_grad()
        nn.functional.cross_entropy(dial.network(batch), labels).backward()
        optimizer.step()


# When to grow


@pytest.mark.parametrize(
    ("losses", "stalled"),
    [([1.0] * 8, True), ([2.0] * 4 + [1.0] * 4, False), ([1.0] * 7, False), ([1.0] * 4 + [1.5] * 4, True), ([1.0] * 4 + [0.93] * 4, True)],
    ids=["flat", "falling", "too-few", "rising", "hardly-falling"],
)
def test_a_plateau_is_a_mean_that_hardly_falls(losses: list[float], stalled: bool) -> None:
    detector = plateau.PlateauDetector(window=4, min_improvement=0.08)
    for loss in losses:
        detector.update(loss)
    assert (detector.stalled() is not None) == stalled


def test_a_stall_is_explained_by_its_numbers() -> None:
    detector = plateau.PlateauDetector(window=2)
    for loss in (0.72, 0.70, 0.70, 0.68):
        detector.update(loss)
    assert detector.stalled() == "loss stalled: 0.71 -> 0.69 in 2 steps"


def test_planned_changes_come_in_order_within_their_bounds() -> None:
    planned = [plan.Planned("first", 5, 20), plan.Planned("second", 6, 12)]
    schedule = plan.Schedule(planned, plateau.PlateauDetector(window=2))
    seen = {}
    for step in range(30):
        if due := schedule.due(step):
            seen[step] = due
        schedule.saw(1.0 if step < 6 else 1.0 / step)  # flat, then falling: one stall, then none
    assert seen == {5: ("first", "loss stalled: 1.00 -> 1.00 in 2 steps"), 12: ("second", "latest step for it: 12")}


# The network and its arithmetic


@pytest.mark.parametrize("widths", [START, CAPACITY, train.SMALL, train.LARGE], ids=str)
def test_costs_are_those_of_the_plain_network(widths: network.Widths) -> None:
    plain = network.plain_network(widths)
    assert widths.parameters() == sum(parameter.numel() for parameter in plain.parameters())
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        plain(torch.zeros(1, 1, 28, 28))
    assert 2 * widths.multiply_adds() == counter.get_total_flops()


@pytest.mark.parametrize("block", [False, True], ids=["block-off", "block-on"])
def test_the_exported_network_is_the_plain_one(block: bool, probe: torch.Tensor) -> None:
    widths = START._replace(block=block)
    elastic = network.elastic_network(widths, CAPACITY)
    exported = ee.export(elastic)
    plain = network.plain_network(widths)
    plain.load_state_dict(exported.state_dict())
    torch.testing.assert_close(outputs(plain, probe), outputs(elastic, probe), rtol=1e-5, atol=1e-5)


# The data


def test_every_pass_shows_each_image_once_in_an_order_of_its_own(images: data.Images) -> None:
    first = [labels for _, labels in images.batches(10, 50, seed=3)]
    again = [labels for _, labels in images.batches(10, 50, seed=3)]
    other = [labels for _, labels in images.batches(10, 50, seed=4)]
    assert Counter(torch.cat(first).tolist()) == dict.fromkeys(range(10), 50)
    assert all(map(torch.equal, first, again))
    assert not all(map(torch.equal, first, other))


def test_a_batch_is_never_larger_than_the_set(images: data.Images) -> None:
    assert [len(labels) for _, labels in images.batches(3, 10_000, seed=0)] == [500, 500, 500]


@pytest.mark.parametrize("limit", [None, 7, 1], ids=str)
def test_accuracy_counts_right_labels_and_restores_the_mode(
    limit: int | None, images: data.Images, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(data, "EVALUATION_BATCH", 30)
    plain = network.plain_network(CAPACITY)
    found = data.accuracy(plain, images, limit)
    right = outputs(plain, images.prepare(images.test_images)).argmax(1) == images.test_labels
    assert found == pytest.approx(100 * right[:limit].float().mean().item())
    assert plain.training


def test_recalibration_measures_the_width_at_hand_and_nothing_else(dial: capacity.Dial, images: data.Images) -> None:
    norm = dial.network.stem.norm
    norm.momentum = 0.3
    before = {name: tensor.clone() for name, tensor in dial.network.state_dict().items() if isinstance(tensor, torch.Tensor)}
    data.recalibrate(dial.network, images)
    changed = {name for name, tensor in before.items() if not torch.equal(tensor, dial.network.state_dict()[name])}
    assert changed
    assert all("running" in name or "tracked" in name for name in changed)
    assert not any(name.startswith("block") for name in changed)  # it is off
    assert torch.equal(norm.running_mean[START.stem :], before["stem.norm.running_mean"][START.stem :])
    assert norm.momentum == 0.3


# Changes of capacity


def test_growing_and_switching_on_keep_the_function(dial: capacity.Dial, images: data.Images, probe: torch.Tensor) -> None:
    optimizer = ee.optim.AdamW(dial.network.parameters(), lr=1e-2)
    one_step(dial, images, optimizer)
    for change in (
        lambda: dial.grow(1, {"stage1": 8, "stage2": 10}, "because"),
        lambda: dial.grow(2, {"stem": 6}, "because"),
        lambda: dial.switch_on(3, "because"),
    ):
        before = outputs(dial.network, probe)
        change()
        torch.testing.assert_close(outputs(dial.network, probe), before, rtol=1e-5, atol=1e-5)
        one_step(dial, images, optimizer)
    assert [(event.step, event.kind) for event in dial.events] == [(1, "grow"), (2, "grow"), (3, "switch")]
    assert dial.widths == (6, 8, 10, 6, True)
    assert dial.events[0].what == "stage1 4->8 stage2 5->10"
    assert all(event.microseconds > 0 for event in dial.events)


def test_the_impossible_is_refused_and_nothing_is_lost(dial: capacity.Dial, probe: torch.Tensor) -> None:
    before = outputs(dial.network, probe)
    dial.try_illegal(7)
    (event,) = dial.events
    assert (event.kind, event.widths) == ("refused", START)
    assert event.reason == "max_bytes: no room beyond 10; nothing lost"
    assert torch.equal(outputs(dial.network, probe), before)


@pytest.mark.parametrize("harm", ["accepted", "weights"])
def test_a_refusal_that_costs_something_is_an_error(harm: str, dial: capacity.Dial, monkeypatch: pytest.MonkeyPatch) -> None:
    def apply(model: nn.Module, decisions: list[AdaptationDecision]) -> bool:
        if harm == "weights":
            nn.init.ones_(model.head.weight)
        return harm == "accepted"

    monkeypatch.setattr(dial.trainer, "apply_architecture_modification", apply)
    with pytest.raises(ElasticError, match="expected a refusal" if harm == "accepted" else "expected the network as it was"):
        dial.try_illegal(7)


def test_pruning_keeps_the_best_units_and_puts_the_best_of_them_first(dial: capacity.Dial, images: data.Images) -> None:
    optimizer = ee.optim.AdamW(dial.network.parameters(), lr=1e-2)
    dial.grow(0, {"stage1": 8}, "because")
    dial.switch_on(0, "because")
    one_step(dial, images, optimizer)
    scores = torch.tensor([3.0, 9.0, 1.0, 8.0, 2.0, 7.0, 0.0, 5.0])
    kernels = dial.network.stage1.conv.weight.detach().clone()
    dial._scores = {part: scores if part == "stage1" else -torch.arange(dim.active).float() for part, dim in dial.dims.items()}
    dial.prune(5, {"stage1": 4})
    assert dial.widths.stage1 == 4
    # a quarter of 4 is unit 1, half adds unit 3, three quarters unit 5, all of them unit 7
    assert torch.equal(dial.network.stage1.conv.weight[:4], kernels[[1, 3, 5, 7]])
    assert dial.events[-1].what == "stage1 8->4, all dims put in order"


def test_narrow_widths_are_left_again_and_leave_the_widths_as_they_were(dial: capacity.Dial) -> None:
    with dial.narrowed(0.5):
        assert dial.widths == (1, 2, 2, 3, False)
    with pytest.raises(KeyError, match="stop"), dial.narrowed(0.25):
        raise KeyError("stop")
    assert dial.widths == START


# The whole job


@pytest.fixture(scope="module")
def finished(stripes: ImageData, tmp_path_factory: pytest.TempPathFactory) -> tuple[list, Path]:
    out = tmp_path_factory.mktemp("demo")
    settings = demo.Settings(steps=50, batch_size=25, evaluate_every=10, evaluation_images=50)
    with pytest.MonkeyPatch.context() as less:
        less.setattr(data, "RECALIBRATION_BATCHES", 2)
        less.setattr(report, "LATENCY_ROUNDS", 2)
        return demo.run(demo.Options(out=out, seeds=2, settings=settings, device="cpu"), stripes), out


def test_the_job_makes_every_change_it_promises(finished: tuple[list, Path]) -> None:
    for result in finished[0]:
        assert [event.kind for event in result.grown.events] == ["grow", "grow", "switch", "refused", "prune"]
        assert result.grown.events[-1].widths == train.LARGE._replace(**train.PRUNED)


def test_the_grown_network_takes_fewer_multiply_adds_than_the_large_one(finished: tuple[list, Path]) -> None:
    for result in finished[0]:
        assert result.small.multiply_adds < result.grown.multiply_adds < result.large.multiply_adds
        assert result.large.multiply_adds == 3 * 50 * 25 * train.LARGE.multiply_adds()


def test_the_job_leaves_picture_numbers_and_plain_checkpoint(finished: tuple[list, Path]) -> None:
    results, out = finished
    assert (out / "demo.png").read_bytes().startswith(b"\x89PNG")
    numbers = json.loads((out / "demo.json").read_text())
    assert [entry["seed"] for entry in numbers["seeds"]] == [0, 1]
    assert "mean of 2 seeds" in numbers["verdict"].lower()
    plain = network.plain_network(train.LARGE._replace(**train.PRUNED))
    plain.load_state_dict(torch.load(out / "exported.pt", weights_only=True))
    exported = ee.export(results[-1].grown.network)
    for name, tensor in plain.state_dict().items():
        assert torch.equal(tensor, exported.state_dict()[name]), name
    image = torch.zeros(1, 1, 28, 28)
    torch.testing.assert_close(outputs(plain, image), outputs(exported, image))  # memory formats differ, and with them the order of sums


def test_a_terminal_shows_a_table_and_a_pipe_plain_lines() -> None:
    from rich.console import Console

    from esper_elastic.demo import live

    event = capacity.Event(3, "refused", "stem ->1", "capacity is 10; nothing lost", 61.4, START)
    shown = {}
    for is_terminal in (True, False):
        console = Console(file=io.StringIO(), force_terminal=is_terminal, width=140)
        with live.watching(console, "a run") as watch:
            watch(3, 55.55, START, event)
        shown[is_terminal] = console.file.getvalue()
    assert "┃" in shown[True]
    assert "REFUSED stem ->1" in shown[True]
    assert "    3    55.5 %  3-4-5+off     REFUSED stem ->1" in shown[False]
    assert "\x1b" not in shown[False]


# The command line


def test_the_command_line_chooses_what_runs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    seen = []
    monkeypatch.setattr(demo, "run", seen.append)
    assert cli.main(["demo", "--seeds", "3", "--steps", "40", "--out", str(tmp_path), "--device", "cpu"]) == 0
    assert seen == [demo.Options(out=tmp_path, seeds=3, device="cpu", settings=demo.Settings(steps=40))]


@pytest.mark.parametrize("package", ["rich", "matplotlib"])
def test_a_missing_package_is_named_with_its_extra(
    package: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    assert cli.main(["demo"]) == 1
    said = capsys.readouterr().err
    assert f"demo: {package}: expected it to be installed" in said
    assert "pip install 'esper-elastic[demo]'" in said


@pytest.mark.parametrize("arguments", [["demo", "--seeds", "0"], ["demo", "--steps", "x"], [], ["paint"]], ids=" ".join)
def test_wrong_arguments_are_refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as leaving:
        cli.main(arguments)
    assert leaving.value.code == 2
    assert "esper-elastic" in capsys.readouterr().err
