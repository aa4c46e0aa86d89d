"""Everything that a user could see of a model in training, object for object and bit for bit, as a flat list that is compared."""

import hashlib
import random
import weakref
from collections import OrderedDict, deque
from collections.abc import Iterator
from typing import Any

import numpy
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from esper_elastic import followers
from esper_elastic.control import Axis, ControlBlock, Replica
from esper_elastic.control.block import Entry
from esper_elastic.layers import registry
from esper_elastic.ops import Widths

Print = list[tuple[str, Any]]

_OPEN = (nn.Module, Optimizer, LRScheduler, torch.amp.GradScaler, Entry, ControlBlock, Axis, Replica, Widths)


def fingerprint(model: nn.Module, optimizer: Any = None, schedulers: Any = None, scaler: Any = None, ema: Any = None) -> Print:
    """Identities, classes, contents and order of modules, tensors, containers and what hangs on the model; and the random generators."""
    found: Print = [
        ("random", random.getstate()),
        ("numpy.random", str(numpy.random.get_state())),
        ("torch.random", digest(torch.get_rng_state())),
    ]
    seen: set[int] = set()
    for path, thing in (("model", model), ("optimizer", optimizer), ("schedulers", schedulers), ("scaler", scaler), ("ema", ema)):
        found += _look(path, thing, seen, root=True)
    return found


def assert_same(now: Print, before: Print) -> None:
    """Fails with the first difference."""
    for one, other in zip(now, before, strict=False):
        if one != other:
            raise AssertionError(f"now {one}, before {other}")
    assert len(now) == len(before)


def digest(tensor: Tensor) -> str:
    tensor = tensor.detach().contiguous().flatten()
    return hashlib.blake2b(tensor.view(torch.uint8).numpy().tobytes(), digest_size=8).hexdigest() if tensor.numel() else ""


def _look(path: str, thing: Any, seen: set[int], root: bool = False) -> Iterator[tuple[str, Any]]:
    if thing is None or isinstance(thing, bool | int | float | str | bytes | torch.dtype | torch.device):
        yield path, thing
        return
    if isinstance(thing, weakref.ref):
        yield path, id(thing())
        return
    if not isinstance(thing, tuple):
        yield path, (type(thing), id(thing))
    if id(thing) in seen:
        return
    seen.add(id(thing))
    if isinstance(thing, Tensor):
        yield from _look_at_tensor(path, thing, seen)
    elif isinstance(thing, torch.Generator):
        yield f"{path}.state", digest(thing.get_state())
    elif isinstance(thing, dict):
        for number, (key, value) in enumerate(thing.items()):
            yield f"{path}[{number}]", key if isinstance(key, str | int) else id(key)
            yield from _look(f"{path}[{key if isinstance(key, str | int) else number}]", value, seen)
            if isinstance(key, Tensor):
                yield from _look(f"{path}.key{number}", key, seen)
        if isinstance(thing, OrderedDict):
            yield path, len(list(reversed(thing)))
    elif isinstance(thing, list | tuple | deque):
        for number, value in enumerate(thing):
            yield from _look(f"{path}[{number}]", value, seen)
    elif isinstance(thing, set):
        yield path, sorted(map(id, thing))
    elif isinstance(thing, torch.jit.ScriptModule):
        yield path, thing.training
        for name, tensor in (*thing.named_parameters(), *thing.named_buffers()):
            yield from _look(f"{path}.{name}", tensor, seen)
    elif isinstance(thing, _OPEN) or root:
        for base in type(thing).__mro__:
            for name in base.__dict__.get("__slots__", ()):
                yield from _look(f"{path}.{name}", getattr(thing, name, "unset"), seen)
        if isinstance(thing, Optimizer):
            yield path, (thing in followers._followers, id(followers._strangers.get(thing)))
        yield from _look(f"{path}.", getattr(thing, "__dict__", None), seen)


def _look_at_tensor(path: str, tensor: Tensor, seen: set[int]) -> Iterator[tuple[str, Any]]:
    yield path, (tensor.shape, tensor.stride(), tensor.dtype, tensor.data_ptr(), tensor.requires_grad, tensor.is_leaf)
    yield f"{path} version", tensor._version
    yield f"{path} values", digest(tensor)
    if tensor.is_leaf:
        yield from _look(f"{path}.grad", tensor.grad, seen)
        yield from _look(f"{path} hooks", (tensor._backward_hooks, tensor._post_accumulate_grad_hooks), seen)
    yield from _look(f"{path}.", tensor.__dict__, seen)
    known = registry.lookup(tensor)
    yield f"{path} axes", None if known is None else (id(known), [id(axis) for axis in known.axes], [id(s) for s in known.switches])
