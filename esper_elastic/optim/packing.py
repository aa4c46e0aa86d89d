"""An optimizer as JSON and named tensors, and back: what a checkpoint holds of one.

Parameters go by their names in the model, so that nothing hangs on their order alone. Options and state may be tensors, numbers, strings,
``None``, and tuples, lists and dicts of them; each keeps its type, and tensors that are one object stay one.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..errors import OptimizerError
from .base import ElasticOptimizer
from .counts import StepCounts

#: What of a group is no option.
_MEMBERS = ("params", "param_names")


def pack(optimizer: Optimizer, model: nn.Module, prefix: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Describe ``optimizer``.

    Args:
        optimizer: any.
        model: that names its parameters; those that it does not hold are numbered.
        prefix: of the names of tensors.

    Returns:
        JSON, and the tensors that it refers to, not copied.

    Raises:
        OptimizerError: a value is of a type that JSON has nothing for.
    """
    known = _names(optimizer, model)
    names = {id(param): name for name, param in known.items()}
    pool = _Pool(prefix)
    groups = [
        {
            "params": [names[id(param)] for param in group["params"]],
            "options": {name: pool.encode(value, f"groups:{number}:{name}") for name, value in _options(group)},
        }
        for number, group in enumerate(optimizer.param_groups)
    ]
    state = {}
    for param, values in optimizer.state.items():
        if id(param) not in names:
            raise OptimizerError(f"optimizer: state: expected that of its parameters alone, got an entry for {_short(param)}.")
        name = names[id(param)]
        state[name] = {key: pool.encode(value, f"{name}:{key}") for key, value in values.items()}
    return {"class": _class(optimizer), "groups": groups, "state": state}, pool.tensors


def check(content: Any, tensors: dict[str, Tensor], optimizer: Optimizer, model: nn.Module, shaped: nn.Module) -> None:
    """Raise unless :func:`unpack` can bring ``optimizer`` to what :func:`pack` described.

    Args:
        content: JSON.
        tensors: that it refers to, among others.
        optimizer: to be loaded.
        model: that names its parameters.
        shaped: the model whose parameters of these names have the shapes that state must fit.

    Raises:
        OptimizerError: with the first thing that does not fit. Damaged content may raise anything else.
    """
    if content["class"] != _class(optimizer):
        raise OptimizerError(f"optimizer: expected the state of a {_class(optimizer)}, got that of a {content['class']}.")
    known = _names(optimizer, model)
    names = {id(param): name for name, param in known.items()}
    here = [[names[id(param)] for param in group["params"]] for group in optimizer.param_groups]
    groups = content["groups"]
    if len(here) != len(groups):
        raise OptimizerError(f"optimizer: expected {len(here)} parameter groups, got {len(groups)}. Build it with the same groups.")
    for number, (mine, group) in enumerate(zip(here, groups, strict=True)):
        theirs = group["params"]
        if mine != theirs:
            ours, got = next((a, b) for a, b in zip([*mine, None], [*theirs, None], strict=False) if a != b)
            raise OptimizerError(
                f"optimizer: group {number}: expected parameter {ours!r}, got {got!r}. "
                "Build it over the same parameters, in the same order."
            )
        _decode_each(group["options"], lambda key: tensors[key])
    shapes = {name: param.shape for name, param in known.items()}
    shapes.update((name, param.shape) for name, param in shaped.named_parameters() if name in shapes)
    for name, values in content["state"].items():
        if name not in shapes:
            raise OptimizerError(f"optimizer: state: expected that of its parameters alone, got an entry for {name!r}.")
        for key, value in _decode_each(values, lambda key: tensors[key]).items():
            for tensor in _tensors(value):
                _check_tensor(f"optimizer: {name}: {key}", key, tensor, shapes[name], isinstance(optimizer, ElasticOptimizer))


def unpack(content: dict[str, Any], tensors: dict[str, Tensor], optimizer: Optimizer, model: nn.Module) -> dict[str, Any]:
    """What to hand to ``optimizer.__setstate__``, after :func:`check`.

    Copies of ``tensors`` lie in memory as the parameter does where they have its shape, and on its device; step counts that are numbers
    stay on the host, as torch has them. State that had its parameter's type in the file gets the type that the parameter has now.
    """
    known = _names(optimizer, model)
    groups = []
    for group, saved in zip(optimizer.param_groups, content["groups"], strict=True):
        present = next((value for value in group.values() if isinstance(value, Tensor)), torch.empty(0))
        groups.append({**group, **_decode_each(saved["options"], _moved(tensors, present.device))})
    _share(groups, content, tensors)
    on_device = {
        id(param): bool(group.get("capturable") or group.get("fused")) for group in optimizer.param_groups for param in group["params"]
    }
    state: defaultdict[Tensor, Any] = defaultdict(dict)
    for name, values in content["state"].items():
        param = known[name]
        for key, value in values.items():
            to_host = key == "step" and not on_device[id(param)]
            state[param][key] = _decode(value, _beside(param, tensors, tensors.get(name), to_host))
    return {"state": state, "param_groups": groups}


def _share(groups: list[dict[str, Any]], content: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """Let groups hold one tensor where they did, as where all have the learning rate that the optimizer was built with."""
    made: dict[str, Any] = {}
    for group, saved in zip(groups, content["groups"], strict=True):
        for name, value in saved["options"].items():
            if isinstance(value, dict) and "tensor" in value:
                group[name] = made.setdefault(value["tensor"], group[name])


def _moved(tensors: dict[str, Tensor], device: torch.device) -> Callable[[str], Tensor]:
    return lambda key: tensors[key].to(device, copy=True)


def _beside(param: Tensor, tensors: dict[str, Tensor], saved: Tensor | None, to_host: bool) -> Callable[[str], Tensor]:
    """How state of ``param`` is made of what was stored, when the parameter was stored as ``saved``."""

    def make(key: str) -> Tensor:
        stored = tensors[key]
        dtype = param.dtype if saved is not None and stored.dtype == saved.dtype and not to_host else stored.dtype
        if stored.shape == param.shape and stored.dim() > 0:
            return torch.empty_like(param, dtype=dtype, memory_format=torch.preserve_format, requires_grad=False).copy_(stored)
        return stored.to("cpu" if to_host else param.device, dtype, copy=True)

    return make


def _check_tensor(where: str, key: str, tensor: Tensor, shape: torch.Size, elastic: bool) -> None:
    if elastic and key == "step":
        StepCounts.unpack(tensor, shape)
    elif key != "step" and (elastic or tensor.dim() == len(shape)):
        alike = tensor.shape == shape if elastic else all(a in (1, b) for a, b in zip(tensor.shape, shape, strict=True))
        if not alike:
            raise OptimizerError(f"{where}: expected the shape {tuple(shape)} of the parameter, got {tuple(tensor.shape)}.")


def _names(optimizer: Optimizer, model: nn.Module) -> dict[str, Tensor]:
    """The parameters of ``optimizer`` by their names in ``model``; others by their number."""
    names = {id(param): name for name, param in model.named_parameters()}
    params = [param for group in optimizer.param_groups for param in group["params"]]
    return {names.get(id(param), f"#{number}"): param for number, param in enumerate(params)}


def _options(group: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    return ((name, value) for name, value in group.items() if name not in _MEMBERS)


def _class(optimizer: Optimizer) -> str:
    """The name of the class, under which a guarded one goes as well."""
    return f"{type(optimizer).__module__}.{type(optimizer).__qualname__}"


def _short(value: Any) -> str:
    return f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)


# Values


class _Pool:
    """Gathers tensors while values are written as JSON."""

    def __init__(self, prefix: str) -> None:
        self.prefix = prefix
        self.tensors: dict[str, Tensor] = {}
        self._keys: dict[int, str] = {}

    def encode(self, value: Any, path: str) -> Any:
        """``value`` as JSON; what JSON has no type for is an object with the one name of its type."""
        if isinstance(value, Tensor):
            key = self._keys.setdefault(id(value), self.prefix + path)
            self.tensors[key] = value
            return {"tensor": key}
        if isinstance(value, float) and not math.isfinite(value):
            return {"float": repr(float(value))}
        if value is None or isinstance(value, bool | int | float | str):
            return value
        if isinstance(value, tuple | list):
            parts = [self.encode(part, f"{path}:{index}") for index, part in enumerate(value)]
            return parts if isinstance(value, list) else {"tuple": parts}
        if isinstance(value, dict) and all(isinstance(key, str) for key in value):
            return {"dict": {key: self.encode(part, f"{path}:{key}") for key, part in value.items()}}
        raise OptimizerError(
            f"optimizer: {path}: expected a tensor, number, string or None, or a tuple, list or dict of them, got {type(value).__name__}."
        )


def _decode(value: Any, tensor: Callable[[str], Tensor]) -> Any:
    """The inverse of :meth:`_Pool.encode`."""
    if isinstance(value, list):
        return [_decode(part, tensor) for part in value]
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == "tensor":
        return tensor(content)
    if kind == "float":
        return float(content)
    if kind == "tuple":
        return tuple(_decode(part, tensor) for part in content)
    if kind == "dict":
        return _decode_each(content, tensor)
    raise ValueError(f"a value of unknown kind {kind!r}")


def _decode_each(values: dict[str, Any], tensor: Callable[[str], Tensor]) -> dict[str, Any]:
    return {key: _decode(value, tensor) for key, value in values.items()}


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for part in value.values():
            yield from _tensors(part)
    elif isinstance(value, tuple | list):
        for part in value:
            yield from _tensors(part)
