"""Decisions: what is to change, as data. Read once, whatever they come as; what is wrong with one is said in one sentence.

Nothing here knows a model. Which mechanism serves a decision is the business of ``mechanisms.py``, whether it may be served that of
``safety.py``.
"""

from __future__ import annotations

import dataclasses
import enum
import json
import math
import time
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any, Protocol, runtime_checkable

from torch import Tensor, nn

from ..errors import DecisionError, SurgeryError
from ..surgery.specs.specs import LayerSpec, items_of, shown

#: What can be decided.
TYPES = (
    "resize",
    "grow",
    "prune",
    "enable",
    "disable",
    "add_layer",
    "remove_layer",
    "modify_layer",
    "add_skip_connection",
    "remove_skip_connection",
)
#: Those that change what the network is made of; the others change what of it is in use.
TOPOLOGY = frozenset(TYPES[5:])
#: Those that must name a layer, block or dim.
_NAMED = frozenset(TYPES) - {"add_layer"}

_FIELDS = ("adaptation_type", "layer_name", "position", "layer_spec", "parameters", "confidence", "urgency", "metadata", "timestamp")
_FIELD_SET = frozenset(_FIELDS)
#: Bounds on what comes from outside.
_LONGEST_NAME, _MOST_VALUES, _DEEPEST = 512, 10_000, 8
#: In bits: Python refuses to print integers of more than 4300 digits.
_LONGEST_INTEGER = 4096


@dataclasses.dataclass(frozen=True, eq=False)
class AdaptationDecision:
    """One change of a network, as data.

    Attributes:
        adaptation_type: one of ``resize``, ``grow``, ``prune``, ``enable``, ``disable``, ``add_layer``, ``remove_layer``, ``modify_layer``,
            ``add_skip_connection``, ``remove_skip_connection``.
        layer_name: the dim (as :func:`ee.dims` names it), layer or block that changes; for a skip, where it begins.
        position: ``"after_<path>"`` or ``"before_<path>"`` for a layer; for a skip, the module whose output it is added to.
        layer_spec: the layer to add: a :class:`LayerSpec`, what :meth:`LayerSpec.to_json` gives, or a module.
        parameters: what else the type takes:

            - resize, grow, prune: ``width`` (units), ``factor`` (of the present width) or ``delta`` (units). Without, grow adds a
              quarter and prune removes a quarter.
            - grow: ``init`` and ``exact`` of :meth:`ElasticDim.grow`.
            - prune: ``keep``, the units that stay; or ``by``, the score that chooses them: ``"magnitude"`` (default), ``"taylor"``
              (of the gradients at hand), ``"batch_norm_scale"``.
            - modify_layer: the new configuration, as of :meth:`ModelSurgeon.modify_layer`.
            - add_layer, add_skip_connection: ``preserve``.
            - add_skip_connection: ``from_layer`` and ``to_layer``, if they are not the name and the position.
        confidence: of whoever decided, from 0 to 1.
        urgency: from 0 to 1.
        metadata: carried along. Fields that are left out may ride in it.
        timestamp: when it was decided, in seconds since 1970.

    An instance made by hand is checked when it is used; :meth:`parse` checks at once.
    """

    adaptation_type: str
    layer_name: str | None = None
    position: str | None = None
    layer_spec: LayerSpec | nn.Module | None = None
    parameters: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    confidence: float = 1.0
    urgency: float = 1.0
    metadata: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    timestamp: float = dataclasses.field(default_factory=time.time)

    @classmethod
    def parse(cls, given: Any) -> AdaptationDecision:
        """The decision that ``given`` says, checked and in one form.

        Args:
            given: a decision, a mapping with its fields, JSON text of one, or any object with attributes of these names.

        Raises:
            DecisionError: it says none: a field is unknown, missing, of another type or out of bounds.
        """
        if type(given) is cls and "_parsed" in given.__dict__:
            return given
        try:
            fields = {name: given.__dict__[name] for name in _FIELDS} if type(given) is cls else _fields_of(given)
            normal = _normal(fields)
        except DecisionError:
            raise
        except Exception as error:  # of a foreign object's own code
            raise DecisionError(
                f"decision: expected fields that can be read, got {shown(given)} that raised a {type(error).__name__}."
            ) from error
        decision = object.__new__(cls)  # the initialiser of a frozen class takes longer than all checks
        decision.__dict__.update(normal, _parsed=True)
        return decision

    def to_json(self) -> dict[str, Any]:
        """The decision as JSON-able data, which :meth:`parse` reads; a module that no :class:`LayerSpec` describes goes by its class."""
        layer: Any = self.layer_spec
        if isinstance(layer, nn.Module):
            layer = LayerSpec.of(layer) or {"module": type(layer).__name__}
        content = {name: getattr(self, name) for name in _FIELDS}
        content["layer_spec"] = layer.to_json() if isinstance(layer, LayerSpec) else layer
        for name in ("parameters", "metadata"):
            content[name] = _plain(content[name])
        return content

    def __str__(self) -> str:
        said = [self.layer_name, self.position, *(f"{name}={shown(value)}" for name, value in self.parameters.items())]
        return f"{self.adaptation_type}({', '.join(part for part in said if part is not None)})"


@runtime_checkable
class DecisionSource(Protocol):
    """Whoever decides: a policy, a file that another process writes, a controller that learns when to change what.

    What else a source may have: ``name``, for the record; ``outcome(result)``, which is called with every :class:`AdaptationResult` of the
    run; ``observes(state)``, which is asked before each step and returns ``"scores"`` or ``"gradmax"`` to have it observed
    (:func:`esper_elastic.growth.observe`), or ``None``; ``state_dict()`` and ``load_state_dict(state)``, JSON-able, for checkpoints.
    """

    def decisions(self, state: Any) -> Iterable[Any]:
        """What to change now.

        Args:
            state: the :class:`~esper_elastic.training.state.TrainingState` between two steps.

        Returns:
            decisions, each in any form that :meth:`AdaptationDecision.parse` takes; a list of them succeeds or vanishes as one.
        """


def name_of(source: Any) -> str:
    """What a source is called in records."""
    return str(getattr(source, "name", None) or type(source).__name__)


# Reading


def _fields_of(given: Any) -> dict[str, Any]:
    if isinstance(given, str | bytes | bytearray):
        try:
            given = json.loads(given)
        except (ValueError, RecursionError) as error:
            raise DecisionError(f"decision: expected JSON, got text that is none: {str(error)[:200]}.") from None
    if isinstance(given, Mapping):
        try:
            fields = items_of(given if isinstance(given, dict | MappingProxyType) else dict(given), "decision", "fields")
        except SurgeryError as error:
            raise DecisionError(str(error)) from None
        if not fields.keys() <= _FIELD_SET:
            unknown = next(name for name in fields if name not in _FIELD_SET)
            raise DecisionError(
                f"decision: {shown(unknown)}: expected one of the fields {', '.join(_FIELDS)}. Put what else there is in metadata."
            )
        return fields
    found = {name: getattr(given, name) for name in _FIELDS if hasattr(given, name)}
    if "adaptation_type" not in found:
        raise DecisionError(f"decision: expected a decision, a mapping with its fields or JSON, got {shown(given)}.")
    return found


def _normal(fields: dict[str, Any]) -> dict[str, Any]:
    metadata = _mapping("metadata", fields.get("metadata"))
    for field in _FIELDS if metadata else ():
        value = fields.get(field)
        if field != "metadata" and (value is None or (type(value) is dict and not value)) and metadata.get(field) is not None:
            fields[field] = metadata[field]
    kind = _type(fields.get("adaptation_type"))
    name, position = _name("layer_name", fields.get("layer_name")), _name("position", fields.get("position"))
    parameters = _mapping("parameters", fields.get("parameters"))
    if kind in _NAMED and name is None and not (kind == "add_skip_connection" and "from_layer" in parameters):
        raise DecisionError(f"decision: {kind}: layer_name: expected the name of what is to change, got none.")
    if kind == "add_layer" and name is None and position is None:
        raise DecisionError('decision: add_layer: position: expected "after_<path>" or "before_<path>", got none.')
    layer = _layer(kind, fields.get("layer_spec"))
    now = fields.get("timestamp")
    return {
        "adaptation_type": kind,
        "layer_name": name,
        "position": position,
        "layer_spec": layer,
        "parameters": parameters,
        "confidence": _share("confidence", fields.get("confidence")),
        "urgency": _share("urgency", fields.get("urgency")),
        "metadata": metadata,
        "timestamp": time.time() if now is None else _number("timestamp", now),
    }


def _type(given: Any) -> str:
    if isinstance(given, enum.Enum):
        given = given.value if isinstance(given.value, str) else given.name
    if type(given) is str and len(given) <= _LONGEST_NAME:
        kind = given.strip().lower().replace("-", "_")
        if kind in TYPES:
            return kind
    raise DecisionError(f"decision: adaptation_type: expected one of {', '.join(TYPES)}, got {shown(given)}.")


def _name(what: str, given: Any) -> str | None:
    if given is None:
        return None
    if type(given) is not str or not given.strip() or len(given) > _LONGEST_NAME or not given.isprintable():
        raise DecisionError(f"decision: {what}: expected a name of at most {_LONGEST_NAME} printable characters, got {shown(given)}.")
    return given.strip()


def _layer(kind: str, given: Any) -> LayerSpec | nn.Module | None:
    if given is None:
        if kind == "add_layer":
            raise DecisionError("decision: add_layer: layer_spec: expected a LayerSpec, its JSON or a module, got none.")
        return None
    if issubclass(type(given), nn.Module) or type(given) is LayerSpec:
        return given
    try:
        return LayerSpec.from_json(given)
    except SurgeryError as error:
        raise DecisionError(f"decision: layer_spec: {error}") from None


def _mapping(what: str, given: Any) -> dict[str, Any]:
    if given is None or (type(given) is dict and not given):
        return {}
    try:
        found = items_of(given, "decision", what)
    except SurgeryError as error:
        raise DecisionError(str(error)) from None
    left = _MOST_VALUES
    pending: list[tuple[Any, int]] = [(found, 0)] if found else []
    while pending:
        value, depth = pending.pop()
        left -= 1
        if left < 0 or depth > _DEEPEST:
            raise DecisionError(f"decision: {what}: expected at most {_MOST_VALUES} values, {_DEEPEST} deep, got more.")
        if issubclass(type(value), dict):
            pending += ((inner, depth + 1) for inner in dict.values(value))
        elif issubclass(type(value), list | tuple):
            pending += ((inner, depth + 1) for inner in _items(value))
    return found


def _share(what: str, given: Any) -> float:
    if given is None:
        return 1.0
    value = _number(what, given)
    if not 0 <= value <= 1:
        raise DecisionError(f"decision: {what}: expected a number from 0 to 1, got {shown(given)}.")
    return value


def _number(what: str, given: Any) -> float:
    if type(given) is int or issubclass(type(given), float):
        try:
            value = float.__float__(given) if issubclass(type(given), float) else float(given)
        except OverflowError:
            value = math.inf
        if math.isfinite(value):
            return value
    raise DecisionError(f"decision: {what}: expected a finite number, got {shown(given)}.")


def _plain(value: Any, depth: int = 0) -> Any:
    """A value as strict JSON can hold it: sequences and tensors as lists, what has no form of its own by a few words."""
    kind = type(value)
    if kind in (str, bool, type(None)) or (kind is int and value.bit_length() <= _LONGEST_INTEGER):
        return value
    if issubclass(kind, float):
        number = float.__float__(value)
        return number if math.isfinite(number) else str(number)
    if depth <= _DEEPEST:
        if issubclass(kind, dict):
            return {key if type(key) is str else shown(key): _plain(inner, depth + 1) for key, inner in dict.items(value)}
        if kind is MappingProxyType:
            return _plain(dict(value), depth)
        if kind is Tensor and value.numel() <= _MOST_VALUES:
            return _plain(value.tolist(), depth)
        if issubclass(kind, list | tuple) or (kind is range and len(value) <= _MOST_VALUES):
            return [_plain(inner, depth + 1) for inner in _items(value)]
    return shown(value)


def _items(value: Any) -> Iterable[Any]:
    """The items of a list, tuple or range by the methods of those themselves."""
    base = next(base for base in (list, tuple, range) if issubclass(type(value), base))
    return base.__iter__(value)
