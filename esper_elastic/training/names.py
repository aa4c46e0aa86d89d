"""What a name means on a model: itself, or the only thing that it is with underscores in the place of dots."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import NoReturn

from torch import nn

from ..errors import DecisionError


def resolve(name: str, names: Iterable[str], what: str) -> str:
    """The one of ``names`` that ``name`` means: itself, or the only one that it is with underscores in the place of dots.

    Raises:
        DecisionError: it means none, or several.
    """
    found = find(name, names, what)
    if found is None:
        unknown(name, names, what)
    return found


def find(name: str, names: Iterable[str], what: str) -> str | None:
    """As :func:`resolve`, ``None`` where it means none."""
    names = names if isinstance(names, Mapping) else list(names)
    if name in names:
        return name
    spelled = name.replace(".", "_")
    meant = [each for each in names if each.replace(".", "_") == spelled]
    if len(meant) > 1:
        raise DecisionError(
            f"decision: {what} {name!r}: expected one meaning, got {len(meant)}: {', '.join(meant[:5])}. Write it with dots."
        )
    return meant[0] if meant else None


def unknown(name: str, names: Iterable[str], what: str) -> NoReturn:
    """Refuse a name, with the nearest ones."""
    listed = list(names)
    near = difflib.get_close_matches(name, listed, n=3) or listed[:3]
    hint = f" The nearest: {', '.join(map(repr, near))}." if near else f" It has no {what} at all."
    raise DecisionError(f"decision: {what} {name!r}: the model has none of that name.{hint}")


def paths_of(model: nn.Module) -> dict[str, nn.Module]:
    """Every module but the model itself."""
    return {path: module for path, module in model.named_modules() if path}
