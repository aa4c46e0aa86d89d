"""Times a candidate against a baseline: one process, interleaved, medians, after a check that refuses to time a wrong result.

A case calls :func:`ratio` or :func:`cost` and then :func:`bar`, which notes the figure for the table and fails when the bar is missed.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch


class Figure(NamedTuple):
    """One line of the table."""

    what: str
    value: float
    unit: str
    bound: str
    met: bool


figures: list[Figure] = []


def interleaved(functions: Sequence[Callable[[], Any]], rounds: int, calls: int = 1) -> list[list[float]]:
    """Seconds per call of each function, ``rounds`` of each, taken in turn; the order alternates so that neither always runs first."""
    seconds: list[list[float]] = [[] for _ in functions]
    order = list(range(len(functions)))
    for _ in range(rounds):
        for index in order:
            function = functions[index]
            start = time.perf_counter()
            for _ in range(calls):
                function()
            seconds[index].append((time.perf_counter() - start) / calls)
        order.reverse()
    return seconds


def ratio(
    benchmark: Any, candidate: Callable[[], Any], baseline: Callable[[], Any], check: Callable[[], None], rounds: int = 31, calls: int = 1
) -> float:
    """Time of ``candidate`` over time of ``baseline``: the median over rounds of the ratio of neighbours."""
    check()
    interleaved([candidate, baseline], 3, calls)
    ours, theirs = interleaved([candidate, baseline], rounds, calls)
    value = statistics.median(a / b for a, b in zip(ours, theirs, strict=True))
    benchmark.extra_info.update(ratio=value, candidate=statistics.median(ours), baseline=statistics.median(theirs))
    benchmark.pedantic(candidate, rounds=3, iterations=calls)
    return value


def cost(benchmark: Any, function: Callable[[], Any], check: Callable[[], None], rounds: int = 31, calls: int = 1) -> float:
    """Microseconds per call of ``function``: the median over rounds."""
    check()
    interleaved([function], 3, calls)
    value = statistics.median(interleaved([function], rounds, calls)[0]) * 1e6
    benchmark.extra_info.update(microseconds=value)
    benchmark.pedantic(function, rounds=3, iterations=calls)
    return value


def bar(what: str, value: float, unit: str, *, at_most: float | None = None, at_least: float | None = None) -> None:
    """Note a figure, and fail if it misses its bar."""
    met = (at_most is None or value <= at_most) and (at_least is None or value >= at_least)
    bound = f"<= {at_most:g}" if at_most is not None else f">= {at_least:g}"
    figures.append(Figure(what, value, unit, bound, met))
    if os.environ.get("TRITON_INTERPRET") == "1":
        return  # a dry run of the GPU's cases: nothing was measured
    assert met, f"{what}: {value:.3f} {unit}, bar {bound}"


def training_step(module: torch.nn.Module, input: torch.Tensor) -> Callable[[], None]:
    """One forward and backward with fresh gradients, input gradient included."""
    output = module(input)
    grad = torch.randn_like(output)

    def step() -> None:
        module.zero_grad()
        input.grad = None
        module(input).backward(grad)

    return step
