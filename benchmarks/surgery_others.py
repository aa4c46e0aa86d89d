"""The same change of a live ResNet-50 by others: what it takes, what the first step after it takes, and what becomes of the optimizer.

``python benchmarks/surgery_others.py`` writes ``results/surgery_others.md``. Torch-Pruning is measured where it is installed.
"""

from __future__ import annotations

import copy
import importlib
import importlib.util
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from conftest import environment
from torch import Tensor, nn

import esper_elastic as ee

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from zoo import BIG

ROUNDS = 5
PATH = "layer3.1.conv1"
WIDER, NARROWER = 320, 192


class Way(NamedTuple):
    """One way to make a change: ``change`` gives the model and the optimizer to go on with."""

    name: str
    change: Callable[[nn.Module, torch.optim.Optimizer, Tensor], tuple[nn.Module, torch.optim.Optimizer]]
    state: str


def ours(width: int) -> Callable[..., tuple[nn.Module, torch.optim.Optimizer]]:
    def change(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor) -> tuple[nn.Module, torch.optim.Optimizer]:
        with ee.transaction(model, optimizer, validate=False):
            assert ee.ModelSurgeon(x).modify_layer(model, PATH, {"out_channels": width})
        return model, optimizer

    return change


def rebuild(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor) -> tuple[nn.Module, torch.optim.Optimizer]:
    """By hand, as one does who knows the network: a new one with the three layers changed, weights copied, a new optimizer."""
    made = BIG["resnet50"].build()
    block: Any = made.get_submodule(PATH.rpartition(".")[0])
    old = block.conv1
    block.conv1 = nn.Conv2d(old.in_channels, WIDER, 1, bias=False)
    block.bn1 = nn.BatchNorm2d(WIDER)
    block.conv2 = nn.Conv2d(WIDER, block.conv2.out_channels, 3, padding=1, bias=False)
    with torch.no_grad():
        for (_, new), (_, kept) in zip(made.state_dict().items(), model.state_dict().items(), strict=True):
            new[tuple(slice(0, n) for n in kept.shape)] = kept
    return made, torch.optim.AdamW(made.parameters(), 1e-3)


def prune(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor) -> tuple[nn.Module, torch.optim.Optimizer]:
    pruning = importlib.import_module("torch_pruning")
    graph = pruning.DependencyGraph().build_dependency(model, example_inputs=x)
    conv = model.get_submodule(PATH)
    graph.get_pruning_group(conv, pruning.prune_conv_out_channels, idxs=list(range(NARROWER, 256))).prune()
    return model, torch.optim.AdamW(model.parameters(), 1e-3)


def main() -> None:
    torch.set_num_threads(2)
    ways = [Way("esper_elastic, wider", ours(WIDER), "kept"), Way("rebuild and copy by hand, wider", rebuild, "lost")]
    ways.append(Way("esper_elastic, narrower", ours(NARROWER), "kept"))
    if importlib.util.find_spec("torch_pruning"):
        ways.append(Way("Torch-Pruning, narrower (it only shrinks)", prune, "lost: parameters are new objects"))
    lines = [
        "# Changing a live ResNet-50: this package and others",
        "",
        f"`{PATH}` (256 channels) made {WIDER} or {NARROWER} channels wide, in a network of 25.6 million parameters with AdamW "
        f"that has state; medians of {ROUNDS}. " + ", ".join(f"{key}: {value}" for key, value in environment().items()) + ".",
        "",
        "| way | change, ms | first step after it, ms | optimizer state |",
        "| --- | ---: | ---: | --- |",
    ]
    for way in ways:
        change, step = measure(way)
        lines.append(f"| {way.name} | {change:.0f} | {step:.0f} | {way.state} |")
    lines.append("| NVIDIA Model-Optimizer | not measured: it is not installed here | | |")
    lines += ["", "What a change that fails costs:", "", "| way | ms |", "| --- | ---: |", *undoing()]
    target = Path(__file__).parent / "results" / "surgery_others.md"
    target.write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


def trained() -> tuple[nn.Module, torch.optim.Optimizer, Tensor]:
    torch.manual_seed(0)
    model, x = BIG["resnet50"].build(), torch.randn(2, 3, 64, 64)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    for _ in range(2):
        advance(model, optimizer, x)
    return model, optimizer, x


def advance(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor) -> None:
    optimizer.zero_grad()
    model(x).square().mean().backward()
    optimizer.step()


def measure(way: Way) -> tuple[float, float]:
    """Milliseconds of the change and of the step after it; the first round, which imports things, is left out."""
    changes, steps = [], []
    for _ in range(ROUNDS + 1):
        model, optimizer, x = trained()
        start = time.perf_counter()
        model, optimizer = way.change(model, optimizer, x)
        middle = time.perf_counter()
        advance(model, optimizer, x)
        changes.append(middle - start)
        steps.append(time.perf_counter() - middle)
    return 1e3 * statistics.median(changes[1:]), 1e3 * statistics.median(steps[1:])


def undoing() -> list[str]:
    model, optimizer, _ = trained()

    def transaction() -> None:
        try:
            with ee.transaction(model, optimizer, validate=False):
                raise KeyboardInterrupt
        except KeyboardInterrupt:
            pass

    def copies() -> None:
        copy.deepcopy((model, optimizer))

    rows = []
    for name, function in (
        ("esper_elastic: references noted and put back", transaction),
        ("`copy.deepcopy` of model and optimizer", copies),
    ):
        function()
        taken = []
        for _ in range(ROUNDS):
            start = time.perf_counter()
            function()
            taken.append(time.perf_counter() - start)
        rows.append(f"| {name} | {1e3 * statistics.median(taken):.0f} |")
    return rows


if __name__ == "__main__":
    main()
