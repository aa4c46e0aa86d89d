"""What a ``state_dict`` says of widths: one tensor key at its root, written and read here, and the widths that smaller tensors imply.

Tensors travel as ``nn`` lets them, at capacity and under the names of the ``nn`` classes. Beside them the root, that is the module on
which ``state_dict()`` was called, gets the key :data:`ROOT_KEY`: JSON as ASCII bytes in a uint8 tensor, so that every format which takes
tensors takes it. It is there only while it has something to say: a width below capacity, or a switch that is off. A plain ``nn`` model
reports the key as unexpected.

Only the module at the root sees a whole ``state_dict``, and it is the user's: a plain container, whose elastic parts may have been put
there long after it was built, far below. No hook of torch reaches it. So the first elastic layer wraps the two methods of ``nn.Module``;
modules carry nothing, hence nothing to copy, pickle or leave behind, and trees without elastic parts pass straight through.
"""

from __future__ import annotations

import contextlib
import functools
import json
import threading
from collections import OrderedDict
from collections.abc import Container, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..control import Axis, ControlBlock, ElasticDim, Switch
from ..errors import CapacityError, StateDictError

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
    call = _Call()

    @functools.wraps(save)
    def state_dict(self: nn.Module, *args: Any, destination: Any = None, prefix: str = "", keep_vars: bool = False) -> Any:
        if call.inside and (destination is not None or args):
            return save(self, *args, destination=destination, prefix=prefix, keep_vars=keep_vars)
        outer, call.inside = call.inside, True
        try:
            saved = save(self, *args, destination=destination, prefix=prefix, keep_vars=keep_vars)
        finally:
            call.inside = outer
        entry = root_entry(self) if _holds_elastic(self) else None
        if entry is not None:
            saved[(args[1] if len(args) > 1 and not prefix else prefix) + ROOT_KEY] = entry
        return saved

    @functools.wraps(load)
    def load_state_dict(self: nn.Module, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        if isinstance(state_dict, Mapping) and _holds_elastic(self):
            state_dict = apply_widths(self, state_dict, strict)
        return load(self, state_dict, strict, assign)

    state_dict._speaks_of_widths = True  # type: ignore[attr-defined]
    nn.Module.state_dict = state_dict  # type: ignore[method-assign]
    nn.Module.load_state_dict = load_state_dict  # type: ignore[method-assign]


class _Call(threading.local):
    """Whether this thread is inside a ``state_dict()`` call, so that a nested one is no root."""

    inside = False


# Names


class Names(NamedTuple):
    """The dims and switches below a module by the places that use them: ``fc1.out``, ``block2.switch``. A shared dim has several."""

    dims: dict[str, ElasticDim]
    switches: dict[str, Switch]


def names(root: nn.Module) -> Names:
    """Name what is elastic below ``root``, by module path and attribute, in the order of modules.

    Where ``root`` only wraps one module, as data parallel, averaged and compiled ones do, the paths start at that one.
    """
    while len(root._modules) == 1 and not _is_elastic(root):
        name, child = next(iter(root._modules.items()))
        if child is None or name not in _WRAPPER_CHILDREN:
            break
        root = child
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


def _holds_elastic(root: nn.Module) -> bool:
    pending: list[nn.Module | None] = [root]
    while pending:
        module = pending.pop()
        if module is not None:
            if _is_elastic(module):
                return True
            pending.extend(module._modules.values())
    return False


def _is_elastic(module: nn.Module) -> bool:
    return hasattr(type(module), "speaks_of_widths")


# Saving


def root_entry(root: nn.Module) -> Tensor | None:
    """What the root key holds, or ``None`` where all widths are at capacity and all switches on."""
    dims, switches = names(root)
    if all(dim.active == dim.capacity for dim in dims.values()) and all(switch.on for switch in switches.values()):
        return None
    first = {id(dim): name for name, dim in reversed(dims.items())}
    content = {
        "format": FORMAT,
        "widths": {name: dim.active for name, dim in dims.items() if first[id(dim)] == name},
        "switches": {name: switch.on for name, switch in switches.items()},
        "journal": [],
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
        StateDictError: tensors disagree, fit no admissible width, or the root key is unknown here; nothing has changed.
        OwnerError: the calling thread does not own the control block; nothing has changed.
    """
    known = names(root)
    entries = _entries(root, state_dict)
    tensors = list(_tensors(root, state_dict))
    problems: list[str] = []
    widths: dict[ElasticDim, int] = {}
    switches: dict[Switch, int] = {}
    for key, below in entries.items():
        _read_entry(key, state_dict[key], below, strict, widths, switches, problems)
    if not entries and any(not tensor.at_capacity for tensor in tensors):
        widths = _Solver({id(dim): name for name, dim in reversed(known.dims.items())}, problems).solve(tensors)
    if not problems:
        problems += [tensor.mismatch() for tensor in tensors if not (tensor.at_capacity or tensor.fits(widths))]
    if problems:
        raise StateDictError(f"Error(s) in loading state_dict for {type(root).__name__}:\n\t" + "\n\t".join(problems))
    changes = [(entry, value) for entry, value in (*widths.items(), *switches.items()) if entry._value != value]
    if changes:
        every = (*known.dims.values(), *known.switches.values())
        ControlBlock.merge(entry.block for entry in every).commit(changes)
    return _without(state_dict, entries) if entries else state_dict


def _entries(root: nn.Module, state_dict: Mapping[str, Any]) -> dict[str, Names]:
    """The root keys in ``state_dict``, and the names that each may use: one, or those of several that were put together."""
    entries = {}
    for key in state_dict:
        path, dot, last = key.rpartition(".")
        if last == ROOT_KEY:
            with contextlib.suppress(AttributeError):
                entries[key] = names(root.get_submodule(path) if dot else root)
    return entries


def _without(state_dict: Mapping[str, Any], keys: Container[str]) -> Mapping[str, Any]:
    rest: Any = OrderedDict((key, value) for key, value in state_dict.items() if key not in keys)
    if hasattr(state_dict, "_metadata"):
        rest._metadata = state_dict._metadata
    return rest


def _read_entry(
    key: str,
    entry: Any,
    known: Names,
    strict: bool,
    widths: dict[ElasticDim, int],
    switches: dict[Switch, int],
    problems: list[str],
) -> None:
    """Add the widths and switches that a root key says. Names that are unknown here are a problem, unless loading is lenient."""
    try:
        content = json.loads(bytes(entry.detach().to("cpu", torch.uint8).tolist()))
        version, said, positions, journal = (content[field] for field in ("format", "widths", "switches", "journal"))
    except Exception as error:
        problems.append(f"{key}: expected a uint8 tensor of JSON, got {entry!r} ({error!r}). Drop the key to load tensors alone.")
        return
    if version != FORMAT:
        problems.append(
            f"{key}: format: expected {FORMAT}, got {version!r}. Another version of esper_elastic wrote it; load it with that one."
        )
        return
    if journal:
        problems.append(f"{key}: journal: expected no edits, got {len(journal)}. Replay them on the model first.")
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


class _Loaded(NamedTuple):
    """A tensor of a ``state_dict``, and the storage that it is for."""

    key: str
    shape: torch.Size
    storage: Tensor
    axes: tuple[Axis | None, ...]

    @property
    def at_capacity(self) -> bool:
        return self.shape == self.storage.shape

    def fits(self, widths: dict[ElasticDim, int]) -> bool:
        """Whether the shape is that of the active slice once dims have ``widths``."""
        if len(self.shape) != len(self.axes):
            return False
        pairs = zip(self.axes, self.storage.shape, strict=True)
        return self.shape == tuple(size if axis is None else _size(axis, widths) for axis, size in pairs)

    def mismatch(self, why: str = "") -> str:
        """The message that torch gives, and why the tensor is not one of active size either."""
        why = why or "It has neither the capacity nor the active size."
        return (
            f"size mismatch for {self.key}: copying a param with shape {self.shape} from checkpoint, "
            f"the shape in current model is {self.storage.shape}. {why}"
        )


def _size(axis: Axis, widths: dict[ElasticDim, int]) -> int:
    return sum(widths.get(segment.dim, segment.dim.active) * segment.inner for segment in axis.segments)


def _tensors(root: nn.Module, state_dict: Mapping[str, Any]) -> Iterator[_Loaded]:
    """The tensors of ``state_dict`` that are for elastic layers, under every path that a layer has."""
    for path, layer in root.named_modules(remove_duplicate=False):
        if not hasattr(type(layer), "tensor_axes"):
            continue
        for name, axes in layer.tensor_axes().items():
            key = f"{path}.{name}" if path else name
            storage, tensor = layer.storage(name), state_dict.get(key)
            if storage is not None and isinstance(tensor, Tensor) and any(axis is not None for axis in axes):
                yield _Loaded(key, tensor.shape, storage, axes)


class _Solver:
    """Finds the width of each dim from the sizes of tensor axes, each a sum of widths times constants."""

    def __init__(self, names: dict[int, str], problems: list[str]) -> None:
        self.names = names
        self.problems = problems
        self.widths: dict[ElasticDim, int] = {}
        self.sources: dict[ElasticDim, str] = {}

    def solve(self, tensors: list[_Loaded]) -> dict[ElasticDim, int]:
        pending = [
            (tensor, axis, size)
            for tensor in tensors
            if len(tensor.shape) == len(tensor.axes)
            for axis, size in zip(tensor.axes, tensor.shape, strict=True)
            if axis is not None
        ]
        while pending:
            left = [claim for claim in pending if not self._settle(*claim)]
            if len(left) == len(pending):
                break
            pending = left
        for tensor, axis, size in pending:
            open_dims = ", ".join(self._name(dim) for dim in axis.dims if dim not in self.widths)
            self.problems.append(tensor.mismatch(f"Its axis of {size} has no unique division among {open_dims}: set their widths first."))
        return self.widths

    def _settle(self, tensor: _Loaded, axis: Axis, size: int) -> bool:
        """Draw from one axis what it says of the one dim not known yet; ``False`` while there are several."""
        unknown = [dim for dim in axis.dims if dim not in self.widths]
        if len(unknown) > 1:
            if size != axis.capacity:
                return False
            self.widths.update((dim, dim.capacity) for dim in unknown)
            self.sources.update((dim, tensor.key) for dim in unknown)
        elif unknown:
            (dim,) = unknown
            rest = size - sum(self.widths.get(segment.dim, 0) * segment.inner for segment in axis.segments)
            per_unit = sum(segment.inner for segment in axis.segments if segment.dim is dim)
            if rest % per_unit:
                self.problems.append(tensor.mismatch(f"{rest} indices are no multiple of the {per_unit} per unit of {self._name(dim)}."))
                return True
            try:
                self.widths[dim] = dim.admit(rest // per_unit)
                self.sources[dim] = tensor.key
            except CapacityError as error:
                self.problems.append(tensor.mismatch(f"{self._name(dim)}: {error}"))
                return True
        expected = _size(axis, self.widths)
        if expected != size:
            said = ", ".join(f"{self._name(dim)} = {self.widths[dim]} by {self.sources[dim]}" for dim in axis.dims)
            self.problems.append(tensor.mismatch(f"Its axis of {size} should be {expected}: {said}."))
        return True

    def _name(self, dim: ElasticDim) -> str:
        return self.names.get(id(dim), dim.label)
