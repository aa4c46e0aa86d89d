"""Rules of elementwise ops, of copies, and of tensors that code makes."""

from __future__ import annotations

from collections.abc import Iterable

from ..structure import Structure, fresh
from ..trace import Node, Value
from .registry import RULES, Scope, give, rule, same, values


def broadcast(scope: Scope, inputs: Iterable[Value], rank: int) -> list[Structure]:
    """The axes that operands have together once they are aligned from the right."""
    found: list[Structure] = [()] * rank
    for value in inputs:
        offset = rank - len(value.shape)
        for index, axis in enumerate(value.axes or []):
            place = index + offset
            if place < 0 or value.shape[index] == 1:
                continue
            if found[place] == ():
                found[place] = axis
            else:
                scope.unify(found[place], axis)
    return found


def pointwise(scope: Scope, node: Node) -> None:
    rank = max((len(output.shape) for output in node.outputs), default=0)
    axes = broadcast(scope, values((node.args, node.kwargs)), rank)
    give(node, *[axes] * len(node.outputs))


# what torch does not tag as such
for _name in ("copy", "native_dropout", "_fused_dropout", "bernoulli", "normal", "uniform", "hardswish", "hardsigmoid", "hardtanh", "mish"):
    RULES[_name] = pointwise
for _name in ("softplus", "threshold", "log_sigmoid_forward", "rrelu_with_noise", "nan_to_num", "masked_fill", "where", "_prelu_kernel"):
    RULES[_name] = pointwise


@rule("clone", "detach", "alias", "_to_copy", "lift_fresh", "lift_fresh_copy", "lift", "_conj", "fill", "zero")
def _copy(scope: Scope, node: Node) -> None:
    same(node)
    source = values(node.args)[0]
    for output in node.outputs:
        scope.follow(output, source, range(len(source.shape)))


@rule("zeros_like", "ones_like", "full_like", "empty_like", "rand_like", "randn_like", "exponential", "random")
def _like(scope: Scope, node: Node) -> None:
    same(node)


@rule("zeros", "ones", "full", "empty", "rand", "randn", "scalar_tensor", "new_zeros", "new_ones", "new_full", "new_empty", "empty_strided")
@rule("new_empty_strided", "empty_permuted")
def _uniform(scope: Scope, node: Node) -> None:
    give(node, [fresh(n) for n in node.outputs[0].shape])


@rule("arange", "linspace", "eye", "randperm", "randint", "tril_indices", "triu_indices", "hann_window", "logspace")
def _counted(scope: Scope, node: Node) -> None:
    axes = [fresh(n) for n in node.outputs[0].shape]
    for axis in axes:
        scope.fix(axis, "code numbers its indices")
    give(node, axes)
