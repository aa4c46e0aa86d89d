"""The table of rules by op, and what rules share: what they may call, and how they read arguments and write axes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

from ..structure import Structure, fresh
from ..trace import Node, Value


class Scope(Protocol):
    """What a rule may call."""

    def unify(self, one: Structure, other: Structure) -> None: ...

    def fix(self, axis: Structure, why: str) -> None: ...

    def mix(self, axis: Structure, why: str, *, static: bool = False) -> None: ...

    def produce(self, weight: Value, axis: int) -> None: ...

    def consume(self, weight: Value, axis: int) -> bool: ...

    def at_least(self, axis: Structure, minimum: int) -> None: ...

    def group(self, groups: Structure, width: Structure) -> None: ...

    def normalise(self, axis: Structure) -> bool: ...

    def enter(self, axis: Structure) -> None: ...

    def write(self, value: Value) -> None: ...

    def follow(self, output: Value, input: Value, order: Sequence[int | None]) -> None: ...


Rule = Callable[[Scope, Node], None]
RULES: dict[str, Rule] = {}


def rule(*names: str) -> Callable[[Rule], Rule]:
    def register(function: Rule) -> Rule:
        for name in names:
            RULES[name] = function
        return function

    return register


def op_name(op: Any) -> str:
    """The ATen name without namespace and without the underscore of a variant that works in place."""
    namespace, _, name = op._schema.name.partition("::")
    plain = name.rstrip("_") if not name.endswith("__") else name
    return plain if namespace == "aten" else f"{namespace}::{name}"


def values(tree: Any) -> list[Value]:
    """The values in arguments, in order."""
    if isinstance(tree, Value):
        return [tree]
    if isinstance(tree, dict):
        tree = tree.values()
    elif not isinstance(tree, tuple | list):
        return []
    return [value for item in tree for value in values(item)]


def argument(node: Node, index: int, name: str, default: Any = None) -> Any:
    return node.args[index] if index < len(node.args) else node.kwargs.get(name, default)


def give(node: Node, *axes: list[Structure]) -> None:
    """Set the axes of the outputs; one that is an input, as in place, keeps its own."""
    for output, found in zip(node.outputs, axes, strict=False):
        if output.axes is None:
            output.axes = found


def wrap(dim: int, rank: int) -> int:
    return dim % rank if rank else 0


def same(node: Node, which: int = 0) -> None:
    source: Value = values(node.args)[which]
    for output in node.outputs:
        if output.axes is None and output.shape == source.shape:
            output.axes = list(source.axes or [])


def fixed(scope: Scope, n: int, why: str) -> Structure:
    axis = fresh(n)
    scope.fix(axis, why)
    return axis


def unknown_axes(value: Value) -> list[Structure]:
    return [fresh(n, "no rule says what it is") for n in value.shape]
