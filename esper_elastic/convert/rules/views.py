"""Rules of views: what regroups, reorders, repeats or drops axes and leaves every axis whole."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import torch

from ..structure import Structure, concat, fresh, resolve
from ..trace import Node, Value
from .registry import Scope, argument, fixed, give, rule, wrap


@rule("view", "_unsafe_view", "_reshape_alias", "view_copy")
def _view(scope: Scope, node: Node) -> None:
    x, output = node.args[0], node.outputs[0]
    if output.axes is None:
        output.axes = regroup(scope, x, output.shape)
        places = [place for place, n in enumerate(x.shape) if n != 1]
        if [x.shape[place] for place in places] == [n for n in output.shape if n != 1]:
            scope.follow(output, x, [None if n == 1 else places.pop(0) for n in output.shape])


@rule("as_strided")
def _as_strided(scope: Scope, node: Node) -> None:
    """What ``reshape`` of some tensors comes to; any other use is not understood."""
    x, shape, stride = node.args[:3]
    start = argument(node, 3, "storage_offset")
    layout = torch.empty_strided(x.shape, x.stride, device="meta")
    try:
        viewed = layout.view(shape).stride()
        is_view = start in (None, x.offset) and all(n == 1 or a == b for n, a, b in zip(shape, viewed, stride, strict=True))
    except RuntimeError:
        is_view = False
    if is_view:
        give(node, regroup(scope, x, shape))
    else:
        for axis in x.axes:
            scope.fix(axis, "code addresses its memory")
        give(node, [fixed(scope, n, "code addresses its memory") for n in shape])


def regroup(scope: Scope, x: Value, shape: Sequence[int]) -> list[Structure]:
    """The axes after a view: runs of axes of equal size, in row-major order, are the same indices."""
    assert x.axes is not None
    found: list[Structure] = []
    if 0 in shape:
        return [fresh(n) for n in shape]
    i = j = 0
    while i < len(x.shape) or j < len(shape):
        i0, j0 = i, j
        before = after = 1
        if i < len(x.shape):
            before, i = x.shape[i], i + 1
        if j < len(shape):
            after, j = shape[j], j + 1
        while before != after:
            if before < after:
                before, i = before * x.shape[i], i + 1
            else:
                after, j = after * shape[j], j + 1
        if i - i0 == 1 and j - j0 == 1:
            found.append(x.axes[i0])
        elif j - j0 == 1:
            found.append(tuple(itertools.chain.from_iterable(x.axes[i0:i])))
        else:
            parts = split_known(tuple(itertools.chain.from_iterable(x.axes[i0:i])), shape[j0:j])
            if parts is None:
                parts = [fresh(n) for n in shape[j0:j]]
                scope.unify(tuple(itertools.chain.from_iterable(x.axes[i0:i])), tuple(itertools.chain.from_iterable(parts)))
            found += parts
    return found


def split_known(axis: Structure, shape: Sequence[int]) -> list[Structure] | None:
    """The factors of an axis dealt out to ``shape``, if they happen to fit."""
    factors = list(resolve(axis))
    parts: list[Structure] = []
    for n in shape:
        part: list[Any] = []
        while math.prod(f.size for f in part) < n and factors:
            part.append(factors.pop(0))
        if math.prod(f.size for f in part) != n:
            return None
        parts.append(tuple(part))
    return None if factors else parts


@rule("permute")
def _permute(scope: Scope, node: Node) -> None:
    x, order = node.args[:2]
    order = [wrap(d, len(x.shape)) for d in order]
    give(node, [x.axes[d] for d in order])
    scope.follow(node.outputs[0], x, order)


@rule("transpose", "t")
def _transpose(scope: Scope, node: Node) -> None:
    x = node.args[0]
    rank = len(x.shape)
    order = list(range(rank))
    a, b = (wrap(d, rank) for d in node.args[1:3]) if len(node.args) > 2 else (max(rank - 2, 0), max(rank - 1, 0))
    if rank:
        order[a], order[b] = order[b], order[a]
    give(node, [x.axes[d] for d in order])
    scope.follow(node.outputs[0], x, order)


@rule("unsqueeze")
def _unsqueeze(scope: Scope, node: Node) -> None:
    x, dim = node.args[:2]
    place = wrap(dim, len(x.shape) + 1)
    give(node, [*x.axes[:place], (), *x.axes[place:]])
    scope.follow(node.outputs[0], x, [*range(place), None, *range(place, len(x.shape))])


@rule("squeeze")
def _squeeze(scope: Scope, node: Node) -> None:
    x = node.args[0]
    dims = node.args[1] if len(node.args) > 1 else range(len(x.shape))
    dims = {wrap(d, len(x.shape)) for d in ([dims] if isinstance(dims, int) else dims)}
    kept = [index for index, n in enumerate(x.shape) if not (n == 1 and index in dims)]
    for index in dims & set(kept):
        scope.at_least(x.axes[index], 2)
    give(node, [x.axes[index] for index in kept])
    scope.follow(node.outputs[0], x, kept)


@rule("expand", "expand_copy")
def _expand(scope: Scope, node: Node) -> None:
    x, output = node.args[0], node.outputs[0]
    offset = len(output.shape) - len(x.shape)
    give(
        node,
        [x.axes[index - offset] if index >= offset and x.shape[index - offset] == n else fresh(n) for index, n in enumerate(output.shape)],
    )
    scope.follow(
        output, x, [index - offset if index >= offset and x.shape[index - offset] == n else None for index, n in enumerate(output.shape)]
    )


@rule("repeat")
def _repeat(scope: Scope, node: Node) -> None:
    x, output = node.args[0], node.outputs[0]
    offset = len(output.shape) - len(x.shape)
    axes: list[Structure] = []
    for index, n in enumerate(output.shape):
        own = x.shape[index - offset] if index >= offset else 1
        if own == 1:
            axes.append(fresh(n))
        else:
            axes.append(concat([x.axes[index - offset]] * (n // own)))
    give(node, axes)


@rule("select", "select_copy")
def _select(scope: Scope, node: Node) -> None:
    x, dim = node.args[:2]
    dim = wrap(dim, len(x.shape))
    scope.fix(x.axes[dim], "code picks one index of it")
    give(node, [axis for index, axis in enumerate(x.axes) if index != dim])


@rule("unbind", "unbind_copy")
def _unbind(scope: Scope, node: Node) -> None:
    x = node.args[0]
    dim = wrap(int(argument(node, 1, "dim", 0)), len(x.shape))
    scope.fix(x.axes[dim], "code takes it apart")
    axes = [axis for index, axis in enumerate(x.axes) if index != dim]
    give(node, *[list(axes) for _ in node.outputs])
