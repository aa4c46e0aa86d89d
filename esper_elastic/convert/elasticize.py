"""``elasticize`` and ``plan``: a plain model made elastic in place, and what that would do.

Everything is built before anything is touched. Then modules change their class and take up axes, tensors grow to capacity inside the
parameters that they are, and optimizer state grows with them.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from .. import followers, layers, optim
from ..control import Axis, DerivedAxis, ElasticDim, Segment
from ..errors import ConversionError, OptimizerError
from ..layers import ElasticLayer, ElasticView
from ..layers.base import at_capacity, write_active
from ..layers.view import Size, fill_like
from ..optim.guard import widen_state
from .dynamic import become_layer, elastic_class
from .plan import Plan, PlannedModule, Stretches
from .planner import make_plan
from .restore import or_nothing

#: The attribute of a converted model that holds the plan as JSON-able data: it goes where the model goes.
PLAN = "_elastic_plan"

_examples: weakref.WeakKeyDictionary[nn.Module, Any] = weakref.WeakKeyDictionary()


def plan(
    model: nn.Module,
    example_inputs: Any,
    *,
    capacity: float | Mapping[str, float] = 1.0,
    minimum: int = 1,
    include: str | Iterable[str] | None = None,
    exclude: str | Iterable[str] | None = None,
) -> Plan:
    """What :func:`elasticize` would do with the same arguments; prints itself. The model stays as it is.

    Returns:
        the plan, with ``dims``, ``modules``, ``switches``, ``rigid`` and ``coverage``.

    Raises:
        ConversionError: as :func:`elasticize`.
    """
    with torch.inference_mode(False):
        return make_plan(model, example_inputs, capacity=capacity, minimum=minimum, include=include, exclude=exclude)


def elasticize(
    model: nn.Module,
    example_inputs: Any,
    *,
    capacity: float | Mapping[str, float] = 1.0,
    minimum: int = 1,
    include: str | Iterable[str] | None = None,
    exclude: str | Iterable[str] | None = None,
    optimizer: Optimizer | None = None,
) -> nn.Module:
    """Make a plain model elastic, in place: find its dims by running it on fake tensors, and let its modules follow them.

    Args:
        model: of ``nn`` modules and code of one's own. The object, its class, methods, hooks, parameters and their names stay.
        example_inputs: a tensor, a tuple of arguments, or a dict of keyword arguments. Their values do not matter, sizes and types do.
        capacity: by how much each dim can outgrow its present size: a factor for all, or a mapping from names of dims to factors, or to
            numbers of units where an ``int`` is at least the present size.
        minimum: the smallest width of every dim, in its own units.
        include: paths or patterns of modules; only dims that one of them produces become elastic.
        exclude: paths or patterns of modules whose tensors stay as they are.
        optimizer: that steps the parameters; it goes on with its state. One of ``torch.optim`` is guarded (:func:`optim.guard`).

    Returns:
        the model.

    Effects:
        Runs the model on fake tensors several times, in training and in evaluation mode; allocates each tensor anew where its capacity
        exceeds its size. Draws random numbers for dormant weights from a generator of its own.

    Raises:
        ConversionError: the model decides by the values of tensors, is scripted or elastic already, or the inputs do not suit it; nothing
            has changed.
        OptimizerError: the optimizer cannot be served; nothing has changed.
    """
    made = plan(model, example_inputs, capacity=capacity, minimum=minimum, include=include, exclude=exclude)
    with torch.inference_mode(False):
        apply_plan(made, model, optimizer)
    if not made.dims and exclude is None:
        reasons = "; ".join(dict.fromkeys(axis.reason for axis in made.rigid)) or "it has no parameters"
        warnings.warn(f"elasticize: {type(model).__name__} has no dim that can change: {reasons}. See ee.plan.", stacklevel=2)
    _examples[model] = example_inputs
    return model


def plan_of(model: nn.Module) -> Plan | None:
    """The plan by which a model was converted, if it was."""
    known = model.__dict__.get(PLAN)
    return None if known is None else Plan.from_json(known)


def example_of(model: nn.Module) -> Any:
    """The example inputs that a model was converted with, or ``None``."""
    return _examples.get(model)


class _Change(NamedTuple):
    """One module's conversion, ready to be carried out."""

    module: Any
    planned: PlannedModule
    made: type[nn.Module]
    donor: ElasticLayer | None
    axes: dict[str, tuple[Axis | None, ...]]


def apply_plan(plan: Plan, model: nn.Module, optimizer: Optimizer | None = None) -> None:
    """Carry out a plan on a model of the structure that it was made for."""
    modules = dict(model.named_modules())
    dims = [_dim(planned) for planned in plan.dims]
    build = _Builder(dims, [planned.size for planned in plan.dims])
    changes = []
    for planned in plan.modules:
        module = modules.get(planned.path)
        if module is None:
            raise ConversionError(
                f"plan: module {planned.path!r} is missing from {type(model).__name__}. Was the plan made for another model?"
            )
        changes.append(build.change(module, planned))
    if optimizer is not None and not isinstance(optimizer, Optimizer):
        raise ConversionError(f"elasticize: optimizer: expected a torch.optim.Optimizer, got {type(optimizer).__name__}.")
    storages: dict[int, tuple[Tensor, Tensor, tuple[Axis | None, ...]]] = {}
    for change in changes:
        for name, axes in change.axes.items():
            tensor = change.module._parameters.get(name, change.module._buffers.get(name))
            if tensor is not None and id(tensor) not in storages:
                grown = build.grown(change, name, tensor, axes)
                if grown is not None:
                    storages[id(tensor)] = (tensor, grown, axes)
    optimizers = _that_hold([tensor for tensor, _, _ in storages.values()], optimizer)
    with or_nothing(model, optimizers):
        for tensor, grown, axes in storages.values():
            _replace_storage(tensor, grown, axes, optimizers)
        for change in changes:
            build.carry_out(change)
        for change in reversed(changes):  # inner blocks first
            if change.planned.switch is not None:
                change.module.install_switch(change.planned.switch)
        model.__dict__[PLAN] = plan.to_json()
        if optimizer is not None:
            optim.guard(optimizer, model)


def _that_hold(tensors: list[Tensor], given: Optimizer | None) -> list[Optimizer]:
    """The optimizer given and those that follow elastic parameters by themselves: their state grows with the tensors.

    Raises:
        OptimizerError: another one holds state, which would not fit any more.
    """
    found: list[Any] = [] if given is None else [given]
    for tensor in tensors:
        stranger = followers.unguarded_with_state(tensor)
        if stranger is not None and stranger is not given:
            raise OptimizerError(
                f"elasticize: {type(stranger).__name__} holds state for a parameter of shape {tuple(tensor.shape)}, which is to have room "
                "to grow: its state would not fit any more. Pass it as optimizer=, or clear it (optimizer.state.clear()) if it is done."
            )
        for follower in followers.followers_of(tensor):
            if not any(follower is known for known in found):
                found.append(follower)
    return found


def _dim(planned: Any) -> ElasticDim:
    dim = ElasticDim(planned.size, planned.capacity, minimum=planned.minimum, multiple_of=planned.multiple_of)
    dim.compact_only, dim.mixed = planned.compact_only, planned.mixed
    dim.path = planned.name
    return dim


class _Builder:
    """Makes axes and layers by a plan."""

    def __init__(self, dims: list[ElasticDim], sizes: list[int]) -> None:
        self.dims = dims
        self.sizes = sizes
        self.made: dict[str, Axis] = {}

    def axis(self, stretches: Stretches) -> Axis:
        """The axis of stretches; equal ones are one object."""
        key = repr(stretches)
        if key not in self.made:
            segments: list[Segment] = []
            start = 0
            for index, inner in stretches:
                dim = self.dims[index] if index is not None else _fixed(inner)
                segments.append(Segment(dim, start, inner if index is not None else 1))
                start += dim.capacity * segments[-1].inner
            whole = len(segments) == 1 and segments[0].inner == 1
            self.made[key] = segments[0].dim if whole else DerivedAxis(tuple(segments))
        return self.made[key]

    def change(self, module: nn.Module, planned: PlannedModule) -> _Change:
        """Prepare what a module becomes; it is only read.

        Raises:
            ConversionError: it is not the module that the plan was made for.
        """
        donor: ElasticLayer | None = None
        axes: dict[str, tuple[Axis | None, ...]] = {}
        elastic: Any = None
        try:
            if planned.layer is not None:
                elastic = getattr(layers, planned.layer)
                arguments = {name: self.axis(stretches) for name, stretches in planned.axes.items()}
                donor = elastic.from_dense(module, **arguments)
                axes = {name: own for name, own in donor.tensor_axes().items() if any(axis is not None for axis in own)}
            else:
                elastic = ElasticView if planned.tensors or planned.sizes else None
                for name, own in planned.tensors.items():
                    axes[name] = tuple(None if stretches is None else self.axis(stretches) for stretches in own)
                    self._check(module, planned.path, name, axes[name])
        except (ValueError, AttributeError, TypeError) as error:
            raise ConversionError(
                f"plan: module {planned.path!r} ({type(module).__name__}) is not what the plan was made for: {error}"
            ) from error
        views = tuple(name for name, own in axes.items() if any(axis is not None for axis in own)) if planned.layer is None else ()
        sizes = tuple(planned.sizes) if donor is None else ()
        made = elastic_class(module, elastic, tensors=views, sizes=sizes, switched=planned.switch is not None)
        return _Change(module, planned, made, donor, axes)

    def _check(self, module: nn.Module, path: str, name: str, axes: tuple[Axis | None, ...]) -> None:
        tensor = module._parameters.get(name, module._buffers.get(name))
        shape = None if tensor is None else tuple(tensor.shape)
        wanted = None if shape is None else tuple(n if axis is None else axis.active for n, axis in zip(shape, axes, strict=True))
        if shape is None or shape != wanted:
            raise ConversionError(f"{path}.{name}: expected shape {wanted}, got {shape}.")

    def grown(self, change: _Change, name: str, tensor: Tensor, axes: tuple[Axis | None, ...]) -> Tensor | None:
        """Storage at capacity with ``tensor`` in its active slice, where that is larger."""
        if all(axis is None or axis.active == axis.capacity for axis in axes):
            return None
        if change.donor is not None:
            storage = change.donor.storage(name)
            return None if storage is None else storage.detach()
        storage = at_capacity(tensor, axes)
        fill_like(storage, tensor)
        with torch.no_grad():
            write_active(storage, axes, tensor.detach())
        return storage

    def carry_out(self, change: _Change) -> None:
        """Turn a module into what was prepared. Its tensors are at capacity already."""
        module, planned = change.module, change.planned
        if change.donor is not None:
            become_layer(module, change.made, change.donor)
            return
        training = module.training
        module.__class__ = change.made
        if planned.tensors or planned.sizes:
            sizes = {name: self._size(module, name, kept) for name, kept in planned.sizes.items()}
            newborn = {name: tuple(births) for name, births in planned.newborn.items()}
            module.become_view(change.axes, sizes, newborn, planned.mixed)
        module.training = training

    def _size(self, module: nn.Module, name: str, kept: Any) -> Any:
        if isinstance(kept, list):
            present = module.__dict__[name]
            return tuple(value if item is None else self._one_size(item) for item, value in zip(kept, present, strict=True))
        return self._one_size(kept)

    def _one_size(self, kept: Mapping[str, Any]) -> Size:
        return Size(self.axis(kept["axis"]), kept["over"])


def _fixed(size: int) -> ElasticDim:
    dim = ElasticDim(size, minimum=size)
    dim.rigid = "conversion found it rigid; ee.plan says why"
    return dim


def _replace_storage(tensor: Tensor, storage: Tensor, axes: tuple[Axis | None, ...], optimizers: list[Optimizer]) -> None:
    """Let a parameter or buffer be as large as its capacity, gradient and optimizer state along with it."""

    def write(made: Tensor, old: Tensor) -> None:
        own = tuple(axis if made.shape[index] == tensor.shape[index] else None for index, axis in enumerate(axes))
        write_active(made, own, old)

    with torch.no_grad():
        grad, shape = tensor.grad, tuple(tensor.shape)
        tensor.grad = None
        tensor.data = storage
        if grad is not None:
            tensor.grad = at_capacity(grad, axes)
            write(tensor.grad, grad)
        for optimizer in optimizers:
            widen_state(optimizer, tensor, shape, write)
