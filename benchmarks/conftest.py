"""Writes the figures of a run, with the hardware, the versions and the commit they belong to, to ``benchmarks/results/``."""

from __future__ import annotations

import json
import platform
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import harness
import pytest
import torch

RESULTS = Path(__file__).parent / "results"
sys.path.insert(0, str(RESULTS.parent / "gpu"))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--write-results", action="store_true", help="write benchmarks/results/<machine>.json and .md")


def pytest_sessionfinish(session: pytest.Session) -> None:
    if harness.figures and session.config.getoption("--write-results"):
        write(harness.figures, environment(), gpu_of(session))


def gpu_of(session: pytest.Session) -> str | None:
    """The name of the GPU, where it is what was measured."""
    on_gpu = any("gpu" in Path(argument).parts for argument in session.config.args)
    return torch.cuda.get_device_name() if on_gpu and torch.cuda.is_available() else None


def environment() -> dict[str, Any]:
    """What a figure depends on besides the code."""
    cpuinfo = Path("/proc/cpuinfo")
    model = re.search(r"model name\s*: (.*)", cpuinfo.read_text()) if cpuinfo.exists() else None
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True, cwd=RESULTS.parent, check=False)
    return {
        "cpu": model.group(1).strip() if model else platform.processor(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "commit": commit.stdout.strip() or "unknown",
    }


def write(figures: list[harness.Figure], machine: dict[str, Any], gpu: str | None) -> None:
    """The same figures as JSON and as a Markdown table, named after the machine."""
    RESULTS.mkdir(exist_ok=True)
    command, hardware = "make bench", f"{machine['cpu']}, {machine['threads']} threads"
    if gpu is not None:
        import triton

        machine |= {"gpu": gpu, "triton": triton.__version__, "cuda": torch.version.cuda}
        command, hardware = "make bench-gpu", f"{gpu}, triton {triton.__version__}, CUDA {torch.version.cuda}"
    name = re.sub(r"[^a-z0-9]+", "-", (gpu or f"{machine['cpu']} {machine['threads']} threads").lower()).strip("-")
    content = {"machine": machine, "figures": [figure._asdict() for figure in figures]}
    (RESULTS / f"{name}.json").write_text(json.dumps(content, indent=1) + "\n")
    lines = [f"{hardware}, Python {machine['python']}, torch {machine['torch']}, "]
    lines[0] += f"commit {machine['commit']}; `{command}`. Medians; both sides of a ratio interleaved in one process."
    lines += ["", "| what | measured | bar | met |", "| --- | ---: | ---: | --- |"]
    lines += [f"| {f.what} | {f.value:.3g} {f.unit} | {f.bound} | {'yes' if f.met else '**no**'} |" for f in figures]
    (RESULTS / f"{name}.md").write_text("\n".join(lines) + "\n")
