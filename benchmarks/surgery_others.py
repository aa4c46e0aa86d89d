"""The same change of a live ResNet-50 by others: what it takes, what the first step after it takes, and what becomes of the optimizer.

``python benchmarks/surgery_others.py`` writes ``results/surgery_others.md``. Torch-Pruning (``pip install torch-pruning``) and NVIDIA
Model-Optimizer (``pip install nvidia-modelopt``) are measured where they are installed.
"""

from __future__ import annotations

import copy
import functools
import importlib
import importlib.metadata
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


Trained = tuple[nn.Module, torch.optim.Optimizer]


class Way(NamedTuple):
    """One way to make a change.

    Attributes:
        name: what it is called in the table.
        change: gives the model and the optimizer to go on with.
        package: that it needs.
        prepare: what is done once for a model before it is trained, beside what is timed.
    """

    name: str
    change: Callable[[nn.Module, torch.optim.Optimizer, Tensor], Trained]
    package: str = ""
    prepare: Callable[[nn.Module, Tensor], nn.Module] | None = None


def ours(width: int) -> Callable[..., Trained]:
    def change(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor) -> Trained:
        with ee.transaction(model, optimizer, validate=False):
            assert ee.ModelSurgeon(x).modify_layer(model, PATH, {"out_channels": width})
        return model, optimizer

    return change


def resize(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor) -> Trained:
    ee.dims(model)[PATH].resize(NARROWER)
    return model, optimizer


def rebuild(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor) -> Trained:
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


def prune(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor) -> Trained:
    pruning = importlib.import_module("torch_pruning")
    graph = pruning.DependencyGraph().build_dependency(model, example_inputs=x)
    conv = model.get_submodule(PATH)
    graph.get_pruning_group(conv, pruning.prune_conv_out_channels, idxs=list(range(NARROWER, 256))).prune()
    return model, optimizer


def searchable(model: nn.Module, x: Tensor) -> nn.Module:
    made: nn.Module = importlib.import_module("modelopt.torch.nas").convert(model, mode="fastnas")
    return made


def select(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor) -> Trained:
    importlib.import_module("modelopt.torch.nas").select(model, {f"{PATH}.out_channels": NARROWER}, strict=False)
    return model, optimizer


def convert_and_export(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor) -> Trained:
    made, _ = select(searchable(model, x), optimizer, x)
    return importlib.import_module("modelopt.torch.nas").export(made), optimizer


WAYS = (
    Way("esper_elastic, surgery: wider", ours(WIDER)),
    Way("a new model and its weights copied, by hand: wider", rebuild),
    Way("esper_elastic, surgery: narrower", ours(NARROWER)),
    Way("Torch-Pruning: narrower (it only shrinks)", prune, "torch_pruning"),
    Way("NVIDIA Model-Optimizer, convert, select, export: narrower (it only shrinks)", convert_and_export, "modelopt"),
    Way("esper_elastic, a model that is elastic: narrower", resize, prepare=ee.elasticize),
    Way("NVIDIA Model-Optimizer, select in a model that is converted: narrower", select, "modelopt", searchable),
)


def main() -> None:
    torch.set_num_threads(2)
    versions = {name: version for name in ("torch-pruning", "nvidia-modelopt") if (version := version_of(name))}
    lines = [
        "# Changing a live ResNet-50: this package and others",
        "",
        f"`{PATH}` (256 channels) made {WIDER} or {NARROWER} channels wide, in a network of 25.6 million parameters with AdamW "
        f"that has state; medians of {ROUNDS}. " + ", ".join(f"{key}: {value}" for key, value in (environment() | versions).items()) + ".",
        "`python benchmarks/surgery_others.py`.",
        "",
        "| way | change, ms | first step after it, ms | parameters that the optimizer steps and has state of |",
        "| --- | ---: | ---: | ---: |",
    ]
    for way in WAYS:
        if way.package and not importlib.util.find_spec(way.package):
            lines.append(f"| {way.name} | not measured: {way.package} is not installed | | |")
            continue
        change, step, kept, count = measure(way)
        lines.append(f"| {way.name} | {change:{'.0f' if change >= 100 else '.3g'}} | {step:.0f} | {kept} of {count} |")
    lines += ["", "Parameters that the optimizer does not step stay as they are until one is made anew, whose state is empty."]
    lines += ["", "What a change that fails costs:", "", "| way | ms |", "| --- | ---: |", *undoing()]
    target = Path(__file__).parent / "results" / "surgery_others.md"
    target.write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


def version_of(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def trained(prepare: Callable[[nn.Module, Tensor], nn.Module] | None = None) -> tuple[nn.Module, torch.optim.Optimizer, Tensor]:
    torch.manual_seed(0)
    model, x = BIG["resnet50"].build(), torch.randn(2, 3, 64, 64)
    if prepare is not None:
        model = prepare(model, x)
    optimizer = (ee.optim if prepare is ee.elasticize else torch.optim).AdamW(model.parameters(), 1e-3)
    for _ in range(2):
        advance(model, optimizer, x)
    return model, optimizer, x


def advance(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor) -> None:
    optimizer.zero_grad()
    model(x).square().mean().backward()
    optimizer.step()


def measure(way: Way) -> tuple[float, float, int, int]:
    """Milliseconds of the change and of the step after it; how many parameters the optimizer steps and has state of then, and of how many.

    The first round, which imports things, is left out.
    """
    changes, steps = [], []
    for _ in range(ROUNDS + 1):
        model, optimizer, x = trained(way.prepare)
        start = time.perf_counter()
        model, optimizer = way.change(model, optimizer, x)
        middle = time.perf_counter()
        held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        kept = sum(id(parameter) in held and bool(optimizer.state.get(parameter)) for parameter in model.parameters())
        steps.append(elapsed(functools.partial(advance, model, optimizer, x)))
        changes.append(middle - start)
    return 1e3 * statistics.median(changes[1:]), 1e3 * statistics.median(steps[1:]), kept, len(list(model.parameters()))


def elapsed(function: Callable[[], Any]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


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
        rows.append(f"| {name} | {1e3 * statistics.median(elapsed(function) for _ in range(ROUNDS)):.3g} |")
    return rows


if __name__ == "__main__":
    main()
