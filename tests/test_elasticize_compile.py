"""A converted model in static layout, compiled once for all widths."""

from collections.abc import Iterator

import pytest
import torch
from contract import needs_library
from converting import assert_close, poison, random_widths
from plain_net import net, pictures
from torch._dynamo.testing import CompileCounterWithBackend

import esper_elastic as ee


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@needs_library
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_resizing_a_compiled_model_compiles_nothing_and_equals_eager(backend: str) -> None:
    model = ee.elasticize(net(torch.float32), pictures(torch.float32), capacity=1.5)
    ee.set_layout(model, "static")
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    clean = [tensor.detach().clone() for tensor in (*model.parameters(), *model.buffers())]
    for seed in range(4):
        for tensor, kept in zip((*model.parameters(), *model.buffers()), clean, strict=True):
            tensor.detach().copy_(kept)  # what wakes now was full of NaN
        ee.resize(model, random_widths(model, seed))
        poison(model)
        eager = model.train()(pictures(torch.float32))
        expected = torch.autograd.grad(eager.square().sum(), list(model.parameters()))
        got = compiled(pictures(torch.float32))
        gradients = torch.autograd.grad(got.square().sum(), list(model.parameters()))
        assert_close(got.detach(), eager.detach(), "output", 1e-5)
        largest = float(max(gradient.abs().max() for gradient in expected))
        for (name, _), one, other in zip(model.named_parameters(), gradients, expected, strict=True):
            assert_close(one, other, f"gradient of {name}", 1e-4, 1e-6 * largest)
    assert counter.frame_count == 1
