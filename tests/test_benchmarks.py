"""The GPU's benchmarks in a dry run: nothing is measured, but minutes on a GPU are few, and no case must fail there first."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent


@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU they are no dry run: `make bench-gpu`")
@pytest.mark.parametrize("path", sorted((ROOT / "benchmarks" / "gpu").glob("bench_*.py")), ids=lambda path: path.stem)
def test_gpu_benchmarks_run_dry(path: Path) -> None:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "TRITON_INTERPRET": "1", "ESPER_ELASTIC_BACKEND": "triton"}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", str(path)], env=environment, cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
