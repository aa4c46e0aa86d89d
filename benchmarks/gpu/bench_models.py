"""A captured training step of whole models at half width, against the same network rebuilt at that size and captured."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import models
import torch
import torch.nn.functional as F
from device import DEVICE, DRY, captured, seconds, sized
from harness import bar
from torch import Tensor, nn

import esper_elastic as ee


def training_step(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, target: Tensor) -> Callable[[], Any]:
    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(DEVICE.type, torch.bfloat16):
            loss = F.cross_entropy(model(x).flatten(0, -2).float(), target.flatten())
        loss.backward()
        optimizer.step()

    return step


def compare(name: str, elastic: nn.Module, plain: nn.Module, x: Tensor, target: Tensor) -> None:
    ee.set_layout(elastic, "static")
    fused = {"fused": True, "capturable": True} if not DRY else {}
    ours = training_step(elastic, ee.optim.AdamW(elastic.parameters()), x, target)
    theirs = training_step(plain, torch.optim.AdamW(plain.parameters(), **fused), x, target)
    steps = [captured(ours), captured(theirs)]
    mine, exact = seconds(steps, rounds=1 if DRY else 9)
    bar(f"{name} at half width, captured training step, static, speed against the network of that size", exact / mine, "x", at_least=0.75)


def halve(model: nn.Module, but: ee.ElasticDim) -> None:
    """Every dim at half of its capacity, except for ``but``, which is as wide as the task wants."""
    ee.resize(model, {name: dim.capacity // 2 for name, dim in ee.dims(model).items() if dim is not but})


def test_resnet_50() -> None:
    elastic = models.resnet(depths=(3, 4, 6, 3), width=64) if not DRY else models.resnet((1,), 4, 10)
    elastic = elastic.to(DEVICE).to(memory_format=torch.channels_last)
    halve(elastic, but=elastic[-1].out_dim)
    plain = ee.export(elastic).to(memory_format=torch.channels_last)
    x = torch.randn(sized(128, 2), 3, sized(224, 8), sized(224, 8), device=DEVICE).to(memory_format=torch.channels_last)
    compare("ResNet-50", elastic, plain, x, torch.randint(0, 10, (len(x),), device=DEVICE))


def test_gpt_2_small() -> None:
    depth, width, heads, vocabulary, length = (12, 768, 12, 50304, 1024) if not DRY else (1, 16, 2, 20, 8)
    elastic = models.GPT(depth, width, heads, vocabulary, length).to(DEVICE)
    halve(elastic, but=elastic.head.out_dim)
    plain = ee.export(elastic)
    for name in ("embedding", "position"):
        table = getattr(plain, name)
        setattr(plain, name, nn.Embedding(table.num_embeddings, width // 2, device=DEVICE))
    tokens = torch.randint(0, vocabulary, (sized(8, 2), length), device=DEVICE)
    compare("GPT-2 small", elastic, plain, tokens, tokens)
