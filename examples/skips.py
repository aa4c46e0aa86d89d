"""Skips where gradients vanish: a deep plain network does not train, until a policy sees why and skips are added to the live model.

Run ``make example-skips``.
"""

from __future__ import annotations

import shutil

import common
import torch
from torch import nn
from torch.nn import functional as F

from esper_elastic.training import SkipVanishing, Trainer, TrainingState, When

STEPS, BATCH, RATE = 1200, 128, 1e-3
DEPTH, WIDTH = 40, 64
#: The share of the steps in which the plain network may try by itself.
ALONE = 0.3


def network() -> nn.Sequential:
    """A deep perceptron without norms or skips, as ``torch.nn`` initialises it."""
    body = [part for _ in range(DEPTH) for part in (nn.Linear(WIDTH, WIDTH), nn.ReLU())]
    return nn.Sequential(nn.Flatten(), nn.Linear(28 * 28, WIDTH), nn.ReLU(), nn.Sequential(*body), nn.Linear(WIDTH, 10))


#: From the output of each activation to that two layers on.
PAIRS = [(f"3.{index}", f"3.{index + 4}") for index in range(1, 2 * DEPTH - 4, 4)]


class Size:
    """A source that decides nothing, and notes how many parameters there are."""

    name = "size"

    def __init__(self, run: common.Run) -> None:
        self._run = run

    def decisions(self, state: TrainingState) -> tuple[()]:
        """None."""
        count = sum(parameter.numel() for parameter in state.model.parameters())
        if not self._run.sizes or self._run.sizes[-1][1] != count:
            self._run.sizes.append((state.step, count))
        return ()


def train(label: str, data: common.Data, seed: int, steps: int, policies: list[object], directory: object = None) -> common.Run:
    """One training of the deep network."""
    torch.manual_seed(seed)
    model, run = network(), common.Run(label)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE)
    trainer = Trainer(
        model,
        optimizer,
        F.cross_entropy,
        sources=[*policies, Size(run)],  # type: ignore[list-item]
        input_shape=(1, 28, 28),
        clip_norm=1.0,
        directory=directory,  # type: ignore[arg-type]
    )
    common.fit(trainer, run, data, seed, BATCH, steps, 24)
    print(f"seed {seed}  {label:<28} {run.accuracy:6.2f} %", flush=True)
    return run


def main() -> None:
    given = common.arguments("skips where gradients vanish", "skips")
    steps = given.steps or STEPS
    data = common.Data()
    pairs = []
    for seed in range(given.seeds):
        directory = given.out if seed == 0 else None
        if directory is not None:
            shutil.rmtree(directory, ignore_errors=True)
        plain = train("plain", data, seed, steps, [])
        policy = When(SkipVanishing(PAIRS, ratio=1e-2, patience=10, preserve=False), first=round(ALONE * steps))
        pairs.append((plain, train("skips added on the way", data, seed, steps, [policy], directory)))
    plain_runs, skip_runs = zip(*pairs, strict=True)
    text = f"{common.over(given.seeds)}: plain {common.mean(plain_runs):.2f} %, with skips added {common.mean(skip_runs):.2f} %."
    numbers = {"plain": [run.accuracy for run in plain_runs], "skips": [run.accuracy for run in skip_runs]}
    common.save(given.out, f"A plain network of {DEPTH + 2} layers that trains once skips are added", text, pairs[0], numbers)


if __name__ == "__main__":
    main()
