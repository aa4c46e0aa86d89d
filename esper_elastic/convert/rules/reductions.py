"""Rules of what runs along an axis: reductions, softmax, sorting."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..structure import Structure
from ..trace import Node
from .elementwise import pointwise
from .registry import Scope, argument, fixed, give, op_name, rule, same, values, wrap


@rule("sum", "mean", "amax", "amin", "prod", "var", "std", "var_mean", "std_mean", "logsumexp", "linalg_vector_norm", "norm", "any", "all")
@rule("max", "min", "argmax", "argmin", "median", "nansum", "count_nonzero", "mode")
def _reduce(scope: Scope, node: Node) -> None:
    name = op_name(node.op)
    inputs = values(node.args)
    if len(inputs) > 1:  # max and min of two
        pointwise(scope, node)
        return
    x = inputs[0]
    rank = len(x.shape)
    place = 2 if name in ("linalg_vector_norm", "norm") else 1
    dims = argument(node, place, "dim")
    keep = bool(node.kwargs.get("keepdim", next((a for a in node.args[place + 1 :] if isinstance(a, bool)), False)))
    reduced = set(range(rank)) if dims is None or dims == [] else {wrap(d, rank) for d in ([dims] if isinstance(dims, int) else dims)}
    for index in reduced:
        axis = x.axes[index]  # type: ignore[index]
        if name in ("argmax", "argmin", "max", "min", "median", "mode") and len(node.outputs) + (name.startswith("arg")) > 1:
            scope.fix(axis, f"{name} numbers its indices")
        elif not (name == "mean" and isinstance(node.call.module, nn.RMSNorm) and len(reduced) == 1 and scope.normalise(axis)):
            scope.mix(axis, f"{name} runs over it", static=name == "sum")
    axes: list[Structure] = []
    for index, axis in enumerate(x.axes or []):
        if index not in reduced:
            axes.append(axis)
        elif keep:
            axes.append(())
    give(node, *[list(axes) for _ in node.outputs])


@rule("_softmax", "_log_softmax", "_safe_softmax")
def _softmax(scope: Scope, node: Node) -> None:
    x, dim = node.args[:2]
    if x.shape:
        scope.mix(x.axes[wrap(dim, len(x.shape))], "softmax runs over it")
    same(node)


@rule("cumsum", "cumprod", "logcumsumexp", "cummax", "cummin", "sort", "topk", "flip", "roll", "tril", "triu", "kthvalue")
def _ordered(scope: Scope, node: Node) -> None:
    x, name = node.args[0], op_name(node.op)
    rank = len(x.shape)
    if name in ("tril", "triu"):
        dims: Any = [rank - 2, rank - 1]
    elif name in ("topk", "kthvalue"):
        dims = argument(node, 2, "dim", -1)
    elif name == "roll":
        dims = argument(node, 2, "dims", ()) or list(range(rank))
    elif name == "sort":
        dims = next((a for a in node.args[1:] if isinstance(a, int) and not isinstance(a, bool)), node.kwargs.get("dim", -1))
    else:
        dims = argument(node, 1, "dim", -1)
    places = {wrap(d, rank) for d in ([dims] if isinstance(dims, int) else dims)}
    why = f"{name} depends on the order of its indices"
    for place in places:
        scope.fix(x.axes[place], why)
    for output in node.outputs:
        kept = [i for i in range(rank) if len(output.shape) == rank or i not in places]
        if output.axes is None:
            output.axes = [x.axes[i] if n == x.shape[i] else fixed(scope, n, why) for i, n in zip(kept, output.shape, strict=True)]


@rule("renorm")
def _renorm(scope: Scope, node: Node) -> None:
    x, _, dim = node.args[:3]
    for index, axis in enumerate(x.axes):
        if index != wrap(dim, len(x.shape)):
            scope.mix(axis, "a norm runs over it")
    same(node)


@rule("unfold")
def _unfold(scope: Scope, node: Node) -> None:
    x, dim = node.args[:2]
    dim = wrap(dim, len(x.shape))
    scope.fix(x.axes[dim], "a window slides along it")
    axes = list(x.axes)
    axes[dim] = fixed(scope, node.outputs[0].shape[dim], "a window slides along it")
    give(node, [*axes, fixed(scope, node.outputs[0].shape[-1], "a window slides along it")])
