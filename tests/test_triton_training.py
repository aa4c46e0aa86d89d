"""Whole training steps on Triton, optimizer included, against the C++ ops in compact layout: the same losses through every change.

The interpreter runs what a captured graph would replay; test_gpu.py replays it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from contract import needs_kernels
from torch import nn
from twins import CHANGES, Net, loss_of

import esper_elastic as ee
from esper_elastic import ops
from esper_elastic.ops import optimizer as optimizer_ops
from esper_elastic.ops import widths as widths_module

OPTIMIZERS: dict[str, Callable[[nn.Module], torch.optim.Optimizer]] = {
    "AdamW": lambda net: ee.optim.AdamW(net.parameters(), lr=1e-2),
    "SGD": lambda net: ee.optim.SGD(net.parameters(), lr=1e-2, momentum=0.9),
}


@needs_kernels
@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU, test_gpu.py does this with a captured graph")
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_training_on_triton_equals_training_on_the_cpu(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    net = Net()
    twin = copy.deepcopy(net)
    for module in (widths_module, ops):
        monkeypatch.setattr(module, "choose", lambda device, static: "triton" if static else "reference")
    ee.set_layout(net, "static")
    optimizer, twin_optimizer = OPTIMIZERS[kind](net), OPTIMIZERS[kind](twin)

    def step(model: Net, owner: torch.optim.Optimizer, on_triton: bool) -> torch.Tensor:
        monkeypatch.setattr(optimizer_ops, "triton_steps", lambda device: on_triton)
        owner.zero_grad()
        loss = loss_of(model, x, target)
        loss.backward()
        owner.step()
        return loss.detach()

    for change in CHANGES:
        change(net)
        change(twin)
        x, target = torch.randn(6, 32), torch.randn(6, 16)
        torch.testing.assert_close(step(net, optimizer, True), step(twin, twin_optimizer, False), rtol=2e-4, atol=2e-5)
    for (name, ours), (_, theirs) in zip(net.named_parameters(), twin.named_parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2e-3, atol=2e-4, msg=lambda text, name=name: f"{name}: {text}")
