"""What conversion will do to a model, as data: dims, what each module becomes, which blocks get a switch, and what stays rigid and why.

A plan is made by :mod:`planner`; it prints itself, and travels as JSON. It is carried out by :mod:`elasticize`, on the model that it was
made from or on another of the same structure.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from torch import nn

from ..errors import ConversionError

FORMAT = 1

#: An axis as data: per stretch ``[index of the dim, inner]``, or ``[None, length]`` for fixed indices.
Stretches = list[list[Any]]


@dataclasses.dataclass
class PlannedDim:
    """A dim to be made.

    Attributes:
        name: the path of the first module that produces it.
        size: the present width.
        capacity: the width to allocate.
        minimum: the smallest width.
        multiple_of: what every width is a multiple of.
        bindings: ``tensor[axis]`` of every tensor axis that it runs through.
        compact_only: why it cannot change in static layout, or ``None``.
        mixed: what plain code computes from all of its units at once, or ``None``.
        note: why its capacity is not what was asked for, or ``None``.
    """

    name: str
    size: int
    capacity: int
    minimum: int
    multiple_of: int
    bindings: list[str]
    compact_only: str | None = None
    mixed: str | None = None
    note: str | None = None


@dataclasses.dataclass
class PlannedModule:
    """What one module becomes.

    Attributes:
        path: of the module.
        layer: name of the elastic layer that takes its place, or ``None`` for a view of its tensors and sizes.
        axes: of a layer, by the names that its constructor knows.
        tensors: of a view, the axes of each parameter and buffer; ``None`` where a size is fixed.
        sizes: attributes that follow axes, each ``{"axis": ..., "over": divisor}``; of a tuple, a list with that or ``None`` per element.
        newborn: of a view, what newborn units get, per tensor and axis.
        mixed: of a view, whether newborn units change what it gives.
        switch: ``"block"`` or ``"branch"`` if it gets a switch.
    """

    path: str
    layer: str | None = None
    axes: dict[str, Stretches] = dataclasses.field(default_factory=dict)
    tensors: dict[str, list[Stretches | None]] = dataclasses.field(default_factory=dict)
    sizes: dict[str, Any] = dataclasses.field(default_factory=dict)
    newborn: dict[str, list[str]] = dataclasses.field(default_factory=dict)
    mixed: bool = False
    switch: str | None = None


@dataclasses.dataclass
class RigidAxis:
    """An axis of a parameter that stays as it is."""

    tensor: str
    axis: int
    size: int
    reason: str


@dataclasses.dataclass
class Plan:
    """What conversion will do.

    Attributes:
        dims: to be made, in the order of the modules that produce them.
        modules: to be changed.
        rigid: axes of parameters that stay as they are.
        parameters: number of elements of all parameters, and of those that have an elastic axis.
    """

    dims: list[PlannedDim]
    modules: list[PlannedModule]
    rigid: list[RigidAxis]
    parameters: tuple[int, int]

    @property
    def coverage(self) -> float:
        """The share of the parameters' elements that lie on an elastic axis."""
        total, elastic = self.parameters
        return elastic / total if total else 0.0

    @property
    def switches(self) -> dict[str, str]:
        """The modules that get a switch, and of which kind."""
        return {module.path: module.switch for module in self.modules if module.switch is not None}

    def to_json(self) -> dict[str, Any]:
        """The plan as JSON-able data."""
        return {"format": FORMAT, **dataclasses.asdict(self)}

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Plan:
        """The plan that :meth:`to_json` wrote.

        Raises:
            ConversionError: it is none.
        """
        try:
            if content["format"] != FORMAT:
                raise ConversionError(
                    f"plan: format: expected {FORMAT}, got {content['format']!r}. Another version of esper_elastic wrote it."
                )
            return cls(
                [PlannedDim(**item) for item in content["dims"]],
                [PlannedModule(**item) for item in content["modules"]],
                [RigidAxis(**item) for item in content["rigid"]],
                (int(content["parameters"][0]), int(content["parameters"][1])),
            )
        except (KeyError, TypeError, IndexError) as error:
            raise ConversionError(f"plan: expected what Plan.to_json() gives, got something else ({error!r}).") from error

    def apply(self, model: nn.Module, optimizer: Any = None) -> None:
        """Carry the plan out on ``model``: see :func:`esper_elastic.elasticize`."""
        from .elasticize import apply_plan

        apply_plan(self, model, optimizer)

    def __str__(self) -> str:
        from .report import report

        return report(self)
