"""Every configuration of every Triton kernel, compiled for real GPUs on a machine that has none: what the compiler made of it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
SHARED_MEMORY = {80: 163 * 1024, 90: 227 * 1024}  # bytes that one block may have
MODULES = sorted(path.stem for path in HERE.glob("aot_*.py"))
COPY_ENGINE_KERNELS = {"product_kernel", "grad_weight_kernel"}
MATRIX_KERNELS = COPY_ENGINE_KERNELS | {"convolution_kernel", "convolution_grad_weight_kernel"}


@pytest.mark.aot
@pytest.mark.parametrize("module", MODULES)
@pytest.mark.parametrize("arch", [80, 90], ids="sm_{}".format)
def test_kernels_compile_without_spills_and_fit_the_chip(arch, module):
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(HERE.parent), str(HERE)])
    done = subprocess.run([sys.executable, HERE / "aot.py", str(arch), module], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    kernels = [json.loads(line) for line in done.stdout.splitlines()]
    assert kernels
    for kernel in kernels:
        assert kernel["stack"] == 0 and kernel["local"] == 0, f"spills: {kernel}"
        assert kernel["shared"] <= SHARED_MEMORY[arch], f"too much shared memory: {kernel}"
        if arch == 90 and kernel["kernel"] in MATRIX_KERNELS and "tf32 off" not in kernel["case"]:
            assert kernel["wgmma"], f"no wgmma: {kernel}"
        if arch == 90 and kernel["kernel"] in COPY_ENGINE_KERNELS and "tf32 off" not in kernel["case"]:
            assert kernel["tma"] == ("unaligned" not in kernel["case"]), f"copy engine: {kernel}"
