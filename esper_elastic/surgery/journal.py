"""The journal: every edit of a model as JSON, kept with the model, and replayed on a fresh one.

An entry says which operation was carried out, with which arguments, what came of it by name, and what the edit decided on the way, so
that a replay needs neither an input nor the old weights::

    {"format": 1, "operation": "add_layer", "arguments": {"position": "after_fc1", "layer": {...}}, "name": "fc1.edits.after_0"}

The journal travels with the model, through ``copy.deepcopy``, ``pickle``, ``state_dict()`` and ``ee.save``; one from outside is checked
here, entry by entry. Carrying an edit out is the surgeon's: nothing here touches a layer.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping
from typing import Any

from torch import nn

from ..convert import PLAN
from ..errors import SurgeryError
from ..layers.state import JOURNAL, ROOT_KEY, Journal, as_text, journal_of, read_content, unwrapped
from .specs.specs import LayerSpec, items_of, shown
from .specs.values import Flag, Json, Text, Unfit, Values

FORMAT = 1
#: Edits in a journal that is read.
MOST_EDITS = 10**5

Entry = dict[str, Any]


def journal(source: nn.Module | Mapping[str, Any]) -> list[Entry]:
    """The edits that a model has had, or those that a ``state_dict`` speaks of, oldest first.

    Returns:
        a copy, JSON-able; empty where nothing was edited.

    Raises:
        SurgeryError: the ``state_dict`` holds something else.
    """
    if isinstance(source, nn.Module):
        return [json.loads(text) for text in journal_of(source)]
    if ROOT_KEY not in source:
        return []
    try:
        content = read_content(source[ROOT_KEY])["journal"]
    except Exception as error:
        raise SurgeryError(
            f"journal: {ROOT_KEY}: expected a uint8 tensor of JSON with a journal, got something else ({error!r})."
        ) from error
    return validated(content, "journal")


def record(model: nn.Module, entry: Entry) -> None:
    """Append an edit to the journal of ``model``, or of the module that it wraps.

    Effects:
        Puts a longer journal in the place of the old one, which is not written to. The entry is copied, and notes whether the model had
        been made elastic by a plan before.

    Raises:
        SurgeryError: it is no entry; nothing has changed.
    """
    (made,) = validated([entry], "record")
    made.pop("elastic", None)
    root = unwrapped(model)
    if _made_elastic(model):
        made["elastic"] = True
    root.__dict__[JOURNAL] = Journal([*journal_of(root), as_text(made)])


def replay(journal: list[Entry], model: nn.Module, *, modules: Mapping[str, nn.Module] | None = None) -> nn.Module:
    """Carry the edits of ``journal`` out on a fresh model, so that it has the structure of the edited one and takes its weights.

    Args:
        journal: what :func:`journal` gives, from a model or a ``state_dict``.
        model: as the edited one was before its first edit. Edits that it has had already, if the journal begins with them, are left out.
        modules: for each edit that inserted a module which no :class:`LayerSpec` describes, one like it, by the name of the edit.

    Returns:
        ``model``, which is changed in place.

    Effects:
        All edits or none, in one transaction.

    Raises:
        SurgeryError: the journal is damaged or not of this model, an edit fails, or a module is missing; the model is as it was.
    """
    entries, held = validated(journal, "replay"), dict(modules or {})
    done = len(journal_of(model))
    if [as_text(entry) for entry in entries[:done]] != journal_of(model):
        raise SurgeryError(
            f"replay: journal: expected one that begins with the {done} edits that {type(model).__name__} has had, got another of "
            f"{len(entries)}. Replay it on a fresh model."
        )
    _check_modules(entries, done, held)
    if len(entries) == done:
        return model
    from .surgeon import ModelSurgeon  # which keeps this journal
    from .transaction import transaction

    surgeon = ModelSurgeon()

    @transaction(model, validate=False)  # which a `with` of ours could not end: see there
    def perform() -> None:
        for number, entry in enumerate(entries[done:], done):
            _perform(surgeon, model, entry, number, held)

    perform()
    return model


def describe(layer: nn.Module | LayerSpec) -> dict[str, Any]:
    """A layer as an entry has it: its spec, or for a module that no spec says exactly the name of its class."""
    spec = layer if isinstance(layer, LayerSpec) else LayerSpec.of(layer)
    return {"kind": "module", "class": _class_of(layer)} if spec is None else spec.to_json()


def layer_of(entry: Entry, modules: Mapping[str, nn.Module]) -> nn.Module:
    """The layer that an ``add_layer`` entry inserts: freshly built from its spec, or the one given under the entry's name.

    Raises:
        SurgeryError: none was given.
    """
    content = entry["arguments"]["layer"]
    if content["kind"] != "module":
        return LayerSpec.from_json(content).build()
    return _given(modules, entry["name"], content["class"])


def validated(content: Any, where: str) -> list[Entry]:
    """A copy of a journal from outside, of exact types.

    Raises:
        SurgeryError: it is none.
    """
    if type(content) not in (list, tuple, Journal) or len(content) > MOST_EDITS:
        raise SurgeryError(f"{where}: journal: expected a list of at most {MOST_EDITS} edits, got {shown(content)}.")
    return [_validated_entry(entry, f"{where}: journal: entry {number}") for number, entry in enumerate(content)]


# Entries


class _Layer:
    """What ``describe`` gives."""

    def read(self, value: Any) -> dict[str, Any]:
        if not issubclass(type(value), dict):
            raise Unfit
        fields = items_of(value, "journal", "layer")
        if type(fields.get("kind")) is str and fields["kind"] == "module":
            if fields.keys() != {"kind", "class"}:
                raise Unfit
            return {"kind": "module", "class": Text().read(fields["class"])}
        return LayerSpec.from_json(fields).to_json()

    def __str__(self) -> str:
        return "the JSON of a LayerSpec, or kind 'module' with the name of its class"


_path, _flag = Text(), Flag()
_OPERATIONS: dict[str, dict[str, Values]] = {
    "add_layer": {"position": _path, "layer": _Layer(), "preserve": _flag},
    "remove_layer": {"layer_name": _path},
    "modify_layer": {"layer_name": _path, "new_config": Json(), "preserve": _flag},
    "add_skip_connection": {"from_layer": _path, "to_layer": _path, "preserve": _flag},
    "remove_skip_connection": {"name": _path},
}
_FIELDS = ("format", "operation", "arguments", "name", "details", "elastic")
#: What an entry or its arguments may do without.
_OPTIONAL = {"preserve", "details", "elastic"}


def _validated_entry(content: Any, where: str) -> Entry:
    said = items_of(content, where, "entry")
    version, operation = said.get("format"), said.get("operation")
    if type(version) is not int or version != FORMAT:
        raise SurgeryError(f"{where}: format: expected {FORMAT}, got {shown(version)}. Replay it with the version that wrote it.")
    if type(operation) is not str or operation not in _OPERATIONS:
        raise SurgeryError(f"{where}: operation: expected one of {', '.join(_OPERATIONS)}, got {shown(operation)}.")
    where = f"{where}: {operation}"
    arguments = items_of(said.get("arguments"), where, "arguments")
    entry: Entry = {"format": FORMAT, "operation": operation, "arguments": _read(arguments, _OPERATIONS[operation], f"{where}: arguments")}
    rest = {name: value for name, value in said.items() if name not in entry}
    return entry | _read(rest, {"name": _path, "details": Json(), "elastic": _flag}, where)


def _read(said: dict[str, Any], table: dict[str, Values], where: str) -> dict[str, Any]:
    """Values by the names of ``table``, in its order."""
    unknown = next((name for name in said if name not in table), None)
    if unknown is not None:
        near = difflib.get_close_matches(unknown[:60], table, 1)
        raise SurgeryError(f"{where}: expected {', '.join(table)}; got {shown(unknown)}." + (f" Did you mean {near[0]}?" if near else ""))
    made = {}
    for name, values in table.items():
        if name not in said:
            if name not in _OPTIONAL:
                raise SurgeryError(f"{where}: {name}: expected {values}, got nothing.")
            continue
        try:
            made[name] = values.read(said[name])
        except Unfit:
            raise SurgeryError(f"{where}: {name}: expected {values}; got {shown(said[name])}.") from None
        except SurgeryError as error:
            raise SurgeryError(f"{where}: {name}: {error}") from error
    return made


# Replaying


def _perform(surgeon: Any, model: nn.Module, entry: Entry, number: int, modules: dict[str, nn.Module]) -> None:
    """Carry out one edit, of which the surgeon keeps the journal.

    Raises:
        SurgeryError: it was refused, or came out otherwise than it did when the entry was written.
    """
    where = f"replay: entry {number} ({entry['operation']} {entry['name']!r})"
    if _made_elastic(model) != entry.get("elastic", False):
        before, now = ("elastic", "is not") if entry.get("elastic") else ("not elastic yet", "is")
        raise SurgeryError(
            f"{where}: expected a model that was {before}, as at the edit; this one {now}. Replay and ee.elasticize in order."
        )
    try:
        result = surgeon.perform(model, entry, modules)
    except Exception as error:
        raise SurgeryError(f"{where}: failed: {error}") from error
    if not result:
        raise SurgeryError(f"{where}: was refused: {result.error}")
    made = journal_of(model)[number:]
    if made != [as_text(entry)]:
        raise SurgeryError(
            f"{where}: expected {as_text(entry)}; got {', '.join(made) or 'nothing'}. The model is not as it was at the edit."
        )


def _check_modules(entries: list[Entry], done: int, modules: Mapping[str, nn.Module]) -> None:
    """Whether the modules that edits from ``done`` on ask for are there, and no others than those that any edit asks for."""
    layers = [(entry["name"], entry["arguments"].get("layer", {})) for entry in entries]
    wanted = [(name, layer["class"]) for name, layer in layers if layer.get("kind") == "module"]
    for name, kind in wanted[len([layer for _, layer in layers[:done] if layer.get("kind") == "module"]) :]:
        _given(modules, name, kind)
    unknown = next((name for name in modules if name not in dict(wanted)), None)
    if unknown is not None:
        known = ", ".join(name for name, _ in wanted) or "none"
        raise SurgeryError(f"replay: modules: expected those that edits ask for, {known}; got {shown(unknown)}.")


def _given(modules: Mapping[str, nn.Module], name: str, kind: str) -> nn.Module:
    given = modules.get(name)
    if not isinstance(given, nn.Module):
        raise SurgeryError(f"replay: modules: expected a {kind} for {name!r}, got nothing. Pass modules={{{name!r}: ...}}.")
    if _class_of(given) != kind:
        raise SurgeryError(f"replay: modules: {name!r}: expected a {kind}, got a {_class_of(given)}.")
    return given


def _made_elastic(model: nn.Module) -> bool:
    return any(PLAN in vars(each) for each in (model, unwrapped(model)))


def _class_of(layer: object) -> str:
    return f"{type(layer).__module__}.{type(layer).__qualname__}"
