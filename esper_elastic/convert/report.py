"""How a plan prints."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .plan import Plan

_SHOWN = 4


def report(plan: Plan) -> str:
    """The plan as text: one line per dim, its bindings, what it cannot do; the switches; what is rigid, and why."""
    total, elastic = plan.parameters
    lines = [f"{len(plan.dims)} dims; {elastic:,} of {total:,} parameters ({plan.coverage:.1%}) lie on one", ""]
    width = max((len(dim.name) for dim in plan.dims), default=0)
    for dim in plan.dims:
        step = f", multiples of {dim.multiple_of}" if dim.multiple_of > 1 else ""
        line = f"  {dim.name:<{width}}  {dim.size} active of {dim.capacity}, from {dim.minimum}{step}"
        lines.append(line)
        lines += [f"  {'':<{width}}    {text}" for text in _details(dim.bindings, dim.compact_only, dim.mixed, dim.note)]
    if plan.switches:
        lines += ["", "switches"]
        lines += [f"  {path}: {kind}" for path, kind in plan.switches.items()]
    if plan.rigid:
        lines += ["", "rigid"]
        reasons = Counter((axis.reason) for axis in plan.rigid)
        for reason, count in reasons.most_common():
            names = [f"{axis.tensor}[{axis.axis}]" for axis in plan.rigid if axis.reason == reason]
            lines.append(f"  {_some(names, count)}: {reason}")
    return "\n".join(lines)


def _details(bindings: list[str], compact_only: str | None, mixed: str | None, note: str | None) -> list[str]:
    found = [f"runs through {_some(bindings, len(bindings))}"]
    found.append("compact and static layout" if compact_only is None else f"compact layout only: {compact_only}")
    if mixed is not None:
        found.append(f"grows with exact=False only: {mixed}")
    if note is not None:
        found.append(note)
    return found


def _some(names: list[str], count: int) -> str:
    shown = ", ".join(names[:_SHOWN])
    return shown if count <= _SHOWN else f"{shown} and {count - _SHOWN} more"
