"""``observe``: hooks that watch passes through a model and leave nothing behind.

Forward hooks note which elastic layer was called with what. Gradients are taken where autograd delivers them: an alias of each consumer's
input receives what comes through that consumer alone. No value is computed differently, and no activation is held that autograd does not
hold for its own backward, as long as that computes weight gradients and recomputes nothing; but for the outputs of a dim that nothing
consumes.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterable, Iterator
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn

from ..control import Axis, ElasticDim
from ..errors import CapacityError
from ..layers import ElasticLayer, ElasticView
from .activations import consumes, inner_of, places_of, unit_axis
from .gradmax import publish
from .routes import Call, Route, routes_to
from .scores import Scores
from .statistic import Statistic, canonical_shape, serves

_CONSUMED = "consumed"


class Observation:
    """Scores of units, of what passes through the model within :func:`observe` have shown; higher is more important.

    They go to :func:`esper_elastic.importance.top`. Each has shape ``(dim.active,)`` and is valid while the dim has the units that it had.
    A score raises :class:`CapacityError` for a dim that was not observed, that no pass has reached, or whose units have changed since.
    """

    def __init__(self, dims: list[ElasticDim]) -> None:
        self._scores = {dim: Scores(dim) for dim in dims}
        self._unseen: dict[ElasticDim, str] = {}

    def __repr__(self) -> str:
        return f"Observation({', '.join(dim.label for dim in self._scores)})"

    def taylor(self, dim: ElasticDim) -> Tensor:
        """How much the loss changes without each unit, to first order: the sum over backward passes of the absolute gate derivative.

        Within a pass the derivative is summed over examples, positions and the layers that consume the unit, with its sign. After one
        pass it equals :func:`esper_elastic.importance.taylor`. Losses that were scaled give scaled scores.

        Source: Molchanov, Mallya, Tyree, Frosio, Kautz: Importance estimation for neural network pruning (CVPR 2019), section 3.2 for
            gates and 4.1 for mini-batches, whose scores are averaged there; the sum ranks alike.
        """
        return self._answer(dim, "taylor")

    def fisher(self, dim: ElasticDim) -> Tensor:
        """The sum over examples of the squared gate derivative: the diagonal of the empirical Fisher information of the gates.

        Examples lie on the first axis of activations. Times 1/2 and divided by the number of examples it estimates the rise of the loss
        without the unit; for that the loss must be a sum over examples, since a mean makes each derivative smaller by their number. The
        ranking is the same.

        Source: Theis, Korshunova, Tejani, Huszár: Faster gaze prediction with dense networks and Fisher pruning (2018), equations 6 and 9.
        """
        return self._answer(dim, "fisher")

    def activation(self, dim: ElasticDim) -> Tensor:
        """The mean absolute activation of each unit, over examples and positions, as its consumers take it. Needs no backward."""
        return self._answer(dim, "activation")

    def zeros(self, dim: ElasticDim) -> Tensor:
        """The share of each unit's activations that are zero, as behind a relu; here higher means less important. Needs no backward.

        Source: Hu, Peng, Tai, Tang: Network trimming (2016), section 3.1.
        """
        return self._answer(dim, "zeros")

    def _answer(self, dim: ElasticDim, what: str) -> Tensor:
        scores = self._scores.get(dim)
        if scores is None:
            raise CapacityError(f"{dim.label}: {what}: expected a dim that is observed, got another. Name it in dims=, or leave that out.")
        if dim in self._unseen:
            raise CapacityError(
                f"{dim.label}: {what}: {self._unseen[dim]}. Use ee.importance.taylor, which reads the gradients of weights."
            )
        return scores.answer(what)


@contextlib.contextmanager
def observe(model: nn.Module, dims: ElasticDim | Iterable[ElasticDim] | None = None, *, gradmax: bool = True) -> Iterator[Observation]:
    """Watch forward and backward passes through ``model``: ``with ee.growth.observe(model) as seen: loss(model(x)).backward()``.

    Args:
        model: any that holds elastic layers; they must be called, as modules. One that ``torch.compile`` runs calls no hooks: observe the
            model that it was made from.
        dims: which to observe; all that its layers produce, if not given.
        gradmax: gather also what ``dim.grow(n, init="gradmax")`` needs. That costs, per consumer, as many weight gradients of the producer
            as its kernel has taps, and memory of that many; scores alone cost a few sums.

    Yields:
        The scores, to be read within or afterwards.

    Effects:
        At the end GradMax may begin from what was seen, until units of the dims that it touches are born or move, or widths change.
        Weights may be stepped in between: the directions are those of the weights that were observed. After an exception nothing is
        kept for GradMax, but earlier observations are. Outputs and gradients are as without it, bit for bit; so they are under autocast,
        gradient accumulation and non-reentrant checkpointing, where the inputs of producers are held until the backward.

    Raises:
        CapacityError: the model has no such dim.
    """
    layers = [module for module in model.modules() if isinstance(module, ElasticLayer)]
    watched = _watched(layers, dims)
    seen = Observation(watched)
    watch = _Watch(seen, layers, gradmax)
    try:
        yield seen
        watch.publish()
    finally:
        watch.end()


def _watched(layers: list[ElasticLayer], dims: ElasticDim | Iterable[ElasticDim] | None) -> list[ElasticDim]:
    produced = {id(dim): dim for layer in layers for dim in layer.produced if dim.rigid is None}
    if dims is None:
        return list(produced.values())
    known = {id(dim) for layer in layers for axis in layer._widths.axes for dim in axis.dims}
    chosen = list({id(dim): dim for dim in ([dims] if isinstance(dims, ElasticDim) else dims)}.values())
    for dim in chosen:
        if not isinstance(dim, ElasticDim):
            raise CapacityError(f"growth.observe: dims: expected dims, got {dim!r}. Take them from ee.dims(model).")
        if id(dim) not in known:
            raise CapacityError(
                f"growth.observe: {dim.label}: expected a dim of the model, got one of another. Take it from ee.dims(model)."
            )
    return chosen


class _Watch:
    """The hooks of one observation."""

    def __init__(self, seen: Observation, layers: list[ElasticLayer], statistics: bool) -> None:
        self.seen = seen
        self.key = object()  # under which nodes of the graph hold the calls that made them
        self.calls: WeakSet[Call] = WeakSet()
        self.tasks: set[int] = set()
        self.statistics = {dim: Statistic(dim) for dim in seen._scores} if statistics else {}
        self.consumed = {id(dim) for layer in layers for dim in seen._scores if consumes(layer, dim)}
        self.handles: list[Any] = []
        for layer in layers:
            self._explain(layer)
            self.handles.append(layer.register_forward_pre_hook(self.before, with_kwargs=True))
            self.handles.append(layer.register_forward_hook(self.after, with_kwargs=True))

    def _explain(self, layer: ElasticLayer) -> None:
        """Note which dims have no scores, since code of the model's own takes their units."""
        if isinstance(layer, ElasticView):
            for name, axes in layer.tensor_axes().items():
                for axis, newborn in zip(axes, layer.newborn.get(name, ()), strict=False):
                    for dim in axis.dims if axis is not None and newborn == "zero" and "draw" in layer.newborn[name] else ():
                        self.seen._unseen[dim] = f"{layer._widths.label} consumes the units in code of its own, which hooks do not see"

    def publish(self) -> None:
        """Let GradMax begin from what was seen."""
        for dim, statistic in self.statistics.items():
            if statistic.blocks or statistic.reason is not None:
                publish(dim, statistic)

    def end(self) -> None:
        """Take every hook away, and let go of what graphs that are still alive would hold."""
        for handle in self.handles:
            handle.remove()
        for call in self.calls:
            call.forget()
        for scores in self.seen._scores.values():
            scores.drop_unfinished()

    # Forward

    def before(self, layer: ElasticLayer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        x = args[0] if args else kwargs.get("input")
        if not self._live(layer) or not isinstance(x, Tensor):
            return None
        axis = getattr(layer, "in_dim", None)
        dims = [dim for dim in axis.dims if dim in self.seen._scores and consumes(layer, dim)] if isinstance(axis, Axis) else []
        index = unit_axis(layer, x)
        if axis is None or index is None or not dims or not x.is_floating_point():
            return None
        with torch.no_grad():
            for dim in dims:
                self.seen._scores[dim].saw(_CONSUMED, x.detach(), index, axis, layer._widths.static)
        if not torch.is_grad_enabled() or torch.is_inference(x):
            return None
        alias = (x if x.requires_grad else x.detach().requires_grad_()).view_as(x)
        self._await(alias, [(_CONSUMED, dim) for dim in dims], index, axis, layer._widths.static)
        return ((alias, *args[1:]), kwargs) if args else (args, {**kwargs, "input": alias})

    def after(self, layer: ElasticLayer, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        x = args[0] if args else kwargs.get("input")
        if not self._live(layer) or not isinstance(x, Tensor) or not isinstance(output, Tensor):
            return
        index = unit_axis(layer, output)
        if index is None:
            return
        axis = layer._widths.axes[0]
        ends = [dim for dim in axis.dims if dim in self.seen._scores and id(dim) not in self.consumed]
        with torch.no_grad():
            for dim in ends:
                self.seen._scores[dim].saw(id(layer), output.detach(), index, axis, layer._widths.static)
        if output.grad_fn is None:
            return
        if ends:
            self._await(output, [(id(layer), dim) for dim in ends], index, axis, layer._widths.static)
        if self.statistics:
            self._trace(layer, x, output)

    def _live(self, layer: ElasticLayer) -> bool:
        """Whether a call is one to note: no recomputation in a backward, no compilation, no layer asleep."""
        if torch.compiler.is_compiling() or _task() != -1:
            return False
        return all(switch.on for switch in layer._widths.switches)

    def _await(self, tensor: Tensor, gates: list[tuple[object, ElasticDim]], index: int, axis: Axis, static: bool) -> None:
        kept = tensor.detach()
        version = kept._version

        def arrived(gradient: Tensor) -> None:
            task = self._task()
            with torch.no_grad():
                for source, dim in gates:
                    if kept._version != version:
                        self.seen._unseen[dim] = "activations of the units were changed in place after they were computed"
                        continue
                    self.seen._scores[dim].gate(source, task, kept, gradient, index, axis, static)

        self.handles.append(tensor.register_hook(arrived))

    def _trace(self, layer: ElasticLayer, x: Tensor, output: Tensor) -> None:
        """Note the call where the graph can be asked for it, and wait for the gradient of a consumer."""
        produces = serves(layer) and any(dim in self.statistics for dim in layer._widths.axes[0].dims)
        call = Call(layer, canonical_shape(layer, output, inner_of(layer._widths.axes[0])), x.grad_fn, x.detach() if produces else None)
        node: Any = output.grad_fn
        node.metadata[self.key] = call
        self.calls.add(call)
        if not serves(layer):
            return
        axis = layer._widths.axes[1]
        for dim in axis.dims:
            statistic = self.statistics.get(dim)
            if statistic is None:
                continue
            routes = routes_to(x.grad_fn, dim, self.key)
            refused = next((route for route in routes if route.reason is not None), None)
            if refused is not None:
                producer = refused.call.layer
                label = "a producer" if producer is None else producer._widths.label
                statistic.reason = statistic.reason or f"between {label} and {layer._widths.label}: {refused.reason}"
            elif routes:
                statistic.half = statistic.half or torch.float16 in (x.dtype, output.dtype)
                inner = places_of(axis, dim)
                shape = canonical_shape(layer, x, inner)
                arrived = functools.partial(self._gradient, layer, statistic, shape, inner, routes)
                self.handles.append(output.register_hook(arrived))

    # Backward

    def _gradient(
        self, layer: ElasticLayer, statistic: Statistic, shape: tuple[int, ...], inner: int, routes: list[Route], gradient: Tensor
    ) -> None:
        with torch.no_grad():
            statistic.add(layer, gradient, shape, inner, routes)

    def _task(self) -> int:
        """The backward pass under way; scores are told when it is over."""
        task = _task()
        if task not in self.tasks:
            self.tasks.add(task)
            torch.autograd.Variable._execution_engine.queue_callback(functools.partial(self._close, task))
        return task

    def _close(self, task: int) -> None:
        self.tasks.discard(task)
        for scores in self.seen._scores.values():
            scores.close(task)


def _task() -> int:
    """The number of the backward pass that calls, -1 outside of one."""
    return torch._C._current_graph_task_id()
