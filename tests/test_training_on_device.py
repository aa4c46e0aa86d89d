"""``ee.training`` on the device that there is, a GPU or else the CPU: changes of every kind, snapshots and resumed runs stay on it."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from training_nets import SPEC, Losses, Net, losses

import esper_elastic as ee
from esper_elastic.training import Governor, Schedule, Trainer, TrainingState
from esper_elastic.training.events import Applied, Restored

DEVICE = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
#: Of every type that the small network has a place for, by metadata and by surgery.
CHANGES: dict[int, Any] = {
    2: {"adaptation_type": "grow", "layer_name": "conv1", "parameters": {"width": 12}},
    4: {"adaptation_type": "add_layer", "position": "after_conv2", "layer_spec": SPEC},
    6: {"adaptation_type": "grow", "layer_name": "conv2", "parameters": {"width": 24}},
    8: [
        {"adaptation_type": "prune", "layer_name": "conv1", "parameters": {"width": 10, "by": "taylor"}},
        {"adaptation_type": "add_skip_connection", "layer_name": "conv1", "position": "bn2"},
    ],
    10: {"adaptation_type": "resize", "layer_name": "conv2", "parameters": {"width": 9}},
    12: {"adaptation_type": "modify_layer", "layer_name": "conv2", "parameters": {"kernel_size": 5}},
    14: {"adaptation_type": "remove_layer", "layer_name": "conv2.edits.after_0"},
}
GRADMAX = {"adaptation_type": "grow", "layer_name": "conv1", "parameters": {"width": 14, "init": "gradmax"}}


def batches(number: int) -> list[tuple[Tensor, Tensor]]:
    """The sixteen batches of an epoch, in the order of its number."""
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(256, 1, 8, 8, generator=generator) + torch.arange(256)[:, None, None, None] % 10 / 3
    order = torch.randperm(256, generator=torch.Generator().manual_seed(number))
    return [(images[part].to(DEVICE), (part % 10).to(DEVICE)) for part in order.split(16)]


def trainer(directory: Path | None = None, decisions: dict[int, Any] | None = None, **settings: Any) -> Trainer:
    torch.manual_seed(0)
    model = ee.elasticize(Net(), torch.randn(2, 1, 8, 8), capacity=2.0).to(DEVICE)
    optimizer = ee.optim.AdamW(model.parameters(), lr=1e-2)
    given = {
        "sources": [Losses(), Schedule(decisions or {})],
        "directory": directory,
        "example_inputs": torch.zeros(2, 1, 8, 8, device=DEVICE),
        "ema": torch.optim.swa_utils.AveragedModel(model),
    }
    torch.manual_seed(1)
    return Trainer(model, optimizer, nn.functional.cross_entropy, **(given | settings))


def tensors_of(run: Trainer) -> list[Tensor]:
    state = [value for kept in run.optimizer.state.values() for value in kept.values() if isinstance(value, Tensor) and value.dim()]
    return [*run.model.parameters(), *run.model.buffers(), *run.ema.parameters(), *run.ema.buffers(), *state]


@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float16], ids=str)
def test_changes_of_every_kind_leave_all_of_it_on_the_device(dtype: torch.dtype | None) -> None:
    scaler = torch.amp.GradScaler(DEVICE.type) if dtype is torch.float16 else None
    run = trainer(decisions=CHANGES, autocast=dtype, scaler=scaler, clip_norm=1.0)
    run.fit(batches, steps=20)
    assert len([event for event in run.monitor.events if isinstance(event, Applied)]) == 8
    assert {tensor.device for tensor in tensors_of(run) if tensor.dim()} == {DEVICE}
    assert all(torch.isfinite(torch.tensor(loss)) for loss in losses(run))
    assert sum(losses(run)[-4:]) < sum(losses(run)[:4])


def test_gradmax_takes_its_statistics_on_the_device() -> None:
    class Grower:
        def observes(self, state: TrainingState) -> str | None:
            return "gradmax" if state.step == 4 else None

        def decisions(self, state: TrainingState) -> list[Any]:
            return [GRADMAX] if state.step == 5 else []

    run = trainer(sources=[Losses(), Grower()])
    run.fit(batches, steps=8)
    assert ee.dims(run.model)["conv1"].active == 14


def test_a_resumed_run_is_the_uninterrupted_one(tmp_path: Path) -> None:
    """With dropout, whose random numbers are the device's own."""
    whole = trainer(tmp_path / "whole", CHANGES, checkpoint_every=5, keep_checkpoints=9)
    whole.fit(batches, steps=20)
    for step in (5, 10, 15):
        shutil.copytree(tmp_path / "whole", tmp_path / f"from {step}")
        again = trainer(tmp_path / f"from {step}", CHANGES)
        assert again.resume(next((tmp_path / f"from {step}").glob(f"*{step:08d}*")))
        again.fit(batches, steps=20)
        assert losses(again) == losses(whole)[step:]
        for ours, theirs in zip(tensors_of(again), tensors_of(whole), strict=True):
            assert torch.equal(ours, theirs)


@pytest.mark.parametrize("spoil", [lambda p: p.data.fill_(float("nan")), lambda p: p.data.mul_(1e4)], ids=["nan", "out of its band"])
def test_a_run_is_put_back_on_the_device(spoil: Callable[[Tensor], Any]) -> None:
    run = trainer(governor=Governor(settle=2))
    run.fit(batches, steps=10)
    before = [tensor.clone() for tensor in tensors_of(run)]
    assert run.apply_architecture_modification(run.model, CHANGES[4])
    spoil(run.model.fc.weight)
    run.fit(batches, steps=13)
    assert [event.step for event in run.monitor.events if isinstance(event, Restored)]
    assert "conv2.edits" not in dict(run.model.named_modules())
    assert len(tensors_of(run)) == len(before)
    assert {tensor.device for tensor in tensors_of(run) if tensor.dim()} == {DEVICE}
