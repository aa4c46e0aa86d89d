"""The GPU's benchmarks in a dry run: nothing is measured, but minutes on a GPU are few, and no case must fail there first."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
CASES = sorted((ROOT / "benchmarks" / "gpu").glob("bench_*.py"))
LONG = ("bench_memory", "bench_models")  # whole models in the interpreter


@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU they are no dry run: `make bench-gpu`")
@pytest.mark.parametrize(
    "path", [pytest.param(path, marks=[pytest.mark.slow] if path.stem in LONG else [], id=path.stem) for path in CASES]
)
def test_gpu_benchmarks_run_dry(path: Path) -> None:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "TRITON_INTERPRET": "1", "ESPER_ELASTIC_BACKEND": "triton"}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", str(path)], env=environment, cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
