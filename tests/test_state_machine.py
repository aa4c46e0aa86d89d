"""Any sequence of resize, grow, keep, switch, layout, step and copy, against a dense twin that is rebuilt from scratch each time.

The truth is one float64 copy of every parameter at capacity, and of its optimizer state, kept by the test. A step is compared with the
gradients of plain ``nn`` modules built from slices of it, and the textbook update of their elements; whatever slept must not have changed
by a bit.
"""

from __future__ import annotations

import copy
import math
import pickle
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from torch import Tensor, nn

import esper_elastic as ee
from esper_elastic.errors import GenerationError
from esper_elastic.ops import backend as backends
from esper_elastic.ops import widths as widths_module

CAPACITIES = (5, 7, 6, 4)  # input, hidden, wide, output
RATE, DECAY = 0.05, 0.1
OPTIMIZERS: dict[str, Any] = {
    "none": lambda net: None,
    "sgd": lambda net: ee.optim.SGD(net.parameters(), lr=RATE, momentum=0.9, weight_decay=DECAY),
    "adamw": lambda net: ee.optim.AdamW(net.parameters(), lr=RATE, weight_decay=DECAY),
}


class Net(nn.Module):
    """Shared dims, a switched residual branch, and a head over a concatenation."""

    def __init__(self, dims: list[ee.ElasticDim]) -> None:
        super().__init__()
        enter, hidden, wide, leave = dims
        both = ee.concat(hidden, wide)
        linear = {"dtype": torch.float64}
        self.first = ee.ElasticLinear(enter.active, hidden.active, in_dim=enter, out_dim=hidden, **linear)
        self.second = ee.ElasticLinear(hidden.active, wide.active, in_dim=hidden, out_dim=wide, **linear)
        self.branch = ee.ElasticBlock(ee.ElasticLinear(wide.active, wide.active, in_dim=wide, out_dim=wide, **linear), kind="branch")
        self.head = ee.ElasticLinear(both.active, leave.active, in_dim=both, out_dim=leave, **linear)

    def forward(self, x: Tensor) -> Tensor:
        return network(self.first, self.second, self.branch, self.head, x)


def network(first: Any, second: Any, branch: Any, head: Any, x: Tensor) -> Tensor:
    hidden = torch.relu(first(x))
    wide = torch.tanh(second(hidden))
    wide = wide + branch(wide)
    return head(torch.cat([hidden, wide], -1))


class Machine(RuleBasedStateMachine):
    """A network, and what must be true of it."""

    @initialize(seed=st.integers(0, 2**16), kind=st.sampled_from(list(OPTIMIZERS)), data=st.data())
    def build(self, seed: int, kind: str, data: st.DataObject) -> None:
        torch.manual_seed(seed)
        self.random = torch.Generator().manual_seed(seed)
        self.widths = [data.draw(st.integers(1, capacity)) for capacity in CAPACITIES]
        self.net = Net([ee.ElasticDim(n, capacity) for n, capacity in zip(self.widths, CAPACITIES, strict=True)])
        self.on = True
        self.layout = "compact"
        self.kind, self.optimizer = kind, OPTIMIZERS[kind](self.net)
        self.truth = {name: p.detach().clone() for name, p in self.net.named_parameters()}
        self.state = {name: torch.zeros(3, *p.shape, dtype=torch.float64) for name, p in self.truth.items()}  # two moments, a count
        self.graphs: list[Tensor] = []

    def teardown(self) -> None:
        if hasattr(self, "choose"):
            widths_module.choose = self.choose

    @property
    def dims(self) -> list[ee.ElasticDim]:
        net = self.net
        return [net.first.in_dim, net.first.out_dim, net.second.out_dim, net.head.out_dim]

    def inside(self) -> dict[str, tuple[Tensor, ...]]:
        """The active indices of each parameter, by the test's own book-keeping."""
        enter, hidden, wide, leave = (torch.arange(n) for n in self.widths)
        both = torch.cat([hidden, CAPACITIES[1] + wide])
        rows = {"first": (hidden, enter), "second": (wide, hidden), "branch.module": (wide, wide), "head": (leave, both)}
        return {name: rows[name.rpartition(".")[0]][: self.truth[name].dim()] for name in self.truth}

    def twin(self) -> dict[str, nn.Linear]:
        """Plain layers from slices of the truth."""
        indices, found = self.inside(), {}
        for layer in ("first", "second", "branch.module", "head"):
            rows, columns = indices[f"{layer}.weight"]
            found[layer] = nn.Linear(len(columns), len(rows), dtype=torch.float64)
            found[layer].weight.data = self.truth[f"{layer}.weight"][rows][:, columns].clone()
            found[layer].bias.data = self.truth[f"{layer}.bias"][rows].clone()
        return found

    def sample(self) -> tuple[Tensor, Tensor]:
        """An input for the net and one for the twin."""
        x = torch.randn(3, self.widths[0], dtype=torch.float64, generator=self.random)
        if self.layout == "compact":
            return x, x
        wide = torch.full((3, CAPACITIES[0]), math.nan, dtype=torch.float64)
        wide[:, : self.widths[0]] = x
        return wide, x

    def changed(self) -> None:
        """After a commit no older graph may run backward."""
        for graph in self.graphs:
            with pytest.raises(GenerationError):
                graph.backward()
        self.graphs.clear()

    # What may happen

    @rule(which=st.integers(0, 3), data=st.data())
    def resize(self, which: int, data: st.DataObject) -> None:
        width = data.draw(st.integers(1, CAPACITIES[which]))
        moved = width != self.widths[which]
        self.dims[which].resize(width)
        self.widths[which] = width
        if moved:
            self.changed()

    @rule(data=st.data())
    def resize_several(self, data: st.DataObject) -> None:
        widths = [data.draw(st.integers(1, capacity)) for capacity in CAPACITIES]
        block = ee.control_block(self.net)
        generation = block.generation
        with block.batch():
            for dim, width in zip(self.dims, widths, strict=True):
                dim.resize(width)
        assert block.generation - generation == (widths != self.widths)
        if widths != self.widths:
            self.widths = widths
            self.changed()

    @rule(which=st.integers(0, 3), wrong=st.sampled_from([0, -1, 99, True, 2.0]))
    def resize_wrongly(self, which: int, wrong: Any) -> None:
        with pytest.raises(ee.CapacityError), ee.control_block(self.net).batch():
            self.dims[(which + 1) % 4].resize(1)
            self.dims[which].resize(wrong)

    @rule(on=st.booleans())
    def switch(self, on: bool) -> None:
        moved = on != self.on
        (ee.enable if on else ee.disable)(self.net, "branch")
        self.on = on
        if moved:
            self.changed()

    @rule(layout=st.sampled_from(["compact", "static"]))
    def set_layout(self, layout: str) -> None:
        ee.set_layout(self.net, layout)
        self.layout = layout

    @precondition(lambda self: backends.LIBRARY_MISSING is None)
    @rule(native=st.booleans())
    def set_backend(self, native: bool) -> None:
        if not hasattr(self, "choose"):
            self.choose = widths_module.choose
        widths_module.choose = lambda device, static: "native" if native else "reference"
        for module in self.net.modules():
            if hasattr(module, "bind_control"):
                module.bind_control()

    @rule()
    def keep_a_graph(self) -> None:
        self.graphs.append(self.net(self.sample()[0]).sum())

    @rule(how=st.sampled_from([copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))]))
    def go_on_with_a_copy(self, how: Any) -> None:
        old = self.dims
        self.net, self.optimizer = how((self.net, self.optimizer))
        for dim in old:
            dim.resize(dim.capacity)
        self.graphs.clear()

    @rule(which=st.sampled_from([1, 2]), init=st.sampled_from(["zero", "split"]), data=st.data())
    def grow(self, which: int, init: str, data: st.DataObject) -> None:
        self.bear(which, data.draw(st.integers(self.widths[which], CAPACITIES[which])), init)

    def bear(self, which: int, width: int, init: str) -> None:
        old = self.widths[which]
        x, _ = self.sample()
        with torch.no_grad():
            before = self.net(x)
        self.dims[which].grow(width, init=init)
        self.widths[which] = width
        with torch.no_grad():
            torch.testing.assert_close(self.net(x), before, rtol=1e-12, atol=1e-12)
        newborn = torch.arange(old, width)
        for name, parameter in self.net.named_parameters():
            touched = torch.zeros(parameter.shape, dtype=torch.bool)
            for axis, start in self.places(which)[name]:
                touched.index_fill_(axis, start + newborn, True)
                if init == "split" and axis == 1:  # the outgoing weights of parents are shared out
                    touched.index_fill_(axis, start + torch.arange(old), True)
            self.truth[name][touched] = parameter.detach()[touched]
            for axis, start in self.places(which)[name]:
                self.state[name].index_fill_(axis + 1, start + newborn, 0)
            assert parameter.isfinite().all()
        if width != old:
            self.changed()

    @rule(which=st.sampled_from([1, 2]), data=st.data())
    def keep(self, which: int, data: st.DataObject) -> None:
        old = self.widths[which]
        chosen = data.draw(st.lists(st.integers(0, old - 1), min_size=1, max_size=old, unique=True))
        self.dims[which].keep(chosen)
        front = sorted(chosen)
        order = torch.tensor(front + [i for i in range(CAPACITIES[which]) if i not in chosen])
        for name in self.truth:
            for axis, start in self.places(which)[name]:
                place = start + torch.arange(CAPACITIES[which])
                for tensor, index in ((self.truth[name], axis), (self.state[name], axis + 1)):
                    tensor.index_copy_(index, place, tensor.index_select(index, start + order))
        self.widths[which] = len(chosen)
        if len(chosen) != old:
            self.changed()

    def places(self, which: int) -> dict[str, list[tuple[int, int]]]:
        """Where the dims "hidden" (1) and "wide" (2) run through each parameter: axis and first index."""
        found = {
            1: {"first": [(0, 0)], "second": [(1, 0)], "branch.module": [], "head": [(1, 0)]},
            2: {"first": [], "second": [(0, 0)], "branch.module": [(0, 0), (1, 0)], "head": [(1, CAPACITIES[1])]},
        }[which]
        return {name: [p for p in found[name.rpartition(".")[0]] if p[0] < t.dim()] for name, t in self.truth.items()}

    @rule(times=st.integers(1, 3))
    def train(self, times: int) -> None:
        for _ in range(times):
            self.step()

    @rule(which=st.sampled_from([1, 2]), init=st.sampled_from(["zero", "split"]))
    def put_to_sleep_and_grow_again(self, which: int, init: str) -> None:
        """What was trained, slept and is born again starts with no history."""
        width = self.widths[which]
        if width > 1:
            self.dims[which].resize(width - 1)
            self.widths[which] = width - 1
            self.changed()
            self.bear(which, width, init)
        self.step()

    def step(self) -> None:
        ours, theirs = self.sample()
        twin = self.twin()
        branch = twin["branch.module"] if self.on else torch.zeros_like
        expected = network(twin["first"], twin["second"], branch, twin["head"], theirs)
        got = self.net(ours)
        assert (got[:, self.widths[3] :] == 0).all()
        torch.testing.assert_close(got[:, : self.widths[3]], expected, rtol=1e-12, atol=1e-12)
        expected.square().mean().backward()
        got[:, : self.widths[3]].square().mean().backward()
        indices, awake = self.inside(), {}
        for name, parameter in self.net.named_parameters():
            layer, _, kind = name.rpartition(".")
            gradient = getattr(twin[layer], kind).grad
            awake[name] = torch.zeros(parameter.shape, dtype=torch.bool)
            awake[name][torch.meshgrid(*indices[name], indexing="ij")] = gradient is not None
            mine = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            assert (mine[~awake[name]] == 0).all(), name
            if gradient is not None:
                torch.testing.assert_close(mine[awake[name]], gradient.flatten(), rtol=1e-9, atol=1e-12, msg=name)
                self.update(self.truth[name], self.state[name], awake[name], gradient.flatten())
        if self.optimizer is not None:
            self.optimizer.step()
        with torch.no_grad():
            for name, parameter in self.net.named_parameters():
                if self.optimizer is None and parameter.grad is not None:
                    parameter.sub_(RATE * parameter.grad)
                inside = awake[name]
                torch.testing.assert_close(parameter[inside], self.truth[name][inside], rtol=1e-6, atol=1e-9, msg=name)
                self.truth[name][inside] = parameter[inside]
        self.net.zero_grad()
        self.graphs.clear()  # their weights have changed

    def update(self, truth: Tensor, state: Tensor, inside: Tensor, g: Tensor) -> None:
        """One step of the optimizer for the elements ``inside``, each on its own."""
        p, (first, second, count) = truth[inside], (part[inside] for part in state)
        count = count + 1
        if self.kind == "none":
            p = p - RATE * g
        elif self.kind == "sgd":
            first = 0.9 * first + g + DECAY * p
            p = p - RATE * first
        else:
            first, second = 0.9 * first + 0.1 * g, 0.999 * second + 0.001 * g * g
            p = p * (1 - RATE * DECAY)
            p = p - RATE * first / (1 - 0.9**count) / ((second / (1 - 0.999**count)).sqrt() + 1e-8)
        truth[inside] = p
        for part, value in zip(state, (first, second, count), strict=True):
            part[inside] = value

    # What always holds

    @invariant()
    def dims_and_shapes_are_as_they_should(self) -> None:
        if not hasattr(self, "net"):
            return
        assert [dim.active for dim in self.dims] == self.widths
        assert self.net.branch.on == self.on
        for name, parameter in self.net.named_parameters():
            assert torch.equal(parameter, self.truth[name]), f"{name} changed where nobody stepped"


Machine.TestCase.settings = settings(
    max_examples=80,
    stateful_step_count=25,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
TestMachine = Machine.TestCase
