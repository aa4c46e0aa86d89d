"""One run under thousands of decisions, in orders that hypothesis makes: the contract holds all the way, nothing leaks or slows."""

from __future__ import annotations

import gc
import statistics
import time
from typing import Any

import pytest
import torch
from contract import dormant_bits
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from training_nets import Net, loader

import esper_elastic as ee
from esper_elastic.layers import ElasticBlock, ElasticLayer
from esper_elastic.layers.state import JOURNAL
from esper_elastic.training import Safety, Trainer


class Switched(Net):
    """The small network with a residual branch that can be switched."""

    def __init__(self) -> None:
        super().__init__()
        self.inside, self.branch, self.outside = nn.Linear(10, 8), nn.Sequential(nn.Linear(8, 8), nn.Tanh()), nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.inside(super().forward(x))
        return self.outside(x + self.branch(x))


KINDS = (
    "resize",
    "grow",
    "prune",
    "disable",
    "enable",
    "add_layer",
    "remove_layer",
    "modify_layer",
    "skip",
    "unskip",
    "several",
    "nonsense",
)


class Soak:
    """A run that is changed before every step, and looked at after it."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.model = ee.elasticize(Switched(), torch.randn(2, 1, 8, 8), capacity=2.0)
        self.model.branch = ElasticBlock(self.model.branch, kind="branch")
        optimizer = ee.optim.AdamW(self.model.parameters(), lr=1e-3)
        self.run = Trainer(
            self.model, optimizer, nn.functional.cross_entropy, safety=Safety(minimum_width=2), example_inputs=torch.zeros(2, 1, 8, 8)
        )
        self.batches = list(loader(16))
        self.added: list[str] = []
        self.skips: list[str] = []
        self.done = 0
        self.refused = 0

    def decision(self, kind: str, number: int) -> Any:
        dim = ("conv1", "conv2", "inside")[number % 3]
        width = 2 + number % 15
        match kind:
            case "resize":
                return {"adaptation_type": "resize", "layer_name": dim, "parameters": {"width": width}}
            case "grow":
                return {"adaptation_type": "grow", "layer_name": dim, "parameters": {"delta": 1 + number % 3}}
            case "prune":
                return {"adaptation_type": "prune", "layer_name": dim, "parameters": {"by": ("magnitude", "taylor")[number % 2]}}
            case "disable" | "enable":
                return {"adaptation_type": kind, "layer_name": "branch"}
            case "add_layer":
                spec = {"kind": ("GELU", "ReLU", "Dropout")[number % 3], "arguments": {}}
                return {"adaptation_type": "add_layer", "position": f"after_{('bn1', 'bn2', 'drop')[number % 3]}", "layer_spec": spec}
            case "remove_layer":
                name = self.added[number % len(self.added)] if self.added else "nothing"
                return {"adaptation_type": "remove_layer", "layer_name": name}
            case "modify_layer":
                return {"adaptation_type": "modify_layer", "layer_name": "conv2", "parameters": {"kernel_size": (3, 1, 5)[number % 3]}}
            case "skip":
                return {"adaptation_type": "add_skip_connection", "layer_name": "conv1", "position": "bn2"}
            case "unskip":
                name = self.skips[number % len(self.skips)] if self.skips else "nothing"
                return {"adaptation_type": "remove_skip_connection", "layer_name": name}
            case "several":
                return [self.decision("resize", number), self.decision(("nonsense", "modify_layer")[number % 2], number)]
        return {"adaptation_type": "resize", "layer_name": dim, "parameters": {"width": -number}}

    def change(self, kind: str, number: int) -> None:
        if len(self.added) > 3 and kind == "add_layer":
            kind = "remove_layer"
        if self.skips and kind == "skip":
            kind = "unskip"
        parameters = {id(parameter) for parameter in self.model.parameters()}
        result = self.run.apply_architecture_modification(self.model, self.decision(kind, number))
        self.done += 1
        self.refused += not result
        if result and result.mechanism == "metadata":
            assert {id(parameter) for parameter in self.model.parameters()} == parameters
        if kind in ("nonsense", "enable", "disable"):
            assert bool(result) == (kind != "nonsense"), result
        names = dict(self.model.named_modules())
        if result and kind in ("add_layer", "skip"):
            (self.added if kind == "add_layer" else self.skips).append(result.details[0]["name"])
        self.added, self.skips = ([name for name in held if name in names] for held in (self.added, self.skips))
        self.model.__dict__.pop(JOURNAL, None)  # the one thing that is to grow: by the text of each edit

    def step(self) -> float:
        """One step, before which and after which dormant memory is the same."""
        layers = {name: module for name, module in self.model.named_modules() if isinstance(module, ElasticLayer)}
        before = {name: dormant_bits(layer) for name, layer in layers.items()}
        batch = self.batches[self.done % len(self.batches)]
        start = time.perf_counter()
        assert self.run._step(batch)
        self.run._between_steps(None, None)
        took = time.perf_counter() - start
        for name, layer in layers.items():
            for key, bits in dormant_bits(layer).items():
                assert torch.equal(bits, before[name][key]), f"{name}.{key}: dormant memory changed"
        return took

    def look(self) -> None:
        """What holds at every moment."""
        for dim in ee.dims(self.model).values():
            assert 2 <= dim.active <= dim.capacity
        grouped = [id(p) for group in self.run.optimizer.param_groups for p in group["params"]]
        assert sorted(grouped) == sorted({id(p) for p in self.model.parameters()})
        assert self.run.state.loss == self.run.state.loss
        plain = ee.export(self.model)
        x = self.batches[0][0]
        self.model.eval(), plain.eval()
        with torch.no_grad():
            torch.testing.assert_close(self.model(x), plain(x), rtol=1e-4, atol=1e-4)
        self.model.train()

    def plain_again(self) -> None:
        """Bring the network back to the size that it began with."""
        for name in (*reversed(self.skips), *reversed(self.added)):
            kind = "remove_skip_connection" if name in self.skips else "remove_layer"
            assert self.run.apply_architecture_modification(self.model, {"adaptation_type": kind, "layer_name": name})
        self.added, self.skips = [], []
        self.run.apply_architecture_modification(self.model, self.decision("modify_layer", 0))
        ee.resize(self.model, {"conv1": 8, "conv2": 8, "inside": 8})
        ee.enable(self.model, "branch")
        self.model.__dict__.pop(JOURNAL, None)


#: Modules whose objects are not counted: hypothesis remembers every order that it has made, and torch each op on fake tensors of new sizes.
OTHERS = ("hypothesis", "builtins", "array", "_pytest", "torch._subclasses")

ORDERS = st.lists(st.tuples(st.sampled_from(KINDS), st.integers(0, 10**6)), min_size=20, max_size=60)
SETTINGS = {"deadline": None, "suppress_health_check": list(HealthCheck), "derandomize": True, "database": None}


@settings(max_examples=5, phases=[Phase.generate], **SETTINGS)
@given(ORDERS)
def test_any_order_of_decisions_keeps_the_contract(order: list[tuple[str, int]]) -> None:
    soak = Soak()
    for kind, number in order:
        soak.change(kind, number)
        soak.step()
    soak.look()


@pytest.mark.slow
def test_ten_thousand_decisions_in_one_run() -> None:
    soak, counted, paces = Soak(), list[int](), list[float]()

    @settings(max_examples=280, phases=[Phase.generate], **SETTINGS)
    @given(ORDERS)
    def go_on(order: list[tuple[str, int]]) -> None:
        for kind, number in order:
            soak.change(kind, number)
            soak.step()
        soak.look()
        if soak.done // 1000 > len(counted):
            soak.plain_again()
            for _ in range(20):
                soak.step()
            paces.append(statistics.median(soak.step() for _ in range(100)))
            gc.collect()
            counted.append(sum(not type(each).__module__.startswith(OTHERS) for each in gc.get_objects()))

    go_on()
    assert soak.done >= 10_000
    assert 0.1 < soak.refused / soak.done < 0.6
    assert min(paces[len(paces) // 2 :]) < 1.2 * min(paces[: len(paces) // 2]), (
        paces
    )  # of the quietest moments: what drifts, drifts there too
    assert counted[-1] - counted[1] < 0.02 * counted[1], counted
