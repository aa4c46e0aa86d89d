"""Times the configurations of the matrix kernels at the shapes of the benchmarks and prints the best: ``python benchmarks/gpu/tune.py``.

What it prints is to be written into ``CONFIGS`` of the kernel files by hand, with the chip and the date. A configuration that does not fit
the chip is left out. Without a GPU it runs dry.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from device import DEVICE, DRY, captured, seconds, sized

sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))
from kernels import Segment, widths

from esper_elastic.triton_kernels import conv2d_dense, conv2d_weight, linear
from esper_elastic.triton_kernels.conv2d import conv2d_forward, conv2d_grad_input, conv2d_grad_weight

HALF = torch.bfloat16
BLOCKS = (64, 128, 256)


def linear_cases() -> Iterator[tuple[str, Callable[[Any], Any], list[Any]]]:
    size, rows = sized(4096, 32), sized(8192, 16)
    x, grad = (torch.randn(rows, size, device=DEVICE, dtype=HALF) for _ in range(2))
    weight, bias = torch.randn(size, size, device=DEVICE, dtype=HALF), torch.randn(size, device=DEVICE, dtype=HALF)
    forward = [
        linear.Config(m, n, k, 8, warps, stages)
        for m, n, k, warps, stages in itertools.product(BLOCKS, BLOCKS, (64, 128), (4, 8), (3, 4))
        if 4096 * warps <= m * n <= 256 * 128
    ]
    backward = [c._replace(block_m=c.block_k, block_k=c.block_m) for c in forward]
    for active in (size // 4, size):
        at = widths([Segment(active, size)], [Segment(size, size)])
        where = at.control, at.slots, at.segments
        yield (
            f"linear forward, {active} outputs",
            lambda c, where=where: linear.linear_forward(x, weight, bias, *where, config=c),
            forward,
        )
        yield (
            f"linear grad_input, {active} outputs",
            lambda c, where=where: linear.linear_grad_input(grad, weight, *where, config=c),
            forward,
        )
        yield (
            f"linear grad_weight, {active} outputs",
            lambda c, where=where: linear.linear_grad_weight(grad, x, weight, bias, *where, config=c),
            backward,
        )


def conv2d_cases() -> Iterator[tuple[str, Callable[[Any], Any], list[Any]]]:
    channels, batch = sized(256, 16), sized(64, 1)
    products = list(itertools.product((64, 128, 256), (64, 128, 256), (32, 64), (4, 8), (3, 4)))
    forward = [conv2d_dense.Config(m, n, k, 16, 8, w, s) for m, n, k, w, s in products if 4096 * w <= m * n <= 256 * 128]
    backward = [conv2d_weight.WeightConfig(k, m, n, 8, w, s) for m, n, k, w, s in products if 4096 * w <= m * n <= 128 * 256]
    for side in (sized(56, 3), sized(14, 2)):
        x, grad = (
            torch.randn(batch, channels, side, side, device=DEVICE, dtype=HALF).to(memory_format=torch.channels_last) for _ in range(2)
        )
        weight = torch.randn(channels, channels, 3, 3, device=DEVICE, dtype=HALF).to(memory_format=torch.channels_last)
        for active in (channels // 2, channels):
            at = widths([Segment(active, channels)], [Segment(active, channels)])
            rest = at.control, at.slots, at.segments, (1, 1), (1, 1), (1, 1), False
            name = f"{side} x {side}, {active} channels"
            yield (
                f"conv2d forward, {name}",
                lambda c, x=x, w=weight, rest=rest: conv2d_forward(x, w, None, *rest, config=c),
                forward,
            )
            yield (
                f"conv2d grad_input, {name}",
                lambda c, g=grad, w=weight, rest=rest: conv2d_grad_input(g, w, tuple(g.shape), *rest, config=c),
                forward,
            )
            yield (
                f"conv2d grad_weight, {name}",
                lambda c, g=grad, x=x, w=weight, rest=rest: conv2d_grad_weight(g, x, w, None, *rest, config=c),
                backward,
            )


def tune(name: str, call: Callable[[Any], Any], configurations: list[Any]) -> None:
    """Print the five fastest configurations of a case."""
    timed, failed = [], 0
    for configuration in configurations[:1] if DRY else configurations:
        try:
            replay = captured(lambda c=configuration: call(c))
            timed.append((seconds([replay], rounds=5)[0], configuration))
        except Exception as error:  # out of shared memory or registers: the next one
            if DRY:
                raise
            failed += 1
            last = error
    for time, configuration in sorted(timed, key=lambda entry: entry[0])[:5]:
        print(f"{name}: {time * 1e6:8.1f} us  {configuration}", flush=True)
    if failed:
        print(f"{name}: {failed} configurations failed, the last with {type(last).__name__}: {str(last)[:120]}", flush=True)


if __name__ == "__main__":
    chosen = sys.argv[1:] or ["linear", "conv2d"]
    for cases in (linear_cases, conv2d_cases):
        if cases.__name__.removesuffix("_cases") in chosen:
            for case in cases():
                tune(*case)
