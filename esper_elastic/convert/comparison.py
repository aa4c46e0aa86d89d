"""A run at other widths beside the first one, op by op: where they part, and which numbers differ."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

from torch.utils._pytree import tree_leaves

from . import rules
from .structure import measure
from .trace import Call, Failure, Node, Run, Stop

#: Ops that some widths need and others do not: they leave values as they are.
_OPTIONAL = ("clone", "alias", "detach", "contiguous")


class Mismatch(NamedTuple):
    """Where a run at other widths left what axes predict."""

    at: int
    node: Node | None  # of the first run
    literals: list[tuple[int, int]]  # integers in the op's arguments, then and now
    call: Call
    line: str
    what: str


class Comparison:
    """Compares a run with the first one as it goes, and ends it where they part."""

    def __init__(self, first: Run, width: Any) -> None:
        self.first = first
        self.width = width
        self.nodes = [index for index, node in enumerate(first.nodes) if kind(node.op) not in _OPTIONAL]
        self.count = 0
        self.last: Call | None = None
        self.mismatch: Mismatch | None = None
        self.computed: Node | None = None  # the first op whose numbers are others

    def __call__(self, event: Node | Failure) -> None:
        if isinstance(event, Node) and kind(event.op) in _OPTIONAL:
            return
        self.last = event.call
        index = self.nodes[self.count] if self.count < len(self.nodes) else len(self.first.nodes)
        known = self.first.nodes[index] if index < len(self.first.nodes) else None
        if isinstance(event, Failure):
            if known is not None and known.line != event.line:
                known = None
            self._end(event, known, index, (event.args,), f"{type(event.error).__name__}: {event.error}")
        elif known is None or kind(known.op) != kind(event.op):
            self._end(event, None, index, (), f"it runs {rules.op_name(event.op)} where it ran {_ran(known)}")
        else:
            self.count += 1
            if len(known.outputs) != len(event.outputs):
                what = f"{rules.op_name(event.op)} gives {len(event.outputs)} tensors, expected {len(known.outputs)}"
                self._end(event, known, index, (event.args, event.kwargs), what)
            for then, now in zip(known.outputs, event.outputs, strict=True):
                predicted = tuple(measure(axis, self.width) for axis in then.axes or [])
                if predicted != now.shape:
                    what = f"{rules.op_name(event.op)} gives {list(now.shape)}, expected {list(predicted)}"
                    self._end(event, known, index, (event.args, event.kwargs), what)
            if self.computed is None and _numbers(known) != _numbers(event):
                self.computed = known

    def _end(self, event: Node | Failure, known: Node | None, index: int, arguments: Any, what: str) -> None:
        then = [] if known is None else list(_literals((known.args, known.kwargs)))
        now = list(_literals(arguments))
        call = self.first.calls[event.call.order] if 0 <= event.call.order < len(self.first.calls) else event.call
        self.mismatch = Mismatch(index, known, list(zip(then, now, strict=False)), call, event.line, " ".join(what.split())[:200])
        raise Stop

    @property
    def reached(self) -> int:
        """How far the run came, in ops of the first one."""
        return self.nodes[self.count] if self.count < len(self.nodes) else len(self.first.nodes)


def kind(op: Any) -> str:
    name = rules.op_name(op)
    return "view" if rules.RULES.get(name) in (rules.RULES["view"], rules.RULES["as_strided"]) else name


def _ran(node: Node | None) -> str:
    return "nothing" if node is None else rules.op_name(node.op)


def _numbers(node: Node) -> list[Any]:
    """The numbers that an op computes with, rather than shapes or places by."""
    found: list[Any] = [value.content for value in rules.values((node.args, node.kwargs)) if value.content is not None]
    for index, name in _numeric(node.op):
        given = rules.argument(node, index, name)
        found += [x for x in tree_leaves(given) if isinstance(x, int | float) and not isinstance(x, bool)]
    return found


@functools.cache
def _numeric(op: Any) -> list[tuple[int, str]]:
    """The arguments of an op that are numbers, or all where it works on elements."""
    elementwise = rules.find(op) is rules.pointwise
    return [(i, a.name) for i, a in enumerate(op._schema.arguments) if elementwise or str(a.type) in _NUMBERS]


_NUMBERS = ("number", "float", "Optional[number]", "Optional[float]", "List[number]", "List[float]")


def _literals(tree: Any) -> Iterator[int]:
    if isinstance(tree, bool):
        return
    if isinstance(tree, int):
        yield tree
    elif isinstance(tree, dict):
        for item in tree.values():
            yield from _literals(item)
    elif isinstance(tree, tuple | list):
        for item in tree:
            yield from _literals(item)
