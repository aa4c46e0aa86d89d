"""How much of a model is elastic, measured: every dim is halved, the model has to compute there, and what became narrower is counted.

A parameter is elastic if one of its axes, in the exported model with all dims halved, has at most half of its indices. The plan is asked
for names and reasons alone; what it promises is not counted.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from converting import EXACT, assert_close
from torch import Tensor, nn
from zoo import Inputs, call, floating_leaves

import esper_elastic as ee
from esper_elastic.convert.elasticize import plan_of


class Rigid(NamedTuple):
    """Parameters that stay as they are for one reason.

    Attributes:
        reason: of each axis that could have halved, and where the code is that decides it.
        names: of the parameters, module path included.
        elements: how many they have.
    """

    reason: str
    names: list[str]
    elements: int


class Coverage(NamedTuple):
    """What was measured on one model.

    Attributes:
        dims: how many it has, and how many of them reach half of their width.
        elements: of all parameters, and of the elastic ones.
        rigid: the others, the largest first.
    """

    dims: tuple[int, int]
    elements: tuple[int, int]
    rigid: list[Rigid]

    @property
    def share(self) -> float:
        """Of the elements of all parameters, those in elastic ones."""
        return self.elements[1] / self.elements[0]


def coverage_of(
    model: nn.Module,
    inputs: Inputs,
    outputs: Callable[[Any], list[Tensor]] = floating_leaves,
    *,
    each: bool = True,
    tolerance: float = EXACT,
) -> Coverage:
    """Convert a copy of a model, halve its dims, and count.

    Args:
        model: left as it is.
        inputs: that it is converted with and run on, in evaluation mode.
        outputs: the tensors to compare, from what the model returns.
        each: halve every dim alone as well.
        tolerance: relative error that two orders of the same additions may leave.

    Raises:
        AssertionError: at some width the model does not compute what its exported twin does, or at full width what it did before.
    """
    elastic = copy.deepcopy(model).eval()
    expected = results(elastic, inputs, outputs)
    ee.elasticize(elastic, inputs)
    compare(results(elastic, inputs, outputs), expected, "full width", tolerance)
    dims = ee.dims(elastic)
    full, half = {name: dim.active for name, dim in dims.items()}, {name: halved(dim) for name, dim in dims.items()}
    reached = {name: n for name, n in half.items() if n is not None}
    for name, n in reached.items() if each else ():
        dims[name].resize(n)
        compare(results(elastic, inputs, outputs), results(ee.export(elastic), inputs, outputs), f"{name!r} at {n}", tolerance)
        dims[name].resize(full[name])
    ee.resize(elastic, reached)
    narrow = ee.export(elastic)
    compare(results(elastic, inputs, outputs), results(narrow, inputs, outputs), "half width", tolerance)
    sizes, shapes = dict(model.named_parameters()), {name: parameter.shape for name, parameter in narrow.named_parameters()}
    rigid = [name for name, parameter in sizes.items() if not any(2 * n <= m for n, m in zip(shapes[name], parameter.shape, strict=True))]
    total = sum(parameter.numel() for parameter in sizes.values())
    found = by_reason(elastic, {name: sizes[name] for name in rigid})
    return Coverage((len(dims), len(reached)), (total, total - sum(group.elements for group in found)), found)


def halved(dim: ee.ElasticDim) -> int | None:
    """The largest width of at most half, ``None`` where the smallest is more."""
    n = dim.active // 2
    n -= n % dim.multiple_of
    return n if n >= dim.minimum else None


def results(model: nn.Module, inputs: Inputs, outputs: Callable[[Any], list[Tensor]]) -> list[Tensor]:
    """What a model gives, under one seed."""
    torch.manual_seed(7)
    with torch.no_grad():
        found = [output.clone() for output in outputs(call(model, inputs))]
    assert found, "the model returns no tensor to compare"
    return found


def compare(got: list[Tensor], expected: list[Tensor], where: str, tolerance: float) -> None:
    """Two results are equal up to ``tolerance``."""
    assert len(got) == len(expected), f"{where}: {len(got)} outputs, expected {len(expected)}"
    for index, (one, other) in enumerate(zip(got, expected, strict=True)):
        assert_close(one, other, f"{where}: output {index}", tolerance)


def by_reason(elastic: nn.Module, parameters: dict[str, Tensor]) -> list[Rigid]:
    """Parameters grouped by what keeps them, those with the most elements first."""
    plan = plan_of(elastic)
    assert plan is not None
    why: dict[str, list[str]] = {name: [] for name in parameters}
    for axis in plan.rigid:
        if axis.tensor in why:
            why[axis.tensor].append(axis.reason)
    for dim in plan.dims:
        for name in {binding.rpartition("[")[0] for binding in dim.bindings} & why.keys():
            step = f" in steps of {dim.multiple_of}" if dim.multiple_of > 1 else ""
            why[name].append(f"its part {dim.name!r} goes from {dim.size} to {dim.minimum}{step}, and the axis not to its half")
    groups: dict[str, list[str]] = {}
    for name, reasons in why.items():
        whole = "; ".join(dict.fromkeys(reasons)) or ("it has one element" if parameters[name].numel() == 1 else "")
        groups.setdefault(whole, []).append(name)
    found = [Rigid(reason, names, sum(parameters[name].numel() for name in names)) for reason, names in groups.items()]
    return sorted(found, key=lambda group: -group.elements)
