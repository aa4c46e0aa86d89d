"""Compiles, on a machine without a GPU, what launchers would launch on one; test_triton_aot.py runs it.

``python tests/aot.py ARCH MODULE``: MODULE's ``ahead_of_time_cases()`` yields ``(name, call)``; each call runs launchers on CPU tensors.
Nothing is launched: kernels are compiled for ``sm_ARCH`` and described, one JSON line each.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from esper_elastic.triton_kernels import launch

MULTIPROCESSORS = 132


class Driver:
    """A driver for a GPU that is not there."""

    def __init__(self, arch: int) -> None:
        self.target = GPUTarget("cuda", arch, 32)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    @staticmethod
    def is_active() -> bool:
        return True


def describe(kernel: Any) -> dict[str, Any]:
    """What the compiler made of a kernel: registers, bytes spilled to local memory, shared memory, and which units it uses."""
    cuobjdump = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage = subprocess.run([cuobjdump, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    figures = {name.lower(): int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    ptx = kernel.asm["ptx"]
    open(f"/tmp/w/conv_ptx/{kernel.metadata.hash[:8]}.ptx","w").write(ptx); open(f"/tmp/w/conv_ptx/{kernel.metadata.hash[:8]}.ttgir","w").write(kernel.asm["ttgir"])
    open(f"/tmp/w/conv.{kernel.metadata.hash[:8]}.ptx","w").write(ptx)
    return figures | {
        "shared": kernel.metadata.shared,
        "h": kernel.metadata.hash[:8], "vec": [ptx.count("cp.async.cg.shared.global"), ptx.count("cp.async.ca.shared.global"), len(re.findall(r"ld.global.b16", ptx))], "warps": kernel.metadata.num_warps,
        "wgmma": "wgmma" in ptx,
        "tma": "cp.async.bulk.tensor" in ptx,
    }


def main(arch: int, module: str) -> None:
    driver.set_active(Driver(arch))
    launch.num_programs = lambda device: MULTIPROCESSORS
    launch.has_copy_engine = lambda device: arch >= 90
    import time; t0=[time.time()]
    run = JITFunction.run
    case = ""

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        print(json.dumps({"case": case, "kernel": self.__name__.strip("_"), "t": round(time.time()-t0[0],1)} | describe(kernel)), flush=True)
        return kernel

    JITFunction.run = compile_only
    torch.manual_seed(0)
    for case, call in importlib.import_module(module).ahead_of_time_cases():  # noqa: B007 (compile_only reads the case)
        call()


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
