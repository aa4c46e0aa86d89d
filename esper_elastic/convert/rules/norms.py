"""Rules of norms."""

from __future__ import annotations

from ..structure import fresh
from ..trace import Node
from .registry import Scope, argument, give, rule, unknown_axes, values, wrap


@rule("native_batch_norm", "_native_batch_norm_legit", "_native_batch_norm_legit_functional", "_native_batch_norm_legit_no_training")
@rule("cudnn_batch_norm", "_batch_norm_with_update", "_batch_norm_no_update")
def _batch_norm(scope: Scope, node: Node) -> None:
    x, *others = values((node.args, node.kwargs))
    channels = x.axes[1]  # type: ignore[index]
    for value in others:
        scope.unify(value.axes[0], channels)  # type: ignore[index]
    if not scope.normalise(channels):
        for value in values(node.args[3:5]):
            scope.write(value)
    give(
        node,
        list(x.axes or []),
        *[[channels] if len(v.shape) == 1 and v.shape[0] == x.shape[1] else unknown_axes(v) for v in node.outputs[1:]],
    )


@rule("native_layer_norm", "_fused_rms_norm")
def _layer_norm(scope: Scope, node: Node) -> None:
    x, *affine = values((node.args, node.kwargs))
    count = len(node.args[1])
    for value in affine:
        for one, other in zip(value.axes or [], (x.axes or [])[-count:], strict=True):
            scope.unify(one, other)
    assert x.axes is not None
    first, *rest = x.axes[-count:]
    for axis in rest:
        scope.fix(axis, "it is a further axis of a layer norm")
    if not scope.normalise(first):
        scope.mix(first, "a norm runs over it")
    statistics = [*x.axes[:-count], *[()] * count]
    give(node, list(x.axes), statistics, statistics)


@rule("native_group_norm")
def _group_norm(scope: Scope, node: Node) -> None:
    x, *affine = values((node.args, node.kwargs))
    assert x.axes is not None
    channels = x.axes[1]
    groups = int(argument(node, 6, "group"))
    count = fresh(groups)
    for value in affine:
        scope.unify(value.axes[0], channels)  # type: ignore[index]
    if groups > 1:
        width = fresh(x.shape[1] // groups)
        scope.unify(channels, (*count, *width))
        scope.group(count, width)
        scope.normalise(channels)
        scope.mix(width, "a norm runs over it")  # where it is the groups that stay as they are
    elif not scope.normalise(channels):
        scope.mix(channels, "a norm runs over it")
    statistics = [x.axes[0], count]
    give(node, list(x.axes), statistics, statistics)


@rule("_weight_norm_interface")
def _weight_norm(scope: Scope, node: Node) -> None:
    v, g = node.args[:2]
    dim = wrap(int(argument(node, 2, "dim", 0)), len(v.shape))
    for index, axis in enumerate(v.axes):
        if index == dim:
            scope.unify(axis, g.axes[dim])
        else:
            scope.mix(axis, "a weight norm runs over it")
    give(node, list(v.axes), list(g.axes))
