"""Which backend serves, why not another, and what is said then. What a GPU would answer is played by stand-ins."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator

import pytest
import torch
from contract import needs_kernels, needs_library

import esper_elastic as ee
from esper_elastic.errors import GraphCaptureError
from esper_elastic.ops import backend as backends
from esper_elastic.ops import widths as widths_module

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def _forget() -> Iterator[None]:
    """What is cached for the life of the process."""
    cached = (backends.triton_missing, backends.refuse_triton, widths_module._warn_captured)
    for function in cached:
        function.cache_clear()
    yield
    for function in cached:
        function.cache_clear()


def play_gpu(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int]) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")


@needs_library
@needs_kernels
def test_layout_and_device_choose(monkeypatch: pytest.MonkeyPatch) -> None:
    play_gpu(monkeypatch, (9, 0))
    assert [backends.choose(CPU, static) for static in (False, True)] == ["native", "native"]
    assert [backends.choose(CUDA, static) for static in (False, True)] == ["native", "triton"]
    monkeypatch.setattr(backends, "CHOICE", "triton")
    assert [backends.choose(CPU, static) for static in (False, True)] == ["native", "triton"]
    monkeypatch.setattr(backends, "CHOICE", "native")
    assert backends.choose(CUDA, True) == "reference"
    monkeypatch.setattr(backends, "CHOICE", "reference")
    assert {backends.choose(device, static) for device in (CPU, CUDA) for static in (False, True)} == {"reference"}


@needs_kernels
def test_what_triton_lacks_is_said_once_and_refused_where_it_was_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    play_gpu(monkeypatch, (7, 5))
    with pytest.warns(UserWarning, match=r"do not serve layers on cuda:0: they need compute capability 8\.0, and a GPU has less") as said:
        assert [backends.choose(CUDA, True) for _ in range(3)] == ["reference"] * 3
    assert len(said) == 1
    monkeypatch.setattr(backends, "CHOICE", "triton")
    backends.refuse_triton.cache_clear()
    with pytest.raises(ee.LayoutError, match=r"ESPER_ELASTIC_BACKEND=triton allows no other backend; unset it"):
        backends.choose(CUDA, True)


def test_reasons_for_having_no_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    if importlib.util.find_spec("triton") is not None:
        assert backends.triton_missing(CPU) == "on the CPU they run in the interpreter alone: set TRITON_INTERPRET=1"
        assert backends.triton_missing(torch.device("xpu")) == "they run on NVIDIA's CUDA, not on xpu"
    backends.triton_missing.cache_clear()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert backends.triton_missing(CPU) == "triton is not installed"
    assert ee.backend_info()["backends"]["triton"] == "triton is not installed"


@needs_kernels
def test_types_that_no_kernel_takes_go_to_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = ee.ElasticLinear(3, 4, max_out_features=6, dtype=torch.float64)
    layer.layout = "static"
    layer._widths.backend = "triton"
    x = torch.randn(2, 3, dtype=torch.float64)
    with pytest.warns(UserWarning, match=r"do not serve ElasticLinear with operands of torch\.float64: they take float32"):
        y = layer(x)
    assert torch.equal(y[:, :4], layer.to_dense()(x)) and (y[:, 4:] == 0).all()
    monkeypatch.setattr(backends, "CHOICE", "triton")
    backends.refuse_triton.cache_clear()
    with pytest.raises(ee.LayoutError, match="ESPER_ELASTIC_BACKEND=triton"):
        layer(x)


@pytest.mark.parametrize("layout", ["compact", "static"])
def test_a_capture_that_could_not_follow_widths_says_so(layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = ee.ElasticLinear(3, 4, max_out_features=6)
    layer.layout = layout
    layer._widths.backend = "reference"
    layer._widths.device = CUDA
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    if layout == "static":
        with pytest.raises(GraphCaptureError, match=r"cannot be captured in a CUDA graph: the reference backend serves it here"):
            layer(torch.ones(2, 3))
    else:
        with pytest.warns(UserWarning, match="compact layout is being captured in a CUDA graph, which keeps the present widths"):
            layer(torch.ones(2, 3))


@needs_kernels
def test_forward_mode_goes_to_the_reference() -> None:
    layer = ee.ElasticLinear(3, 4, max_out_features=6)
    layer.layout = "static"
    layer._widths.backend = "triton"
    x, tangent = torch.randn(2, 3), torch.randn(2, 3)
    _, got = torch.func.jvp(layer, (x,), (tangent,))
    torch.testing.assert_close(got[:, :4], torch.func.jvp(layer.to_dense(), (x,), (tangent,))[1])
