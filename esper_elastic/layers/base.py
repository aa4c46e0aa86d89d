"""What every elastic layer has: storage at capacity, dims, a layout, and the way from and to its dense twin.

A concrete layer subclasses :class:`ElasticLayer` and its ``nn`` class, says which dims run through which tensor, builds a dense layer of
its active size, and calls its op. Nothing here computes.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from ..control import Axis, ControlBlock, ElasticDim, Switch, exact_int
from ..errors import CapacityError, LayoutError
from ..ops import Widths
from ..ops.reference import active_slice
from . import registry, state

_MODULE_ATTRIBUTES = frozenset(nn.Module().__dict__)


class ElasticLayer(nn.Module):
    """Base of all elastic layers; mixed in before the ``nn`` class whose place the layer takes."""

    dense_class: ClassVar[type[nn.Module]]
    #: What `grow` writes to newborn units, per tensor and axis: "draw" from the layer's law, "zero" or "one".
    newborn: ClassVar[dict[str, tuple[str, ...]]]
    speaks_of_widths = True  # a state_dict does
    _widths: Widths

    # What a concrete layer supplies

    def tensor_axes(self) -> dict[str, tuple[Axis | None, ...]]:
        """The axes of each parameter and buffer, by name; ``None`` for an axis of fixed size."""
        raise NotImplementedError

    def _dense(self, device: Any, dtype: Any) -> nn.Module:
        """A freshly initialised ``nn`` layer of the active size."""
        raise NotImplementedError

    def _init_bound(self) -> float:
        """The half-width of the uniform law that ``nn`` would draw weights from at the active size."""
        raise NotImplementedError

    @property
    def mixes_units(self) -> bool:
        """Whether one unit's output depends on the others of the same dim, so that no newborn unit can leave the function as it is."""
        return False

    @property
    def inseparable(self) -> int:
        """Neighbouring indices of the weight's first axis that stay or go together, since the layer computes them as one group."""
        return 1

    def storage(self, name: str) -> Tensor | None:
        """A parameter or buffer at capacity."""
        tensor: Tensor | None = getattr(self, name)
        return tensor

    def named_axes(self) -> Iterator[tuple[str, Axis]]:
        """The layer's axes by the names that a ``state_dict`` gives them."""
        return ((name.removesuffix("_dim"), value) for name, value in vars(self).items() if isinstance(value, Axis))

    def own_attributes(self) -> set[str]:
        """Names of the attributes that the ``nn`` layer does not have."""
        return {"_widths", "_group_width", "_fixed_shape", *(name for name, value in vars(self).items() if isinstance(value, Axis))}

    @property
    def produced(self) -> list[ElasticDim]:
        """The dims of the units that the layer makes."""
        return self._widths.axes[0].dims

    def name_of(self, dim: ElasticDim) -> str:
        """What to call a dim of a layer that is the whole model."""
        return "" if len(self.produced) == 1 else f":{self.produced.index(dim)}"

    # Construction

    def _adopt(self, dense: nn.Module, dims: dict[str, Axis]) -> None:
        """Become the elastic form of ``dense``, whose sizes are the active ones: allocate at capacity and copy what is active.

        ``dims`` are the attributes to set, the one that the layer produces first.
        """
        state.wrap_module_methods()
        nn.Module.__init__(self)
        for key, value in dense.__dict__.items():
            if key not in _MODULE_ATTRIBUTES and not isinstance(getattr(type(self), key, None), property):
                setattr(self, key, value)
        self.training = dense.training
        for name, axis in dims.items():
            setattr(self, name, axis)
        self._widths = Widths(type(self).__name__, tuple(dims.values()))
        roots = [dim for axis in dims.values() for dim in axis.dims]
        ControlBlock.merge(dim.block for dim in roots)
        for dim in roots:
            dim.attach(self)
        axes = self.tensor_axes()
        for name, parameter in dense._parameters.items():
            if parameter is None:
                self.register_parameter(name, None)
            else:
                storage = nn.Parameter(at_capacity(parameter, axes[name]), requires_grad=parameter.requires_grad)
                self.register_parameter(name, storage)
        for name, buffer in dense._buffers.items():
            axes_here = axes.get(name)
            persistent = name not in dense._non_persistent_buffers_set
            kept = buffer if buffer is None or axes_here is None else at_capacity(buffer, axes_here)
            self.register_buffer(name, kept, persistent)
        self.bind_control()
        self._fill(dense)

    @torch.no_grad()
    def _fill(self, dense: nn.Module) -> None:
        """Copy ``dense`` into the active slices, and draw the dormant rest from the same law with a generator of its own."""
        for name, axes in self.tensor_axes().items():
            storage, source = self.storage(name), getattr(dense, name)
            if storage is None or storage.is_meta:
                continue
            if any(axis is not None and axis.active < axis.capacity for axis in axes):
                self._fill_dormant(name, storage)
            write_active(storage, axes, source)

    def _fill_dormant(self, name: str, storage: Tensor) -> None:
        """Give all of ``storage`` finite values of the law that the active slice is drawn from."""
        self.draw(storage, private_generator(storage.device))

    def draw(self, values: Tensor, generator: torch.Generator | None = None, axis: int = 1) -> None:
        """Fill ``values`` by the law that ``nn`` would draw them from at the active size.

        They are all of a tensor, or what newborn units have of it, whose axis is ``axis``.
        """
        bound = self._init_bound()
        values.uniform_(-bound, bound, generator=generator)

    def renumber(self, axis: int, order: Tensor) -> None:
        """Take note that index ``order[i]`` of an axis of the weight has moved to ``i``; for layers that know an index by its number."""

    def reset_parameters(self) -> None:
        """Draw the active slice as ``nn`` would with the same seed, and the dormant part from a generator of its own."""
        tensor = self._first_tensor()
        if tensor is not None:
            self._fill(self._dense(tensor.device, tensor.dtype))

    # Dense twins

    @classmethod
    def _require_dense(cls, module: nn.Module) -> None:
        if not isinstance(module, cls.dense_class) or isinstance(module, ElasticLayer):
            raise LayoutError(f"{cls.__name__}.from_dense: expected a plain nn.{cls.dense_class.__name__}, got {type(module).__name__}.")

    @classmethod
    def _from(cls, dense: nn.Module, dims: dict[str, Axis]) -> Self:
        layer = cls.__new__(cls)
        layer._adopt(dense, dims)
        return layer

    def to_dense(self) -> nn.Module:
        """An ordinary ``nn`` layer of the active size with copies of the active weights; no random number is drawn.

        Hooks and parametrizations do not travel.
        """
        dense = self._dense("meta", None)
        for name, parameter in self._parameters.items():
            if parameter is not None:
                copy = nn.Parameter(self.active(name).detach().clone(), requires_grad=parameter.requires_grad)
                dense.register_parameter(name, copy)
        for name, buffer in self._buffers.items():
            dense._buffers[name] = None if buffer is None else self.active(name).detach().clone()
        return dense.train(self.training)

    def active(self, name: str) -> Tensor:
        """The operand that the layer computes with: the active slice of a parameter or buffer, differentiable.

        A view of the storage, unless the slice has several runs (concatenated dims), which are then copied together.
        """
        tensor = self.storage(name)
        assert tensor is not None, name
        for index, axis in enumerate(self.tensor_axes().get(name, ())):
            if axis is not None:
                tensor = active_slice(tensor, index, axis)
        return tensor

    # state_dict

    def _load_from_state_dict(self, state_dict: Any, prefix: str, local_metadata: Any, *args: Any) -> None:
        """Load as ``nn`` does, and tensors of the active size into the active slice."""
        assign = local_metadata.get("assign_to_params_buffers", False)
        for name, axes in self.tensor_axes().items():
            storage, source = self.storage(name), state_dict.get(prefix + name)
            if storage is None or not isinstance(source, Tensor) or source.shape == storage.shape:
                continue
            if source.shape == tuple(size if axis is None else axis.active for size, axis in zip(storage.shape, axes, strict=True)):
                state_dict = {**state_dict, prefix + name: self._filled(name, axes, storage, source, assign)}
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args)
        if assign:
            self.bind_control()

    @torch.no_grad()
    def _filled(self, name: str, axes: tuple[Axis | None, ...], storage: Tensor, source: Tensor, assign: bool) -> Tensor:
        """``storage`` with ``source`` in its active slice: itself, or with ``assign`` a new tensor of the kind of ``source``."""
        if storage.is_meta and not assign:
            return source.new_zeros(()).expand(storage.shape)  # for torch to warn of, and to load nothing from
        if assign:
            old, storage = storage, at_capacity(source, axes)
            if old.is_meta:
                self._fill_dormant(name, storage)
            else:
                storage.copy_(old)
        write_active(storage, axes, source)
        return storage

    # Layout

    @property
    def layout(self) -> str:
        """``"compact"`` or ``"static"``; set by :func:`esper_elastic.set_layout`."""
        return "static" if self._widths.static else "compact"

    @layout.setter
    def layout(self, layout: str) -> None:
        if layout not in ("compact", "static"):
            raise LayoutError(f"{self._widths.label}: layout: expected 'compact' or 'static', got {layout!r}.")
        self._widths.static = layout == "static"
        self.bind_control()

    # Control

    def bind_control(self) -> None:
        """Fetch the control tensor and slots again, and note each parameter's axes where optimizers look for them."""
        tensor = self._first_tensor()
        self._widths.bind(torch.device("cpu") if tensor is None else tensor.device)
        for name, axes in self.tensor_axes().items():
            parameter = self._parameters.get(name)
            if parameter is not None:
                registry.register(parameter, axes, self._widths.switches)

    def _first_tensor(self) -> Tensor | None:
        return next((t for t in (*self._parameters.values(), *self._buffers.values()) if t is not None), None)

    def _follow(self, input: Tensor) -> None:
        """Bind a layer without parameters and buffers, which is on no device of its own, to that of its input."""
        if input.device != self._widths.device and self._first_tensor() is None:
            self._widths.bind(input.device)

    def govern(self, switch: Switch) -> None:
        """Put the layer under the switch of a block around it."""
        if not any(known is switch for known in self._widths.switches):
            self._widths.switches += (switch,)
            ControlBlock.merge((self._widths.block, switch.block))
            switch.attach(self)
            self.bind_control()

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        super().register_parameter(name, param)
        if param is not None and "_widths" in self.__dict__:
            axes = self.tensor_axes().get(name)
            if axes is not None:
                registry.register(param, axes, self._widths.switches)

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        for parameter in self._parameters.values():
            if parameter is not None:
                registry.forget(parameter)  # torch swaps the contents of tensors only where nothing refers to them weakly
        super()._apply(fn, recurse)
        self.bind_control()
        return self

    def __setstate__(self, attributes: dict[str, Any]) -> None:
        state.wrap_module_methods()
        super().__setstate__(attributes)
        for entry in (*(dim for axis in self._widths.axes for dim in axis.dims), *self._widths.switches):
            entry.attach(self)
        self.bind_control()


def resolve_dim(label: str, size: int, what: str, capacity: int | None, dim: Axis | None) -> Axis:
    """The dim for one size of a layer: the one given, which must have that active size, or a new one.

    Raises:
        CapacityError: sizes disagree, or both a capacity and a dim were given.
    """
    if dim is None:
        return ElasticDim(size, capacity) if capacity is not None else ElasticDim(size)
    if not isinstance(dim, Axis):
        raise CapacityError(f"{label}: dim for {what}: expected an ElasticDim or a derived axis, got {type(dim).__name__}.")
    if capacity is not None:
        raise CapacityError(
            f"{label}: max_{what} and a dim for {what} were both given. The dim has a capacity of its own; drop max_{what}."
        )
    if dim.active != exact_int(size, label, what):
        raise CapacityError(f"{label}: {what}: expected {dim.active}, the active size of the dim given, got {size}.")
    return dim


def at_capacity(tensor: Tensor, axes: tuple[Axis | None, ...]) -> Tensor:
    shape = [size if axis is None else axis.capacity for size, axis in zip(tensor.shape, axes, strict=True)]
    return torch.zeros(shape, dtype=tensor.dtype, device=tensor.device)


def write_active(storage: Tensor, axes: tuple[Axis | None, ...], source: Tensor) -> None:
    """Copy ``source`` into the active slice of ``storage``, run by run."""
    pending = [(storage, source, 0)]
    while pending:
        target, part, index = pending.pop()
        if index == len(axes):
            target.copy_(part)
            continue
        axis = axes[index]
        offset = 0
        for start, length in [(0, target.shape[index])] if axis is None else axis.runs():
            pending.append((target.narrow(index, start, length), part.narrow(index, offset, length), index + 1))
            offset += length


def private_generator(device: torch.device) -> torch.Generator:
    """A generator that depends on the global seed and state but does not advance them."""
    fork = torch.Generator(device)
    fork.set_state(torch.get_rng_state() if device.type == "cpu" else torch.get_device_module(device).get_rng_state(device))
    seed = torch.randint(2**62, (), generator=fork, device=device)
    return fork.manual_seed(int(seed))
