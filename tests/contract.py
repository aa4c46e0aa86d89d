"""The suite that every elastic layer inherits: ``class TestX(Contract)`` supplies a constructor, its dense twin and an input.

Everything here runs with the dormant part of every storage full of NaN, so that a leak is seen wherever it goes. "Equal" is the rule of
:func:`assert_as_exact`: no more than twice the error of PyTorch in the same dtype, plus one ulp of the largest value.
"""

from __future__ import annotations

import copy
import itertools
import math
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.autograd import forward_ad
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import esper_elastic as ee
from esper_elastic.control import Axis
from esper_elastic.errors import GenerationError
from esper_elastic.ops import backend as backends
from esper_elastic.ops import widths as widths_module

DTYPES = (torch.float32, torch.float64, torch.bfloat16)
LAYOUTS = ("compact", "static")
needs_library = pytest.mark.skipif(backends.LIBRARY_MISSING is not None, reason=f"no compiled library: {backends.LIBRARY_MISSING}")
NO_KERNELS = backends.triton_missing(torch.get_default_device())
needs_kernels = pytest.mark.skipif(NO_KERNELS is not None, reason=f"Triton: {NO_KERNELS}")
STALE = "widths or switches changed after the forward that built the graph"


def without_kernels(test: Callable[..., None]) -> Callable[..., None]:
    """Marks a test of what Triton leaves to the reference: float64, forward mode, torch.func."""
    test.without_kernels = True  # type: ignore[attr-defined]
    return test


class AxisCase(NamedTuple):
    """How to build one axis, and the widths to give its dims once the layer stands."""

    id: str
    sizes: tuple[tuple[int, int], ...]  # (active, capacity) of each dim
    build: Callable[..., Axis]

    def axis(self) -> tuple[Axis, list[ee.ElasticDim]]:
        dims = [ee.ElasticDim(capacity) for _, capacity in self.sizes]
        return self.build(*dims), dims


AXES = (
    AxisCase("one", ((1, 9),), lambda d: d),
    AxisCase("odd", ((5, 9),), lambda d: d),
    AxisCase("full", ((9, 9),), lambda d: d),
    AxisCase("times3", ((2, 5),), lambda d: d * 3),
    AxisCase("concat", ((3, 5), (1, 4)), lambda a, b: ee.concat(a, b * 2)),
    AxisCase("repeat", ((3, 4),), lambda d: ee.concat(d, d, d)),
    AxisCase("adjacent", ((4, 4), (1, 3)), lambda a, b: ee.concat(a, b)),
)
NARROW, MANY = AXES[1], AXES[4]


def active_indices(axis: Axis) -> Tensor:
    """The active indices of an axis, by the definition of a binding and nothing else."""
    found = []
    for segment in axis.segments:
        width = segment.dim.capacity * segment.inner
        found += [segment.start + i for i in range(width) if (i // segment.inner) % segment.dim.capacity < segment.dim.active]
    return torch.tensor(found)


def active_part(tensor: Tensor, axes: tuple[Axis | None, ...]) -> Tensor:
    for index, axis in enumerate(axes):
        if axis is not None:
            tensor = tensor.index_select(index, active_indices(axis))
    return tensor


def dormant_mask(tensor: Tensor, axes: tuple[Axis | None, ...]) -> Tensor:
    mask = torch.zeros(tensor.shape, dtype=torch.bool)
    for index, axis in enumerate(axes):
        if axis is not None:
            asleep = torch.ones(axis.capacity, dtype=torch.bool)
            asleep[active_indices(axis)] = False
            mask |= asleep.view([-1 if i == index else 1 for i in range(tensor.dim())])
    return mask


def poison(layer: nn.Module) -> None:
    """Fill the dormant part of every parameter and buffer with NaN."""
    with torch.no_grad():
        for name, axes in layer.tensor_axes().items():
            tensor = getattr(layer, name)
            if tensor is not None and tensor.is_floating_point():
                tensor.masked_fill_(dormant_mask(tensor, axes), math.nan)


def dormant_bits(layer: nn.Module) -> dict[str, Tensor]:
    bits = {}
    for name, axes in layer.tensor_axes().items():
        tensor = getattr(layer, name)
        if tensor is not None:
            asleep = tensor.detach()[dormant_mask(tensor, axes)]
            bits[name] = asleep.view(torch.uint8).clone()
    return bits


def embed(part: Tensor, index: int, axis: Axis, fill: float) -> Tensor:
    """``part`` at the active indices of an activation of capacity size, ``fill`` elsewhere."""
    shape = list(part.shape)
    shape[index] = axis.capacity
    return torch.full(shape, fill, dtype=part.dtype).index_copy(index, active_indices(axis), part)


def ulp(value: float, dtype: torch.dtype) -> float:
    """The distance between neighbouring numbers of ``dtype`` at ``value``."""
    return 0.0 if value == 0 else torch.finfo(dtype).eps * 2.0 ** math.floor(math.log2(value))


def assert_as_exact(got: Tensor, dense: Tensor, exact: Tensor, what: str = "") -> None:
    """``got`` is at most twice as far from ``exact`` (float64) as PyTorch's ``dense`` is, plus one ulp of the largest value.

    Where the dtype is float64 itself, nothing finer is at hand, and PyTorch's error counts as one ulp.
    """
    assert got.shape == dense.shape, f"{what}: shape {tuple(got.shape)}, expected {tuple(dense.shape)}"
    assert got.dtype == dense.dtype, f"{what}: {got.dtype}, expected {dense.dtype}"
    if got.numel() == 0:
        return
    assert got.isfinite().all(), f"{what}: not finite"
    step = ulp(exact.abs().max().item(), got.dtype)
    theirs = step if got.dtype == torch.float64 else (dense.double() - exact).abs().max().item()
    ours = (got.double() - exact).abs().max().item()
    assert ours <= 2 * theirs + step, f"{what}: error {ours:.3e}, PyTorch's {theirs:.3e}, one ulp {step:.3e}"


class Record(TorchDispatchMode):
    """Notes the calls of our ops, with the operands that their kernels got."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "esper_elastic":
            self.calls.append((func, args, kwargs or {}))
        return func(*args, **(kwargs or {}))


def norm(dense_class: Any, *arguments: Any, bias: bool = True, **options: Any) -> Any:
    """A norm of torch, without a bias if need be, which torch 2.11 has no argument for."""
    module = dense_class(*arguments, **options)
    if not bias:
        module.register_parameter("bias", None)
    return module


def allocations(run: Callable[[], Any]) -> list[int]:
    """The sizes in bytes of all tensors that ``run`` allocates."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        run()
    sizes: list[int] = []
    pending = list(profile.profiler.kineto_results.experimental_event_tree())
    while pending:
        event = pending.pop()
        pending += event.children
        if event.name == "[memory]" and event.extra_fields.alloc_size > 0:
            sizes.append(event.extra_fields.alloc_size)
    return sizes


def run_plain(module: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    return module(x)


def run_checkpointed(module: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    return checkpoint(module, x, use_reentrant=False)


def run_with_identity_hooks(module: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    with saved_tensors_hooks(lambda t: t, lambda t: t):
        return module(x)


def run_with_cloning_hooks(module: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    with saved_tensors_hooks(lambda t: t.clone(), lambda t: t.clone()):
        return module(x)


RUNNERS = (run_plain, run_checkpointed, run_with_identity_hooks, run_with_cloning_hooks)


class Contract(ABC):
    """What a concrete class says of its layer.

    Attributes:
        num_axes: how many axes :meth:`make` takes, in the order of the axes of the weight.
        entering: which of them the input's units run over.
        leaving: which of them the output's units run over.
        unit: the axis of the activations that units lie on.
        differentiable: whether the input has a gradient; indices have none.
        dtypes: those that the layer serves.
        kernels: whether Triton serves the layer: ``"all"`` tests run on it, ``"narrow"`` (the interpreter takes its time), or ``None``.
    """

    num_axes = 2
    entering = 1
    leaving = 0
    unit = -1
    differentiable = True
    dtypes: tuple[torch.dtype, ...] = DTYPES
    kernels: str | None = None

    @abstractmethod
    def make(self, *axes: Axis, **factory: Any) -> nn.Module:
        """An elastic layer over ``axes``."""

    @abstractmethod
    def dense(self, *sizes: int, **factory: Any) -> nn.Module:
        """The ``nn`` layer of the same configuration with these sizes."""

    @abstractmethod
    def input(self, size: int) -> Tensor:
        """A float64 input with ``size`` units, of positive values."""

    @classmethod
    def axis_cases(cls) -> Iterator[tuple[AxisCase, ...]]:
        """The combinations of axes to test, each case in each place; a layer whose axes depend on each other overrides this."""
        seen = {}
        for shift in (0, 2, 3):
            for first in range(len(AXES)):
                cases = tuple(AXES[(first + shift * place) % len(AXES)] for place in range(cls.num_axes))
                seen[tuple(case.id for case in cases)] = cases
        return iter(seen.values())

    @classmethod
    def narrow_cases(cls) -> Iterator[tuple[AxisCase, ...]]:
        """A few of them, for what is slow: one run per axis, and several."""
        yield (NARROW,) * cls.num_axes
        yield (MANY,) * cls.num_axes

    @classmethod
    def backend_cases(cls) -> Iterator[Any]:
        """Which backends to test in which layouts."""
        for layout in LAYOUTS:
            yield pytest.param("reference", layout)
            if layout == "compact" or torch.get_default_device().type == "cpu":
                yield pytest.param("native", layout, marks=needs_library)
        if cls.kernels is not None:
            yield pytest.param("triton", "static", marks=needs_kernels)

    # Set-up

    @pytest.fixture
    def backend(self, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
        monkeypatch.setattr(widths_module, "choose", lambda device, static: request.param)
        return request.param

    @pytest.fixture(autouse=True)
    def _seed(self) -> None:
        torch.manual_seed(0)

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        for argument, cases in (("axes", self.axis_cases), ("narrow", self.narrow_cases)):
            if argument in metafunc.fixturenames:
                found = list(cases())
                metafunc.parametrize(argument, found, ids=["-".join(case.id for case in combination) for combination in found])
        dtypes = [pytest.param(dtype, id=str(dtype).removeprefix("torch.")) for dtype in self.dtypes]
        if "backend" in metafunc.fixturenames:
            spared = hasattr(metafunc.function, "without_kernels") or (self.kernels == "narrow" and "axes" in metafunc.fixturenames)
            cases = [case for case in self.backend_cases() if not (spared and case.values[0] == "triton")]
            if "dtype" in metafunc.fixturenames:  # Triton leaves float64 to the reference
                metafunc.parametrize(
                    ("backend", "layout", "dtype"),
                    [
                        pytest.param(*case.values, *dtype.values, marks=case.marks, id="-".join((*case.values, str(dtype.id))))
                        for case in cases
                        for dtype in dtypes
                        if (case.values[0], dtype.values[0]) != ("triton", torch.float64)
                    ],
                    indirect=["backend"],
                )
            else:
                metafunc.parametrize(("backend", "layout"), cases, indirect=["backend"])
        else:
            if "layout" in metafunc.fixturenames:
                metafunc.parametrize("layout", LAYOUTS)
            if "dtype" in metafunc.fixturenames:
                metafunc.parametrize("dtype", dtypes)

    def build(self, cases: tuple[AxisCase, ...], layout: str, dtype: torch.dtype = torch.float32) -> nn.Module:
        """A layer built at capacity, narrowed to the widths of ``cases``, poisoned.

        Values are positive, as those of inputs and gradients should be: where sums cancel, PyTorch's error is a matter of luck.
        """
        built = [case.axis() for case in cases]
        layer = self.make(*(axis for axis, _ in built), dtype=dtype)
        with torch.no_grad():
            for tensor in (*layer.parameters(), *layer.buffers()):
                if tensor.is_floating_point():
                    tensor.uniform_(0.25, 1.25)
        for (_, dims), case in zip(built, cases, strict=True):
            for dim, (active, _) in zip(dims, case.sizes, strict=True):
                dim.resize(active)
        layer.layout = layout
        poison(layer)
        return layer

    def widen(self, layer: nn.Module, width: int | None = None) -> None:
        """Set every dim of ``layer`` to ``width``, or to capacity, with finite values in what wakes and NaN in what sleeps."""
        with torch.no_grad():
            for tensor in (*layer.parameters(), *layer.buffers()):
                tensor.nan_to_num_(0.5)
        for dim in {id(dim): dim for axis in layer._widths.axes for dim in axis.dims}.values():
            dim.resize(dim.capacity if width is None else min(width, dim.capacity))
        poison(layer)

    def twin(self, layer: nn.Module, dtype: torch.dtype) -> nn.Module:
        """The ``nn`` layer built from the active slice, in ``dtype``."""
        dense = self.dense(*(axis.active for axis in layer._widths.axes), dtype=dtype)
        axes, tensors = layer.tensor_axes(), (*layer.named_parameters(), *layer.named_buffers())
        state = {name: active_part(tensor.detach(), axes[name]) for name, tensor in tensors if name in axes}
        state |= {name: tensor for name, tensor in dense.state_dict().items() if name not in axes}
        dense.load_state_dict(state)
        return dense.train(layer.training)

    def axis_in(self, layer: nn.Module) -> Axis:
        return layer._widths.axes[self.entering]

    def axis_out(self, layer: nn.Module) -> Axis:
        return layer._widths.axes[self.leaving]

    def inputs(self, layer: nn.Module, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
        """An input as the layer's layout wants it, dormant units full of NaN, and the twin's; both require gradients, if they have any."""
        axis = self.axis_in(layer)
        part = self.input(axis.active)
        if not self.differentiable:
            return part, part.clone()
        part = part.to(dtype)
        ours = embed(part, self.unit, axis, math.nan) if layer.layout == "static" else part.clone()
        return ours.requires_grad_(), part.requires_grad_()

    def part(self, layer: nn.Module, activation: Tensor, axis: Axis) -> Tensor:
        """The active units of an activation; the others must be zero to the bit."""
        if layer.layout == "compact":
            return activation
        inside = active_indices(axis)
        outside = torch.ones(axis.capacity, dtype=torch.bool).index_fill(0, inside, False)
        asleep = activation.index_select(self.unit, outside.nonzero().squeeze(1))
        assert (asleep == 0).all(), "dormant units of an activation are not exactly zero"
        return activation.index_select(self.unit, inside)

    def gradient(self, layer: nn.Module, name: str) -> Tensor:
        """The active part of a parameter's gradient; the rest must be zero to the bit."""
        parameter, axes = getattr(layer, name), layer.tensor_axes()[name]
        assert parameter.grad is not None, f"{name}: no gradient"
        assert parameter.grad.shape == parameter.shape
        assert (parameter.grad[dormant_mask(parameter, axes)] == 0).all(), f"{name}: dormant gradient is not exactly zero"
        return active_part(parameter.grad, axes)

    def compare(self, layer: nn.Module, call: Callable[..., Tensor] = run_plain, x: tuple[Tensor, Tensor] | None = None) -> None:
        """Forward, every gradient and every buffer of ``layer`` against its dense twin."""
        dtype = next(layer.parameters()).dtype
        dense, exact = self.twin(layer, dtype), self.twin(layer, torch.float64)
        before = dormant_bits(layer)
        ours, theirs = self.inputs(layer, dtype) if x is None else x
        truth = theirs.detach().double().requires_grad_() if self.differentiable else theirs
        y, y_dense, y_exact = call(layer, ours), call(dense, theirs), call(exact, truth)
        axis = self.axis_out(layer)
        assert_as_exact(self.part(layer, y, axis), y_dense, y_exact, "output")
        g = (torch.rand(y_exact.shape, dtype=torch.float64) + 0.25).to(y_dense.dtype)
        y.backward(embed(g, self.unit, axis, math.nan) if layer.layout == "static" else g)
        y_dense.backward(g)
        y_exact.backward(g.double())
        if self.differentiable:
            assert_as_exact(self.part(layer, ours.grad, self.axis_in(layer)), theirs.grad, truth.grad, "input gradient")
        for name, parameter in dense.named_parameters():
            assert_as_exact(self.gradient(layer, name), parameter.grad, exact.get_parameter(name).grad, f"{name} gradient")
        for name, buffer in dense.named_buffers():
            mine = active_part(getattr(layer, name), layer.tensor_axes().get(name, ()))
            assert_as_exact(mine, buffer, exact.get_buffer(name).double(), name) if buffer.is_floating_point() else None
            assert buffer.is_floating_point() or torch.equal(mine, buffer)
        after = dormant_bits(layer)
        assert all(torch.equal(before[name], after[name]) for name in before), "dormant storage changed"

    # Forward and backward

    def test_equals_the_dense_twin(self, backend: str, layout: str, dtype: torch.dtype, axes: tuple[AxisCase, ...]) -> None:
        self.compare(self.build(axes, layout, dtype))

    def test_equals_the_dense_twin_in_eval(self, backend: str, layout: str, narrow: tuple[AxisCase, ...]) -> None:
        self.compare(self.build(narrow, layout).eval())

    @pytest.mark.parametrize("call", RUNNERS[1:])
    def test_equals_the_dense_twin_through_saved_tensor_hooks(
        self, backend: str, layout: str, narrow: tuple[AxisCase, ...], call: Callable[..., Tensor]
    ) -> None:
        self.compare(self.build(narrow, layout), call)

    def test_takes_strided_inputs_and_gradients(self, backend: str, layout: str, narrow: tuple[AxisCase, ...]) -> None:
        layer = self.build(narrow, layout)
        ours, theirs = self.inputs(layer)

        def strided(tensor: Tensor) -> Tensor:
            wide = torch.full((*tensor.shape, 2), math.nan if self.differentiable else -1, dtype=tensor.dtype)
            wide[..., 0] = tensor.detach()
            return wide[..., 0].requires_grad_(tensor.requires_grad)

        def call(module: nn.Module, x: Tensor) -> Tensor:
            return strided_gradient(module(x))

        self.compare(layer, call, (strided(ours), strided(theirs)))

    def test_without_grad_the_output_is_the_same(self, backend: str, layout: str, narrow: tuple[AxisCase, ...]) -> None:
        layer = self.build(narrow, layout).eval()
        x, _ = self.inputs(layer)
        expected = layer(x)
        assert expected.requires_grad
        for mode in (torch.no_grad(), torch.inference_mode()):
            with mode:
                got = layer(x)
            assert not got.requires_grad
            assert torch.equal(got, expected)

    def test_frozen_operands_get_no_gradient(self, backend: str, layout: str, narrow: tuple[AxisCase, ...]) -> None:
        names = [name for name, _ in self.build(narrow, layout).named_parameters()]
        for wanted in itertools.product((False, True), repeat=len(names) + 1):
            if not any(wanted) or (wanted[0] and not self.differentiable):
                continue
            layer = self.build(narrow, layout)
            dense = self.twin(layer, torch.float32)
            x, x_dense = self.inputs(layer)
            for ours, theirs, flag in zip((x, *layer.parameters()), (x_dense, *dense.parameters()), wanted, strict=True):
                ours.requires_grad_(flag)
                theirs.requires_grad_(flag)
            layer(x).sum().backward()
            dense(x_dense).sum().backward()
            assert (x.grad is None) == (not wanted[0])
            for name, flag in zip(names, wanted[1:], strict=True):
                assert (getattr(layer, name).grad is None) == (not flag), name
                if flag:
                    torch.testing.assert_close(self.gradient(layer, name), getattr(dense, name).grad)

    def test_output_may_be_modified_in_place(self, backend: str, layout: str, narrow: tuple[AxisCase, ...]) -> None:
        self.compare(self.build(narrow, layout), lambda module, x: module(x).mul_(2))

    def test_backward_needs_no_more_than_nn_does(self, backend: str, layout: str, narrow: tuple[AxisCase, ...]) -> None:
        """Weights may change before the backward where ``nn`` allows it; elsewhere that is an error too, or harmless."""
        layer = self.build(narrow, layout)
        dense = self.twin(layer, torch.float32)
        untouched = copy.deepcopy(dense)
        x, x_dense = (t.detach() for t in self.inputs(layer))
        untouched(x_dense).sum().backward()
        outputs = [dense(x_dense), layer(x)]
        with torch.no_grad():
            for parameter in (*layer.parameters(), *dense.parameters()):
                parameter.mul_(1.5)
        try:
            outputs[0].sum().backward()
            refused = False
        except RuntimeError:
            refused = True
        try:
            outputs[1].sum().backward()
        except RuntimeError as error:
            if not refused or re.search("modified (by an )?in-?place", str(error)) is None:
                raise
            return
        for name, parameter in untouched.named_parameters():
            torch.testing.assert_close(self.gradient(layer, name), parameter.grad)

    def test_gradients_accumulate(self, backend: str, layout: str, narrow: tuple[AxisCase, ...]) -> None:
        layer = self.build(narrow, layout)
        x, _ = self.inputs(layer)
        layer(x).sum().backward()
        once = {name: p.grad.clone() for name, p in layer.named_parameters()}
        layer(x).sum().backward()
        layer(x).sum().backward()
        for name, parameter in layer.named_parameters():
            torch.testing.assert_close(parameter.grad, 3 * once[name])

    # Derivatives

    @without_kernels
    @pytest.mark.parametrize("order", [1, 2])
    def test_gradcheck(self, backend: str, layout: str, narrow: tuple[AxisCase, ...], order: int) -> None:
        layer = self.build(narrow, layout, torch.float64)
        x, _ = self.inputs(layer, torch.float64)
        x.data.nan_to_num_(0.5)
        operands = [p.detach().nan_to_num(0.5).requires_grad_() for p in layer.parameters()]
        names = [name for name, _ in layer.named_parameters()]
        buffers = {name: b.clone() for name, b in layer.named_buffers()}

        def call(x: Tensor, *operands: Tensor) -> Tensor:
            state = dict(zip(names, operands, strict=True)) | {name: b.clone() for name, b in buffers.items()}
            return torch.func.functional_call(layer, state, x)

        check = torch.autograd.gradcheck if order == 1 else torch.autograd.gradgradcheck
        assert check(call, (x, *operands), fast_mode=order == 2)

    @without_kernels
    def test_forward_mode_equals_the_dense_twin(self, backend: str, layout: str, narrow: tuple[AxisCase, ...]) -> None:
        layer = self.build(narrow, layout).eval()
        dense = self.twin(layer, torch.float32)
        x, x_dense = (t.detach() for t in self.inputs(layer))
        t_dense = torch.randn_like(x_dense)
        t = embed(t_dense, self.unit, self.axis_in(layer), math.nan) if layout == "static" else t_dense
        with forward_ad.dual_level():
            got = forward_ad.unpack_dual(layer(forward_ad.make_dual(x, t))).tangent
            expected = forward_ad.unpack_dual(dense(forward_ad.make_dual(x_dense, t_dense))).tangent
            assert got is not None
            torch.testing.assert_close(self.part(layer, got, self.axis_out(layer)), expected)

    @without_kernels
    def test_torch_func_equals_the_dense_twin(self, backend: str, layout: str, narrow: tuple[AxisCase, ...]) -> None:
        layer = self.build(narrow, layout, torch.float64).eval()
        dense = self.twin(layer, torch.float64)
        x, x_dense = (t.detach() for t in self.inputs(layer, torch.float64))
        parameters = {name: p.detach() for name, p in layer.named_parameters()}
        parameters_dense = {name: p.detach() for name, p in dense.named_parameters()}
        axis, tensor_axes = self.axis_out(layer), layer.tensor_axes()

        def loss(module: nn.Module) -> Callable[..., Tensor]:
            def of(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
                y = torch.func.functional_call(module, parameters, x)
                return (y.index_select(self.unit, active_indices(axis)) if module is layer and layout == "static" else y).square().sum()

            return of

        got = torch.func.grad(loss(layer), argnums=(0, 1))(parameters, x)
        expected = torch.func.grad(loss(dense), argnums=(0, 1))(parameters_dense, x_dense)
        torch.testing.assert_close(self.part(layer, got[1], self.axis_in(layer)), expected[1])
        for name, value in got[0].items():
            torch.testing.assert_close(active_part(value, tensor_axes[name]), expected[0][name])
        batch, batch_dense = torch.stack([x, x * 2, x - 1]), torch.stack([x_dense, x_dense * 2, x_dense - 1])
        got = torch.func.vmap(torch.func.grad(loss(layer), argnums=1), (None, 0))(parameters, batch)
        expected = torch.func.vmap(torch.func.grad(loss(dense), argnums=1), (None, 0))(parameters_dense, batch_dense)
        for ours, theirs in zip(got, expected, strict=True):
            torch.testing.assert_close(self.part(layer, ours, self.axis_in(layer)), theirs)
        jacobian = torch.func.jacrev(lambda x: self.part(layer, layer(x), axis))(x)
        expected = torch.func.jacrev(dense)(x_dense)
        torch.testing.assert_close(
            self.part(layer, jacobian, self.axis_in(layer)) if self.unit == -1 else jacobian.sum(),
            (expected if self.unit == -1 else expected.sum()),
        )

    @needs_library
    def test_opcheck(self, layout: str, narrow: tuple[AxisCase, ...]) -> None:
        layer = self.build(narrow, layout)
        x, _ = self.inputs(layer)
        x.data.nan_to_num_(0.5)
        with torch.no_grad():
            for tensor in (*layer.parameters(), *layer.buffers()):
                tensor.nan_to_num_(0.5)
        with Record() as record:
            layer(x).sum().backward()
        assert len(record.calls) >= 2, "forward and backward are ops of ours"
        for number, (op, args, kwargs) in enumerate(record.calls):
            operands = [a.detach().clone() if isinstance(a, Tensor) and a.is_floating_point() else a for a in args]
            if number == 0:
                for mine, theirs in zip(operands, args, strict=True):
                    if isinstance(theirs, Tensor) and theirs.is_floating_point() and not any(theirs is b for b in layer.buffers()):
                        mine.requires_grad_()
            torch.library.opcheck(op, tuple(operands), kwargs)

    # A commit between forward and backward

    @pytest.mark.parametrize("call", RUNNERS)
    def test_backward_across_a_commit_raises(
        self, backend: str, layout: str, narrow: tuple[AxisCase, ...], call: Callable[..., Tensor]
    ) -> None:
        layer = self.build(narrow, layout)
        x, _ = self.inputs(layer)
        loss = call(layer, x).sum()
        dim = layer._widths.axes[0].dims[0]
        dim.resize(dim.active + 1)
        with pytest.raises(GenerationError, match=STALE):
            loss.backward()
        assert x.grad is None
        assert all(p.grad is None for p in layer.parameters())

    def test_second_derivative_across_a_commit_raises(self, backend: str, layout: str, narrow: tuple[AxisCase, ...]) -> None:
        names = [name for name, _ in self.build(narrow, layout).named_parameters()]
        for of in ("input", *names) if self.differentiable else names:
            layer = self.build(narrow, layout)
            x, _ = self.inputs(layer)
            y = layer(x)
            g = torch.ones_like(y, requires_grad=True)
            (first,) = torch.autograd.grad(y, x if of == "input" else getattr(layer, of), g, create_graph=True)
            dim = layer._widths.axes[0].dims[0]
            dim.resize(dim.active + 1)
            with pytest.raises(GenerationError, match=STALE):
                first.nan_to_num().square().sum().backward()

    def test_backward_raises_after_width_returned(self, backend: str, layout: str, narrow: tuple[AxisCase, ...]) -> None:
        layer = self.build(narrow, layout)
        x, _ = self.inputs(layer)
        loss = layer(x).sum()
        dim = layer._widths.axes[0].dims[0]
        active = dim.active
        dim.resize(active + 1)
        dim.resize(active)
        with pytest.raises(GenerationError, match=r"2 commits since"):
            loss.backward()
        layer(x).sum().backward()

    # Widths and layouts that do not fit

    def test_input_of_another_width_is_refused(self, backend: str, layout: str, narrow: tuple[AxisCase, ...]) -> None:
        layer = self.build(narrow, layout)
        axis = self.axis_in(layer)
        for size in (axis.active - 1, axis.active + 1, axis.active if layout == "static" else axis.capacity):
            remedy = "set_layout" if layout == "static" or size == axis.capacity else "share one dim"
            with pytest.raises(ee.LayoutError, match=rf"expected {axis.capacity if layout == 'static' else axis.active} .*{remedy}"):
                layer(self.input(size).float())
        self.compare(layer)

    # Casts, hooks, memory

    def test_autocast_equals_the_dense_twin(self, backend: str, layout: str, narrow: tuple[AxisCase, ...]) -> None:
        layer = self.build(narrow, layout)

        def call(module: nn.Module, x: Tensor) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16, enabled=x.dtype != torch.float64):
                return module(x)

        self.compare(layer, call)

    def test_hooks_see_what_those_of_the_dense_twin_see(self, backend: str, layout: str, narrow: tuple[AxisCase, ...]) -> None:
        layer = self.build(narrow, layout)
        dense = self.twin(layer, torch.float32)
        seen: dict[nn.Module, list[tuple[str, Tensor]]] = {layer: [], dense: []}
        for module in (layer, dense):
            note = seen[module].append
            module.register_forward_pre_hook(lambda m, args, note=note: note(("forward pre", args[0])) or (args[0] * 2,))
            module.register_forward_hook(lambda m, args, y, note=note: note(("forward", y)) or y + 0)
            module.register_full_backward_pre_hook(lambda m, g, note=note: note(("backward pre", g[0])))
            module.register_full_backward_hook(lambda m, gx, gy, note=note: note(("backward", gx[0])) or (gx[0] * 3,))
        x, x_dense = self.inputs(layer)
        layer(x).sum().backward()
        dense(x_dense).sum().backward()
        assert [what for what, _ in seen[layer]] == [what for what, _ in seen[dense]]
        for (what, ours), (_, theirs) in zip(seen[layer], seen[dense], strict=True):
            axis = self.axis_in(layer) if what in ("forward pre", "backward") else self.axis_out(layer)
            inside = ours if layout == "compact" else ours.index_select(self.unit, active_indices(axis))
            torch.testing.assert_close(inside, theirs, msg=lambda m, what=what: f"{what}: {m}")
        torch.testing.assert_close(self.part(layer, x.grad, self.axis_in(layer)), x_dense.grad)

    def test_copies_compute_alike_and_apart(self, backend: str, layout: str, narrow: tuple[AxisCase, ...]) -> None:
        layer = self.build(narrow, layout)
        twin = copy.deepcopy(layer)
        x, _ = self.inputs(layer)
        assert torch.equal(twin(x), layer(x))
        self.widen(layer)
        assert [axis.active for axis in twin._widths.axes] == [axis.active for axis in self.build(narrow, layout)._widths.axes]
        self.compare(twin)
        self.compare(layer)

    # Compilation, in static layout

    @needs_library
    def test_compiles_once_for_all_widths(self, narrow: tuple[AxisCase, ...]) -> None:
        layer = self.build(narrow, "static")
        torch._dynamo.reset()
        counter = CompileCounterWithBackend("aot_eager")
        compiled = torch.compile(layer, fullgraph=True, backend=counter)
        dims = [dim for axis in layer._widths.axes for dim in axis.dims]
        for width in range(1, 1 + max(dim.capacity for dim in dims)):
            self.widen(layer, width)
            layer.zero_grad()
            self.compare(layer, lambda module, x: compiled(x) if module is layer else module(x))
        assert counter.frame_count == 1

    def test_compiled_backward_across_a_commit_raises(self, backend: str, layout: str, narrow: tuple[AxisCase, ...]) -> None:
        layer = self.build(narrow, layout)
        torch._dynamo.reset()
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
        x, _ = self.inputs(layer)
        loss = compiled(x).sum()
        dim = layer._widths.axes[0].dims[0]
        dim.resize(dim.active + 1)
        with pytest.raises(RuntimeError, match=f"{STALE}|modified by an inplace operation"):
            loss.backward()
        assert all(p.grad is None for p in layer.parameters())


class _StridedGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return torch.stack([grad, torch.full_like(grad, math.nan)], -1)[..., 0]


def strided_gradient(x: Tensor) -> Tensor:
    """The identity, whose gradient arrives with gaps in memory."""
    return _StridedGradient.apply(x)
