"""Times GPU work: every candidate is captured in a CUDA graph, and the graphs are replayed in turn between events.

Without a GPU there is a dry run: tiny sizes, the interpreter, no figures; it shows that the cases themselves are right.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

DRY = not torch.cuda.is_available()
if DRY:
    os.environ.setdefault("TRITON_INTERPRET", "1")
    os.environ.setdefault("ESPER_ELASTIC_BACKEND", "triton")
DEVICE = torch.device("cpu" if DRY else "cuda")
ROUNDS = 1 if DRY else 25


def sized(real: int, tiny: int) -> int:
    """A size on the GPU, and in a dry run."""
    return tiny if DRY else real


def captured(function: Callable[[], Any], calls: int = 1, warm: int = 3) -> Callable[[], Any]:
    """``calls`` calls of ``function`` as one graph replay."""
    if DRY:
        return function
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(warm):
            function()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(calls):
            function()
    return graph.replay


def seconds(functions: Sequence[Callable[[], Any]], rounds: int = ROUNDS) -> list[float]:
    """The median device time of each function, all taken in turn; the order alternates."""
    taken: list[list[float]] = [[] for _ in functions]
    order = list(range(len(functions)))
    for function in functions:
        function()
    for _ in range(rounds):
        for index in order:
            taken[index].append(_seconds(functions[index]))
        order.reverse()
    return [statistics.median(times) for times in taken]


def _seconds(function: Callable[[], Any]) -> float:
    if DRY:
        start = time.perf_counter()
        function()
        return time.perf_counter() - start
    start_event, end_event = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start_event.record()
    function()
    end_event.record()
    end_event.synchronize()
    return start_event.elapsed_time(end_event) / 1e3


def speed(candidate: Callable[[], Any], baseline: Callable[[], Any], calls: int = 4) -> float:
    """How many times as fast as ``baseline`` the candidate is, both as graphs of ``calls`` calls."""
    ours, theirs = seconds([captured(candidate, calls), captured(baseline, calls)])
    return theirs / ours


def host_microseconds(function: Callable[[], Any], calls: int = 200) -> float:
    """The median time that the host spends in a call, which waits for nothing."""
    times = []
    for _ in range(3 if DRY else calls):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    if not DRY:
        torch.cuda.synchronize()
    return statistics.median(times) * 1e6


def copy_bandwidth() -> float:
    """Bytes per second, read and written, of a large device-to-device copy: the ceiling of what only moves memory."""
    source = torch.empty(sized(1 << 30, 1 << 10), dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    return 2 * source.numel() / seconds([captured(lambda: target.copy_(source))])[0]
