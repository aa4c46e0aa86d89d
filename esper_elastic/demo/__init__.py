"""The main job: a network on real images whose capacity is turned while it trains, beside two plain networks of fixed size.

Owns the order of things: data, three trainings, tables, picture, export. ``rich`` and ``matplotlib`` are needed here and nowhere else in
the package; importing this module is free of them.
"""

from __future__ import annotations

import importlib
import json
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ..datasets import ImageData, load
from ..errors import ElasticError
from .data import Images
from .train import LARGE, SMALL, Settings, train_baseline, train_grown

if TYPE_CHECKING:
    from rich.console import Console

    from .report import SeedResult

__all__ = ["Options", "Settings", "run"]


@dataclass(frozen=True)
class Options:
    """What the command line chooses."""

    out: Path = Path("runs/demo")
    seeds: int = 1
    first_seed: int = 0
    device: str = "auto"
    settings: Settings = field(default_factory=Settings)


def run(options: Options, data: ImageData | None = None) -> list[SeedResult]:
    """Run the demo and return the runs of every seed.

    Args:
        options: what to run and where to write.
        data: images to use; those of :func:`esper_elastic.datasets.load` by default.

    Effects: prints to stdout; writes ``demo.png``, ``demo.json`` and ``exported.pt`` into ``options.out``.

    Raises:
        ElasticError: rich or matplotlib is missing, no images can be had, or a check of the demo fails.
    """
    _require("rich", "matplotlib")
    from rich.console import Console

    from . import picture, report

    began = time.perf_counter()
    console = Console() if sys.stdout.isatty() else Console(width=140)  # a pipe has no width, and 80 columns cut the tables
    data = data or load()
    device = torch.device(options.device if options.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu")
    images = Images(data, device)
    console.print(
        f"{data.name} ({data.source}): {len(data.train_labels):,} + {len(data.test_labels):,} images, on {device}.", highlight=False
    )
    if data.caveat:
        console.print(f"Note: {data.caveat}", style="bold yellow", highlight=False)
    results = [_one_seed(seed, images, options, console) for seed in range(options.first_seed, options.first_seed + options.seeds)]
    first = results[0]
    console.print(report.runs_table(results))
    path = options.out / "demo.png"
    shown = min(options.settings.evaluation_images, len(data.test_labels))
    note = f"lines: the first {shown:,} test images; numbers: all {len(data.test_labels):,}; seed {first.seed}"
    picture.draw(path, first.grown, first.small, first.large, data_name=data.name, steps=options.settings.steps, note=note)
    numbers = options.out / "demo.json"
    numbers.write_text(json.dumps(report.as_json(results, data), indent=1) + "\n")
    console.print(f"Picture: {path}   numbers: {numbers}   {time.perf_counter() - began:.0f} s in all.", highlight=False, soft_wrap=True)
    return results


def _one_seed(seed: int, images: Images, options: Options, console: Console) -> SeedResult:
    """Train the three networks of one seed, and show what the grown one can do afterwards."""
    from . import live, report

    settings = options.settings
    runs = {}
    for label, widths in (("small", SMALL), ("large", LARGE)):
        with live.watching(console, f"{label}: {widths}, plain modules, seed {seed}") as watch:
            runs[label] = train_baseline(label, widths, images, settings, seed, watch)
    with live.watching(console, f"grown: elastic layers, {SMALL} at first, seed {seed}") as watch:
        grown, dial = train_grown("grown", images, settings, seed, watch)
    console.print(report.widths_table(report.measure_widths(dial, images)))
    path = options.out / "exported.pt"
    difference = report.check_export(dial, images, path)
    console.print(
        f"Exported to plain modules, saved to {path}, reloaded into a fresh network: outputs equal bit for bit "
        f"(to the elastic network's within {difference:.1g}).",
        highlight=False,
        soft_wrap=True,
    )
    return report.SeedResult(seed, runs["small"], runs["large"], grown)


def _require(*packages: str) -> None:
    """Import what the demo shows its results with.

    Raises:
        ElasticError: one is missing; the message names the extra that brings it.
    """
    for package in packages:
        try:
            importlib.import_module(package)
        except ImportError as missing:
            raise ElasticError(
                f"demo: {package}: expected it to be installed, got {missing}. pip install 'esper-elastic[demo]'"
            ) from missing
