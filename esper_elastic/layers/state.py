"""What a ``state_dict`` says of widths and edits: one tensor key at its root, written and read here.

Tensors travel as ``nn`` lets them, at capacity and under the names of the ``nn`` classes. Beside them the root, that is the module on
which ``state_dict()`` was called, gets the key :data:`ROOT_KEY`: JSON as ASCII bytes in a uint8 tensor, so that every format which takes
tensors takes it. It is there only while it has something to say: a width below capacity, a switch that is off, or an edit in the journal. A
plain ``nn`` model reports the key as unexpected: where this package is not at hand, take it out, and load the rest.

Only the module at the root sees a whole ``state_dict``, and it is the user's: a plain container, whose elastic parts may have been put
there long after it was built, far below. No hook of torch reaches it. So the first elastic layer, or the first edit, wraps the two methods
of ``nn.Module``; modules carry nothing, hence nothing to copy, pickle or leave behind, and trees with neither pass straight through.
"""

from __future__ import annotations

import contextlib
import functools
import json
import threading
from collections import OrderedDict
from collections.abc import Container, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..control import ControlBlock, ElasticDim, Switch
from ..errors import CapacityError, StateDictError
from .implied import Loaded, Solver

ROOT_KEY = "_esper_elastic"
#: The attribute of a module in which the journal of its edits is kept; absent where there is none.
JOURNAL = "_surgery_journal"
FORMAT = 1

#: The names under which wrappers (data parallel, averaged, compiled) hold the one module that they wrap.
_WRAPPER_CHILDREN = ("module", "_orig_mod")


def wrap_module_methods() -> None:
    """Let ``nn.Module.state_dict`` and ``load_state_dict`` speak of widths at the root of each call; idempotent."""
    if hasattr(nn.Module.state_dict, "_speaks_of_widths"):
        return
    save, load = nn.Module.state_dict, nn.Module.load_state_dict
    call = call_under_way

    @functools.wraps(save)
    def state_dict(self: nn.Module, *args: Any, destination: Any = None, prefix: str = "", keep_vars: bool = False) -> Any:
        if call.inside and (destination is not None or args):
            return save(self, *args, destination=destination, prefix=prefix, keep_vars=keep_vars)
        outer, call.inside = call.inside, True
        try:
            saved = save(self, *args, destination=destination, prefix=prefix, keep_vars=keep_vars)
        finally:
            call.inside = outer
        entry = root_entry(self) if _has_something_to_say(self) else None
        if entry is not None:
            saved[(args[1] if len(args) > 1 and not prefix else prefix) + ROOT_KEY] = entry
        return saved

    @functools.wraps(load)
    def load_state_dict(self: nn.Module, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        if isinstance(state_dict, Mapping) and (_has_something_to_say(self) or _was_edited(state_dict)):
            state_dict = apply_widths(self, state_dict, strict)
        return load(self, state_dict, strict, assign)

    state_dict._speaks_of_widths = True  # type: ignore[attr-defined]
    nn.Module.state_dict = state_dict  # type: ignore[method-assign]
    nn.Module.load_state_dict = load_state_dict  # type: ignore[method-assign]


class _Call(threading.local):
    """Whether this thread is inside a ``state_dict()`` call, so that a nested one is no root."""

    inside = False


call_under_way = _Call()


# The journal


class Journal(list[str]):
    """The edits of a model, in the order in which they were made: each is JSON as text, so that looking over it costs next to nothing.

    Wherever one is, unpickled in a new process too, a ``state_dict`` speaks of it.
    """

    def __init__(self, edits: Iterable[str] = ()) -> None:
        super().__init__(edits)
        wrap_module_methods()

    def __reduce__(self) -> tuple[Any, ...]:
        return Journal, (list(self),)


def journal_of(root: nn.Module) -> list[str]:
    """The edits that ``root``, or the module that it wraps, has had; not a copy."""
    kept: list[str] = unwrapped(root).__dict__.get(JOURNAL, [])
    return kept


def as_text(edit: Any) -> str:
    """An edit as a journal keeps it: what is equal has the same text."""
    return json.dumps(edit, sort_keys=True, allow_nan=False)


def read_content(entry: Any) -> dict[str, Any]:
    """The JSON in the tensor of a root key; whatever raises, it is none."""
    content: dict[str, Any] = json.loads(bytes(entry.detach().to("cpu", torch.uint8).tolist()))
    return content


def _was_edited(state_dict: Mapping[str, Any]) -> bool:
    try:
        return ROOT_KEY in state_dict and bool(read_content(state_dict[ROOT_KEY])["journal"])
    except Exception:
        return False  # then torch says that the key is unexpected


def _problem_of_journal(mine: list[str], edits: Any) -> str | None:
    """What is wrong with loading the tensors of a model that had ``edits`` into one that had others."""
    try:
        theirs = [as_text(edit) for edit in edits]
    except (TypeError, ValueError):
        return f"journal: expected a list of edits, got {edits!r}. Drop the key to load tensors alone."
    if mine == theirs:
        return None
    had, other = (f"the {len(mine)} edits that the model has had", " other ones") if mine else ("no edits", "")
    remedy = "Replay them on the model first: ee.replay(ee.journal(state_dict), model)."
    if theirs[: len(mine)] != mine:
        remedy = "Load it into a fresh model, after ee.replay(ee.journal(state_dict), fresh)."
    return f"journal: expected {had}, got {len(theirs)}{other}. {remedy}"


# Names


class Names(NamedTuple):
    """The dims and switches below a module by the places that use them: ``fc1.out``, ``block2.switch``. A shared dim has several."""

    dims: dict[str, ElasticDim]
    switches: dict[str, Switch]


def names(root: nn.Module) -> Names:
    """Name what is elastic below ``root``, by module path and attribute, in the order of modules.

    Where ``root`` only wraps one module, as data parallel, averaged and compiled ones do, the paths start at that one.
    """
    root = unwrapped(root)
    found = Names({}, {})
    for path, module in root.named_modules():
        if not _is_elastic(module):
            continue
        for attribute, axis in module.named_axes() if hasattr(module, "named_axes") else ():
            place, dims = f"{path}.{attribute}".lstrip("."), axis.dims
            for index, dim in enumerate(dims):
                found.dims[place if len(dims) == 1 else f"{place}.{index}"] = dim
        if isinstance(getattr(module, "switch", None), Switch):
            found.switches[f"{path}.switch".lstrip(".")] = module.switch
    return found


def unwrapped(root: nn.Module) -> nn.Module:
    """The module inside wrappers: where names start, and where the journal is kept."""
    while len(root._modules) == 1 and not _is_elastic(root):
        name, child = next(iter(root._modules.items()))
        if child is None or name not in _WRAPPER_CHILDREN:
            break
        root = child
    return root


def _has_something_to_say(root: nn.Module) -> bool:
    """Whether there is anything elastic or edited below ``root``."""
    pending: list[nn.Module | None] = [root]
    while pending:
        module = pending.pop()
        if module is not None:
            if _is_elastic(module) or JOURNAL in module.__dict__:
                return True
            pending.extend(module._modules.values())
    return False


def _is_elastic(module: nn.Module) -> bool:
    return hasattr(type(module), "speaks_of_widths")


# Saving


def root_entry(root: nn.Module) -> Tensor | None:
    """What the root key holds, or ``None`` where all widths are at capacity, all switches on, and nothing was edited."""
    dims, switches = names(root)
    journal = journal_of(root)
    if not journal and all(dim.active == dim.capacity for dim in dims.values()) and all(switch.on for switch in switches.values()):
        return None
    first = {id(dim): name for name, dim in reversed(dims.items())}
    content = {
        "format": FORMAT,
        "widths": {name: dim.active for name, dim in dims.items() if first[id(dim)] == name},
        "switches": {name: switch.on for name, switch in switches.items()},
        "journal": [json.loads(edit) for edit in journal],
    }
    with torch.inference_mode(False):
        return torch.tensor(list(json.dumps(content).encode("ascii")), dtype=torch.uint8, device="cpu")


# Loading


def apply_widths(root: nn.Module, state_dict: Mapping[str, Any], strict: bool) -> Mapping[str, Any]:
    """Set the widths that ``state_dict`` speaks of, and return it without the root key.

    With the root key, widths and switches are what it says; what it does not name stays. Without it, tensors that are all at capacity
    leave the widths as they are. If one is smaller, the dict is taken for one of active size throughout, as a plain ``nn`` model has,
    and its tensors say the width of every dim that they have an axis of.

    Effects: one commit, on a control block that the whole model shares from then on; nothing where no width changes.

    Raises:
        StateDictError: tensors disagree, fit no admissible width, the root key is unknown here, or it has another journal than the
            model; nothing has changed.
        OwnerError: the calling thread does not own the control block; nothing has changed.
    """
    known = names(root)
    entries = _entries(root, state_dict)
    tensors = list(_tensors(root, state_dict))
    problems: list[str] = []
    widths: dict[ElasticDim, int] = {}
    switches: dict[Switch, int] = {}
    for key, owner in entries.items():
        _read_entry(key, state_dict[key], owner, strict, widths, switches, problems)
    if not entries and any(not tensor.at_capacity for tensor in tensors):
        widths = Solver({id(dim): name for name, dim in reversed(known.dims.items())}, problems).solve(tensors)
    if not problems:
        problems += [tensor.mismatch() for tensor in tensors if not (tensor.at_capacity or tensor.fits(widths))]
    if problems:
        raise StateDictError(f"Error(s) in loading state_dict for {type(root).__name__}:\n\t" + "\n\t".join(problems))
    changes = [(entry, value) for entry, value in (*widths.items(), *switches.items()) if entry._value != value]
    if changes:
        every = (*known.dims.values(), *known.switches.values())
        ControlBlock.merge(entry.block for entry in every).commit(changes)
    return _without(state_dict, entries) if entries else state_dict


def _entries(root: nn.Module, state_dict: Mapping[str, Any]) -> dict[str, nn.Module]:
    """The root keys in ``state_dict``, and the module that each speaks of: one, or those of several that were put together."""
    entries = {}
    for key in state_dict:
        path, dot, last = key.rpartition(".")
        if last == ROOT_KEY:
            with contextlib.suppress(AttributeError):
                entries[key] = root.get_submodule(path) if dot else root
    return entries


def _without(state_dict: Mapping[str, Any], keys: Container[str]) -> Mapping[str, Any]:
    rest: Any = OrderedDict((key, value) for key, value in state_dict.items() if key not in keys)
    if hasattr(state_dict, "_metadata"):
        rest._metadata = state_dict._metadata
    return rest


def _read_entry(
    key: str,
    entry: Any,
    owner: nn.Module,
    strict: bool,
    widths: dict[ElasticDim, int],
    switches: dict[Switch, int],
    problems: list[str],
) -> None:
    """Add the widths and switches that a root key says. Names that are unknown here are a problem, unless loading is lenient."""
    try:
        content = read_content(entry)
        version, said, positions, journal = (content[field] for field in ("format", "widths", "switches", "journal"))
    except Exception as error:
        problems.append(f"{key}: expected a uint8 tensor of JSON, got {entry!r} ({error!r}). Drop the key to load tensors alone.")
        return
    if version != FORMAT:
        problems.append(
            f"{key}: format: expected {FORMAT}, got {version!r}. Another version of esper_elastic wrote it; load it with that one."
        )
        return
    edited = _problem_of_journal(journal_of(owner), journal)
    if edited is not None:
        problems.append(f"{key}: {edited}")
        return
    known = names(owner)
    unknown = [name for name in said if name not in known.dims] + [name for name in positions if name not in known.switches]
    if strict and unknown:
        problems.append(
            f"{key}: expected names of dims and switches here, {', '.join((*known.dims, *known.switches))}; got {', '.join(unknown)}. "
            "Was it saved from another model? strict=False ignores unknown names."
        )
    for name, width in said.items():
        dim = known.dims.get(name)
        if dim is None:
            continue
        try:
            if widths.setdefault(dim, dim.admit(width)) != width:
                problems.append(f"{key}: {name}: expected {widths[dim]}, as for another axis that shares the dim here, got {width}.")
        except CapacityError as error:
            problems.append(f"{key}: {name}: {error}")
    switches.update((known.switches[name], int(bool(on))) for name, on in positions.items() if name in known.switches)


def _tensors(root: nn.Module, state_dict: Mapping[str, Any]) -> Iterator[Loaded]:
    """The tensors of ``state_dict`` that are for elastic layers, under every path that a layer has."""
    for path, layer in root.named_modules(remove_duplicate=False):
        if not hasattr(type(layer), "tensor_axes"):
            continue
        for name, axes in layer.tensor_axes().items():
            key = f"{path}.{name}" if path else name
            storage, tensor = layer.storage(name), state_dict.get(key)
            if storage is not None and isinstance(tensor, Tensor) and any(axis is not None for axis in axes):
                yield Loaded(key, tensor.shape, storage, axes)
