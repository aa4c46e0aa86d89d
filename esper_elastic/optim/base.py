"""What AdamW and SGD share: state at capacity, step counts per element, and a step that touches active elements alone.

A *plan* remembers, for one parameter, which cells of its step counts are active and where they lie in memory. It holds until a commit,
a permutation or a load; with it, a step costs per parameter a few dictionary look-ups, and one call of a compiled op does the work for all
parameters of a group. What that op does not serve (other devices and dtypes, odd strides) goes through the functions of
``torch.optim``, on one view per cell.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from ..control import ControlBlock, Runs
from ..errors import OptimizerError
from ..followers import follow
from ..layers import registry
from ..layers.registry import ParameterAxes
from ..ops.backend import CHOICE, LIBRARY_MISSING
from .counts import StepCounts

_NATIVE = LIBRARY_MISSING is None and CHOICE != "reference"
_MOST_CELLS = 16


class Plan:
    """What one step needs to know of a parameter.

    Attributes:
        asleep: nothing is active.
        runs: the active indices of each axis.
        counts: in bands that fit ``runs``.
        vector: for the compiled op, see ``csrc/optim.cpp``; ``None`` where it does not serve.
        strides: that the compiled op expects of the gradient.
    """

    __slots__ = ("asleep", "block", "counts", "generation", "revision", "runs", "strides", "vector")

    def __init__(self, param: Tensor) -> None:
        self.revision = registry.revision()
        known = registry.lookup(param)
        self.block = _block_of(known)
        self.generation = -1 if self.block is None else self.block.generation
        self.asleep = param.numel() == 0 or (known is not None and known.asleep)
        self.runs: tuple[Runs, ...] = tuple([(0, size)] for size in param.shape) if known is None else known.runs(param.shape)
        self.strides = param.stride()
        self.counts: StepCounts
        self.vector: Tensor | None = None

    def holds(self) -> bool:
        """Whether widths, switches and bindings are as they were."""
        return self.revision == registry.revision() and (self.block is None or self.block.generation == self.generation)


class ElasticOptimizer(Optimizer):
    """Base of the optimizers of this package; :class:`esper_elastic.followers.Follower` says what ``grow`` and ``keep`` may ask of it."""

    def __init__(self, params: Any, defaults: dict[str, Any]) -> None:
        super().__init__(params, defaults)
        self._plans: dict[Tensor, Plan] = {}
        follow(self)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._plans = {}
        follow(self)

    # What a concrete optimizer supplies

    def _names(self, group: dict[str, Any]) -> tuple[str, ...]:
        """The state tensors of parameter shape that a step uses; without any, no counts are kept either."""
        raise NotImplementedError

    def _step_native(self, group: dict[str, Any], operands: list[list[Tensor]], counts: list[Tensor], plans: list[Tensor]) -> None:
        """Update whole groups by the compiled op. ``operands`` are parameters, gradients, then the state tensors by name."""
        raise NotImplementedError

    def _step_views(self, group: dict[str, Any], operands: list[list[Tensor]], counts: list[int]) -> None:
        """Update tensors whose elements were all updated ``counts`` times before, by the functions of ``torch.optim``."""
        raise NotImplementedError

    # Stepping

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update the active elements of every parameter that has a gradient.

        Args:
            closure: evaluates the model again and returns the loss.

        Effects: dormant elements of parameters and state are neither read nor written, nor anything under a switch that is off. State is
        allocated at capacity at a parameter's first step.

        Raises:
            OptimizerError: a gradient is sparse; nothing has changed.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._refuse_sparse()
        if len(self._plans) > sum(len(group["params"]) for group in self.param_groups):
            self._plans.clear()  # a parameter was removed, which a plan would keep alive
        for group in self.param_groups:
            self._step_group(group)
        return loss

    def _step_group(self, group: dict[str, Any]) -> None:
        names = self._names(group)
        native: dict[torch.dtype, tuple[list[list[Tensor]], list[Tensor], list[Tensor]]] = {}
        views: list[list[Tensor]] = [[] for _ in range(len(names) + 2)]
        view_counts: list[int] = []
        for param in group["params"]:
            grad = param.grad
            if grad is None:
                continue
            plan = self._plan(param, names)
            if plan.asleep:
                continue
            state = self.state[param] if names else {}
            if plan.vector is None or not _same_strides(grad, plan.strides):
                self._step_slowly(group, [param, grad, *(state[name] for name in names)], plan, views, view_counts)
                continue
            if param.dtype not in native:
                native[param.dtype] = [[] for _ in views], [], []
            operands, counts, plans = native[param.dtype]
            operands[0].append(param)
            operands[1].append(grad)
            for index, name in enumerate(names, 2):
                operands[index].append(state[name])
            counts.append(plan.counts.packed)
            plans.append(plan.vector)
        for operands, counts, plans in native.values():
            self._step_native(group, operands, counts, plans)
        if view_counts:
            self._step_views(group, views, view_counts)

    def _step_slowly(
        self, group: dict[str, Any], tensors: list[Tensor], plan: Plan, views: list[list[Tensor]], view_counts: list[int]
    ) -> None:
        """Queue one view per active cell; where there are many, update copies of all elements that share a count at once."""
        counts, table = plan.counts, plan.counts.table
        spans = [counts.spans(axis, runs) for axis, runs in enumerate(plan.runs)]
        if math.prod(map(len, spans)) <= _MOST_CELLS:
            for cell in itertools.product(*spans):
                index = tuple(slice(start, stop) for start, stop, _ in cell)
                for queue, tensor in zip(views, tensors, strict=True):
                    queue.append(tensor[index])
                band = tuple(band for _, _, band in cell)
                view_counts.append(int(table[band]))
                table[band] += 1
            return
        active = counts.dense().new_zeros(counts.shape, dtype=torch.bool)
        for corner in itertools.product(*plan.runs):
            active[tuple(slice(start, start + length) for start, length in corner)] = True
        dense = counts.dense()
        for count in dense[active].unique().tolist():
            chosen = (active & (dense == count)).to(tensors[0].device)
            parts = [[tensor[chosen]] for tensor in tensors]
            self._step_views(group, parts, [count])
            for tensor, part in zip((tensors[0], *tensors[2:]), (parts[0], *parts[2:]), strict=True):
                tensor[chosen] = part[0]
        table.copy_(counts.advance(plan.runs).table)

    def _plan(self, param: Tensor, names: tuple[str, ...]) -> Plan:
        """The plan of ``param``, made anew where widths, bindings or state are no longer those it was made for."""
        plan = self._plans.get(param)
        if plan is not None and plan.holds():
            if plan.asleep:
                return plan
            state = self.state[param] if names else {}
            if all(name in state for name in names) and (not names or state.get("step") is plan.counts.packed):
                return plan
        plan = self._plans[param] = Plan(param)
        if plan.asleep:
            return plan
        kept = self.state[param] if names else {}
        counts = StepCounts.unpack(kept["step"], param.shape) if "step" in kept else StepCounts(param.shape)
        plan.counts = counts.split(plan.runs)
        if names:
            kept["step"] = plan.counts.packed
        for name in names:
            if name not in kept:
                kept[name] = torch.zeros_like(param, memory_format=torch.preserve_format)
        native = _NATIVE and param.device.type == "cpu" and param.dtype in (torch.float32, torch.float64)
        if native and all(_same_strides(kept[name], plan.strides) for name in names):
            plan.vector = _vector(param, plan)
        return plan

    def _refuse_sparse(self) -> None:
        for index, group in enumerate(self.param_groups):
            for place, param in enumerate(group["params"]):
                if param.grad is not None and param.grad.layout != torch.strided:
                    raise OptimizerError(
                        f"{type(self).__name__}: parameter {place} of group {index}: expected a dense gradient, got {param.grad.layout}. "
                        "Build the layer that it belongs to with sparse=False."
                    )

    # Following

    @torch.no_grad()
    def permute_state(self, param: Tensor, axis: int, order: Tensor) -> None:
        state = self.state.get(param)
        for name, tensor in (state or {}).items():
            if name == "step":
                self.state[param]["step"] = StepCounts.unpack(tensor, param.shape).permute(axis, order).packed
            elif tensor.shape == param.shape:
                tensor.copy_(tensor.index_select(axis, order.to(tensor.device)))

    @torch.no_grad()
    def reset_state(self, param: Tensor, axis: int, start: int, stop: int) -> None:
        state = self.state.get(param)
        for name, tensor in (state or {}).items():
            if name == "step":
                self.state[param]["step"] = StepCounts.unpack(tensor, param.shape).reset(axis, start, stop).packed
            elif tensor.shape == param.shape:
                tensor.narrow(axis, start, stop - start).zero_()

    def step_counts(self, param: Tensor) -> Tensor:
        """How often each element of ``param`` was updated: int64, of its shape."""
        packed = self.state.get(param, {}).get("step")
        return (StepCounts(param.shape) if packed is None else StepCounts.unpack(packed, param.shape)).dense()


def at_least(label: str, what: str, value: Any, low: float, below: float = math.inf) -> None:
    """Check a hyperparameter.

    Raises:
        OptimizerError: it is no number in ``[low, below)``.
    """
    if isinstance(value, Tensor) and value.numel() != 1:
        raise OptimizerError(f"{label}: {what}: expected one number, got a tensor of shape {tuple(value.shape)}.")
    if not isinstance(value, int | float | Tensor) or not low <= value < below:
        bound = "" if below == math.inf else f" and less than {below:g}"
        raise OptimizerError(f"{label}: {what}: expected a number of at least {low:g}{bound}, got {value!r}.")


def _block_of(known: ParameterAxes | None) -> ControlBlock | None:
    if known is None:
        return None
    entries: Iterable[Any] = itertools.chain((dim for axis in known.axes if axis is not None for dim in axis.dims), known.switches)
    return next((entry.block for entry in entries), None)


def _same_strides(tensor: Tensor, strides: tuple[int, ...]) -> bool:
    """Whether ``tensor`` lies in memory as ``strides`` say; the stride of an axis of size 1 means nothing."""
    if tensor.stride() == strides:
        return True
    return all(mine == theirs or size == 1 for mine, theirs, size in zip(tensor.stride(), strides, tensor.shape, strict=True))


def _vector(param: Tensor, plan: Plan) -> Tensor | None:
    """The plan of the compiled op: the parameter as rows of columns, at most one elastic axis along each.

    ``None`` where memory has gaps, or more axes than two are cut into bands.
    """
    order = sorted((axis for axis, size in enumerate(param.shape) if size > 1), key=param.stride, reverse=True)
    sizes = [param.shape[axis] for axis in order]
    if [param.stride(axis) for axis in order] != [math.prod(sizes[place + 1 :]) for place in range(len(sizes))]:
        return None
    counts = plan.counts
    cut = [place for place, axis in enumerate(order) if len(counts.starts[axis]) > 1]
    if len(cut) > 2 or (len(cut) == 2 and math.prod(sizes[: cut[0]]) != 1):
        return None
    last = cut[-1] if cut else 0
    rows = [(0, math.prod(sizes[:last]), counts.offset)]
    if len(cut) == 2:
        rows = _bands(plan, order[cut[0]], math.prod(sizes[cut[0] + 1 : last]), counts.offset)
    columns = [(0, param.numel(), 0)]
    if cut:
        columns = _bands(plan, order[last], math.prod(sizes[last + 1 :]), 0)
    return torch.tensor([math.prod(sizes[last:]), len(rows), len(columns), *itertools.chain(*rows, *columns)])


def _bands(plan: Plan, axis: int, unit: int, offset: int) -> list[tuple[int, int, int]]:
    """The active bands of ``axis``, each index of which takes ``unit`` rows or columns: begin, end and offset in the counts."""
    stride = plan.counts.table.stride(axis)
    return [(start * unit, stop * unit, offset + band * stride) for start, stop, band in plan.counts.spans(axis, plan.runs[axis])]
