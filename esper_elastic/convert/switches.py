"""Which modules of a model can be switched off: parts that preserve shapes, and branches whose output is added to something."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from torch import nn

from . import rules
from .names import clash
from .structure import resolve
from .trace import Call, Run, Value
from .verify import Mode


def find_switches(model: nn.Module, runs: Mapping[Mode, Run]) -> dict[str, str]:
    """Path -> kind of every module that can have a switch.

    A ``"block"`` is a child of a ``Sequential`` or ``ModuleList`` that takes one tensor and gives one with the same axes. A ``"branch"``
    is a module that does so too, whose output an addition takes as it is. Both have children and parameters of their own below them.
    """
    found: dict[str, str] = {}
    lists = {
        f"{path}.{name}".lstrip(".")
        for path, module in model.named_modules()
        if isinstance(module, nn.Sequential | nn.ModuleList)
        for name in module._modules
    }
    for run in runs.values():
        added = {id(value) for value in _added(run)}
        for path, calls in _calls(run).items():
            if all(_preserves(call) for call in calls):
                if path in lists:
                    found.setdefault(path, "block")
                elif all(id(call.outputs[0]) in added for call in calls):
                    found.setdefault(path, "branch")
        for path, calls in _calls(run).items():
            if path in found and not all(_preserves(call) for call in calls):
                del found[path]
    return found


def _calls(run: Run) -> dict[str, list[Call]]:
    found: dict[str, list[Call]] = {}
    for call in run.calls:
        inside = next(call.module.parameters(), None) is not None and next(call.module.children(), None) is not None
        if call.path and inside and not isinstance(call.module, nn.Sequential | nn.ModuleList) and clash(call.module) is None:
            found.setdefault(call.path, []).append(call)
    return found


def _preserves(call: Call) -> bool:
    """Whether a module's one output has the axes of its first input, and is another tensor."""
    if not call.single or not call.inputs or len(call.outputs) != 1 or call.outputs[0] is call.inputs[0]:
        return False
    before, after = call.inputs[0].axes or [], call.outputs[0].axes or []
    return len(before) == len(after) and all(resolve(a) == resolve(b) for a, b in zip(before, after, strict=True))


def _added(run: Run) -> Iterator[Value]:
    for node in run.nodes:
        if rules.op_name(node.op) == "add":
            operands = rules.values(node.args[:2])
            if len(operands) == 2 and operands[0].shape == operands[1].shape:
                yield from operands
