"""Rules of what looks up by index."""

from __future__ import annotations

import torch

from ..structure import Structure, stiffen
from ..trace import Node, Value
from .elementwise import broadcast
from .registry import Scope, fixed, give, rule, same, unknown_axes, values, wrap


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


@rule("index_put", "_unsafe_index_put")
def _index_put(scope: Scope, node: Node) -> None:
    x, indices, written = node.args[:3]
    axes = iter(x.axes)
    kept: list[Structure] = []
    met: list[Structure] = []
    for index in indices:
        if index is None:
            kept.append(next(axes))
        elif index.dtype in (torch.bool, torch.uint8):
            for axis in index.axes:
                own = next(axes)
                met.append(own)
                scope.unify(own, axis)
        else:
            own = next(axes)
            met.append(own)
            scope.fix(own, "it is looked up by index")
    kept += axes
    if any(n != 1 for n in written.shape):
        # what is written has the axes of the indices and those that are not looked up; only the plain way of doing so is followed
        masks = any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in indices)
        plain = indices[0] is not None and sum(index is not None for index in indices) == 1 and not masks
        expected = [*indices[0].axes, *kept] if plain else None
        for place, axis in enumerate(reversed(written.axes)):
            if expected is None:
                scope.fix(axis, "it is written by index")
            elif written.shape[-1 - place] != 1:
                scope.unify(axis, expected[-1 - place])
        if expected is None:
            for axis in (*met, *kept):
                scope.fix(axis, "it is written by index")
    same(node)


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
