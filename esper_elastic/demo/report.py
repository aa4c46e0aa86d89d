"""The end of the demo: accuracy and latency at four widths from the same weights, the export that is checked, and the summary of all runs.

Owns measuring the finished networks and printing tables of them. ``rich`` is imported here and in ``live.py`` alone.

Shape legend: B batch.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from rich.table import Table
from torch import nn

import esper_elastic as ee

from ..datasets import ImageData
from ..errors import ElasticError
from .capacity import NARROW_SHARES, Dial
from .data import Images, accuracy, recalibrate
from .network import Widths, placed, plain_network
from .train import Run

LATENCY_BATCH = 64
LATENCY_ROUNDS = 30


@dataclass(frozen=True)
class WidthResult:
    """One width of the finished network."""

    share: float
    widths: Widths
    accuracy: float
    milliseconds: float


@dataclass(frozen=True)
class SeedResult:
    """The three runs of one seed."""

    seed: int
    small: Run
    large: Run
    grown: Run


def measure_widths(dial: Dial, images: Images) -> list[WidthResult]:
    """Accuracy on the whole test set and latency at full width and at each narrow share, from one set of weights.

    Effects: batch-norm statistics are measured anew for each narrow width and are the trained ones again at the end.

    Raises:
        ElasticError: the full width's outputs afterwards are not bit for bit those from before.
    """
    network = dial.network
    probe = images.prepare(images.test_images[:LATENCY_BATCH])
    trained = {name: buffer.clone() for name, buffer in network.named_buffers()}
    before = _outputs(network, probe)
    results = [WidthResult(1.0, dial.widths, accuracy(network, images), _latency(network, probe))]
    for share in NARROW_SHARES:
        with dial.narrowed(share):
            recalibrate(network, images)
            results.append(WidthResult(share, dial.widths, accuracy(network, images), _latency(network, probe)))
        for name, buffer in network.named_buffers():
            buffer.copy_(trained[name])
    if not torch.equal(before, _outputs(network, probe)):
        raise ElasticError("demo: back at full width: expected the same outputs bit for bit, got others. Report this.")
    return results


def check_export(dial: Dial, images: Images, path: Path) -> float:
    """Export to plain modules, save, reload into a fresh plain network, and compare; returns the largest difference to the elastic one.

    Effects: writes a plain ``state_dict`` to ``path``.

    Raises:
        ElasticError: the reloaded network does not compute exactly what the exported one does, or the elastic one does something else.
    """
    probe = images.prepare(images.test_images[:1000])
    plain = placed(ee.export(dial.network), images.device)
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(plain.state_dict(), path)
    reloaded = placed(plain_network(dial.widths), images.device)
    reloaded.load_state_dict(torch.load(path, map_location=images.device, weights_only=True))
    expected, exported, loaded = (_outputs(network, probe) for network in (dial.network, plain, reloaded))
    if not torch.equal(exported, loaded):
        raise ElasticError(f"demo: {path}: expected the exported network's outputs after reloading, got others. Report this.")
    difference = (expected - exported).abs().max().item()
    if not torch.allclose(expected, exported, rtol=1e-4, atol=1e-4):
        raise ElasticError(f"demo: ee.export: expected the elastic network's outputs, got others by up to {difference:.2g}. Report this.")
    return difference


def widths_table(results: Sequence[WidthResult]) -> Table:
    """Four widths from the same weights."""
    table = Table(title="Four widths from the same weights", title_justify="left", title_style="bold", header_style="bold")
    for heading in (
        "width",
        "channels",
        "test accuracy",
        f"latency, batch of {LATENCY_BATCH}",
        "active parameters",
        "multiply-adds per image",
    ):
        table.add_column(heading, justify="left" if heading == "channels" else "right")
    for result in results:
        table.add_row(
            f"{result.share:.0%}",
            str(result.widths),
            f"{result.accuracy:.2f} %",
            f"{result.milliseconds:.2f} ms",
            f"{result.widths.parameters():,}",
            f"{result.widths.multiply_adds():,}",
        )
    table.caption = "Batch-norm statistics were measured anew at each narrow width: 10 training batches, no weight changed."
    table.caption_justify = "left"
    return table


def runs_table(results: Sequence[SeedResult]) -> Table:
    """Accuracy and work of the three runs, one row per seed and network, then the means."""
    table = Table(title="Three networks, equal training steps", title_justify="left", title_style="bold", header_style="bold")
    for heading in ("seed", "network", "test accuracy", "multiply-adds in training", "of the large one", "training time"):
        table.add_column(heading, justify="left" if heading == "network" else "right")
    for result in results:
        for run in (result.small, result.grown, result.large):
            share = run.multiply_adds / result.large.multiply_adds
            percent = f"{run.final_accuracy:.2f} %"
            table.add_row(str(result.seed), run.label, percent, f"{run.multiply_adds / 1e12:.3f} T", f"{share:.0%}", f"{run.seconds:.1f} s")
        table.add_section()
    table.caption = verdict(results)
    table.caption_justify = "left"
    return table


def verdict(results: Sequence[SeedResult]) -> str:
    """The comparison in one sentence."""
    grown, large, small = (
        statistics.fmean(getattr(result, name).final_accuracy for result in results) for name in ("grown", "large", "small")
    )
    work = sum(result.grown.multiply_adds for result in results) / sum(result.large.multiply_adds for result in results)
    over = "one seed" if len(results) == 1 else f"mean of {len(results)} seeds"
    return (
        f"{over.capitalize()}: grown {grown:.2f} %, large {large:.2f} % ({grown - large:+.2f} points), small {small:.2f} %; "
        f"the grown one took {work:.0%} of the large one's multiply-adds."
    )


def as_json(results: Sequence[SeedResult], data: ImageData) -> dict[str, object]:
    """Every number of the demo, for other programs."""
    return {
        "data": {"name": data.name, "source": data.source},
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "verdict": verdict(results),
        "seeds": [
            {
                "seed": result.seed,
                **{run.label: _run_as_json(run) for run in (result.small, result.large, result.grown)},
            }
            for result in results
        ],
    }


def _run_as_json(run: Run) -> dict[str, object]:
    return {
        "accuracy": run.final_accuracy,
        "multiply_adds": run.multiply_adds,
        "seconds": run.seconds,
        "curve": run.curve,
        "sizes": run.sizes,
        "events": [asdict(event) for event in run.events],
    }


@torch.no_grad()
def _outputs(network: nn.Module, batch: torch.Tensor) -> torch.Tensor:
    """Logits in eval mode. Shape: ``(B, 1, 28, 28)`` to ``(B, 10)``."""
    network.eval()
    logits = network(batch)
    network.train()
    return logits


@torch.no_grad()
def _latency(network: nn.Module, batch: torch.Tensor) -> float:
    """Median milliseconds of a forward pass in eval mode."""
    network.eval()
    durations = []
    for _ in range(LATENCY_ROUNDS):
        start = time.perf_counter()
        network(batch)
        if batch.is_cuda:
            torch.cuda.synchronize(batch.device)
        durations.append((time.perf_counter() - start) * 1e3)
    network.train()
    return statistics.median(durations)
