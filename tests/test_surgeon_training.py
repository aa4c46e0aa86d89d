"""Training goes on through edits: optimizers, schedulers and averages follow by themselves, and what is kept keeps its momentum."""

import itertools

import pytest
import torch
from surgery_net import images, net, surgeon
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

import esper_elastic as ee

pytestmark = pytest.mark.wide

EDITS = {
    "add": lambda hand, model: hand.add_layer(model, "after_conv1", nn.BatchNorm2d(8)),
    "add_wider": lambda hand, model: hand.add_layer(model, "after_conv2", nn.Conv2d(12, 20, 3, padding=1)),
    "remove_folded": lambda hand, model: hand.remove_layer(model, "bn1"),
    "remove_block": lambda hand, model: hand.remove_layer(model, "blocks.1"),
    "remove_projected": lambda hand, model: hand.remove_layer(model, "conv2"),
    "widen": lambda hand, model: hand.modify_layer(model, "blocks.0.conv1", {"out_channels": 30}),
    "kernel": lambda hand, model: hand.modify_layer(model, "conv1", {"kernel_size": 5}),
    "skip": lambda hand, model: hand.add_skip_connection(model, "conv1", "blocks.0"),
}


def trained(steps: int = 3) -> tuple[nn.Module, torch.optim.Optimizer]:
    model = net().train()
    optimizer = torch.optim.AdamW(
        [
            {"params": model.conv1.parameters(), "lr": 1e-4},
            {"params": [p for n, p in model.named_parameters() if not n.startswith("conv1.")]},
        ],
        lr=1e-3,
    )
    for step in range(steps):
        advance(model, optimizer, step)
    return model, optimizer


def advance(model: nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> float:
    optimizer.zero_grad()
    loss = model(images(seed)).square().mean()
    loss.backward()
    optimizer.step()
    return float(loss)


@pytest.mark.parametrize("edit", EDITS)
@pytest.mark.parametrize("told", [True, False], ids=["told", "found"])
def test_the_optimizer_follows(edit: str, told: bool) -> None:
    """Told of it, or found by having stepped the model before: each parameter is in one group, beside its neighbours, and state fits."""
    model, optimizer = trained()
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    before = {name: {key: value.clone() for key, value in optimizer.state[p].items()} for name, p in model.named_parameters()}
    shapes = {name: p.shape for name, p in model.named_parameters()}
    if told:
        with ee.transaction(model, optimizer, schedulers=scheduler):
            assert EDITS[edit](surgeon(), model)
    else:
        assert EDITS[edit](surgeon(), model)
    held = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert sorted(held) == sorted(id(p) for p in model.parameters())
    first = {id(p) for p in optimizer.param_groups[0]["params"]}
    assert first == {id(p) for p in model.conv1.parameters()}
    for name, parameter in model.named_parameters():
        if name in before and parameter.shape == shapes[name]:
            assert all(torch.equal(value, before[name][key]) for key, value in optimizer.state[parameter].items()), name
        elif name in before:
            overlap = tuple(slice(0, n) for n in shapes[name])
            if edit == "kernel":
                overlap = (slice(None), slice(None), slice(1, 4), slice(1, 4))
            assert torch.equal(optimizer.state[parameter]["exp_avg"][overlap], before[name]["exp_avg"]), name
    losses = [advance(model, optimizer, step) for step in range(3)]
    scheduler.step()
    assert all(torch.isfinite(torch.tensor(losses))) and optimizer.param_groups[0]["lr"] == 5e-5


@pytest.mark.parametrize("kind", ["module", "dict"])
@pytest.mark.parametrize("edit", EDITS)
def test_the_average_follows(edit: str, kind: str) -> None:
    model, optimizer = trained()
    average = AveragedModel(model) if kind == "module" else {name: p.detach().clone() for name, p in model.named_parameters()}
    with ee.transaction(model, optimizer, ema=average):
        assert EDITS[edit](surgeon(), model)
    tensors = dict(average.module.named_parameters()) if isinstance(average, AveragedModel) else average
    assert {name: t.shape for name, t in tensors.items()} == {name: p.shape for name, p in model.named_parameters()}
    assert all(torch.allclose(tensors[name], p, rtol=0, atol=1e-9) for name, p in model.named_parameters())  # it averages this one model
    if isinstance(average, AveragedModel):
        advance(model, optimizer, 5)
        average.update_parameters(model)
        assert average(images()).shape == (2, 6)


def test_an_edit_that_fails_leaves_the_average_alone() -> None:
    model, optimizer = trained()
    average = AveragedModel(model)
    before = [(id(p), p.clone()) for p in average.parameters()]
    with ee.transaction(model, optimizer, ema=average):
        assert not surgeon().add_layer(model, "after_conv1", nn.Flatten(), preserve=False)
    assert all(id(p) == known and torch.equal(p, value) for p, (known, value) in zip(average.parameters(), before, strict=True))


@pytest.mark.parametrize("edit", EDITS)
def test_training_goes_on(edit: str) -> None:
    """The loss some steps after an edit is within the band of three networks that nothing happened to, or below it."""
    target = images(9).mean((2, 3)) @ torch.randn(3, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(4))

    def learn(seed: int, edit: str | None) -> float:
        model: nn.Module = net(seed).train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        loss = torch.zeros(())
        for step in range(60):
            if edit is not None and step == 30:
                with ee.transaction(model, optimizer):
                    assert EDITS[edit](surgeon(), model)
            optimizer.zero_grad()
            loss = _loss(model, target)
            loss.backward()
            optimizer.step()
        return float(loss.detach())

    untouched = [learn(seed, None) for seed in range(3)]
    spread = max(untouched) - min(untouched)
    assert learn(0, edit) <= max(untouched) + 2 * spread


def _loss(model: nn.Module, target: Tensor) -> Tensor:
    torch.manual_seed(0)  # of dropout
    return (model(images(9)) - target).square().mean()


def test_every_edit_can_follow_every_other() -> None:
    model, optimizer = trained()
    with ee.transaction(model, optimizer):
        for first, second in itertools.pairwise(["skip", "kernel", "widen", "add", "add_wider", "remove_folded"]):
            del first
            assert EDITS[second](surgeon(), model)
    advance(model, optimizer, 7)
