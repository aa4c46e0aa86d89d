"""Prints how much of each model of the tests' zoo is elastic, and why the rest is not; writes `results/coverage_models.md`.

Nothing is timed and nothing is random: two runs with the same versions write the same file. What is counted, and how the models are
checked where they are counted, is said in `tests/covering.py`.
"""

from __future__ import annotations

import platform
import sys
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))

from converting import built, inputs_of  # noqa: E402
from covering import Coverage, coverage_of  # noqa: E402
from zoo import BIG, MODELS  # noqa: E402

#: The least share, and the architectures that it is not asked of: recurrent layers stay rigid, and a graph network mixes nodes by index.
BAR = 0.9
EXEMPT = ("lstm", "graph_convolution", "graph_attention")

_SHOWN = 3


def main() -> int:
    torch.set_num_threads(1)
    measured: dict[str, Coverage] = {}
    for name, case in (MODELS | BIG).items():
        measured[name] = coverage_of(built(case), inputs_of(case), case.outputs)
        print("\n".join(lines_of(name, measured[name])), flush=True)
    missed = [name for name, coverage in measured.items() if name not in EXEMPT and coverage.share < BAR]
    versions = f"Python {platform.python_version()}, torch {torch.__version__}, transformers {version('transformers')}"
    table = [
        f"{versions}; `make coverage-models`. Of each model, in float64: its dims halved, each alone and then all of them; outputs equal",
        "to those of the exported model at every one of these widths. Elastic is a parameter of which an axis has halved then.",
        "",
        *markdown(measured),
    ]
    (ROOT / "benchmarks" / "results" / "coverage_models.md").write_text("\n".join(table) + "\n")
    for name in missed:
        print(f"{name}: {measured[name].share:.1%} of the parameters are elastic, bar {BAR:.0%}")
    return 1 if missed else 0


def lines_of(name: str, coverage: Coverage) -> list[str]:
    """One model, for people who watch: its share, then what is rigid."""
    (dims, reached), (total, elastic) = coverage.dims, coverage.elements
    lines = [f"{name:<24}{coverage.share:>8.2%}  {elastic:>11,} of {total:>11,} parameters, {reached} of {dims} dims halve"]
    return lines + [f"    {group.elements:,} rigid: {some(group.names)}: {group.reason}" for group in coverage.rigid]


def markdown(measured: dict[str, Coverage]) -> list[str]:
    """All models as a table."""
    lines = ["| model | parameters | elastic | dims that halve | rigid, and why |", "| --- | ---: | ---: | ---: | --- |"]
    for name, coverage in measured.items():
        why = "<br>".join(f"{group.elements:,}: {some(f'`{n}`' for n in group.names)}: {group.reason}" for group in coverage.rigid)
        (dims, reached), (total, _) = coverage.dims, coverage.elements
        lines.append(f"| {name} | {total:,} | {coverage.share:.2%} | {reached} of {dims} | {why.replace('|', chr(92) + '|')} |")
    return lines


def some(names: Iterable[str]) -> str:
    """The first names of many."""
    known = list(names)
    return ", ".join(known[:_SHOWN]) + (f" and {len(known) - _SHOWN} more" if len(known) > _SHOWN else "")


if __name__ == "__main__":
    sys.exit(main())
