"""Rules of what looks up by index."""

from __future__ import annotations

from ..structure import stiffen
from ..trace import Node, Value
from .elementwise import broadcast
from .registry import Scope, fixed, give, rule, unknown_axes, values, wrap


@rule("embedding")
def _embedding(scope: Scope, node: Node) -> None:
    weight, indices = node.args[:2]
    scope.fix(weight.axes[0], "it is looked up by index")
    scope.produce(weight, 1)
    give(node, [*indices.axes, weight.axes[1]])


@rule("_embedding_bag", "_embedding_bag_forward_only")
def _embedding_bag(scope: Scope, node: Node) -> None:
    weight = node.args[0]
    scope.fix(weight.axes[0], "it is looked up by index")
    scope.produce(weight, 1)
    give(node, [fixed(scope, node.outputs[0].shape[0], "it counts bags"), weight.axes[1]], *[unknown_axes(v) for v in node.outputs[1:]])


@rule("index", "_unsafe_index")
def _index(scope: Scope, node: Node) -> None:
    x, indices = node.args[:2]
    places = [i for i, index in enumerate(indices) if index is not None]
    rank = max(len(indices[i].shape) for i in places)
    looked_up = broadcast(scope, [indices[i] for i in places], rank)
    for place in places:
        scope.fix(x.axes[place], "it is looked up by index")
    rest = [axis for index, axis in enumerate(x.axes) if index not in places]
    adjacent = places == list(range(places[0], places[-1] + 1))
    first = places[0] if adjacent else 0
    give(node, [*rest[:first], *looked_up, *rest[first:]])


@rule("index_select")
def _index_select(scope: Scope, node: Node) -> None:
    x, dim, index = node.args[:3]
    dim = wrap(dim, len(x.shape))
    scope.fix(x.axes[dim], "it is looked up by index")
    give(node, [*x.axes[:dim], index.axes[0] if index.axes else (), *x.axes[dim + 1 :]])


@rule("gather")
def _gather(scope: Scope, node: Node) -> None:
    x, dim, index = node.args[:3]
    along(scope, dim, x, index)
    give(node, list(index.axes))


@rule("scatter", "scatter_add", "scatter_reduce", "index_add", "index_copy", "index_fill")
def _scatter(scope: Scope, node: Node) -> None:
    x, dim, index = node.args[:3]
    others = [v for v in values(node.args[2:]) if len(v.shape) == len(x.shape)]
    along(scope, dim, x, *others)
    if len(index.shape) != len(x.shape):
        for axis in index.axes:
            scope.fix(axis, "it is looked up by index")
    give(node, list(x.axes))


def along(scope: Scope, dim: int, *operands: Value) -> None:
    """Operands that meet index by index on every axis but one, which is looked up."""
    first = operands[0]
    assert first.axes is not None
    dim = wrap(dim, len(first.shape))
    for value in operands:
        for index, axis in enumerate(value.axes or []):
            if index == dim:
                scope.fix(axis, "it is looked up by index")
            elif value is not first:
                if value.shape[index] == first.shape[index]:
                    scope.unify(first.axes[index], axis)
                else:
                    stiffen(axis, "it meets part of another axis")
                    stiffen(first.axes[index], "part of it meets another axis")
