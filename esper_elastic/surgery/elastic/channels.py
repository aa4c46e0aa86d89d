"""Which axis of an elastic model the channels of a module's input or output run along.

An elastic layer says it of itself. Of any other module, as a block, an activation or a view, it is found from a run on tensors without
values: elastic layers say what enters and leaves them, and the rules of conversion follow that through the plain ops between. What no
rule follows stays unknown, and so does what could be either of two axes; nothing is ever guessed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from ... import layers
from ...control import Axis, ElasticDim, concat
from ...convert import example_of
from ...convert.axes import Axes
from ...convert.structure import Atom, Concat, Structure, forget_history, fresh, resolve, size
from ...convert.structure import concat as joined
from ...convert.trace import Call, Example, Run, Value, owned_tensors, run
from ...errors import ConversionError
from ...layers import ElasticLayer, ElasticView

_NORMS_OF_LAST = (layers.ElasticLayerNorm, layers.ElasticRMSNorm)
_NORMS_OF_CHANNELS = (layers.ElasticBatchNorm1d, layers.ElasticBatchNorm2d, layers.ElasticGroupNorm)


def axes_at(model: nn.Module, path: str, side: str, recorded: Run | Callable[[], Run | None] | None = None) -> Axis | None:
    """The axis that the channels of a module's first tensor run along.

    Args:
        model: that holds elastic layers.
        path: of the module.
        side: ``"in"`` or ``"out"``: of what its own forward takes, or gives; layers that edits have put before or after it are beyond.
        recorded: a run of a module of the model that calls this one, or what gives one if it is needed. Without, the model runs on the
            inputs that ``elasticize`` recorded.

    Returns:
        the axis, one that the model has already where there is one; ``None`` where it is not certain, or not elastic.

    Effects:
        None on the model; the run is on tensors without values, and only where the module does not say it itself.
    """
    module = model.get_submodule(path)
    said = _said(module, side)
    if said is not None or isinstance(module, layers.ElasticEmbedding):
        return said
    if recorded is None:
        example = example_of(model)
        if example is None:
            return None
        try:
            recorded = run(model, Example(example), grad=False)
        except ConversionError:
            return None
    if not isinstance(recorded, Run):
        recorded = recorded()
    return None if recorded is None else Channels(recorded).of(module, side)


def _said(module: nn.Module, side: str) -> Axis | None:
    """What an elastic layer says of itself; of a sequence, its first or last layer."""
    if isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward:
        own = list(module)
        return _said(own[0 if side == "in" else -1], side) if own else None
    if not isinstance(module, ElasticLayer) or isinstance(module, ElasticView | layers.ElasticEmbedding):
        return module.out_dim if isinstance(module, layers.ElasticEmbedding) and side == "out" else None
    found: Axis = getattr(module, "dim", None) or getattr(module, f"{side}_dim")
    return found


class Channels(Axes):
    """What is known of the values of a run of an elastic model."""

    def __init__(self, recorded: Run) -> None:
        super().__init__()
        self.recorded = recorded
        self.atoms: dict[ElasticDim, Atom] = {}
        self.axes: list[Axis] = []
        try:
            self._read()
        finally:
            forget_history()
        self.dims: dict[Atom, list[ElasticDim]] = {}
        for dim, atom in self.atoms.items():
            self.dims.setdefault(atom.root(), []).append(dim)

    def of(self, module: nn.Module, side: str) -> Axis | None:
        """The one axis that the first tensor has in every call of a module."""
        found: list[Axis | None] = []
        for call in self.recorded.calls:
            values = call.inputs if side == "in" else call.outputs
            if call.module is module and values:
                known = [axis for axis in map(self._axis, values[0].axes or []) if axis is not None]
                found.append(known[0] if len(known) == 1 else None)
        if not found or any(axis is None or found[0] is None or axis.segments != found[0].segments for axis in found):
            return None
        return found[0]

    # Reading

    def _read(self) -> None:
        recorded = self.recorded
        self._take_tensors()
        for value in (*recorded.inputs, *recorded.constants):
            value.axes = [fresh(n) for n in value.shape]
        inside = {call.start: call for call in reversed(recorded.calls) if _is_leaf(call.module)}
        position = 0
        while position < len(recorded.nodes):
            call = inside.pop(position, None)
            if call is not None:
                self._pass(call)
                position = max(call.end, position)
                continue
            node = recorded.nodes[position]
            self._take_own_op(node)
            position += 1

    def _take_tensors(self) -> None:
        axes: dict[int, tuple[Structure, ...]] = {}
        whole = self.recorded.calls[0].module
        names: dict[str, tuple[nn.Module, str]] = {name: (module, key) for name, module, key, _ in owned_tensors(whole)}
        for name, value in self.recorded.tensors.items():
            module, key = names[name]
            if isinstance(module, ElasticLayer) and module.tensor_axes().get(key):
                axes[id(value)] = tuple(
                    self._stored(axis, n, module) for axis, n in zip(module.tensor_axes()[key], value.shape, strict=True)
                )
            value.axes = list(axes.get(id(value), (fresh(n) for n in value.shape)))

    def _stored(self, axis: Axis | None, capacity: int, module: ElasticLayer) -> Structure:
        """The axis of a tensor at capacity: what is active comes first."""
        if axis is None:
            return fresh(capacity)
        shown = self._structure(axis, module)
        if size(shown) == capacity:
            return shown
        return joined([shown, fresh(capacity - size(shown))]) if len(axis.segments) == 1 else fresh(capacity)

    def _structure(self, axis: Axis, module: ElasticLayer) -> Structure:
        """An axis as activations have it in the layout of a layer."""
        self.axes.append(axis)
        parts: list[Structure] = []
        for dim, _, inner in axis.segments:
            n = dim.capacity if module._widths.static else dim.active
            atom = self.atoms.setdefault(dim, Atom(n))
            parts.append((*((atom,) if n > 1 else ()), *fresh(inner)))
        return joined(parts)

    def _take_own_op(self, node: Any) -> None:
        """Ops of ours outside of elastic layers pass their first operand on, as switches and fences do."""
        if node.op.namespace != "esper_elastic":
            self._apply(node)
            return
        source = next((arg for arg in node.args if isinstance(arg, Value)), None)
        for output in node.outputs:
            if output.axes is None:
                alike = source is not None and source.axes is not None and source.shape == output.shape
                output.axes = list(source.axes) if alike else [fresh(n) for n in output.shape]  # type: ignore[union-attr, arg-type]

    def _pass(self, call: Call) -> None:
        """What enters an elastic layer and what leaves it, as the layer says."""
        layer: Any = call.module
        for value in (*call.inputs, *call.outputs):
            if value.axes is None and value not in call.outputs:
                value.axes = [fresh(n) for n in value.shape]
        if not call.inputs or not call.outputs:
            return
        given, made = call.inputs[0], call.outputs[0]
        entering, leaving = list(given.axes or []), [fresh(n) for n in made.shape]
        rank = len(entering)
        if isinstance(layer, layers.ElasticEmbedding):
            leaving = [*entering, self._structure(layer.out_dim, layer)]
        elif isinstance(layer, (*_NORMS_OF_LAST, *_NORMS_OF_CHANNELS)):
            place = rank - 1 - len(layer._fixed_shape) if isinstance(layer, _NORMS_OF_LAST) else 1
            self.unify(entering[place], self._structure(layer.dim, layer))
            leaving = entering
        else:
            place = rank - 1 if isinstance(layer, layers.ElasticLinear) else rank - 1 - len(layer.kernel_size)
            self.unify(entering[place], self._structure(layer.in_dim, layer))
            leaving[:place] = entering[:place]
            leaving[place] = self._structure(layer.out_dim, layer)
        made.axes = leaving

    # Results

    def _axis(self, structure: Structure) -> Axis | None:
        """The axis of a structure that consists of dims throughout."""
        stretches = self._stretches_of(structure)
        if not stretches:
            return None
        made = concat(*(dim * inner if inner > 1 else dim for dim, inner in stretches))
        same = next((axis for axis in self.axes if axis.segments == made.segments), None)
        return same if same is not None else made

    def _stretches_of(self, structure: Structure) -> list[tuple[ElasticDim, int]] | None:
        factors = resolve(structure)
        if not factors:
            return None
        first, rest = factors[0], factors[1:]
        if isinstance(first, Concat):
            found: list[tuple[ElasticDim, int]] = []
            for part in first.parts:
                stretches = self._stretches_of((*part, *rest))
                if stretches is None:
                    return None
                found += stretches
            return found
        known = self.dims.get(first.root(), [])
        return [(known[0], size(rest))] if len(known) == 1 else None


def _is_leaf(module: nn.Module) -> bool:
    """Whether a module is an elastic layer that says what it takes and gives."""
    return isinstance(module, ElasticLayer) and not isinstance(module, ElasticView)
