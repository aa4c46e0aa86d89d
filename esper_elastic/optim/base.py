"""What AdamW and SGD share: state at capacity, step counts per element, and a step that touches active elements alone.

A *plan* remembers, for one parameter, which cells of its step counts are active and where they lie in memory. It holds until a commit,
a permutation or a load; with it, a step costs per parameter a few dictionary look-ups, and one call of a compiled op does the work for all
parameters of a group. On GPUs Triton's kernels do, and a plan says no more than where the tensors are: what is active they read from the
control block, and they keep counts per element, so that a CUDA graph that captured a step follows every commit. What neither serves (other
devices and dtypes, odd strides) goes through the functions of ``torch.optim``, on one view per cell.
"""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version
from torch.optim import Optimizer

from ..control import ControlBlock, Runs
from ..errors import OptimizerError
from ..followers import follow
from ..layers import registry
from ..layers.registry import ParameterAxes
from ..ops import optimizer as kernels
from ..ops.backend import CHOICE, LIBRARY_MISSING
from .counts import StepCounts, dense_counts, is_dense, widened

_NATIVE = LIBRARY_MISSING is None and CHOICE != "reference"
_MOST_CELLS = 16


class Plan:
    """What one step needs to know of a parameter.

    Attributes:
        asleep: nothing is active.
        runs: the active indices of each axis.
        counts: in bands that fit ``runs``.
        vector: for the compiled op, see ``csrc/optim.cpp``; ``None`` where it does not serve.
        strides: that the compiled op and the kernels expect of the gradient.
        block: the control block.
        pieces: for Triton's kernels, see :func:`esper_elastic.ops.optimizer.pieces_of`; ``None`` where they do not serve. If they do, the
            plan holds for all widths, nothing is asleep, and there are no ``runs``, ``counts`` and ``vector``.
        tensors: for the kernels: the parameter, its state and, if they are kept, its counts.
        addresses: of ``tensors``.
        count_dtype: that was asked for.
    """

    __slots__ = (
        "addresses",
        "asleep",
        "block",
        "count_dtype",
        "counts",
        "generation",
        "pieces",
        "revision",
        "runs",
        "strides",
        "tensors",
        "vector",
    )

    def __init__(self, param: Tensor) -> None:
        self.revision = registry.revision()
        known = registry.lookup(param)
        self.block = block_of(known)
        self.strides = param.stride()
        self.pieces: kernels.Pieces | None = None
        if kernels.triton_steps(param.device):
            self.pieces = kernels.pieces_of(param, *(((None,) * param.dim(), ()) if known is None else (known.axes, known.switches)))
        if self.pieces is not None:
            self.asleep, self.generation = False, None
            self.tensors: list[Tensor] = []
            self.addresses: list[int] = []
            self.count_dtype: torch.dtype | None = None
            return
        self.generation = None if self.block is None else self.block.generation
        self.asleep = param.numel() == 0 or (known is not None and known.asleep)
        self.runs: tuple[Runs, ...] = tuple([(0, size)] for size in param.shape) if known is None else known.runs(param.shape)
        self.counts: StepCounts
        self.vector: Tensor | None = None

    def holds(self) -> bool:
        """Whether bindings are as they were, and widths and switches, if it says anything about them."""
        if self.revision != registry.revision():
            return False
        return self.generation is None or self.block is None or self.block.generation == self.generation

    def holds_for(self, param: Tensor, names: tuple[str, ...], state: dict[str, Any], count_dtype: torch.dtype | None) -> bool:
        """Whether the tensors that kernels would touch are those of the plan, where they were."""
        kept = (*names, "step") if count_dtype is not None else names
        if count_dtype != self.count_dtype or len(self.tensors) != 1 + len(kept) or self.tensors[0] is not param:
            return False
        if any(state.get(name) is not tensor for name, tensor in zip(kept, self.tensors[1:], strict=True)):
            return False
        return self.addresses == [tensor.data_ptr() for tensor in self.tensors]


class ElasticOptimizer(Optimizer):
    """Base of the optimizers of this package; :class:`esper_elastic.followers.Follower` says what ``grow`` and ``keep`` may ask of it."""

    def __init__(self, params: Any, defaults: dict[str, Any]) -> None:
        super().__init__(params, defaults)
        self._forget()
        follow(self)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._forget()
        follow(self)

    def _forget(self) -> None:
        self._plans: dict[Tensor, Plan] = {}
        self._batches: dict[tuple[Any, ...], tuple[list[Plan], kernels.Batch]] = {}

    # What a concrete optimizer supplies

    def _names(self, group: dict[str, Any]) -> tuple[str, ...]:
        """The state tensors of parameter shape that a step uses; without any, no counts are kept either."""
        raise NotImplementedError

    def _count_dtype(self, group: dict[str, Any]) -> torch.dtype | None:
        """The type in which kernels keep counts: int16 where those that it cannot tell apart make no difference; ``None`` for no counts."""
        raise NotImplementedError

    def _step_native(self, group: dict[str, Any], operands: list[list[Tensor]], counts: list[Tensor], plans: list[Tensor]) -> None:
        """Update whole groups by the compiled op. ``operands`` are parameters, gradients, then the state tensors by name."""
        raise NotImplementedError

    def _step_kernels(
        self, group: dict[str, Any], batch: kernels.Batch, grads: Any, tensors: list[int], count_dtype: torch.dtype | None
    ) -> None:
        """Update parameters of one type by Triton's kernels. ``tensors`` are addresses: of parameters, then as in :attr:`Plan.tensors`."""
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
        allocated at capacity at a parameter's first step. On a GPU nothing waits for the device, and a step may be captured in a CUDA
        graph, which follows widths, switches and a learning rate that is a tensor on the device; other hyperparameters stay as captured.
        As with ``torch.optim``, run a few steps first, so that state is allocated and kernels are loaded.

        Raises:
            OptimizerError: a gradient is sparse; nothing has changed. Or state is to be allocated while a graph is captured.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._refuse_sparse()
        if len(self._plans) > sum(len(group["params"]) for group in self.param_groups):
            self._forget()  # a parameter was removed, which a plan would keep alive
        for number, group in enumerate(self.param_groups):
            self._step_group(group, number)
        return loss

    def _step_group(self, group: dict[str, Any], number: int) -> None:
        names, count_dtype = self._names(group), self._count_dtype(group)
        resident: defaultdict[tuple[Any, ...], list[tuple[Plan, Tensor]]] = defaultdict(list)
        native: dict[torch.dtype, tuple[list[list[Tensor]], list[Tensor], list[Tensor]]] = {}
        views: list[list[Tensor]] = [[] for _ in range(len(names) + 2)]
        view_counts: list[int] = []
        for param in group["params"]:
            grad = param.grad
            if grad is None:
                continue
            plan = self._plan(param, names, count_dtype)
            if plan.asleep:
                continue
            if plan.pieces is not None:
                counted = None if count_dtype is None else plan.tensors[-1].dtype
                resident[param.device, param.dtype, counted, plan.block].append((plan, grad))
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
        for key, members in join_plain(resident).items():
            self._step_resident(group, (number, *key), members)

    def _step_resident(self, group: dict[str, Any], key: tuple[Any, ...], members: list[tuple[Plan, Tensor]]) -> None:
        """Update parameters of one type and control block by Triton's kernels."""
        _, device, dtype, count_dtype, block = key
        plans = [plan for plan, _ in members]
        known = self._batches.get(key)
        if known is None or known[0] != plans:
            pieces = [plan.pieces for plan in plans if plan.pieces is not None]
            known = self._batches[key] = plans, kernels.Batch(pieces, sum(p.tensors[0].numel() for p in plans), device, dtype)
        batch = known[1]
        given = [_laid_out(grad, plan.tensors[0]) for plan, grad in members]
        grads = batch.gradients(block, [grad.data_ptr() for grad in given])
        tensors = [address for same in zip(*(plan.addresses for plan in plans), strict=True) for address in same]
        self._step_kernels(group, batch, grads, tensors, count_dtype)
        increment_version([tensor for plan in plans for tensor in plan.tensors if not tensor.is_inference()])

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

    def _plan(self, param: Tensor, names: tuple[str, ...], count_dtype: torch.dtype | None) -> Plan:
        """The plan of ``param``, made anew where widths, bindings or state are no longer those it was made for."""
        plan = self._plans.get(param)
        if plan is not None and plan.holds():
            if plan.asleep:
                return plan
            state = self.state[param] if names else {}
            if plan.pieces is not None:
                if plan.holds_for(param, names, state, count_dtype):
                    return plan
            elif all(name in state for name in names) and (not names or state.get("step") is plan.counts.packed):
                return plan
        plan = self._plans[param] = Plan(param)
        if plan.asleep:
            return plan
        state = self.state[param] if names else {}
        if "step" not in state and any(name in state for name in names):
            state["step"] = torch.ones(())  # whoever kept state without counts had no use for more than that it is not new
        if plan.pieces is not None:
            self._settle(plan, param, names, state, count_dtype)
            return plan
        counts = StepCounts.unpack(state["step"], param.shape) if "step" in state else StepCounts(param.shape)
        plan.counts = counts.split(plan.runs)
        if names:
            state["step"] = plan.counts.packed
        for name in names:
            if name not in state:
                state[name] = torch.zeros_like(param, memory_format=torch.preserve_format)
        native = _NATIVE and param.device.type == "cpu" and param.dtype in (torch.float32, torch.float64)
        if native and all(_same_strides(state[name], plan.strides) for name in names):
            plan.vector = _vector(param, plan)
        return plan

    def _settle(self, plan: Plan, param: Tensor, names: tuple[str, ...], state: dict[str, Any], count_dtype: torch.dtype | None) -> None:
        """Bring the state of ``param`` into the form of the kernels, and note where it is."""
        found: dict[str, Tensor] = {}
        for name in names:
            found[name] = _laid_out(state[name], param) if name in state else torch.zeros_like(param, memory_format=torch.preserve_format)
        if count_dtype is not None:
            found["step"] = torch.zeros_like(param, dtype=count_dtype, memory_format=torch.preserve_format)
            if "step" in state:
                found["step"] = dense_counts(param, state["step"], count_dtype)
        if kernels.capturing(param.device) and any(tensor is not state.get(name) for name, tensor in found.items()):
            raise OptimizerError(
                f"{type(self).__name__}: state of a parameter of shape {tuple(param.shape)} would be allocated by a CUDA graph that is "
                "being captured, and begin anew at each replay. Run a few steps first."
            )
        state.pop("step", None)
        state.update(found)
        plan.tensors = [param, *found.values()]
        plan.addresses = [tensor.data_ptr() for tensor in plan.tensors]
        plan.count_dtype = count_dtype

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
            if name == "step" and not is_dense(tensor, param.shape):
                self.state[param]["step"] = StepCounts.unpack(tensor, param.shape).permute(axis, order).packed
            elif tensor.shape == param.shape:
                tensor.copy_(tensor.index_select(axis, order.to(tensor.device)))

    @torch.no_grad()
    def reset_state(self, param: Tensor, axis: int, start: int, stop: int) -> None:
        state = self.state.get(param)
        for name, tensor in (state or {}).items():
            if name == "step" and not is_dense(tensor, param.shape):
                self.state[param]["step"] = StepCounts.unpack(tensor, param.shape).reset(axis, start, stop).packed
            elif tensor.shape == param.shape:
                tensor.narrow(axis, start, stop - start).zero_()

    def step_counts(self, param: Tensor) -> Tensor:
        """How often each element of ``param`` was updated: int64, of its shape; zeros where no counts are kept.

        On a GPU, AdamW counts to 65,535 where more would make no difference in float32, and SGD counts with dampening alone.
        """
        step = self.state.get(param, {}).get("step")
        if step is None:
            return StepCounts(param.shape).dense()
        return widened(step) if is_dense(step, param.shape) else StepCounts.unpack(step, param.shape).dense()


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


def block_of(known: ParameterAxes | None) -> ControlBlock | None:
    if known is None:
        return None
    entries: Iterable[Any] = itertools.chain((dim for axis in known.axes if axis is not None for dim in axis.dims), known.switches)
    return next((entry.block for entry in entries), None)


def join_plain(members: dict[tuple[Any, ...], list[Any]]) -> dict[tuple[Any, ...], list[Any]]:
    """What belongs to no control block goes along with what belongs to one and is alike else; the block is the last part of a key."""
    for key in [key for key in members if key[-1] is None]:
        other = next((other for other in members if other[:-1] == key[:-1] and other[-1] is not None), None)
        if other is not None:
            members[other] = members[other] + members.pop(key)
    return members


def _laid_out(tensor: Tensor, param: Tensor) -> Tensor:
    """``tensor`` as kernels expect what belongs to ``param``: itself, or a copy of its type and device that lies in memory alike.

    Raises:
        OptimizerError: it has another shape.
    """
    if tensor.shape != param.shape:
        raise OptimizerError(
            f"state or gradient of a parameter of shape {tuple(param.shape)}: expected that shape, got {tuple(tensor.shape)}. "
            "Load the state of an optimizer over the same parameters, in the same order."
        )
    if tensor.dtype == param.dtype and tensor.device == param.device and _same_strides(tensor, param.stride()):
        return tensor
    return torch.empty_like(param, memory_format=torch.preserve_format).copy_(tensor)


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
