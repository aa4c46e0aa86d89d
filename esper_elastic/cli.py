"""The command line: ``esper-elastic demo`` and ``esper-elastic inspect``.

Owns arguments and exit codes; the work is elsewhere and imported on demand, so that ``--help`` needs no optional package.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from .errors import ElasticError


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code: 0, or 1 after an error that is printed in one line."""
    parser = argparse.ArgumentParser(prog="esper-elastic", description="Neural networks whose capacity is a dial.")
    commands = parser.add_subparsers(dest="command", required=True)
    _add_demo(commands.add_parser("demo", help="train on real images while capacity is turned, beside two plain networks"))
    _add_inspect(commands.add_parser("inspect", help="show what a training run did, as one HTML file and in short here"))
    chosen = parser.parse_args(arguments)
    try:
        return int(chosen.run(chosen))
    except ElasticError as error:
        print(f"esper-elastic: {error}", file=sys.stderr)
        return 1


def _add_demo(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--seeds", type=_positive, default=1, help="repeat over this many seeds and print the means (default: 1)")
    parser.add_argument("--seed", type=int, default=0, help="the first seed (default: 0)")
    parser.add_argument("--out", type=Path, default=Path("runs/demo"), help="folder for the picture, the numbers and the exported network")
    parser.add_argument("--steps", type=_positive, default=None, help="training steps of each network (default: the demo's own number)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: auto, which takes a GPU if there is one)")
    parser.set_defaults(run=_demo)


def _demo(chosen: argparse.Namespace) -> int:
    from . import demo

    settings = demo.Settings() if chosen.steps is None else demo.Settings(steps=chosen.steps)
    demo.run(demo.Options(out=chosen.out, seeds=chosen.seeds, first_seed=chosen.seed, device=chosen.device, settings=settings))
    return 0


def _add_inspect(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("directory", metavar="RUN", type=Path, help="the folder that the run wrote to, or its events.jsonl")
    parser.add_argument("--out", type=Path, metavar="FILE", default=None, help="the file to write (default: RUN/report.html)")
    parser.add_argument("--open", action="store_true", help="show it in a browser")
    parser.set_defaults(run=_inspect)


def _inspect(chosen: argparse.Namespace) -> int:
    from .training import report

    report.inspect_and_tell(chosen.directory, chosen.out, show=chosen.open)
    return 0


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"expected at least 1, got {number}")
    return number


if __name__ == "__main__":
    sys.exit(main())
