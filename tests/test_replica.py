"""The control block on a device: in which order streams see a commit, and what a CUDA graph forbids. Streams are played by stand-ins.

What takes a real GPU is in test_gpu.py.
"""

from __future__ import annotations

import shutil
import subprocess
import sysconfig
import warnings
import weakref
from pathlib import Path

import pytest
import torch
from torch.utils import cpp_extension

import esper_elastic as ee
from esper_elastic.control import Replica
from esper_elastic.errors import GraphCaptureError

CUDA = torch.device("cuda", 0)
SOURCES = Path(__file__).parent.parent / "csrc"


class Stream:
    def __init__(self, machine: Machine, number: int) -> None:
        self.machine, self.number = machine, number

    def wait_stream(self, other: Stream) -> None:
        self.machine.log.append(f"{self.number} waits for {other.number}")


class Machine:
    """Stands in for torch.cuda: two streams, one of them current, and a note of what was asked of them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.log: list[str] = []
        self.streams = [Stream(self, number) for number in range(2)]
        self.current = 0
        self.capturing = False
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: self.capturing)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: self.streams[self.current])
        monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda index: self.current, raising=False)
        monkeypatch.setattr(Replica, "write_device", staticmethod(self.write))

    def write(self, target: torch.Tensor, source: torch.Tensor, begin: int, end: int) -> None:
        self.log.append(f"{self.current} writes {begin}:{end}")
        target.numpy()[begin:end] = source.numpy()[begin:end]  # as a kernel of ours does: torch sees no write


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    return Machine(monkeypatch)


def on_device(block: ee.control.ControlBlock) -> Replica:
    """Give ``block`` a replica that thinks it is on a GPU."""
    replica = block._replicas[CUDA] = Replica(block._host, torch.device("cpu"))
    replica.tensor = block._host.clone()
    replica._cuda = True
    return replica


def test_a_commit_writes_what_changed_and_nothing_waits_on_one_stream(machine: Machine) -> None:
    dim, other = ee.ElasticDim(4, 8), ee.ElasticDim(4, 8)
    layer = ee.ElasticLinear(4, 4, in_dim=dim, out_dim=other)
    replica = on_device(dim.block)
    version = replica.tensor._version
    replica.tensor._replica = weakref.ref(replica)
    Replica.of(dim.block.on(CUDA)).note_reader()
    dim.resize(6)
    with dim.block.batch():
        dim.resize(3)
        other.resize(2)
    slots = sorted((dim.slot, other.slot))
    assert machine.log == [f"0 writes {dim.slot}:{dim.slot + 1}", f"0 writes {slots[0]}:{slots[1] + 1}"]
    assert replica.tensor[[dim.slot, other.slot]].tolist() == [3, 2]
    assert replica.tensor._version > version
    assert layer.in_features == 3


def test_streams_that_read_come_before_a_commit_and_after_it(machine: Machine) -> None:
    dim = ee.ElasticDim(4, 8)
    replica = on_device(dim.block)
    replica.note_reader()
    machine.current = 1
    dim.resize(6)
    machine.current = 0
    dim.resize(5)
    write = f"writes {dim.slot}:{dim.slot + 1}"
    assert machine.log == ["1 waits for 0", f"1 {write}", "0 waits for 1", "0 waits for 1", f"0 {write}", "1 waits for 0"]


def test_a_commit_during_capture_is_refused_and_nothing_has_changed(machine: Machine) -> None:
    dim = ee.ElasticDim(4, 8)
    layer = ee.ElasticLinear(4, 4, in_dim=dim, out_dim=ee.ElasticDim(4))
    replica = on_device(dim.block)
    before = layer.weight.detach().clone(), dim.block.generation, replica.tensor.tolist()
    machine.capturing = True
    for change in (lambda: dim.resize(6), lambda: dim.grow(6), lambda: dim.keep([3, 1])):
        with pytest.raises(GraphCaptureError, match=r"cannot commit while a CUDA graph is being captured.*Change widths before"):
            change()
    assert dim.active == 4
    assert torch.equal(layer.weight, before[0])
    assert (dim.block.generation, replica.tensor.tolist()) == before[1:]
    machine.capturing = False
    dim.resize(6)
    assert replica.tensor[dim.slot] == 6


def test_graphs_that_lose_their_control_block_are_told(machine: Machine) -> None:
    dim = ee.ElasticDim(4, 8)
    replica = on_device(dim.block)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        replica.note_reader()
        replica.abandon()
    machine.capturing = True
    replica.note_reader()
    machine.capturing = False
    grow = [ee.ElasticDim(1) for _ in range(40)]
    with pytest.warns(UserWarning, match="CUDA graphs captured before follow no further width changes"):
        ee.control.ControlBlock.merge([dim.block, *(one.block for one in grow)])


@pytest.mark.aot
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not on PATH")
def test_cuda_sources_compile(tmp_path: Path) -> None:
    """Kernels for every chip that Triton serves; what calls them, against the headers of a CPU build of torch."""
    targets = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in (80, 90)]
    files = sorted((SOURCES / "cuda").glob("*.cu"))
    assert files
    for file in files:
        command = ["nvcc", "-std=c++20", "-O3", *targets, "-Werror", "all-warnings", f"-I{SOURCES}", "-c", file, "-o", tmp_path / "out.o"]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    includes = [SOURCES, *cpp_extension.include_paths("cpu"), sysconfig.get_path("include")]
    for file in sorted((SOURCES / "cuda").glob("*.cpp")):
        options = ["-std=c++20", "-DC10_CUDA_NO_CMAKE_CONFIGURE_FILE", "-Xcompiler", "-fsyntax-only", *(f"-I{path}" for path in includes)]
        done = subprocess.run(["nvcc", *options, "-c", file, "-o", tmp_path / "out.o"], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
