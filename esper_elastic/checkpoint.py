"""``save`` and ``load``: a model with its widths, and the optimizer that trains it, in one safetensors file.

The file holds every tensor of ``model.state_dict()`` at capacity under its own key, and the optimizer's under keys that begin with
:data:`OPTIMIZER`. The metadata holds one entry of JSON: widths, switches, layout, the plan by which a plain model was made elastic, the
journal of its edits, and what else there is of the optimizer. Nothing is pickled, so that a file from anywhere can be read without
running it.

A save leaves the old file or the new one, whole, whenever it is interrupted. A load checks all it can before it touches anything, and takes
back what it did if it is interrupted. How an optimizer is written is in ``optim/packing.py``.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from .control import ControlBlock, Entry
from .convert import PLAN, Plan
from .errors import CapacityError, CheckpointError, OptimizerError, SurgeryError
from .layers import ElasticLayer, Switchable
from .layers.state import ROOT_KEY, names
from .model import copy_structure, layout_of, put_in_layout, set_layout
from .optim import packing
from .surgery.journal import journal, replay, validated
from .surgery.transaction import transaction
from .surgery.undo import save_values

#: The entry of the metadata.
ENTRY = "esper_elastic"
FORMAT = 1
#: What the keys of an optimizer's tensors begin with.
OPTIMIZER = "optimizer:"


def save(path: str | os.PathLike[str], model: nn.Module, optimizer: Optimizer | None = None) -> None:
    """Write ``model``, and ``optimizer`` if there is one, to ``path``.

    Args:
        path: of the file, in a folder that exists. ``safetensors.torch.load_file`` reads its tensors too.
        model: elastic or plain. A wrapper that adds no tensors, as of data parallelism or compilation, is looked through.
        optimizer: of this package, guarded, or any that keeps tensors, numbers and strings.

    Effects:
        Writes a temporary file beside ``path``, flushes it to the disk and renames it over ``path``, so that whoever looks, after a crash
        too, finds the old file or the new one. A process that is killed may leave the temporary one behind. Waits for the device.

    Raises:
        CheckpointError: something cannot be written, or safetensors is not installed; ``path`` is as it was, unless all that failed was to
            flush the folder.
    """
    safetensors = _safetensors()
    where, model = f"save: {os.fspath(path)}", _unwrapped(model)
    tensors, aliases = _distinct(_live_tensors(model, where))
    content = {
        "format": FORMAT,
        **_positions(model),
        "journal": journal(model),
        "plan": getattr(model, PLAN, None),
        "aliases": aliases,
        "optimizer": None,
    }
    taken = next((key for key in (*tensors, *aliases) if key.startswith(OPTIMIZER)), None)
    if taken is not None:
        raise CheckpointError(f"{where}: {taken}: keys of a model may not begin with {OPTIMIZER!r}. Rename the module.")
    try:
        if optimizer is not None:
            content["optimizer"], more = packing.pack(optimizer, model, OPTIMIZER)
            tensors |= more
        metadata = {ENTRY: json.dumps(content, allow_nan=False)}
    except (OptimizerError, TypeError, ValueError) as error:
        raise CheckpointError(f"{where}: {error}") from error
    _write(os.path.realpath(path), lambda partial: safetensors.torch.save_file(_ready(tensors, where), partial, metadata), where)


@torch.no_grad()
def load(
    path: str | os.PathLike[str],
    model: nn.Module,
    optimizer: Optimizer | None = None,
    *,
    modules: Mapping[str, nn.Module] | None = None,
) -> None:
    """Bring ``model``, and ``optimizer`` if there is one, to what :func:`save` wrote.

    Args:
        path: of the file.
        model: of the same structure, or as it was before ``ee.elasticize`` and the surgeon's edits: it is first made elastic by the plan in
            the file, and the edits that it has not had are replayed. Tensors keep their device, type and memory format; values are cast.
        optimizer: of the same class over the same parameters. ``None`` leaves what the file holds of one aside.
        modules: for edits that inserted what no :class:`LayerSpec` describes, as in ``ee.replay``.

    Effects:
        Writes parameters and buffers in place, sets widths and switches in one commit, and the layout. The optimizer gets new state and new
        options. Old tensors are kept on the host until all is done. Edits, and all that follows them, are one transaction.

    Raises:
        CheckpointError: the file is damaged or foreign, or does not fit; model and optimizer are as they were, whatever the error.
        OwnerError: the calling thread does not own the control block; nothing has changed.
    """
    where, model = f"load: {os.fspath(path)}", _unwrapped(model)
    content, tensors = _read(path, where)
    convert = content["plan"] is not None and not any(isinstance(module, ElasticLayer | Switchable) for module in model.modules())
    if content["journal"] != journal(model):
        with transaction(model, optimizer, validate=False) as opened:
            if convert:
                _replay([edit for edit in content["journal"] if not edit.get("elastic")], model, modules, where)
                _apply_plan(content["plan"], model, optimizer, where)
            _replay(content["journal"], model, modules, where)
            opened.settle()  # the optimizer holds what the model does from here on
            save_values(*_live_tensors(model, where).values())
            _load(content, tensors, model, optimizer, False, where)
    else:
        _load(content, tensors, model, optimizer, convert, where)


def _load(
    content: dict[str, Any], tensors: dict[str, Tensor], model: nn.Module, optimizer: Optimizer | None, convert: bool, where: str
) -> None:
    """Load into a model that has had the edits, after making it elastic if ``convert``."""
    twin = model
    if convert:
        twin = copy_structure(model, _without_values)
        _apply_plan(content["plan"], twin, None, where)
    _check_model(content, tensors, twin, where)
    if optimizer is not None:
        _check_optimizer(content, tensors, optimizer, model, twin, where)
    with contextlib.ExitStack() as undo:
        if convert:
            undo.callback(_structure_of(model, optimizer))
            _apply_plan(content["plan"], model, optimizer, where)
        _set_positions(content, model, undo)
        for key, target in _distinct(_live_tensors(model, where))[0].items():
            undo.callback(target.copy_, target.to("cpu", copy=True))
            target.copy_(tensors[content["aliases"].get(key, key)])
        if optimizer is not None:
            undo.callback(optimizer.__setstate__, {"state": optimizer.state, "param_groups": optimizer.param_groups})
            optimizer.__setstate__(packing.unpack(content["optimizer"], tensors, optimizer, model))
        undo.pop_all()


# The file


def _safetensors() -> Any:
    try:
        import safetensors
        import safetensors.torch
    except ImportError as error:
        raise CheckpointError("checkpoint: safetensors is not installed. pip install safetensors") from error
    return safetensors


def _write(target: str, write: Callable[[str], None], where: str) -> None:
    """Let ``write`` fill a temporary file, and put it in the place of ``target`` when it is on the disk."""
    folder, name = os.path.split(target)
    partial = os.path.join(folder, f".{name}.{os.urandom(8).hex()}.partial")
    try:
        mode = _create(partial)
        write(partial)
        os.chmod(partial, mode)  # safetensors gives its files to their owner alone
        _flush(partial)
        os.replace(partial, target)
        _flush(folder)
    except BaseException as error:
        with contextlib.suppress(OSError):
            os.unlink(partial)
        if isinstance(error, CheckpointError) or not isinstance(error, Exception):
            raise
        raise CheckpointError(f"{where}: could not be written: {error}") from error


def _create(path: str) -> int:
    """Make an empty file, and return the rights that a new one has here."""
    made = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
    try:
        return os.fstat(made).st_mode & 0o777
    finally:
        os.close(made)


def _flush(path: str) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    opened = os.open(path, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


def _read(path: str | os.PathLike[str], where: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The entry of the metadata and all tensors, of the right kinds.

    Raises:
        CheckpointError: the file is no checkpoint, or of another format.
    """
    safetensors = _safetensors()
    what = f"{where}: expected a checkpoint that ee.save wrote"
    try:
        with safetensors.safe_open(Path(path), framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  it is no mapping
    except safetensors.SafetensorError as error:
        raise CheckpointError(f"{what}, got a file that is cut off or of another kind ({error}).") from error
    if ENTRY not in metadata:
        raise CheckpointError(f"{what}, got a safetensors file without the entry {ENTRY!r} in its metadata. Load it with load_state_dict.")
    try:
        content = json.loads(metadata[ENTRY])
        found = content["format"]
    except (ValueError, TypeError, KeyError) as error:
        raise CheckpointError(f"{what}, got metadata that do not read as JSON with a format ({error!r}).") from error
    if found != FORMAT:
        raise CheckpointError(
            f"{where}: format: expected {FORMAT}, got {found!r}. Load it with the version of esper_elastic that wrote it."
        )
    kinds = {"widths": dict, "switches": dict, "layout": str | dict, "journal": list, "aliases": dict}
    for field, kind in kinds.items():
        if not isinstance(content.get(field), kind):
            raise CheckpointError(f"{where}: {field}: expected {kind}, got {content.get(field)!r}. The metadata are damaged.")
    if not all(isinstance(key, str) for key in content["aliases"].values()):
        raise CheckpointError(f"{where}: aliases: expected keys, got {content['aliases']!r}. The metadata are damaged.")
    try:
        edits = validated(content["journal"], where)
    except SurgeryError as error:
        raise CheckpointError(str(error)) from error
    return {"plan": None, "optimizer": None, **content, "journal": edits}, tensors


# The model


def _unwrapped(model: nn.Module) -> nn.Module:
    """The module inside wrappers that hold nothing but it."""
    while len(model._modules) == 1 and not model._parameters and not model._buffers and not isinstance(model, Switchable):
        ((name, inner),) = model._modules.items()
        if inner is None or name not in ("module", "_orig_mod"):
            break
        model = inner
    return model


def _live_tensors(model: nn.Module, where: str) -> dict[str, Tensor]:
    """The parameters and buffers that ``state_dict`` names, themselves.

    Raises:
        CheckpointError: it holds something else.
    """
    own = {id(t) for m in model.modules() for t in (*m._parameters.values(), *m._buffers.values()) if t is not None}
    found = model.state_dict(keep_vars=True)
    found.pop(ROOT_KEY, None)
    strange = next((key for key, value in found.items() if id(value) not in own), None)
    if strange is not None:
        raise CheckpointError(
            f"{where}: {strange}: expected a parameter or buffer, got {type(found[strange]).__name__}, which a hook or get_extra_state "
            "added to state_dict(). Save it by other means."
        )
    return dict(found)


def _distinct(live: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Each tensor under its first key, and for each further key the first one."""
    first: dict[int, str] = {}
    for key, tensor in live.items():
        first.setdefault(id(tensor), key)
    tensors = {key: tensor for key, tensor in live.items() if first[id(tensor)] == key}
    return tensors, {key: first[id(tensor)] for key, tensor in live.items() if key not in tensors}


def _ready(tensors: Mapping[str, Tensor], where: str) -> dict[str, Tensor]:
    """``tensors`` on the host, contiguous, and none in the storage of another."""
    ready, seen = {}, set()
    for key, tensor in tensors.items():
        if tensor.is_meta:
            raise CheckpointError(
                f"{where}: {key}: expected a tensor with values, got one on the meta device. Materialise the model first."
            )
        tensor = tensor.detach().to("cpu").contiguous()
        if tensor.untyped_storage().data_ptr() in seen:
            tensor = tensor.clone()
        seen.add(tensor.untyped_storage().data_ptr())
        ready[key] = tensor
    return ready


def _positions(model: nn.Module) -> dict[str, Any]:
    """Widths, switches and layout as JSON; a layout by path where modules differ."""
    dims, switches = names(model)
    first = {id(dim): name for name, dim in reversed(dims.items())}
    layouts = {path: layout_of(m) for path, m in model.named_modules() if isinstance(m, ElasticLayer | Switchable)}
    return {
        "widths": {name: dim.active for name, dim in dims.items() if first[id(dim)] == name},
        "switches": {name: switch.on for name, switch in switches.items()},
        "layout": layouts if len(set(layouts.values())) > 1 else next(iter(layouts.values()), "compact"),
    }


def _check_model(content: dict[str, Any], tensors: dict[str, Tensor], model: nn.Module, where: str) -> None:
    """Raise unless everything that the file says of the model fits.

    Raises:
        CheckpointError: with every problem.
    """
    problems: list[str] = []
    live, aliases = _live_tensors(model, where), content["aliases"]
    stored = {key: tensors[key] for key in tensors if not key.startswith(OPTIMIZER)}
    shared = _distinct(live)[1]
    for key, expected in live.items():
        source = aliases.get(key, key)
        got = stored.get(source)
        if got is None:
            problems.append(f"{key}: missing")
            continue
        if key in shared and source != shared[key]:
            problems.append(f"{key}: expected to be shared with {shared[key]}, as it is here, got a tensor of its own")
        if expected.shape != got.shape:
            problems.append(f"{key}: shape: expected {tuple(expected.shape)}, got {tuple(got.shape)}")
        if _kind(expected) != _kind(got):
            problems.append(f"{key}: dtype: expected {expected.dtype}, got {got.dtype}, which is of another kind")
    problems += [f"{key}: unexpected" for key in (*stored, *aliases) if key not in live]
    problems += _problems_of_positions(content, model)
    if problems:
        raise CheckpointError(f"{where}: does not fit {type(model).__name__}:\n\t" + "\n\t".join(problems))


def _kind(tensor: Tensor) -> tuple[bool, ...]:
    return tensor.is_floating_point(), tensor.is_complex(), tensor.dtype == torch.bool


def _problems_of_positions(content: dict[str, Any], model: nn.Module) -> list[str]:
    known, expected = names(model), _positions(model)
    problems = []
    for what in ("widths", "switches"):
        problems += [f"{what}: {name}: missing" for name in expected[what].keys() - content[what].keys()]
        problems += [f"{what}: {name}: unexpected" for name in content[what].keys() - expected[what].keys()]
    for name in content["widths"].keys() & expected["widths"].keys():
        try:
            known.dims[name].admit(content["widths"][name])
        except CapacityError as error:
            problems.append(f"widths: {name}: {error}")
    problems += [
        f"switches: {name}: expected true or false, got {on!r}" for name, on in content["switches"].items() if type(on) is not bool
    ]
    layout = content["layout"]
    layouts = layout if isinstance(layout, dict) else {"": layout}
    for path, value in layouts.items():
        if value not in ("compact", "static"):
            problems.append(f"layout: {path}: expected 'compact' or 'static', got {value!r}")
    modules = dict(model.named_modules())
    if isinstance(layout, dict):
        problems += [f"layout: {path}: unexpected" for path in layout if not isinstance(modules.get(path), ElasticLayer | Switchable)]
    return problems


def _set_positions(content: dict[str, Any], model: nn.Module, undo: contextlib.ExitStack) -> None:
    """Widths and switches in one commit, then the layout."""
    dims, switches = names(model)
    changes: list[tuple[Entry, int]] = [(dims[name], width) for name, width in content["widths"].items()]
    changes += [(switches[name], int(on)) for name, on in content["switches"].items()]
    if changes:
        control = ControlBlock.merge(entry.block for entry, _ in changes)
        undo.callback(control.commit, [(entry, entry._value) for entry, _ in changes])
        control.commit(changes)
    modules: dict[str, Any] = {path: m for path, m in model.named_modules() if isinstance(m, ElasticLayer | Switchable)}
    layout = content["layout"]
    layouts = layout if isinstance(layout, dict) else dict.fromkeys(modules, layout)
    changed = {path: value for path, value in layouts.items() if layout_of(modules[path]) != value}
    for path in changed:
        undo.callback(put_in_layout, modules[path], layout_of(modules[path]))
    if changed and isinstance(layout, str):
        set_layout(model, layout)
    else:
        for path, value in changed.items():
            put_in_layout(modules[path], value)


# Edits and conversion


def _replay(edits: list[dict[str, Any]], model: nn.Module, modules: Mapping[str, nn.Module] | None, where: str) -> None:
    asked_for = {edit["name"] for edit in edits}
    try:
        replay(edits, model, modules={name: module for name, module in (modules or {}).items() if name in asked_for})
    except SurgeryError as error:
        raise CheckpointError(f"{where}: {error}") from error


def _without_values(tensor: Tensor) -> Tensor:
    meta = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")
    return nn.Parameter(meta, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else meta


def _apply_plan(plan: Any, model: nn.Module, optimizer: Optimizer | None, where: str) -> None:
    try:
        Plan.from_json(plan).apply(model, optimizer)
    except Exception as error:
        raise CheckpointError(f"{where}: plan: cannot make {type(model).__name__} elastic by it: {error}") from error


def _structure_of(model: nn.Module, optimizer: Optimizer | None) -> Callable[[], None]:
    """What brings back the modules, parameters and buffers that ``model`` has now, and what the optimizer holds."""
    modules = [(module, type(module), dict(vars(module)), [dict(getattr(module, name)) for name in _HOLDERS]) for module in model.modules()]
    tensors = [(t, t.data, t.grad) for t in (*model.parameters(), *model.buffers())]
    groups = [] if optimizer is None else [(group, dict(group), list(group["params"])) for group in optimizer.param_groups]
    state = {} if optimizer is None else {parameter: dict(entry) for parameter, entry in optimizer.state.items()}
    stepper: Any = type(optimizer)

    def restore() -> None:
        for module, kind, attributes, held in modules:
            module.__class__ = kind
            vars(module).clear()
            vars(module).update(attributes)
            for name, content in zip(_HOLDERS, held, strict=True):
                getattr(module, name).clear()
                getattr(module, name).update(content)
        for tensor, data, grad in tensors:
            tensor.grad = None
            tensor.data, tensor.grad = data, grad
        for group, options, params in groups:
            group.clear()
            group.update(options)
            group["params"][:] = params
        if optimizer is not None:
            optimizer.state.clear()
            optimizer.state.update(state)
            optimizer.__class__ = stepper

    return restore


_HOLDERS = ("_modules", "_parameters", "_buffers")


# The optimizer


def _check_optimizer(
    content: dict[str, Any], tensors: dict[str, Tensor], optimizer: Optimizer, model: nn.Module, twin: nn.Module, where: str
) -> None:
    """Raise unless what the file says of an optimizer fits; ``model`` names its parameters, ``twin`` has their shapes.

    Raises:
        CheckpointError: with the first problem.
    """
    if content["optimizer"] is None:
        raise CheckpointError(f"{where}: optimizer: expected its state, got a checkpoint without. Load the model alone.")
    try:
        packing.check(content["optimizer"], tensors, optimizer, model, twin)
    except OptimizerError as error:
        raise CheckpointError(f"{where}: {error}") from error
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise CheckpointError(f"{where}: optimizer: the metadata are damaged ({error!r}).") from error
