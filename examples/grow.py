"""Progressive growth: a network that starts at half its widths and grows when its loss stalls, beside one that is large from the start.

Run ``make example-grow``. Steps, batches and learning rates are the same; what growth saves is counted in multiply-adds, forward and
backward. The learning rate stays where it is until the network has long been at its full size: units that come when it falls learn little.
"""

from __future__ import annotations

import shutil

import common
import torch
from networks import network, train
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

import esper_elastic as ee
from esper_elastic.training import Governor, GrowOnPlateau, Safety, When

STEPS, RATE = 3000, 0.01
LARGE = (24, 48, 72)
#: The first step at which it may grow, and the steps between one growth and the next, as shares of all.
FIRST, BETWEEN = 0.2, 0.35
#: The shares of the steps after which the learning rate has risen, and begins to fall.
RISEN, FALLS = 0.05, 0.75


def steady(optimizer: Optimizer, steps: int) -> LRScheduler:
    """A learning rate that rises, stays, and falls to zero at the end."""
    return LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / (RISEN * steps), max(0.0, steps - step) / ((1 - FALLS) * steps)))


def main() -> None:
    given = common.arguments("progressive growth from a small network", "grow")
    steps = given.steps or STEPS
    data = common.Data()
    pairs = []
    for seed in range(given.seeds):
        torch.manual_seed(seed)
        large = train("large from the start", network(LARGE), data, seed, steps, RATE, steady)
        torch.manual_seed(seed)
        small = ee.elasticize(network(tuple(width // 2 for width in LARGE)), torch.zeros(2, 1, 28, 28), capacity=2.0)
        directory = given.out if seed == 0 else None
        if directory is not None:
            shutil.rmtree(directory, ignore_errors=True)
        policy = GrowOnPlateau(factor=1.5, window=max(2, steps // 55), min_improvement=0.08, parameters={"init": "split"})
        grown = train(
            "grown from half the widths",
            small,
            data,
            seed,
            steps,
            RATE,
            steady,
            sources=[When(policy, first=round(FIRST * steps))],
            safety=Safety(cooldown_steps=round(BETWEEN * steps)),
            governor=Governor(),
            directory=directory,
        )
        pairs.append((large, grown))
    large_runs, grown_runs = zip(*pairs, strict=True)
    share = common.mean(grown_runs, "multiply_adds") / common.mean(large_runs, "multiply_adds")
    text = (
        f"{common.over(given.seeds)}: grown {common.mean(grown_runs):.2f} %, large from the start {common.mean(large_runs):.2f} %, "
        f"at {share:.0%} of its multiply-adds in training."
    )
    numbers = {"large": [run.accuracy for run in large_runs], "grown": [run.accuracy for run in grown_runs], "multiply_adds": share}
    common.save(given.out, "A network that grows when its loss stalls", text, pairs[0], numbers)


if __name__ == "__main__":
    main()
