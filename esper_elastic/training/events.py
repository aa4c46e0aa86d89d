"""What can happen in a run, as typed events, and their form in JSON.

Owns the kinds of events, their fields and the strict check of what is read back. It neither stores nor counts them (``monitor.py``), and
knows no file (``lines.py``).

JSON has no infinities: a number field writes them as the strings ``"nan"``, ``"inf"`` and ``"-inf"``. In a free-form field, where such a
string could have been meant, they become ``{"$float": "nan"}``, and a key that begins with ``$`` is written with one more.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_type_hints

from ..errors import MonitorError
from .fields import field_of
from .free_form import safe_repr

Mechanism = Literal["metadata", "surgery"]


@dataclass(frozen=True, slots=True)
class Event:
    """Base of all events: the number of steps made when it happened, and the time in seconds since 1970.

    Mappings given to an event belong to it: nobody changes them afterwards.
    """

    step: int
    time: float


@dataclass(frozen=True, slots=True)
class RunStarted(Event):
    """A run begins: of which model, how large, how wide, with which settings and versions of packages."""

    model: str
    parameters: int
    multiply_adds: int | None
    widths: dict[str, int]
    settings: dict[str, Any]
    versions: dict[str, str]


@dataclass(frozen=True, slots=True)
class Resumed(Event):
    """A run goes on from a checkpoint."""

    checkpoint: str


@dataclass(frozen=True, slots=True)
class Progress(Event):
    """Means over the steps since the last one; ``parameters`` counts the active ones."""

    loss: float
    step_ms: float
    learning_rate: float
    parameters: int


@dataclass(frozen=True, slots=True)
class Evaluated(Event):
    """What an evaluation measured."""

    metrics: dict[str, float]


@dataclass(frozen=True, slots=True)
class Requested(Event):
    """A decision came in, from the source of that name. ``request`` numbers the decisions of a run."""

    request: int
    decision: dict[str, Any]
    source: str


@dataclass(frozen=True, slots=True)
class Refused(Event):
    """A decision was refused before anything was changed: by whom (``decision``, ``safety``, ``surgeon``, ...) and why."""

    request: int
    adaptation_type: str
    layer_name: str | None
    by: str
    reason: str


@dataclass(frozen=True, slots=True)
class Applied(Event):
    """A decision was carried out; what the model is like since.

    ``widths`` are those that may have changed. Counting parameters may be left to the next :class:`Progress`.
    """

    request: int
    adaptation_type: str
    layer_name: str | None
    mechanism: Mechanism
    milliseconds: float
    details: dict[str, Any]
    widths: dict[str, int]
    parameters: int | None
    multiply_adds: int | None


@dataclass(frozen=True, slots=True)
class RolledBack(Event):
    """An edit was begun and undone."""

    request: int
    adaptation_type: str
    layer_name: str | None
    milliseconds: float
    error: str


@dataclass(frozen=True, slots=True)
class Effect(Event):
    """What became of loss and step time some steps after a decision was applied."""

    request: int
    loss_before: float
    loss_after: float
    step_ms_before: float
    step_ms_after: float


@dataclass(frozen=True, slots=True)
class SnapshotTaken(Event):
    """The state before a change was put aside, so that it can be restored."""

    milliseconds: float
    bytes: int


@dataclass(frozen=True, slots=True)
class Restored(Event):
    """The state of ``snapshot_step`` was put back; ``request`` is the decision that is taken back by it, if it is known."""

    request: int | None
    snapshot_step: int
    reason: str
    milliseconds: float


@dataclass(frozen=True, slots=True)
class Saved(Event):
    """A checkpoint was written."""

    checkpoint: str
    milliseconds: float


@dataclass(frozen=True, slots=True)
class RunEnded(Event):
    """The run is over."""

    reason: str


KINDS: dict[str, type[Event]] = {
    kind.__name__: kind
    for kind in (
        RunStarted,
        Resumed,
        Progress,
        Evaluated,
        Requested,
        Refused,
        Applied,
        RolledBack,
        Effect,
        SnapshotTaken,
        Restored,
        Saved,
        RunEnded,
    )
}


def to_json(event: Event) -> dict[str, Any]:
    """The event as a dict that strict JSON can hold, its kind under ``"event"``.

    What JSON has no form for, anywhere in a free-form field, is written as its ``repr``.
    """
    return {"event": type(event).__name__} | {name: field.write(getattr(event, name)) for name, field in _FIELDS[type(event)].items()}


def from_json(data: object, where: str = "event") -> Event:
    """The event that :func:`to_json` wrote.

    Args:
        data: what was read, of any form.
        where: begins the message of an error.

    Raises:
        MonitorError: unknown kind, unknown or missing field, or a value of another type.
    """
    if not isinstance(data, Mapping):
        raise MonitorError(f"{where}: expected an object, got {safe_repr(data)}.")
    kind = KINDS.get(name) if isinstance(name := data.get("event"), str) else None
    if kind is None:
        raise MonitorError(f"{where}: event: expected one of {', '.join(KINDS)}, got {safe_repr(name)}.")
    fields = _FIELDS[kind]
    if strangers := [key for key in data if key not in fields and key != "event"]:
        raise MonitorError(f"{where}: {kind.__name__}: expected the fields {', '.join(fields)}, got also {safe_repr(strangers[0])}.")
    values = {}
    for key, field in fields.items():
        if key not in data:
            raise MonitorError(f"{where}: {kind.__name__}.{key}: expected {field.expected}, got nothing.")
        try:
            values[key] = field.read(data[key])
        except (TypeError, ValueError, OverflowError) as error:
            raise MonitorError(f"{where}: {kind.__name__}.{key}: expected {field.expected}, got {safe_repr(data[key])}.") from error
    return kind(**values)


#: Kind -> name of field -> how it is written and read, in the order of the fields.
_FIELDS = {kind: {name: field_of(hint) for name, hint in get_type_hints(kind).items()} for kind in KINDS.values()}
