"""Whether a model's modules and tensors hang together: registered once, of the kind and size that attributes tell, saved whole.

Reads only. Each check is a function from a model to sentences, and says nothing of what another one finds.
"""

from __future__ import annotations

import collections
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import batchnorm, conv

from ..layers import ElasticLayer, registry
from ..layers.state import ROOT_KEY
from .trial.calls import Calls
from .trial.memory import Memory
from .trial.twins import Twins

_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
_LISTS = (nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)


def tree_errors(model: nn.Module) -> Iterator[str]:
    """Cycles, children that are no modules, modules registered twice under one parent."""
    yield from _cycles(model)
    for path, module in _walk(model):
        where = _called(path)
        names: dict[int, str] = {}
        for name, child in module._modules.items():
            if child is None:
                continue
            if not isinstance(child, nn.Module):
                yield f"{where}: child {name!r} is registered as a module: expected an nn.Module, got {type(child).__name__}."
                continue
            first = names.setdefault(id(child), name)
            holds = next(child.parameters(), None) is not None
            if first != name and holds and not isinstance(module, _CONTAINERS):
                yield f"{where}: {type(child).__name__} is registered twice, as {first!r} and {name!r}. Remove one of the two."


def _walk(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Every module once, however broken the tree is."""
    seen: set[int] = set()
    pending: list[tuple[str, Any]] = [("", model)]
    while pending:
        path, module = pending.pop()
        if isinstance(module, nn.Module) and id(module) not in seen:
            seen.add(id(module))
            yield path, module
            pending += [(f"{path}.{name}".lstrip("."), child) for name, child in module._modules.items()]


def _cycles(model: nn.Module) -> Iterator[str]:
    """Ways from a module down to itself. Iterative: a tree with a cycle has no bottom."""
    finished: set[int] = set()
    above: set[int] = {id(model)}
    stack: list[tuple[str, nn.Module, Iterator[tuple[str, Any]]]] = [("", model, iter(model._modules.items()))]
    while stack:
        path, module, children = stack[-1]
        for name, child in children:
            below = f"{path}.{name}".lstrip(".")
            if not isinstance(child, nn.Module) or id(child) in finished:
                continue
            if id(child) in above:
                holder = next(p for p, m, _ in stack if m is child)
                yield f"{below}: cycle: it is {_called(holder)}, which holds it. Register it in one place only."
                continue
            above.add(id(child))
            stack.append((below, child, iter(child._modules.items())))
            break
        else:
            stack.pop()
            above.discard(id(module))
            finished.add(id(module))


def tensor_errors(model: nn.Module) -> Iterator[str]:
    """What is registered as a parameter or buffer and is none; tensors on the meta device among real ones."""
    meta, real = [], 0
    for path, module in model.named_modules():
        for kind, table, expected in (("parameter", module._parameters, nn.Parameter), ("buffer", module._buffers, Tensor)):
            for key, value in table.items():
                name = f"{path}.{key}".lstrip(".")
                if value is not None and not isinstance(value, expected):
                    yield f"{name}: registered as a {kind}: expected {expected.__name__}, got {type(value).__name__}."
                elif isinstance(value, Tensor):
                    if value.is_meta:
                        meta.append(name)
                    else:
                        real += 1
    if meta and real:
        yield f"{meta[0]}: on the meta device, without values{_more(meta)}, while other tensors have theirs. Materialise it."


def size_errors(model: nn.Module) -> Iterator[str]:
    """Layers whose tensors have not the shapes that their attributes tell."""
    for path, module in model.named_modules():
        where = f"{_called(path)}: {type(module).__name__}"
        if isinstance(module, ElasticLayer):
            for key, axes in module.tensor_axes().items():
                tensor = module.storage(key)
                if isinstance(tensor, Tensor):
                    expected = tuple(n if axis is None else axis.capacity for n, axis in zip(tensor.shape, axes, strict=False))
                    if expected != tuple(tensor.shape) or len(axes) != tensor.dim():
                        yield f"{where}: {key}: expected the capacity of its dims, {expected}, got {tuple(tensor.shape)}."
            continue
        for key, shape, told in _told_shapes(module):
            tensor = module._parameters.get(key, module._buffers.get(key))
            if isinstance(tensor, Tensor) and not nn.parameter.is_lazy(tensor) and tuple(tensor.shape) != shape:
                yield f"{where}: {key}: expected {shape} by {told}, got {tuple(tensor.shape)}."
        for dividend, divisor in (("in_channels", "groups"), ("out_channels", "groups"), ("num_channels", "num_groups")):
            size, groups = getattr(module, dividend, None), getattr(module, divisor, None)
            known = isinstance(module, conv._ConvNd | nn.GroupNorm) and isinstance(size, int) and isinstance(groups, int)
            if known and (groups < 1 or size % groups):  # type: ignore[operator]
                yield f"{where}: {dividend}={size} is no multiple of {divisor}={groups}."


def _told_shapes(module: Any) -> Iterator[tuple[str, tuple[int, ...], str]]:
    """Per tensor of a layer of ``torch.nn``: the shape that its attributes tell, and which these are."""
    if isinstance(module, conv._ConvNd):
        rows, columns = (module.in_channels, module.out_channels) if module.transposed else (module.out_channels, module.in_channels)
        weight = (rows, columns // max(module.groups, 1), *module.kernel_size)
        yield "weight", weight, "in_channels, out_channels, kernel_size and groups"
        yield "bias", (module.out_channels,), "out_channels"
    elif isinstance(module, nn.Linear):
        yield "weight", (module.out_features, module.in_features), "out_features and in_features"
        yield "bias", (module.out_features,), "out_features"
    elif isinstance(module, nn.Embedding | nn.EmbeddingBag):
        yield "weight", (module.num_embeddings, module.embedding_dim), "num_embeddings and embedding_dim"
    elif isinstance(module, batchnorm._NormBase):
        for key in ("weight", "bias", "running_mean", "running_var"):
            yield key, (module.num_features,), "num_features"
    elif isinstance(module, nn.GroupNorm):
        yield "weight", (module.num_channels,), "num_channels"
        yield "bias", (module.num_channels,), "num_channels"
    elif isinstance(module, nn.LayerNorm | nn.RMSNorm):
        yield "weight", tuple(module.normalized_shape), "normalized_shape"
        yield "bias", tuple(module.normalized_shape), "normalized_shape"
    elif isinstance(module, nn.MultiheadAttention):
        yield "in_proj_weight", (3 * module.embed_dim, module.embed_dim), "embed_dim"
        yield "in_proj_bias", (3 * module.embed_dim,), "embed_dim"
    elif isinstance(module, nn.PReLU):
        yield "weight", (module.num_parameters,), "num_parameters"


def storage_errors(model: nn.Module) -> Iterator[str]:
    """Parameters that are different objects and share memory: a step of the one would move the other."""
    by_storage: dict[int, list[tuple[int, int, str, Tensor]]] = collections.defaultdict(list)
    for name, tensor in model.named_parameters():
        if isinstance(tensor, Tensor) and not tensor.is_meta and not nn.parameter.is_lazy(tensor) and tensor.numel() and _strided(tensor):
            start = int(tensor.storage_offset())
            stop = start + 1 + sum(int((n - 1) * s) for n, s in zip(tensor.shape, tensor.stride(), strict=True))
            size = tensor.element_size()
            by_storage[tensor.untyped_storage().data_ptr()].append((start * size, stop * size, name, tensor))
    for spans in by_storage.values():
        spans.sort(key=lambda span: span[:2])
        end, holder = spans[0][1], spans[0][2]
        for start, stop, name, _ in spans[1:]:
            if start < end:
                yield f"{name}: its memory overlaps that of {holder!r}, another parameter. Tie them as one Parameter, or clone one."
            if stop > end:
                end, holder = stop, name


def _strided(tensor: Tensor) -> bool:
    return tensor.layout is torch.strided and type(tensor) in (nn.Parameter, Tensor)


def state_errors(model: nn.Module) -> Iterator[str]:
    """What a strict ``load_state_dict`` of the model's own ``state_dict`` would miss, not expect, or find of another shape.

    Tried on a twin without values, so that nothing is copied.
    """
    names = collections.Counter(
        f"{path}.{key}".lstrip(".")
        for path, module in model.named_modules(remove_duplicate=False)
        if not isinstance(module, torch.jit.ScriptModule)
        for key in (*module._parameters, *(key for key in module._buffers if key not in module._non_persistent_buffers_set))
    )
    for name, count in names.items():
        if count > 1:
            yield f"{name}: {count} tensors have this name: a state_dict can hold but one. Rename one."
    if not all(map(_can_be_valueless, model.modules())):
        return
    twin = Twins(_valueless).module(model)
    saved = {key: _valueless(value) if isinstance(value, Tensor) else value for key, value in model.state_dict().items()}
    saved.pop(ROOT_KEY, None)  # it speaks of widths, which the twin shares with the model
    try:
        twin.load_state_dict(saved, strict=True)
    except Exception as error:
        yield f"state_dict: the model does not load its own: {' '.join(str(error).split())[:400]}"


def _can_be_valueless(module: nn.Module) -> bool:
    """Whether a twin of a module shares no tensor with it, so that it can be loaded."""
    if isinstance(module, torch.jit.ScriptModule):
        return False
    tensors = [t for t in (*module._parameters.values(), *module._buffers.values()) if isinstance(t, Tensor)]
    return all(t.layout is torch.strided and not nn.parameter.is_lazy(t) for t in tensors)


def _valueless(tensor: Tensor) -> Tensor:
    made = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")
    return nn.Parameter(made, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else made


def stale_modules(model: nn.Module, memory: Memory) -> Iterator[tuple[bool, str]]:
    """Modules that plain attributes refer to and the tree does not hold: whether each was in it once, and what to say of it."""
    registered = {id(module) for module in model.modules()}
    for path, module in model.named_modules():
        for name, value in module.__dict__.items():
            if name in ("_modules", "_parameters", "_buffers"):
                continue
            for found in _modules_in(value):
                if id(found) in registered:
                    continue
                what = f"{_called(path)}: attribute {name!r} refers to a {type(found).__name__}"
                if found in memory.seen:
                    yield True, f"{what} that was removed from the model. Clear the attribute, or register the module."
                elif next(found.parameters(), None) is not None:
                    yield False, f"{what} that is not registered: its parameters are neither trained nor saved."


def _modules_in(value: Any) -> Iterator[nn.Module]:
    if isinstance(value, nn.Module):
        yield value
    elif isinstance(value, list | tuple) and len(value) <= 256:
        for item in value:
            yield from _modules_in(item)
    elif isinstance(value, dict) and len(value) <= 256:
        for item in value.values():
            yield from _modules_in(item)


def tie_warnings(model: nn.Module, memory: Memory) -> Iterator[str]:
    """Parameters under several names that were not tied when surgery first looked, or that one module holds twice."""
    names: dict[int, list[str]] = collections.defaultdict(list)
    for name, tensor in model.named_parameters(remove_duplicate=False):
        names[id(tensor)].append(name)
    ties = {frozenset(several) for several in names.values() if len(several) > 1}
    before = memory.ties
    if before is None:
        memory.ties = ties
    for tie in ties:
        several = sorted(tie)
        parents = {name.rpartition(".")[0] for name in several}
        known = before is None or any(tie <= other for other in before)
        if not known or (len(parents) < len(several) and not _shared_modules(model)):
            yield f"{several[0]}: one parameter under {len(several)} names: {', '.join(several)}. Is that meant?"


def _shared_modules(model: nn.Module) -> bool:
    return sum(1 for _ in model.named_modules(remove_duplicate=False)) > sum(1 for _ in model.modules())


def uncalled_warnings(model: nn.Module, calls: Calls) -> Iterator[str]:
    """Modules with parameters that no forward called, and whose parameters nothing read; what is switched off is not expected to be."""
    called = set(calls.paths)
    skip: tuple[str, ...] = ()
    for path, module in model.named_modules():
        if path.startswith(skip) and skip:
            continue
        below = f"{path}." if path else ""
        if path in called or isinstance(module, _LISTS) or any(other.startswith(below) for other in called):
            continue
        known = [(name, registry.lookup(parameter)) for name, parameter in module.named_parameters(prefix=path)]
        names = [name for name, axes in known if axes is None or not axes.asleep]
        if names and not any(name in calls.used for name in names):
            skip = (*skip, f"{path}.")
            yield f"{path}: {type(module).__name__} is registered, but no forward calls it: its parameters are not trained."


def guarded(check: Callable[..., Iterator[Any]], *args: Any) -> list[Any]:
    """What a check finds; where the model is too broken even to be looked at, that."""
    found: list[Any] = []
    try:
        for item in check(*args):
            found.append(item)
    except Exception as error:
        name = check.func.__name__ if isinstance(check, functools.partial) else check.__name__
        found.append(f"{name.strip('_').replace('_', ' ')}: could not be checked: {type(error).__name__}: {' '.join(str(error).split())}")
    return found


def _called(path: str) -> str:
    return path or "the model"


def _more(names: list[str]) -> str:
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""
