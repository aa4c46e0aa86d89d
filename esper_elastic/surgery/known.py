"""What each module of a model is called with, from one recorded run, so that a module can be run by itself.

A record is kept per model until its structure or the inputs change. An edit that leaves a module's inputs and outputs as they were renews
what is known of the modules inside, and the rest stays.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map

from ..convert import rules
from ..convert.trace import Call, Example, Run, Value, in_mode, run
from ..convert.verify import Mode
from ..errors import ConversionError

_PLAIN = (int, float, bool, str, bytes, type(None), torch.dtype, torch.device, torch.Size, torch.layout, torch.memory_format)


class Given(NamedTuple):
    """The arguments of one call, values in the place of tensors."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class Calls:
    """One run of a model.

    Attributes:
        given: path of a module -> its calls.
        leaks: paths of modules in which something is made that code outside reads by other ways than their outputs.
        readers: name of a parameter or buffer -> the paths of modules, the running ones and those around, of each op that reads it.
        plain: path -> whether the module runs on meta tensors; not there where nobody has tried.
        scopes: ``(tensor, axis)`` -> the module in which that axis was last found to be closed.
        alike: paths of modules that run in the same way in training as in evaluation.
    """

    def __init__(self, model: nn.Module, inputs: Any) -> None:
        example = Example(inputs)
        self.inputs = Given(example.args, example.kwargs)
        self.plain: dict[str, bool] = {}
        self.scopes: dict[tuple[str, int], str] = {}
        self.alike: set[str] = set()
        self._runs: dict[str, tuple[Example, dict[Mode, Run]]] = {}
        self.given: dict[str, list[Given]] = {}
        self.leaks: set[str] = set()
        self.readers: dict[str, set[frozenset[str]]] = {}
        self.signature = _signature(inputs)
        self.stamp: int | None = stamp(model)
        with in_mode(model, False):
            self._read(self.record(model, "", self.inputs)[1])

    def record(self, module: nn.Module, path: str, given: Given) -> tuple[Example, Run]:
        """Run a module on meta tensors, or on fake ones where its code needs a device.

        Raises:
            ConversionError: its code decides by the values of tensors, or fails.
        """
        for fake in (False, True):
            if fake or self.plain.get(path, True):
                example = Example(given.args, fake=fake)
                example.kwargs = given.kwargs
                try:
                    recorded = run(module, example)
                except ConversionError:
                    if fake:
                        raise
                    continue
                self.plain[path] = not fake
                return example, recorded
        raise AssertionError

    def _read(self, run: Run) -> None:
        self._note_calls(run, "")
        made: dict[int, Call] = {}
        chains: dict[int, frozenset[str]] = {}
        around: dict[int, Call] = {}
        for node in run.nodes:
            if id(node.call) not in chains:
                chains[id(node.call)] = frozenset(call.path for call in node.call.chain())
                around.update((id(call), call) for call in node.call.chain())
            for value in rules.values((node.args, node.kwargs)):
                if value.name is not None:
                    self.readers.setdefault(value.name, set()).add(chains[id(node.call)])
                elif id(value) in made and made[id(value)] is not node.call:
                    self._note_leaks(value, made[id(value)], node.call)
            for value in node.outputs:
                made.setdefault(id(value), node.call)
        for value in run.outputs:
            if id(value) in made:
                self._note_leaks(value, made[id(value)], None)

    def _note_leaks(self, value: Value, maker: Call, reader: Call | None) -> None:
        inside = set() if reader is None else {id(call) for call in reader.chain()}
        for call in maker.chain():
            if call.path and id(call) not in inside and not any(value is output for output in call.outputs):
                self.leaks.add(call.path)

    def _note_calls(self, run: Run, around: str) -> None:
        for call in run.calls:
            if call.path:
                self.given.setdefault(f"{around}.{call.path}".lstrip("."), []).append(Given(call.args, call.kwargs))

    def arguments(self, path: str) -> Given | None:
        """What a module is given in its one call, tensors and all; ``None`` if it cannot be run by itself."""
        calls = self.given.get(path, ())
        if path == "":
            return self.inputs
        if len(calls) != 1 or path in self.leaks:
            return None
        (given,) = calls
        leaves, _ = tree_flatten((given.args, given.kwargs))
        if not all(isinstance(leaf, (Value, *_PLAIN)) for leaf in leaves):
            return None
        tensors: dict[int, Tensor] = {}

        def tensor(leaf: Any) -> Any:
            if not isinstance(leaf, Value):
                return leaf
            if id(leaf) not in tensors:
                tensors[id(leaf)] = torch.empty_strided(leaf.shape, leaf.stride, dtype=leaf.dtype, device="meta")
            return tensors[id(leaf)]

        args, kwargs = tree_map(tensor, (given.args, given.kwargs))
        return Given(args, kwargs)

    def runs(self, path: str, module: nn.Module) -> tuple[Example, dict[Mode, Run]] | None:
        """The runs that :meth:`renew` was given of a module, if nothing has changed in it since; once."""
        known = self._runs.pop(path, None)
        if known is not None:
            modules = dict(module.named_modules())
            for call in _every_call(known[1]):
                call.module = modules[call.path]
        return known

    def renew(self, model: nn.Module, path: str, example: Example, runs: dict[Mode, Run]) -> None:
        """Take in an edit inside of ``path``, from runs of that module: what the modules within are called with now."""
        self.stamp = None  # for the time of the changes: what an exception leaves is of no model
        for known in [known for known in self.given if not path or known.startswith(f"{path}.")]:
            del self.given[known]
        self._note_calls(next(iter(runs.values())), path)
        for known in [known for known in self._runs if _within(known, path) or _within(path, known)]:
            del self._runs[known]
        inside = {name for name, _ in model.get_submodule(path).named_modules()}
        if all(call.path in inside for call in _every_call(runs)):
            for call in _every_call(runs):
                call.module = _NOBODY  # a record must not keep alive what it is kept for
            self._runs[path] = example, runs
        self.stamp = stamp(model)


def _every_call(runs: dict[Mode, Run]) -> Iterable[Call]:
    """The calls of modules in runs, and that of the code around the first."""
    return {id(each): each for run in runs.values() for call in run.calls for each in call.chain()}.values()


def _within(path: str, around: str) -> bool:
    return not around or path == around or path.startswith(f"{around}.")


_NOBODY = nn.Module()
_known: weakref.WeakKeyDictionary[nn.Module, Calls] = weakref.WeakKeyDictionary()


def calls_of(model: nn.Module, inputs: Any) -> Calls:
    """What the modules of a model are called with when it is given ``inputs``.

    Effects:
        Runs the model on fake tensors, if its structure or the inputs are others than at the last time.

    Raises:
        ConversionError: its code decides by the values of tensors, or fails.
    """
    known = _known.get(model)
    if known is None or known.signature != _signature(inputs) or known.stamp != stamp(model):
        known = _known[model] = Calls(model, inputs)
    return known


def stamp(model: nn.Module) -> int:
    """A number that changes with the modules of a model, their tensors' shapes and the plain attributes that they keep."""
    return hash(tuple(_stamps(model)))


def _stamps(model: nn.Module) -> Iterable[Any]:
    for path, module in model.named_modules():
        yield path, id(module), type(module), len(module._forward_hooks), len(module._forward_pre_hooks)
        for key, value in vars(module).items():
            if type(value) in (int, float, bool, str, tuple) and key != "training":
                yield key, repr(value)
        for key, tensor in (*module._parameters.items(), *module._buffers.items()):
            yield (key, None) if tensor is None else (key, id(tensor), tensor.shape, tensor.dtype)


def _signature(inputs: Any) -> Any:
    leaves, structure = tree_flatten(inputs)
    return structure, [(leaf.shape, leaf.stride(), leaf.dtype) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
