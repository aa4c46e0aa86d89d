"""Rules of matrix products, convolutions and attention."""

from __future__ import annotations

from ..structure import Structure, fresh
from ..trace import Node, Value
from .registry import Scope, argument, fixed, give, op_name, rule, same, unknown_axes, values


@rule("mm", "bmm")
def _matmul(scope: Scope, node: Node) -> None:
    a, b = node.args[:2]
    give(node, product(scope, a, b))


def product(scope: Scope, a: Value, b: Value) -> list[Structure]:
    """The axes of ``a @ b``, both matrices or both batches of them."""
    assert a.axes is not None and b.axes is not None
    for one, other in zip(a.axes[:-2], b.axes[:-2], strict=True):
        scope.unify(one, other)
    contract(scope, a, -1, b, -2)
    scope.produce(b, -1)
    scope.produce(a, -2)
    return [*a.axes[:-1], b.axes[-1]]


def contract(scope: Scope, a: Value, i: int, b: Value, j: int) -> None:
    """Sum over an axis of both. Where one is a weight, units whose column in it is zero take no part; where both are, one makes them."""
    assert a.axes is not None and b.axes is not None
    scope.unify(a.axes[i], b.axes[j])
    if scope.consume(b, j):
        scope.produce(a, i)
    elif not scope.consume(a, i):
        scope.mix(a.axes[i], "two activations are multiplied along it", static=True)


@rule("addmm", "baddbmm", "addbmm")
def _addmm(scope: Scope, node: Node) -> None:
    bias, a, b = node.args[:3]
    axes = product(scope, a, b)
    if op_name(node.op) == "addbmm":
        contract(scope, a, 0, b, 0)
        axes = axes[1:]
    give(node, axes)
    for index, axis in enumerate(reversed(bias.axes)):
        if bias.shape[-1 - index] != 1:
            scope.unify(axis, axes[-1 - index])


@rule("mv", "dot", "vdot")
def _vector(scope: Scope, node: Node) -> None:
    a, b = node.args[:2]
    contract(scope, a, -1, b, -1)
    give(node, list(a.axes[:-1]))


@rule("addmv")
def _addmv(scope: Scope, node: Node) -> None:
    bias, a, b = node.args[:3]
    contract(scope, a, -1, b, -1)
    scope.unify(bias.axes[0], a.axes[0])
    give(node, list(a.axes[:-1]))


@rule("linear", "mkldnn_linear")
def _linear(scope: Scope, node: Node) -> None:
    x, weight = node.args[:2]
    bias = argument(node, 2, "bias")
    contract(scope, x, -1, weight, -1)
    scope.produce(weight, 0)
    if isinstance(bias, Value):
        scope.unify(bias.axes[0], weight.axes[0])  # type: ignore[index]
    give(node, [*x.axes[:-1], *weight.axes[:-1]])


@rule("convolution", "_convolution", "convolution_overrideable", "mkldnn_convolution")
def _convolution(scope: Scope, node: Node) -> None:
    x, weight, bias = node.args[:3]
    transposed, groups = bool(argument(node, 6, "transposed", False)), int(argument(node, 8, "groups", 1))
    into, out = (0, 1) if transposed else (1, 0)
    channels = weight.axes[out]
    if groups == 1:
        contract(scope, x, 1, weight, into)
        scope.produce(weight, out)
    else:
        count = fresh(groups)
        width = fresh(weight.shape[0] // groups)
        scope.unify(weight.axes[0], (*count, *width))
        scope.unify(x.axes[1], (*count, *(width if transposed else weight.axes[1])))
        scope.group(count, width)
        scope.group(count, weight.axes[1])
        scope.enter(x.axes[1])
        scope.produce(weight, 0)
        if transposed:
            scope.produce(weight, 1)
            scope.mix(width, "a grouped convolution sums over it", static=True)  # where it is the groups that stay as they are
        else:
            scope.consume(weight, 1)
        channels = (*count, *weight.axes[1]) if transposed else weight.axes[0]
    if isinstance(bias, Value):
        scope.unify(bias.axes[0], channels)  # type: ignore[index]
    for axis in (*x.axes[2:], *weight.axes[2:]):
        scope.fix(axis, "a kernel slides along it")
    give(node, [x.axes[0], channels, *[fixed(scope, n, "a kernel slides along it") for n in node.outputs[0].shape[2:]]])


def attention(scope: Scope, node: Node) -> None:
    """``softmax(query key^T + mask) value``: heads and batch stay, the size of a head is contracted, that of a value comes out."""
    query, key, value = node.args[:3]
    mask = next((v for v in values((node.args[3:], node.kwargs)) if len(v.shape) >= 2), None)
    for one, other in zip(query.axes[:-2], key.axes[:-2], strict=True):
        scope.unify(one, other)
    for one, other in zip(key.axes[:-1], value.axes[:-1], strict=True):
        scope.unify(one, other)
    scope.unify(query.axes[-1], key.axes[-1])
    scope.mix(query.axes[-1], "attention scales by its size")
    scope.mix(key.axes[-2], "softmax runs over it")
    scores = [*query.axes[:-1], key.axes[-2]]
    if mask is not None:
        for index, axis in enumerate(reversed(mask.axes or [])):
            if mask.shape[-1 - index] != 1:
                scope.unify(axis, scores[-1 - index])
    give(node, [*query.axes[:-1], value.axes[-1]])
    for output in node.outputs[1:]:
        if output.axes is None:
            matches = output.shape == query.shape[:-1]
            output.axes = list(query.axes[:-1]) if matches else unknown_axes(output)


@rule("_native_multi_head_attention", "_transformer_encoder_layer_fwd")
def _fused_encoder(scope: Scope, node: Node) -> None:
    """Fast paths of modules whose plain path says the same in full."""
    same(node)
    for output in node.outputs:
        if output.axes is None:
            output.axes = unknown_axes(output)
