"""What ``torch.utils.flop_counter`` is told of our ops: each counts as the op of ATen that does its work on the active slice.

A formula reads active widths from the control block, as the kernels do; for a control tensor without values, as in a trace, it takes the
sizes of the operands, which in static layout are capacities. Norms, as in torch, count nothing. The reference backend calls ops of
ATen on active slices and needs no formula.

That module of torch takes half a second to import and brings Triton along, so nothing here imports it: formulas are registered when
somebody does, whoever that is, by a finder on ``sys.meta_path``.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

COUNTER = "torch.utils.flop_counter"


def register() -> None:
    """Register the formula of every op that exists by now and has none, if torch's flop counter is loaded."""
    counter = sys.modules.get(COUNTER)
    if hasattr(counter, "FlopCounterMode"):
        _register(counter)


def serve() -> None:
    """Register the formulas now, or as soon as torch's flop counter is imported."""
    register()
    sys.meta_path.insert(0, _Finder())


class _Finder(MetaPathFinder):
    """Finds torch's flop counter where it is, and lets formulas be registered once it is loaded."""

    def find_spec(self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if fullname != COUNTER:
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_register(module: ModuleType) -> None:
                execute(module)
                _register(module)

            spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec


def _register(counter: Any) -> None:
    for name, formula in _FORMULAS.items():
        op = getattr(torch.ops.esper_elastic, name, None)
        if op is not None and op not in counter.flop_registry:
            counter.register_flop_formula(op, get_raw=True)(formula)


# Widths


def _values(tensor: Tensor) -> Any:
    """What ``tensor`` holds, under whatever modes are active; ``None`` for one without values."""
    from torch._subclasses.fake_tensor import is_fake

    if tensor.is_meta or is_fake(tensor):
        return None
    with _disable_current_modes():
        return tensor.tolist()


def _active(control: Tensor, slots: Tensor, sizes: tuple[int, int], static: bool) -> tuple[int, int]:
    """The active indices of the two axes of a weight; no rows for a static layer under a switch that is off.

    Args:
        control: the control tensor.
        slots: rows ``[axis, slot, start, inner]``; axis -1 is a switch.
        sizes: that the axes have in activations, which are the answer where nothing can be read.
        static: the layout.
    """
    values, table = _values(control), _values(slots)
    if values is None or table is None:
        return sizes
    rows, columns = (sum(values[slot] * inner for axis, slot, _, inner in table if axis == wanted) for wanted in (0, 1))
    asleep = static and any(values[slot] == 0 for axis, slot, _, _ in table if axis == -1)
    return 0 if asleep else rows, columns


# Formulas. Each has the arguments of its op, and `out_val`, its result.


def _aten() -> Any:
    """Torch's own formulas, which take shapes."""
    from torch.utils import flop_counter

    return flop_counter


def _linear(input: Tensor, control: Tensor, slots: Tensor, width: int | None, rows: int) -> int:
    """Of a linear layer, and of each of its two gradients: the same product with other sides open. ``input`` has its columns."""
    out, columns = _active(control, slots, (rows if width is None else width, input.shape[-1]), width is None)
    return int(_aten().mm_flop([input.shape[:-1].numel(), columns], [columns, out], out_val=None))


def _linear_forward(
    input: Tensor, weight: Tensor, bias: Any, control: Tensor, slots: Tensor, width: int | None, dtype: Any = None, *, out_val: Any
) -> int:
    return _linear(input, control, slots, width, weight.shape[0])


def _linear_grad_input(
    grad: Tensor, weight: Tensor, control: Tensor, slots: Tensor, width: int | None, in_width: int, *, out_val: Tensor
) -> int:
    return _linear(out_val, control, slots, width, weight.shape[0])


def _linear_grad_weight(
    grad: Tensor, input: Tensor, weight: Tensor, control: Tensor, slots: Tensor, width: int | None, *, out_val: Any
) -> int:
    return _linear(input, control, slots, width, weight.shape[0])


def _active_shapes(
    input: Tensor, weight: Tensor, output: Tensor, control: Tensor, slots: Tensor, transposed: bool, grouped: bool, static: bool
) -> tuple[list[int], list[int], list[int]] | None:
    """The shapes of input, weight and output of a convolution that are active; ``None`` where nothing is."""
    rows, columns = _active(control, slots, (output.shape[1], input.shape[1]), static)
    if rows == 0:
        return None
    first, second = (columns, rows) if transposed else (rows, columns)
    w = [first, weight.shape[1] if grouped else second, *weight.shape[2:]]
    return [input.shape[0], columns, *input.shape[2:]], w, [output.shape[0], rows, *output.shape[2:]]


def _convolution(
    input: Tensor,
    weight: Tensor,
    bias: Any,
    control: Tensor,
    slots: Tensor,
    stride: Any,
    padding: Any,
    dilation: Any,
    transposed: bool,
    output_padding: Any,
    grouped: bool,
    channels: Any,
    compact: bool,
    dtype: Any = None,
    *,
    out_val: Tensor,
) -> int:
    shapes = _active_shapes(input, weight, out_val, control, slots, transposed, grouped, not compact)
    if shapes is None:
        return 0
    x, w, y = shapes
    return int(_aten().conv_flop(x, w, None, stride, padding, dilation, transposed, out_val=y))


def _convolution_backward(
    grad: Tensor,
    input: Tensor,
    weight: Tensor,
    bias_size: Any,
    control: Tensor,
    slots: Tensor,
    stride: Any,
    padding: Any,
    dilation: Any,
    transposed: bool,
    output_padding: Any,
    grouped: bool,
    compact: bool,
    mask: Sequence[bool],
    *,
    out_val: Any,
) -> int:
    shapes = _active_shapes(input, weight, grad, control, slots, transposed, grouped, not compact)
    if shapes is None:
        return 0
    x, w, y = shapes
    groups = x[1] // w[1] if grouped and not transposed else 1
    at = None, stride, padding, dilation, transposed, [0, 0], groups, list(mask)
    return int(_aten().conv_backward_flop(y, x, w, *at, out_val=(x, w, [y[1]])))


# Those of Triton's ops, which are in static layout.


def _triton_linear(x: Tensor, weight: Tensor, bias: Any, control: Tensor, slots: Tensor, segments: Any, *, out_val: Any) -> int:
    return _linear(x, control, slots, None, weight.shape[0])


def _triton_linear_grad_input(grad: Tensor, weight: Tensor, control: Tensor, slots: Tensor, segments: Any, *, out_val: Tensor) -> int:
    return _linear(out_val, control, slots, None, weight.shape[0])


def _triton_linear_grad_weight(
    grad: Tensor, x: Tensor, weight: Tensor, bias: Any, control: Tensor, slots: Tensor, segments: Any, *, out_val: Any
) -> int:
    return _linear(x, control, slots, None, weight.shape[0])


def _triton_conv2d(
    x: Tensor, weight: Tensor, bias: Any, control: Tensor, slots: Tensor, segments: Any, geometry: Sequence[int], *, out_val: Tensor
) -> int:
    stride, padding, dilation, grouped = _split(geometry)
    at = stride, padding, dilation, False, (0, 0), grouped, None, False
    return _convolution(x, weight, bias, control, slots, *at, out_val=out_val)


def _triton_conv2d_grad_input(
    grad: Tensor,
    weight: Tensor,
    size: Any,
    control: Tensor,
    slots: Tensor,
    segments: Any,
    geometry: Sequence[int],
    *,
    out_val: Tensor,
) -> int:
    stride, padding, dilation, grouped = _split(geometry)
    at = None, control, slots, stride, padding, dilation, False, (0, 0), grouped, False, (True, False, False)
    return _convolution_backward(grad, out_val, weight, *at, out_val=None)


def _triton_conv2d_grad_weight(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Any,
    control: Tensor,
    slots: Tensor,
    segments: Any,
    geometry: Sequence[int],
    *,
    out_val: Any,
) -> int:
    stride, padding, dilation, grouped = _split(geometry)
    at = None, control, slots, stride, padding, dilation, False, (0, 0), grouped, False, (False, True, True)
    return _convolution_backward(grad, x, weight, *at, out_val=None)


def _split(geometry: Sequence[int]) -> tuple[Sequence[int], Sequence[int], Sequence[int], bool]:
    """Stride, padding, dilation, and whether groups are what is elastic."""
    return geometry[:2], geometry[2:4], geometry[4:6], bool(geometry[6])


_FORMULAS: dict[str, Callable[..., int]] = {
    "linear": _linear_forward,
    "linear_grad_input": _linear_grad_input,
    "linear_grad_weight": _linear_grad_weight,
    "convolution": _convolution,
    "convolution_backward": _convolution_backward,
    "triton_linear": _triton_linear,
    "triton_linear_grad_input": _triton_linear_grad_input,
    "triton_linear_grad_weight": _triton_linear_grad_weight,
    "triton_conv2d": _triton_conv2d,
    "triton_conv2d_grad_input": _triton_conv2d_grad_input,
    "triton_conv2d_grad_weight": _triton_conv2d_grad_weight,
}
