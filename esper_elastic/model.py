"""The calls that take a whole model: its dims by name, widths and switches in one commit, layout, control block.

They work on any model that holds elastic layers. What they learn of its structure is kept, weakly. Registering a module anywhere makes them
look whether it still holds; the calls that only read look always.
"""

from __future__ import annotations

import copy
import difflib
import functools
import itertools
import operator
import weakref
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NoReturn

from torch import Tensor, nn
from torch.nn.modules.module import register_module_module_registration_hook

from .control import ControlBlock, ElasticDim
from .errors import LayoutError, UnknownDimError
from .layers import ElasticLayer, Switchable


class Dims(dict[str, ElasticDim]):
    """The free root dims of a model by name, in the order of the modules that produce them.

    A name that is not there may be the one that a dim was given when it was made; otherwise the error names the nearest ones.
    """

    def __missing__(self, name: str) -> ElasticDim:
        for dim in self.values():
            if dim.name == name:
                return dim
        _unknown("dim", name, self)


def dims(model: nn.Module) -> Dims:
    """Every dim that a layer of ``model`` produces, under the path of the first one that does.

    Each is free: any multiple between its minimum and its capacity is valid, whatever the others are. A dim that only enters, as the
    model's input width, is no one's to choose here; it is ``layer.in_dim``.

    Effects:
        Gathers the model's layers on one control block, and teaches them their paths for messages.
    """
    return _structure(model, look=True).dims


def known(model: nn.Module) -> tuple[Dims, Mapping[str, Switchable]]:
    """Dims and switches by name as they were found last, which is now if a module was registered anywhere since; quicker than looking."""
    structure = _structure(model)
    return structure.dims, structure.blocks


def control_block(model: nn.Module) -> ControlBlock:
    """The control block of ``model``; the blocks of its layers are merged into one.

    Raises:
        LayoutError: the model holds no elastic layer.
    """
    structure = _structure(model, look=True)
    if structure.block is None:
        raise LayoutError(f"control_block: {type(model).__name__} holds no elastic layer. Build it from ee.ElasticLinear and its kin.")
    return structure.block


def resize(model: nn.Module, widths: Mapping[str, int]) -> None:
    """Set several widths, by the names of :func:`dims`, in one commit: all or none.

    Raises:
        CapacityError: a name is unknown or a width invalid; nothing has changed.
        OwnerError: the calling thread does not own the control block; nothing has changed.
    """
    if not widths:
        return
    structure = _structure(model)
    changes = [(structure.dims[name], n) for name, n in widths.items()]
    changes = [(dim, dim.admit(n)) for dim, n in changes]
    changes[0][0].block.stage_all(changes)


def enable(model: nn.Module, name: str) -> None:
    """Switch the :class:`ElasticBlock` at path ``name`` on; its parameters and optimizer state are as they were when it went off."""
    _block(model, name).switch.set(True)


def disable(model: nn.Module, name: str) -> None:
    """Switch the :class:`ElasticBlock` at path ``name`` off; see there for what it gives meanwhile."""
    _block(model, name).switch.set(False)


def set_layout(model: nn.Module, layout: str) -> None:
    """Choose what activations carry: the active units alone (``"compact"``), or capacity units with dormant ones zero (``"static"``).

    Raises:
        LayoutError: the layout is unknown, or a part of the model cannot be static; nothing has changed.
    """
    if layout not in ("compact", "static"):
        raise LayoutError(f"set_layout: layout: expected 'compact' or 'static', got {layout!r}.")
    structure = _structure(model, look=True)
    if layout == "static":
        for path, block in structure.blocks.items():
            _refuse_plain_statistics(path, block)
        for dim in {dim for layer in structure.layers for _, axis in layer.named_axes() for dim in axis.dims}:
            if dim.compact_only is not None:
                raise LayoutError(
                    f"set_layout: {dim.label} cannot be static: {dim.compact_only}, over dormant units as over active ones. "
                    "Stay compact, or convert the model without that dim (exclude=)."
                )
    for module in (*structure.layers, *structure.blocks.values()):
        put_in_layout(module, layout)


def layout_of(module: nn.Module) -> str:
    """The layout of an elastic layer or of what has a switch."""
    if isinstance(module, ElasticLayer):
        return module.layout
    assert isinstance(module, Switchable)
    return "static" if module.static else "compact"


def put_in_layout(module: nn.Module, layout: str) -> None:
    """Set the layout of an elastic layer, of what has a switch, or of what is both."""
    if isinstance(module, ElasticLayer):
        module.layout = layout
    if isinstance(module, Switchable):
        module.be_static(layout == "static")


def forgetting(model: nn.Module) -> list[Callable[[], Any]]:
    """Calls after which the structure of ``model`` is looked up anew; none runs a line of this package."""
    return [functools.partial(_structures.pop, model, None), _count]


def copy_structure(model: nn.Module, stand_in: Callable[[Tensor], Tensor]) -> nn.Module:
    """A deep copy of ``model``, on a control block of its own, that holds ``stand_in(tensor)`` for each tensor of a module, once."""
    memo: dict[int, object] = {}
    for module in model.modules():
        for tensor in (*module._parameters.values(), *module._buffers.values(), *vars(module).values()):
            if isinstance(tensor, Tensor) and id(tensor) not in memo:
                memo[id(tensor)] = stand_in(tensor)
    return copy.deepcopy(model, memo)


def _refuse_plain_statistics(path: str, block: Switchable) -> None:
    for name, module in block.inside.named_modules():
        plain = isinstance(module, nn.modules.batchnorm._NormBase) and not isinstance(module, ElasticLayer)
        if plain and module.track_running_stats:
            raise LayoutError(
                f"set_layout: ElasticBlock {path!r} cannot be static: {type(module).__name__} {name!r} inside would go on updating its "
                "running statistics while the block is off. Use ee.ElasticBatchNorm2d or ee.ElasticBatchNorm1d there, or stay compact."
            )


class _Structure:
    """What the model-level calls need to know of a model, and whether it still holds."""

    seen: int

    def __init__(self, model: nn.Module) -> None:
        self.layers: list[ElasticLayer] = []
        self.blocks: dict[str, Switchable] = {}
        self.dims = Dims()
        self._children: list[tuple[weakref.ref[nn.Module], tuple[nn.Module | None, ...]]] = []
        named: set[int] = set()
        for path, module in model.named_modules():
            self._children.append((weakref.ref(module), tuple(module._modules.values())))
            if isinstance(module, ElasticLayer):
                self.layers.append(module)
                module._widths.label = f"{type(module).__name__} {path!r}" if path else type(module).__name__
                produced = [dim for dim in module.produced if dim.rigid is None]
                for index, dim in enumerate(produced):
                    if id(dim) not in named:
                        named.add(id(dim))
                        name = path or module.name_of(dim)
                        several = len(produced) > 1 if path else name in self.dims
                        self._name(dim, f"{name}:{index}" if several else name)
            if isinstance(module, Switchable):
                self.blocks[path] = module
                module.switch.path = path
        owners = [layer._widths.block for layer in self.layers] + [block.switch.block for block in self.blocks.values()]
        self.block = ControlBlock.merge(owners) if owners else None

    def _name(self, dim: ElasticDim, path: str) -> None:
        dim.path = path
        self.dims[path] = dim

    def holds(self) -> bool:
        """Whether every module still has the children that it had."""
        for reference, children in self._children:
            module = reference()
            if module is None or tuple(module._modules.values()) != children:
                return False
        return self.block is None or all(dim.block is self.block for dim in self.dims.values())


_structures: weakref.WeakKeyDictionary[nn.Module, _Structure] = weakref.WeakKeyDictionary()


_registrations = 0
_count: Callable[[], Any] = functools.partial(
    next, map(functools.partial(operator.setitem, globals(), "_registrations"), itertools.count(1))
)


def _count_registration(module: nn.Module, name: str, child: nn.Module | None) -> None:
    _count()


register_module_module_registration_hook(_count_registration)


def _structure(model: nn.Module, look: bool = False) -> _Structure:
    known = _structures.get(model)
    if known is not None and known.seen == _registrations and not look:
        return known
    if known is None or not known.holds():
        known = _structures[model] = _Structure(model)
    known.seen = _registrations
    return known


def _block(model: nn.Module, name: str) -> Switchable:
    structure = _structure(model)
    block = structure.blocks.get(name)
    if block is None:
        _unknown("switch", name, structure.blocks)
    return block


def _unknown(what: str, name: str, known: Iterable[str]) -> NoReturn:
    names = list(known)
    near = difflib.get_close_matches(str(name), names, n=3) or names[:5]
    hint = f"The nearest: {', '.join(map(repr, near))}." if near else f"The model has no {what} at all."
    raise UnknownDimError(f"model: unknown {what} {name!r}: expected one of its {len(names)} names. {hint}")
