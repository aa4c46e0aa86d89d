"""``summary``: what a model holds and what it uses of it: parameters, bytes, multiply-adds, by dim and by switch.

It reads. Multiply-adds are counted on a copy of the model whose tensors are fake, so that nothing is computed and nothing is touched.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .control import Axis, ElasticDim, Switch
from .control.block import Entry
from .convert import example_of
from .errors import LayoutError
from .layers import ElasticLayer, Switchable
from .model import control_block, copy_structure, dims


@dataclass(frozen=True)
class DimSummary:
    """One free dim of a model.

    Attributes:
        name: as in ``ee.dims(model)``.
        active: units in use.
        capacity: units allocated.
        minimum: the smallest width.
        multiple_of: every width is a multiple of it.
        parameters: active elements of parameters that lie on the dim: those that would be gone at width 0.
        share: their part of all active parameters. An element where two dims cross counts for both, so shares may sum to more than one.
    """

    name: str
    active: int
    capacity: int
    minimum: int
    multiple_of: int
    parameters: int
    share: float


@dataclass(frozen=True)
class SwitchSummary:
    """One block with a switch.

    Attributes:
        name: the path of the block.
        on: whether it takes part.
        parameters: elements under it, at capacity.
        active_parameters: those in use; none while it is off.
    """

    name: str
    on: bool
    parameters: int
    active_parameters: int


@dataclass(frozen=True)
class Summary:
    """What :func:`summary` found. Prints as a table.

    Attributes:
        model: the name of the model's class.
        parameters: elements of all parameters at capacity, shared ones once.
        active_parameters: those in use at the present widths; what is under a switch that is off is not.
        bytes: of parameters and buffers at capacity. Gradients and optimizer state are not counted.
        active_bytes: of what is in use.
        multiply_adds: of one forward pass in eval mode with every dim at its largest width and every switch on; ``None`` if not counted.
        active_multiply_adds: as it stands now; ``None`` if not counted.
        not_counted: why multiply-adds are missing; empty if they are not.
        dims: the free dims, in the order of ``ee.dims(model)``.
        switches: the blocks with a switch, in the order of modules.
    """

    model: str
    parameters: int
    active_parameters: int
    bytes: int
    active_bytes: int
    multiply_adds: int | None
    active_multiply_adds: int | None
    not_counted: str
    dims: tuple[DimSummary, ...]
    switches: tuple[SwitchSummary, ...]

    def __str__(self) -> str:
        totals = [
            ("parameters", self.active_parameters, self.parameters),
            ("bytes", self.active_bytes, self.bytes),
            ("multiply-adds", self.active_multiply_adds, self.multiply_adds),
        ]
        parts = [_table((self.model, "active", "at capacity", ""), [(what, a, b, _share(a, b)) for what, a, b in totals])]
        if self.not_counted:
            parts.append(f"multiply-adds are not counted: {self.not_counted}")
        parts.append("bytes are those of parameters and buffers, without gradients and optimizer state")
        if self.dims:
            heads = "dim", "active", "capacity", "minimum", "multiple of", "active parameters on it", "share"
            rows = [(d.name, d.active, d.capacity, d.minimum, d.multiple_of, d.parameters, f"{d.share:.1%}") for d in self.dims]
            parts += ["", _table(heads, rows)]
        if self.switches:
            lines = [(s.name, "on" if s.on else "off", s.active_parameters, s.parameters) for s in self.switches]
            parts += ["", _table(("switch", "", "active parameters", "at capacity"), lines)]
        return "\n".join(parts)


def summary(model: nn.Module, example_inputs: Any = None) -> Summary:
    """What ``model`` holds and what it uses of it, elastic or plain.

    Args:
        model: any module.
        example_inputs: a tensor, a tuple or list of positional arguments, or a dict of keyword arguments. Shapes and dtypes alone matter.
            Left out, they are those that :func:`esper_elastic.elasticize` was given; without any, multiply-adds are not counted.

    Returns:
        The numbers; ``print`` shows them as a table. Multiply-adds are half of what ``torch.utils.flop_counter`` counts for a forward
        pass in eval mode: matrix products, convolutions and attention, not norms and pointwise ops.

    Effects:
        Gathers the model's layers on one control block, as :func:`esper_elastic.dims` does. Weights, buffers, modes and random number
        generators stay untouched; to count, the modules are copied without their tensors, and no kernel runs.

    Raises:
        LayoutError: the model does not run on the example inputs, or not on tensors without values.
    """
    known = dims(model)
    held = _held_tensors(model)
    parameters = [tensor for tensor in held if isinstance(tensor.tensor, nn.Parameter)]
    active = sum(tensor.active for tensor in parameters)
    multiply_adds, active_multiply_adds, not_counted = None, None, "no example inputs were given, as in summary(model, torch.randn(...))."
    if example_inputs is None:
        example_inputs = example_of(model)
    if example_inputs is not None:
        active_multiply_adds, multiply_adds, not_counted = _count(model, example_inputs)
    on_dims = [sum(tensor.active_on(dim) for tensor in parameters) for dim in known.values()]
    switches = {path: module for path, module in model.named_modules() if isinstance(module, Switchable)}
    return Summary(
        model=type(model).__name__,
        parameters=sum(tensor.tensor.numel() for tensor in parameters),
        active_parameters=active,
        bytes=sum(tensor.tensor.numel() * tensor.tensor.element_size() for tensor in held),
        active_bytes=sum(tensor.active * tensor.tensor.element_size() for tensor in held),
        multiply_adds=multiply_adds,
        active_multiply_adds=active_multiply_adds,
        not_counted=not_counted,
        dims=tuple(
            DimSummary(name, dim.active, dim.capacity, dim.minimum, dim.multiple_of, number, number / max(active, 1))
            for (name, dim), number in zip(known.items(), on_dims, strict=True)
        ),
        switches=tuple(_of_switch(path, block, parameters) for path, block in switches.items()),
    )


def parameters_in_use(model: nn.Module, value_of: Callable[[Entry], int] | None = None) -> int:
    """Elements of the parameters of ``model`` that are in use.

    Args:
        model: any module.
        value_of: the width of a dim and the state of a switch; the present ones by default.
    """
    parameters = (held for held in _held_tensors(model) if isinstance(held.tensor, nn.Parameter))
    return sum(held.active if value_of is None else held.active_at(value_of) for held in parameters)


def _of_switch(path: str, block: Switchable, parameters: list[_Held]) -> SwitchSummary:
    inside = {id(parameter) for parameter in block.parameters()}
    below = [tensor for tensor in parameters if id(tensor.tensor) in inside]
    in_use = sum(tensor.active for tensor in below) if block.on else 0
    return SwitchSummary(path, block.on, sum(tensor.tensor.numel() for tensor in below), in_use)


# What is held


class _Use(NamedTuple):
    """How one module uses a tensor: the axes that it gives it, and the switches above."""

    axes: tuple[Axis | None, ...]
    switches: tuple[Switch, ...]


class _Held(NamedTuple):
    """A parameter or buffer, once, and how the modules that hold it use it."""

    tensor: Tensor
    uses: list[_Use]

    @property
    def active(self) -> int:
        """The elements in use: by the module that uses most of them."""
        return max((math.prod(self._sizes(use, None)) for use in self._awake()), default=0)

    def active_at(self, value_of: Callable[[Entry], int]) -> int:
        """The elements that would be in use if dims and switches had these values."""
        awake = (use for use in self.uses if all(value_of(switch) for switch in use.switches))
        return max((math.prod(self._sizes_at(use, value_of)) for use in awake), default=0)

    def _sizes_at(self, use: _Use, value_of: Callable[[Entry], int]) -> Iterator[int]:
        for size, axis in zip(self.tensor.shape, use.axes, strict=True):
            yield size if axis is None else sum(value_of(s.dim) * s.inner for s in axis.segments)

    def active_on(self, dim: ElasticDim) -> int:
        """The elements in use that would not be if ``dim`` had no unit."""
        return max((math.prod(self._sizes(use, None)) - math.prod(self._sizes(use, dim)) for use in self._awake()), default=0)

    def _awake(self) -> list[_Use]:
        return [use for use in self.uses if all(switch.on for switch in use.switches)]

    def _sizes(self, use: _Use, without: ElasticDim | None) -> Iterator[int]:
        """The active size of each axis, without the units of one dim."""
        for size, axis in zip(self.tensor.shape, use.axes, strict=True):
            yield size if axis is None else sum(s.dim.active * s.inner for s in axis.segments if s.dim is not without)


def _held_tensors(model: nn.Module) -> list[_Held]:
    """Every parameter and buffer below ``model``."""
    above: dict[int, tuple[Switch, ...]] = {}
    for block in (module for module in model.modules() if isinstance(module, Switchable)):
        for module in block.inside.modules():
            above[id(module)] = (*above.get(id(module), ()), block.switch)
    found: dict[int, _Held] = {}
    for module in model.modules():
        axes = module.tensor_axes() if isinstance(module, ElasticLayer) else {}
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None:
                use = _Use(axes.get(name, (None,) * tensor.dim()), above.get(id(module), ()))
                found.setdefault(id(tensor), _Held(tensor, [])).uses.append(use)
    return list(found.values())


# Counting


def _count(model: nn.Module, example_inputs: Any) -> tuple[int, int | None, str]:
    """Multiply-adds as the model stands and at full capacity, and why the latter are missing.

    Raises:
        LayoutError: the model does not run on the inputs.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    where = f"summary: example_inputs: {type(model).__name__} does not run on"
    try:
        mode = FakeTensorMode(allow_non_fake_inputs=True)
        twin = _without_values(getattr(model, "_orig_mod", model), mode)  # a compiled model would be compiled for the fakes
        args, kwargs = _arguments(example_inputs, mode)
        now = _multiply_adds(twin, args, kwargs, mode)
    except Exception as error:
        raise LayoutError(f"{where} {_shapes(example_inputs)} as tensors without values: {type(error).__name__}: {error}") from error
    try:
        _widen(twin)
        return now, _multiply_adds(twin, args, kwargs, mode), ""
    except Exception as error:
        return now, None, f"at full capacity, {type(model).__name__} does not run: {type(error).__name__}: {error}"


def _without_values(model: nn.Module, mode: Any) -> nn.Module:
    """A copy of ``model`` in eval mode with a control block of its own, whose tensors have no values."""
    twin = copy_structure(model, lambda tensor: _fake(tensor, mode)).eval()
    for module in twin.modules():
        module._forward_hooks.clear()  # they watch, and what they note may lie outside of the copy; those before a forward may make weights
    return twin


def _fake(tensor: Tensor, mode: Any) -> Tensor:
    with mode:
        fake: Tensor = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device)
    return nn.Parameter(fake, requires_grad=False) if isinstance(tensor, nn.Parameter) else fake


def _arguments(example_inputs: Any, mode: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    from torch.utils._pytree import tree_map_only

    fakes = tree_map_only(Tensor, lambda tensor: _fake(tensor, mode), example_inputs)
    if isinstance(fakes, Mapping):
        return (), dict(fakes)
    return tuple(fakes) if isinstance(fakes, tuple | list) else (fakes,), {}


def _multiply_adds(twin: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], mode: Any) -> int:
    from torch.utils import flop_counter

    attention: Any = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu  # which torch has no formula for
    more = {} if attention in flop_counter.flop_registry else {attention: _attention_flops}
    with torch.no_grad(), _plain_attention(), mode, flop_counter.FlopCounterMode(display=False, custom_mapping=more) as counter:
        twin(*args, **kwargs)
    return int(counter.get_total_flops()) // 2


def _attention_flops(query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> int:
    from torch.utils import flop_counter

    return int(flop_counter.sdpa_flop_count(query, key, value))


@contextlib.contextmanager
def _plain_attention() -> Iterator[None]:
    """Without the fused ops of nn's transformer layers, which have no formula."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def _widen(twin: nn.Module) -> None:
    """Set every dim to its largest width and every switch on, in one commit."""
    changes: list[tuple[Any, int]] = [(dim, dim.capacity - dim.capacity % dim.multiple_of) for dim in dims(twin).values()]
    changes += [(module.switch, 1) for module in twin.modules() if isinstance(module, Switchable)]
    if changes:
        control = control_block(twin)
        control.adopt()
        control.stage_all(changes)


def _shapes(example_inputs: Any) -> str:
    from torch.utils._pytree import tree_leaves

    shapes = [str(tuple(leaf.shape)) if isinstance(leaf, Tensor) else repr(leaf) for leaf in tree_leaves(example_inputs)]
    return f"inputs of shape {', '.join(shapes)}"


# Printing


def _table(heads: tuple[str, ...], rows: list[tuple[Any, ...]]) -> str:
    """Columns under their heads: names to the left, all else to the right."""
    cells = [heads, *(tuple(map(_cell, row)) for row in rows)]
    first, *rest = (max(map(len, column)) for column in zip(*cells, strict=True))
    lines = ((row[0].ljust(first), *map(str.rjust, row[1:], rest)) for row in cells)
    return "\n".join("  ".join(line).rstrip() for line in lines)


def _cell(value: Any) -> str:
    return "-" if value is None else f"{value:,}" if isinstance(value, int) else str(value)


def _share(active: int | None, capacity: int | None) -> str:
    return f"{active / capacity:.1%}" if active is not None and capacity else ""
