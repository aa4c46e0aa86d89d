"""Runs of one module by itself, op by op, on what it is called with in its model."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree

from ...convert.comparison import kind
from ...convert.lightest import lightest_run
from ...convert.trace import Example, Run, in_mode, run
from ...convert.verify import Mode
from ...errors import ConversionError
from ..trial.calls import Calls, TensorSpec
from ..trial.memory import settings_of

#: In evaluation first; in training where code may take another path there.
MODES = (Mode(False, True), Mode(True, True))


class Arguments(NamedTuple):
    """What a module is called with."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


def arguments_of(calls: Calls, path: str) -> Arguments | None:
    """The arguments of a module's one call, tensors without values among them; ``None`` if it cannot be run by itself."""
    found = calls.of(path)
    if len(found) != 1 or not found[0].repeatable or path in calls.open:
        return None
    mode = FakeTensorMode()
    given = (found[0].args, found[0].kwargs)
    return Arguments(*pytree.tree_map(lambda leaf: leaf.fake(mode) if isinstance(leaf, TensorSpec) else leaf, given))


class Alone:
    """The runs of a module at its present size, in each mode in which its code takes a path of its own.

    Attributes:
        example: the arguments, to run it again with.
    """

    example: Example

    def __init__(self, module: nn.Module, arguments: Arguments) -> None:
        self._module = module
        self._arguments = arguments

    def runs(self) -> Iterator[tuple[Mode, Run]]:
        """The runs, one after another.

        Raises:
            ConversionError: code decides by the values of tensors, or fails, in both modes.
        """
        found: dict[Mode, Run] = {}
        for mode in MODES:
            if found and all(map(alike, self._module.modules())):
                return
            try:
                with in_mode(self._module, mode.training):
                    found[mode] = run(self._module, self.example) if found else self._first()
            except ConversionError:  # layers dropped at random, in training alone
                if not found and mode is MODES[-1]:
                    raise
                continue
            yield mode, found[mode]
        if len(found) == len(MODES):
            evaluation, training = map(own_paths, found.values())
            note_alike(module for module, path in evaluation.items() if training.get(module) == path)

    def _first(self) -> Run:
        recorded, self.example = lightest_run(self._module, self._arguments.args, self._arguments.kwargs)
        return recorded


#: Modules whose own code takes the same path in training as in evaluation, and the settings with which it was seen to do so.
_alike: weakref.WeakKeyDictionary[nn.Module, Any] = weakref.WeakKeyDictionary()


def own_paths(recorded: Run) -> dict[nn.Module, list[tuple[str, str]]]:
    """The ops in each module's own code, with the lines that call them."""
    found: dict[nn.Module, list[tuple[str, str]]] = {call.module: [] for call in recorded.calls}
    for node in recorded.nodes:
        if any(output.shape for output in node.outputs):  # others count batches
            found.setdefault(node.call.module, []).append((kind(node.op), node.line))
    return found


def alike(module: nn.Module) -> bool:
    """Whether a module's own code is known to take the same path in training as in evaluation."""
    return module in _alike and _alike[module] == _state(module)


def note_alike(modules: Iterable[nn.Module]) -> None:
    """Note that this is known of modules, as they are now."""
    _alike.update((module, _state(module)) for module in modules)


def _state(module: nn.Module) -> Any:
    return weakref.ref(type(module)), settings_of(module)
