"""What callers hand in, checked at the door: models that can be converted, names and patterns of modules, capacities and minimum."""

from __future__ import annotations

import difflib
import fnmatch
import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from ..errors import ConversionError

#: Wrappers that keep another reading of the module inside, and the attribute that has it.
_WRAPPERS = {
    "DataParallel": "module",
    "DistributedDataParallel": "module",
    "FullyShardedDataParallel": "module",
    "OptimizedModule": "_orig_mod",
}


def check_model(model: Any) -> None:
    """Refuse what cannot be converted, by name.

    Raises:
        ConversionError: it is no module, scripted, wrapped, elastic already, or without sizes yet.
    """
    if not isinstance(model, nn.Module):
        what = f"the class {model.__name__}" if isinstance(model, type) else type(model).__name__
        raise ConversionError(f"elasticize: model: expected an nn.Module, got {what}.")
    if isinstance(model, torch.jit.ScriptModule):
        raise ConversionError("elasticize: the model is scripted: its code cannot be followed. Convert it before torch.jit.script.")
    for path, module in model.named_modules():
        kind = type(module)
        here = f"{path!r} ({kind.__name__})" if path else f"the model, of type {kind.__name__},"
        if kind.__name__ in _WRAPPERS and kind.__module__.startswith("torch."):
            inside = _WRAPPERS[kind.__name__]
            raise ConversionError(
                f"elasticize: {here} wraps a model: convert the one inside (its .{inside}), then wrap that. Nothing has changed."
            )
        if hasattr(kind, "speaks_of_widths"):
            raise ConversionError(
                f"elasticize: {path or kind.__name__!r} is elastic already ({kind.__name__}). Convert a model once; "
                "ee.export(model) gives a plain one."
            )
        if any(is_lazy(tensor) for tensor in (*module._parameters.values(), *module._buffers.values())):
            raise ConversionError(f"elasticize: {here} has no sizes yet. Run the model once on real inputs, then convert it.")


def check_minimum(minimum: Any) -> None:
    if isinstance(minimum, bool) or not isinstance(minimum, int) or minimum < 1:
        raise ConversionError(f"elasticize: minimum: expected an integer of at least 1, got {minimum!r}.")


def check_capacity(capacity: Any) -> None:
    """Refuse what is no factor or number of units; whether names are those of dims is seen later."""
    for name, given in capacity.items() if isinstance(capacity, Mapping) else [(None, capacity)]:
        if isinstance(given, bool) or not isinstance(given, int | float) or not given >= 1 or math.isinf(given):
            where = "" if name is None else f" of {name!r}"
            units = "" if name is None else " or a number of units"
            raise ConversionError(f"elasticize: capacity{where}: expected a factor of at least 1{units}, got {given!r}.")


def patterns(what: str, given: str | Iterable[str] | None) -> list[str]:
    """The names or patterns of ``include`` or ``exclude``."""
    if given is None:
        return []
    if not isinstance(given, str | Iterable):
        raise ConversionError(f"elasticize: {what}: expected names or patterns of modules, got {given!r} of type {type(given).__name__}.")
    names = [given] if isinstance(given, str) else list(given)
    for name in names:
        if not isinstance(name, str):
            raise ConversionError(f"elasticize: {what}: expected names or patterns, got {name!r} of type {type(name).__name__}.")
    return names


def matches(path: str, patterns: Iterable[str]) -> bool:
    """Whether a module's path, or that of a module around it, is one of the names or fits one of the patterns."""
    parts = path.split(".")
    around = [".".join(parts[:end]) for end in range(1, len(parts) + 1)]
    return any(fnmatch.fnmatchcase(name, pattern) for name in around for pattern in patterns)


def nearest(name: str, known: Iterable[str]) -> str:
    """A sentence with the names most like the one that was given, or with the first ones."""
    names = [each for each in known if each]
    near = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
    if near:
        return f"The nearest: {', '.join(map(repr, near))}."
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return f"There are {', '.join(map(repr, names[:5]))}{more}." if names else "There are none."
