"""Pruning what contributes least: a trained network loses units, a few at a time, while it trains on; their scores say which.

Run ``make example-prune``. Scores are first-order Taylor terms of the gradients that training makes anyway.
"""

from __future__ import annotations

import copy
import shutil

import common
import torch
from networks import LARGE, STEPS, network, train

import esper_elastic as ee
from esper_elastic.training import Governor, PruneLeast, Safety, When

#: Steps of training on, as a share of those before; the network is pruned in their first half.
MORE = 0.6
#: The share of the units that stays, in how many prunings.
UNTIL, PRUNINGS = 0.62, 8


def main() -> None:
    given = common.arguments("pruning what contributes least", "prune")
    steps = given.steps or STEPS
    more = max(20, round(MORE * steps))
    data = common.Data()
    example = torch.zeros(1, 1, 28, 28)
    pairs, shares = [], []
    for seed in range(given.seeds):
        torch.manual_seed(seed)
        model = ee.elasticize(network(LARGE), torch.zeros(2, 1, 28, 28))
        train("trained", model, data, seed, steps)
        before = ee.summary(model, example).active_multiply_adds
        assert before is not None
        untouched = train("trained on, not pruned", copy.deepcopy(model), data, seed + 100, more, rate=0.005)
        directory = given.out if seed == 0 else None
        if directory is not None:
            shutil.rmtree(directory, ignore_errors=True)
        every = max(2, more // (2 * PRUNINGS))
        policy = When(PruneLeast((1 - UNTIL) / PRUNINGS, every=every, until=UNTIL), last=more // 2 + every)
        pruned = train(
            "pruned while it trains on",
            model,
            data,
            seed + 100,
            more,
            rate=0.005,
            sources=[policy],
            safety=Safety(minimum_width=2),
            governor=Governor(),
            directory=directory,
        )
        after = ee.summary(model, example).active_multiply_adds
        assert after is not None
        shares.append(1 - after / before)
        pairs.append((untouched, pruned))
    untouched_runs, pruned_runs = zip(*pairs, strict=True)
    text = (
        f"{common.over(given.seeds)}: {sum(shares) / len(shares):.0%} of the multiply-adds are gone; "
        f"pruned {common.mean(pruned_runs):.2f} %, not pruned {common.mean(untouched_runs):.2f} %."
    )
    numbers = {
        "not pruned": [run.accuracy for run in untouched_runs],
        "pruned": [run.accuracy for run in pruned_runs],
        "multiply-adds gone": shares,
    }
    common.save(given.out, "A network that loses what contributes least", text, pairs[0], numbers)


if __name__ == "__main__":
    main()
