"""Layer specs: a layer as data, so that one from outside can be read without running anything.

A spec names a kind of the allow-list in ``kinds.py`` and its arguments, and nothing else: no code, no path to import, no pickle. It is
checked when it is made, and what it would allocate is computed from the arguments; so a spec that exists can be built. What is refused is
refused as :class:`SurgeryError`, whatever is thrown at it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import nn

from ...errors import SurgeryError
from ...layers import ElasticLayer
from ...layers.state import JOURNAL
from .kinds import KINDS, Given
from .values import Unfit

#: Elements of parameters and buffers that one spec may allocate in all: a gibibyte of float32.
BUDGET = 2**28
#: Layers of one spec in all, containers included.
MOST_LAYERS = 1024
#: Layers inside one another.
MOST_NESTED = 16


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class LayerSpec:
    """A layer as data: immutable, hashable, and equal to every other spec that builds the same layer.

    Args:
        kind: the name of a class of ``torch.nn`` on the allow-list, as ``"Conv2d"``.
        arguments: those of its constructor by name, without ``device`` and ``dtype``. Integers, floats, booleans and strings are taken by
            their exact type, sizes as an integer, a tuple or a list.
        layers: of a ``"Sequential"``, the layers in it.

    Attributes:
        elements: how many elements of parameters and buffers it allocates, those inside included.
        num_layers: the layers that it consists of, itself included.
        depth: how many layers lie inside one another.

    ``arguments`` are kept as the layer keeps them, without those that are at their default.

    Example:
        >>> LayerSpec("Conv2d", {"in_channels": 3, "out_channels": 8, "kernel_size": 3, "stride": 1})
        LayerSpec('Conv2d', in_channels=3, out_channels=8, kernel_size=(3, 3))

    Raises:
        SurgeryError: something is not on the allow-list, of another type, out of bounds, or all of it is too large.
    """

    kind: str
    arguments: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    layers: tuple[LayerSpec, ...] = ()
    elements: int = dataclasses.field(init=False)
    num_layers: int = dataclasses.field(init=False)
    depth: int = dataclasses.field(init=False)

    def __post_init__(self) -> None:
        if type(self.kind) is not str or self.kind not in KINDS:
            raise SurgeryError(f"LayerSpec: kind: expected a layer on the allow-list, got {shown(self.kind)}.{_nearest(self.kind, KINDS)}")
        kind = KINDS[self.kind]
        given = _read_arguments(self.kind, self.arguments)
        layers = _read_layers(self.kind, self.layers)
        said = {name: value for name, value in given.items() if not _same(value, kind.arguments[name].default)}
        own: dict[str, Any] = {
            "arguments": MappingProxyType(said),
            "layers": layers,
            "elements": kind.elements(given) + sum(layer.elements for layer in layers),
            "num_layers": 1 + sum(layer.num_layers for layer in layers),
            "depth": 1 + max((layer.depth for layer in layers), default=0),
        }
        for name, value in own.items():
            object.__setattr__(self, name, value)
        _check_limits(self)

    @property
    def all_arguments(self) -> dict[str, Any]:
        """The arguments with those at their default, in the order of the constructor."""
        return {name: self.arguments.get(name, argument.default) for name, argument in KINDS[self.kind].arguments.items()}

    def replace(self, **arguments: Any) -> LayerSpec:
        """The spec with other ``arguments`` for those of the same names.

        Raises:
            SurgeryError: as the constructor.
        """
        return LayerSpec(self.kind, {**self.arguments, **arguments}, self.layers)

    def build(self) -> nn.Module:
        """A freshly initialised layer, as ``torch.nn`` makes it: on the default device, in the default type.

        Effects:
            Allocates :attr:`elements`; draws from the global random generator.

        Raises:
            SurgeryError: the layer could not be made, as for want of memory.
        """
        _check_limits(self)
        make = KINDS[self.kind].make
        try:
            return make(*(layer.build() for layer in self.layers), **self.arguments)
        except SurgeryError:
            raise
        except Exception as error:
            raise SurgeryError(f"LayerSpec: {self.kind}: could not be built: {error}") from error

    def to_json(self) -> dict[str, Any]:
        """The spec as JSON-able data: what :meth:`from_json` reads."""
        arguments = {name: list(value) if type(value) is tuple else value for name, value in self.arguments.items()}
        content: dict[str, Any] = {"kind": self.kind, "arguments": arguments}
        if self.layers:
            content["layers"] = [layer.to_json() for layer in self.layers]
        return content

    @classmethod
    def from_json(cls, content: Any) -> LayerSpec:
        """The spec that :meth:`to_json` wrote, from parsed JSON.

        Raises:
            SurgeryError: it is none.
        """
        return _from_json(content, MOST_NESTED)

    @classmethod
    def of(cls, module: nn.Module) -> LayerSpec | None:
        """The spec that builds a layer like ``module``, weights aside; ``None`` where none says exactly the same.

        That is so for a layer off the allow-list or beyond the limits, one with hooks or attributes of its own, a subclass, a container
        that holds one module twice. An elastic layer is described by the ``nn`` layer of its active size.
        """
        modules = list(module.modules())
        if len(modules) != sum(1 for _ in module.named_modules(remove_duplicate=False)) or len(modules) > MOST_LAYERS:
            return None
        return _of(module)

    def __repr__(self) -> str:
        parts = [repr(self.kind), *(f"{name}={value!r}" for name, value in self.arguments.items())]
        if self.layers:
            parts.append(f"layers={self.layers!r}")
        return f"LayerSpec({', '.join(parts)})"

    def _identity(self) -> tuple[Any, ...]:
        return self.kind, tuple(self.arguments.items()), self.layers

    def __eq__(self, other: object) -> bool:
        return self._identity() == other._identity() if isinstance(other, LayerSpec) else NotImplemented

    def __hash__(self) -> int:
        return hash(self._identity())

    def __reduce__(self) -> tuple[Any, ...]:
        return LayerSpec, (self.kind, dict(self.arguments), self.layers)


def shown(value: Any) -> str:
    """A short text for a value of whatever type, for messages; none of its methods is called.

    Builtin values are shown themselves, shortened; of all others the class is named.
    """
    kind = type(value)
    if kind is int and value.bit_length() > 64:
        return f"an integer of {value.bit_length()} bits"
    if kind is str and len(value) > 60:
        return f"{value[:60]!r}..., a string of {len(value)} characters"
    if kind in (int, float, bool, str, type(None)):
        return repr(value)
    if kind in (tuple, list) and len(value) <= 8 and all(type(item) in (int, float, bool, type(None)) for item in value):
        return "(" + ", ".join(map(shown, value)) + ")"
    return f"a {_name_of(kind)}"


#: ``type.__name__`` by itself: a metaclass may shadow it.
_name_of = type.__dict__["__name__"].__get__


def items_of(content: Any, where: str, what: str) -> dict[str, Any]:
    """A dict with string keys as a plain dict, by the methods of ``dict`` itself.

    Raises:
        SurgeryError: it is something else.
    """
    if type(content) is MappingProxyType:
        with contextlib.suppress(Exception):  # of what it stands for
            content = dict(content)
    if not issubclass(type(content), dict):
        raise SurgeryError(f"{where}: {what}: expected a dict, got {shown(content)}.")
    pairs = list(dict.items(content))
    strange = [key for key, _ in pairs if type(key) is not str]
    if strange:
        raise SurgeryError(f"{where}: {what}: expected names for keys, got {shown(strange[0])}.")
    return dict(pairs)


def _same(value: Any, default: Any) -> bool:
    return type(value) is type(default) and value == default


def _nearest(name: Any, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, list(known), 1) if type(name) is str and len(name) <= 60 else []
    return f" Did you mean {near[0]}?" if near else f" Known: {', '.join(known) or 'none'}."


def _read_arguments(kind: str, arguments: Any) -> Given:
    """All arguments of a layer as it keeps them, defaults included."""
    where, table = f"LayerSpec: {kind}", KINDS[kind].arguments
    said = items_of(arguments, where, "arguments")
    unknown = next((name for name in said if name not in table), None)
    if unknown is not None:
        raise SurgeryError(f"{where}: expected arguments that it has, got {shown(unknown)}.{_nearest(unknown, table)}")
    given: Given = {}
    for name, argument in table.items():
        if name not in said:
            if argument.required:
                raise SurgeryError(f"{where}: {name}: expected {argument.values}, got nothing.")
            given[name] = argument.default
            continue
        try:
            given[name] = argument.values.read(said[name])
        except Unfit:
            raise SurgeryError(f"{where}: {name}: expected {argument.values}; got {shown(said[name])}.") from None
    wrong = KINDS[kind].rule(given)
    if wrong is not None:
        name, expected, got = wrong
        raise SurgeryError(f"{where}: {name}: expected {expected}; got {shown(got)}.")
    return KINDS[kind].settled(given)


def _read_layers(kind: str, layers: Any) -> tuple[LayerSpec, ...]:
    if type(layers) not in (tuple, list) or not all(type(layer) is LayerSpec for layer in layers):
        raise SurgeryError(f"LayerSpec: {kind}: layers: expected a tuple of LayerSpec, got {shown(layers)}.")
    if layers and kind != "Sequential":
        raise SurgeryError(f"LayerSpec: {kind}: layers: expected none, got {len(layers)}. Only a Sequential holds layers.")
    return tuple(layers)


def _check_limits(spec: LayerSpec) -> None:
    for what, got, most in (
        ("layers", spec.num_layers, MOST_LAYERS),
        ("layers inside one another", spec.depth, MOST_NESTED),
        ("elements to allocate", spec.elements, BUDGET),
    ):
        if got > most:
            raise SurgeryError(f"LayerSpec: {spec.kind}: {what}: expected at most {most} in all, got {got}.")


def _from_json(content: Any, levels: int) -> LayerSpec:
    where = "LayerSpec.from_json"
    fields = items_of(content, where, "content")
    unknown = next((name for name in fields if name not in ("kind", "arguments", "layers")), None)
    if unknown is not None or "kind" not in fields:
        got = "no kind" if unknown is None else shown(unknown)
        raise SurgeryError(f"{where}: expected kind, and perhaps arguments and layers; got {got}.")
    layers = fields.get("layers", [])
    if type(layers) not in (list, tuple):
        raise SurgeryError(f"{where}: layers: expected a list, got {shown(layers)}.")
    if layers and levels == 1:
        raise SurgeryError(f"{where}: layers inside one another: expected at most {MOST_NESTED}, got more.")
    inside: list[LayerSpec] = []
    left = MOST_LAYERS
    for layer in layers:  # counted on the way, for the same list may be in it often
        inside.append(_from_json(layer, levels - 1))
        left -= inside[-1].num_layers
        if left <= 0:
            raise SurgeryError(f"{where}: layers: expected at most {MOST_LAYERS} in all, got more.")
    return LayerSpec(fields["kind"], fields.get("arguments", {}), tuple(inside))


# From modules


def _of(module: nn.Module) -> LayerSpec | None:
    if isinstance(module, ElasticLayer):
        if type(module).__name__ != f"Elastic{module.dense_class.__name__}" or _has_hooks(module):
            return None
        module = module._dense("meta", None)
    kind = KINDS.get(type(module).__name__)
    if kind is None or type(module) is not kind.make:
        return None
    children = [(name, child) for name, child in module._modules.items()]
    if [name for name, _ in children] != [str(index) for index in range(len(children))] or (children and kind.make is not nn.Sequential):
        return None
    layers = [None if child is None else _of(child) for _, child in children]
    held = {**vars(module), **module._parameters}
    arguments = {name: held[name] is not None if name == "bias" else held[name] for name in kind.arguments if name in held}
    try:
        spec = LayerSpec(type(module).__name__, arguments, tuple(layer for layer in layers if layer is not None))
    except SurgeryError:
        return None
    if None in layers:
        return None
    with torch.device("meta"):
        twin = kind.make(*[nn.Module() for _ in children], **spec.arguments)
    return spec if _alike(module, twin) else None


def _alike(module: nn.Module, twin: nn.Module) -> bool:
    """Whether two modules of one class differ in nothing but the values of their tensors and what their children are."""
    ours, theirs = ({key: value for key, value in vars(each).items() if key not in _NOT_COMPARED} for each in (module, twin))
    if ours.keys() != theirs.keys() or not all(_same(value, theirs[key]) for key, value in ours.items()):
        return False
    for holder in ("_parameters", "_buffers"):
        mine, other = getattr(module, holder), getattr(twin, holder)
        if mine.keys() != other.keys():
            return False
        if any(
            (a is None) != (b is None) or (a is not None and a.shape != b.shape) for a, b in zip(mine.values(), other.values(), strict=True)
        ):
            return False
    return True


def _has_hooks(module: nn.Module) -> bool:
    return any("hook" in key and bool(value) for key, value in vars(module).items())


_NOT_COMPARED = {"_parameters", "_buffers", "_modules", "training", JOURNAL}
