"""Edits of a live ResNet-50 with AdamW: what they take, alone and with the whole model validated, and what a rollback takes."""

from __future__ import annotations

import random
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from harness import bar
from torch import nn

import esper_elastic as ee

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from zoo import BIG

Edit = Callable[[ee.ModelSurgeon, nn.Module, random.Random], ee.SurgeryResult]
ROUNDS = 6


def block(chance: random.Random) -> str:
    """A bottleneck that no edit here removes."""
    return f"layer{chance.choice([1, 2, 3])}.{chance.choice([0, 1])}"


EDITS: dict[str, Edit] = {
    "a convolution added": lambda s, m, c: s.add_layer(m, f"after_{(path := block(c))}.bn2", square(m.get_submodule(f"{path}.conv3"))),
    "an activation added": lambda s, m, c: s.add_layer(m, f"after_{block(c)}", nn.GELU()),
    "a wider convolution added": lambda s, m, c: s.add_layer(m, f"after_{(path := block(c))}.bn1", wider(m.get_submodule(f"{path}.conv2"))),
    "a batch norm removed": lambda s, m, c: s.remove_layer(m, next(p for p, k in m.named_modules() if p.endswith(".bn3"))),
    "a block removed": lambda s, m, c: s.remove_layer(
        m, next(p for p in ("layer3.5", "layer3.4", "layer3.3", "layer2.3", "layer2.2", "layer1.2") if has(m, p))
    ),
    "a kernel enlarged": lambda s, m, c: s.modify_layer(
        m, f"{(p := block(c))}.conv2", {"kernel_size": m.get_submodule(f"{p}.conv2").kernel_size[0] + 2}
    ),
    "a bottleneck widened": lambda s, m, c: s.modify_layer(
        m, f"{(p := block(c))}.conv2", {"out_channels": m.get_submodule(f"{p}.conv2").out_channels + 16}
    ),
    "a skip within a block": lambda s, m, c: s.add_skip_connection(m, f"{(p := block(c))}.conv1", f"{p}.conv3"),
    "a skip between stages": lambda s, m, c: s.add_skip_connection(m, "layer1", f"layer{c.choice([2, 3])}"),
}


def whole(surgeon: ee.ModelSurgeon, model: nn.Module, chance: random.Random) -> ee.SurgeryResult:
    """A width that reaches from the second stage to the fourth."""
    conv: Any = model.get_submodule("layer3.0.conv3")
    return surgeon.modify_layer(model, "layer3.0.conv3", {"out_channels": conv.out_channels + 16})


def has(model: nn.Module, path: str) -> bool:
    return path in dict(model.named_modules())


def square(behind: Any) -> nn.Module:
    """A convolution that gives what it takes, before ``behind``."""
    return nn.Conv2d(behind.in_channels, behind.in_channels, 3, padding=1)


def wider(behind: Any) -> nn.Module:
    return nn.Conv2d(behind.in_channels, behind.in_channels + 32, 1)


def trained() -> tuple[nn.Module, torch.optim.Optimizer, ee.ModelSurgeon]:
    """The network after one step, and a surgeon that has seen it."""
    torch.manual_seed(0)
    model, x = BIG["resnet50"].build(), torch.randn(2, 3, 64, 64)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    model(x).square().mean().backward()
    optimizer.step()
    surgeon = ee.ModelSurgeon(x)
    assert surgeon.plan_add_layer(model, "after_layer4", nn.ReLU())
    return model, optimizer, surgeon


def seconds(edit: Edit, validate: bool, chance: random.Random, known: tuple[nn.Module, torch.optim.Optimizer, ee.ModelSurgeon]) -> float:
    model, optimizer, surgeon = known
    start = time.perf_counter()
    if validate:
        with ee.transaction(model, optimizer, example_inputs=surgeon.example_inputs):
            result = edit(surgeon, model, chance)
    else:
        result = edit(surgeon, model, chance)
    took = time.perf_counter() - start
    assert result, result
    return took


@pytest.mark.parametrize("validate", [False, True], ids=["alone", "validated"])
def test_edits(benchmark: Any, validate: bool) -> None:
    chance, known, taken = random.Random(0), trained(), []
    edits = [edit for edit in EDITS.values() for _ in range(ROUNDS)]
    chance.shuffle(edits)
    for edit in edits:
        taken.append(seconds(edit, validate, chance, known))
    benchmark.pedantic(lambda: None, rounds=1)
    model, x = known[0], known[2].example_inputs
    assert model(x).isfinite().all()
    if not validate:
        bar(
            "an edit of a ResNet-50 with AdamW, median of 54 of nine kinds, tried on the module around it",
            1e3 * statistics.median(taken),
            "ms",
            at_most=100,
        )
    else:
        bar("the same in a transaction that validates the whole model, slowest of 54", max(taken), "s", at_most=1)


def test_the_width_of_a_stage(benchmark: Any) -> None:
    known = trained()
    taken = [seconds(whole, False, random.Random(0), known) for _ in range(5)]
    benchmark.pedantic(lambda: None, rounds=1)
    bar("the residual width of a ResNet-50's third stage, which all of its blocks follow, slowest of 5", max(taken), "s", at_most=1)


def test_rollback(benchmark: Any) -> None:
    """Of 252 million parameters, beginning included."""
    model = nn.Sequential(*[nn.Linear(4096, 4096) for _ in range(15)])

    def vain() -> None:
        try:
            with ee.transaction(model, validate=False):
                model[0] = nn.Identity()
                raise KeyboardInterrupt
        except KeyboardInterrupt:
            pass

    vain()
    taken = []
    for _ in range(9):
        start = time.perf_counter()
        vain()
        taken.append(time.perf_counter() - start)
    benchmark.pedantic(vain, rounds=3)
    assert isinstance(model[0], nn.Linear)
    bar(
        "a transaction on 252 million parameters that fails and is undone, nothing copied", 1e3 * statistics.median(taken), "ms", at_most=20
    )
