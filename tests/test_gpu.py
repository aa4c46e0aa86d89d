"""What takes a real GPU: captured graphs, streams, compiled models, and who serves what there. ``make test-gpu``."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from twins import CHANGES, Net, loss_of

import esper_elastic as ee
from esper_elastic.errors import GenerationError, GraphCaptureError

if not torch.cuda.is_available():
    pytest.skip("no NVIDIA GPU", allow_module_level=True)

pytestmark = pytest.mark.gpu
WIDTHS = (64, 40, 1, 63, 8, 64)


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch.manual_seed(0)
    yield
    torch._dynamo.reset()


def static_net() -> Net:
    net = Net().cuda()
    ee.set_layout(net, "static")
    return net


class CapturedStep:
    """A whole training step in one CUDA graph."""

    def __init__(self, net: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self.x, self.target = torch.randn(24, 32, device="cuda"), torch.randn(24, 16, device="cuda")
        self.net, self.optimizer = net, optimizer
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                self._step()
        torch.cuda.current_stream().wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        optimizer.zero_grad(set_to_none=True)
        with torch.cuda.graph(self.graph):
            self.loss = self._step(zero=False)

    def _step(self, zero: bool = True) -> Tensor:
        if zero:
            self.optimizer.zero_grad(set_to_none=True)
        loss = loss_of(self.net, self.x, self.target)
        loss.backward()
        self.optimizer.step()
        return loss

    def __call__(self, x: Tensor, target: Tensor) -> Tensor:
        self.x.copy_(x)
        self.target.copy_(target)
        self.graph.replay()
        return self.loss.clone()


OPTIMIZERS: dict[str, Callable[[nn.Module], torch.optim.Optimizer]] = {
    "AdamW": lambda net: ee.optim.AdamW(net.parameters(), lr=torch.tensor(1e-2, device="cuda")),
    "SGD": lambda net: ee.optim.SGD(net.parameters(), lr=1e-2, momentum=0.9),
}


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_a_captured_training_step_follows_widths_switches_and_keep(kind: str) -> None:
    """Replay by replay against a compact twin on the CPU that takes the same steps and changes."""
    net = static_net()
    optimizer = OPTIMIZERS[kind](net)
    step = CapturedStep(net, optimizer)
    twin = copy.deepcopy(net).cpu()
    ee.set_layout(twin, "compact")
    twin_optimizer = OPTIMIZERS[kind](twin) if kind == "SGD" else ee.optim.AdamW(twin.parameters(), lr=1e-2)
    state = optimizer.state_dict()
    if kind == "AdamW":
        state["param_groups"][0]["lr"] = 1e-2
    twin_optimizer.load_state_dict(state)

    def both(change: Callable[[Net], None]) -> None:
        change(net)
        change(twin)

    for change in CHANGES:
        both(change)
        for _ in range(2):
            x, target = torch.randn(24, 32), torch.randn(24, 16)
            loss = step(x.cuda(), target.cuda())
            twin_optimizer.zero_grad()
            expected = loss_of(twin, x, target)
            expected.backward()
            twin_optimizer.step()
            torch.testing.assert_close(loss.cpu(), expected.detach(), rtol=2e-4, atol=2e-5)
    for (name, ours), (_, theirs) in zip(net.named_parameters(), twin.named_parameters(), strict=True):
        torch.testing.assert_close(ours.cpu(), theirs, rtol=2e-3, atol=2e-4, msg=lambda text, name=name: f"{name}: {text}")


def test_a_thousand_changes_under_one_graph_compile_and_capture_nothing() -> None:
    from esper_elastic.triton_kernels import linear as kernels

    net = static_net()
    x = torch.randn(24, 32, device="cuda")
    with torch.no_grad():
        net(x)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = net(x)
        compiled = sum(len(cache[0]) for cache in kernels._product_kernel.device_caches.values())
        for round in range(1000):
            net.hidden.resize(1 + round % 64)
            graph.replay()
            if round % 50 == 0:
                torch.testing.assert_close(y, net(x))
        assert sum(len(cache[0]) for cache in kernels._product_kernel.device_caches.values()) == compiled


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_a_compiled_training_step_follows_widths_and_compiles_once(mode: str) -> None:
    net = static_net()
    counter = CompileCounterWithBackend("inductor")
    compiled = torch.compile(net, fullgraph=True, mode=mode) if mode != "default" else torch.compile(net, fullgraph=True, backend=counter)
    for round, width in enumerate(WIDTHS * 2):
        net.hidden.resize(width)
        net.branch.switch.set(round % 3 != 2)
        x = torch.randn(24, 32, device="cuda")
        expected = net(x)
        expected.sum().backward()
        gradients = [p.grad.clone() for p in net.parameters()]
        net.zero_grad()
        torch.compiler.cudagraph_mark_step_begin()
        got = compiled(x)
        got.sum().backward()
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
        for ours, theirs in zip(net.parameters(), gradients, strict=True):
            torch.testing.assert_close(ours.grad, theirs, rtol=1e-4, atol=1e-4)
        net.zero_grad()
    if mode == "default":
        assert counter.frame_count == 1


def test_commits_of_other_streams_come_in_order() -> None:
    """A kernel that takes long reads the widths after another stream's commit was issued, and still sees those of its time."""
    net = static_net()
    x = torch.randn(24, 32, device="cuda")
    with torch.no_grad():
        wide = net(x)
        net.hidden.resize(3)
        narrow = net(x)
        net.hidden.resize(64)
        side = torch.cuda.Stream()
        torch.cuda.synchronize()
        for _ in range(20):
            torch.cuda._sleep(10_000_000)
            first = net(x)
            with torch.cuda.stream(side):
                net.hidden.resize(3)
            second = net(x)
            net.hidden.resize(64)
            torch.testing.assert_close(first, wide)
            torch.testing.assert_close(second, narrow)


def test_many_commits_at_once_do_not_overtake_each_other() -> None:
    dims = [ee.ElasticDim(8) for _ in range(2500)]
    block = ee.control.ControlBlock.merge([dim.block for dim in dims])
    control = block.on(torch.device("cuda", 0))
    snapshots = []
    for round in range(50):
        torch.cuda._sleep(1_000_000)
        with block.batch():
            for dim in dims:
                dim.resize(1 + round % 8)
        snapshots.append(control.clone())
    slots = torch.tensor([dim.slot for dim in dims])
    for round, seen in enumerate(snapshots):
        assert (seen.cpu()[slots] == 1 + round % 8).all()


def test_what_a_graph_cannot_follow_says_so() -> None:
    net = static_net()
    x = torch.randn(24, 32, device="cuda")
    graph = torch.cuda.CUDAGraph()
    net(x)
    with pytest.raises(GraphCaptureError, match="cannot commit while a CUDA graph is being captured"), torch.cuda.graph(graph):
        net.hidden.resize(3)
    assert net.hidden.active == 64
    double = static_net().double()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        double(x.double())
        with pytest.raises(GraphCaptureError, match=r"cannot be captured in a CUDA graph.*reference"), torch.cuda.graph(graph):
            double(x.double())
    ee.set_layout(net, "compact")
    with pytest.warns(UserWarning, match="compact layout is being captured"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        net(x)


def test_backward_across_a_commit_raises() -> None:
    net = static_net()
    loss = net(torch.randn(24, 32, device="cuda")).sum()
    net.hidden.resize(3)
    with pytest.raises(GenerationError, match="widths or switches changed"):
        loss.backward()


def test_grow_works_between_replays() -> None:
    """`grow` writes in place and commits: a captured forward computes with the newborn units at the next replay."""
    net = static_net()
    net.hidden.resize(20)
    x = torch.randn(24, 32, device="cuda")
    with torch.no_grad():
        net(x)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = net(x)
        net.hidden.grow(33, exact=False)
        graph.replay()
        torch.testing.assert_close(y, net(x))


def test_triton_serves_static_and_compiled_ops_serve_compact() -> None:
    net = Net().cuda()
    assert ee.backend_info()["backends"]["triton"] is True
    assert net.first._widths.backend == "native"
    ee.set_layout(net, "static")
    assert net.first._widths.backend == "triton"
