"""The size of one dim of a plain model, changed through everything that is coupled with it.

:func:`find` says what that is: rows that make its units, columns that consume them, biases and norms, the partners of residual additions,
parts of concatenations, and the numbers that modules keep. :meth:`Coupled.resize` changes all of it at once or, with the reason, nothing.
What the change of an elastic model's widths needs is metadata, and is done by its dims.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ...convert.structure import forget_history
from ...convert.trace import Example, owned_tensors
from ...errors import TopologyError
from ..trial.calls import Calls
from ..trial.trial import look
from .alone import Arguments, alike, note_alike
from .coupling import KeptByCode, Refused, Scope
from .resizing import Stretches, attributes_of, changes_of, check_owners
from .tensors import replace_storage


class Binding(NamedTuple):
    """An axis that a dim runs along, of the parameter or buffer ``tensor`` of the module at ``path``."""

    path: str
    tensor: str
    axis: int
    stretches: Stretches

    def __str__(self) -> str:
        return f"{self.path}.{self.tensor}".lstrip(".") + f"[{self.axis}]"


class Attribute(NamedTuple):
    """A size that the module at ``path`` keeps: the attribute ``name``, or an element of it."""

    path: str
    name: str
    element: int | None
    stretches: Stretches


@dataclasses.dataclass(frozen=True, eq=False)
class Coupled:
    """A dim of a plain model.

    Attributes:
        tensor: the parameter that was asked about, and
        axis: its axis, along which sizes count here.
        size: of that axis.
        multiple_of: by how much it changes for each unit.
        fixed: how much of it is not of the dim: sizes are ``fixed`` plus a multiple of ``multiple_of``.
        minimum: the smallest size.
        bindings: the axes that the dim runs along.
        attributes: the sizes that modules keep of it.
        mixed: why growth cannot keep the function, or ``None``.
        scope: path of the module that it does not leave.
    """

    tensor: str
    axis: int
    size: int
    multiple_of: int
    fixed: int
    minimum: int
    bindings: tuple[Binding, ...]
    attributes: tuple[Attribute, ...]
    mixed: str | None
    scope: str
    _model: nn.Module = dataclasses.field(repr=False)
    _found: Scope = dataclasses.field(repr=False)

    @property
    def units(self) -> int:
        """How many units the dim has."""
        return (self.size - self.fixed) // self.multiple_of

    def resize(
        self, size: int, *, keep: Iterable[int] | None = None, preserve: bool = True, generator: torch.Generator | None = None
    ) -> None:
        """Change the size everywhere. Once: what is coupled then is to be found anew.

        Args:
            size: of the axis.
            keep: the units that stay where it shrinks, in their order; the first ones if not given.
            preserve: refuse to grow where that changes what the model computes.
            generator: to draw new rows from.

        Effects:
            Parameters and buffers keep their identity and hold other storage, gradients follow. New rows that make units are drawn as their
            module initialises itself, new columns that consume them are zero, norms begin as the identity. Reported to :mod:`undo`.

        Raises:
            TopologyError: the size is none of the dim, code does not go along, or the model has changed; nothing has changed.
        """
        units = self._units(size)
        kept = self._kept(units, keep)
        if units > self.units and preserve and self.mixed is not None:
            raise TopologyError(
                f"{self._where}: new units change what the model computes: {self.mixed}. Pass preserve=False to grow it all the same."
            )
        self._check_unchanged()
        found = self._prove(units)
        if units == self.units and kept is None:
            return
        changes = changes_of(found, self.units, units, kept, generator)
        attributes = attributes_of(found, units)
        for change in changes:
            replace_storage(change.tensor, change.storage, change.write)
        known = {module for module, _, _ in attributes if alike(module)}
        for module, name, value in attributes:
            vars(module)[name] = value
        note_alike(known)

    @property
    def _where(self) -> str:
        return f"{self.tensor}[{self.axis}]"

    def _units(self, size: int) -> int:
        least = f"{self.fixed} plus " if self.fixed else ""
        sizes = f"at least {self.minimum}, {least}a multiple of {self.multiple_of}" if self.multiple_of > 1 else f"at least {self.minimum}"
        if isinstance(size, bool) or not isinstance(size, int):
            raise TopologyError(f"{self._where}: size: expected an integer, {sizes}, got {size!r}.")
        units, rest = divmod(size - self.fixed, self.multiple_of)
        if rest or size < self.minimum:
            near = self.fixed + max(1, round((size - self.fixed) / self.multiple_of)) * self.multiple_of
            raise TopologyError(f"{self._where}: size: expected {sizes}, got {size}. The nearest is {max(near, self.minimum)}.")
        return units

    def _kept(self, units: int, keep: Iterable[int] | None) -> list[int] | None:
        if keep is None:
            return None
        kept = [int(unit) for unit in keep]
        if units > self.units or len(kept) != units or len(set(kept)) != units or not all(0 <= unit < self.units for unit in kept):
            raise TopologyError(
                f"{self._where}: keep: expected {units} different units of {self.units}, got {kept}. Growth keeps all, and takes no keep."
            )
        return kept

    def _check_unchanged(self) -> None:
        for binding in self.bindings:
            module = _module(self._model, binding.path)
            tensor = None if module is None else module._parameters.get(binding.tensor, module._buffers.get(binding.tensor))
            expected = sum((self.units if ours else 1) * length for ours, length in binding.stretches)
            if tensor is None or tensor.dim() <= binding.axis or tensor.shape[binding.axis] != expected:
                got = "none" if tensor is None else tuple(tensor.shape)
                raise TopologyError(f"{binding}: expected {expected} indices, got {got}: the model has changed. Find the dim anew.")

    def _prove(self, units: int) -> Scope:
        """See that code goes along at this size, on fake tensors."""
        found = self._found
        if units not in (found.tried, self.units):
            try:
                found.settle(self.fixed + units * self.multiple_of)
            except Refused as refused:
                raise TopologyError(
                    f"{self._where}: cannot have {self.fixed + units * self.multiple_of} indices: {refused}. Nothing has changed."
                ) from refused
            finally:
                forget_history()
        return found


def find(
    model: nn.Module,
    tensor_name: str,
    axis: int,
    inputs: Any,
    *,
    size: int | None = None,
    returned: bool = False,
    calls: Calls | None = None,
) -> Coupled:
    """What is coupled with an axis of a parameter.

    Args:
        model: plain; it stays as it is.
        tensor_name: of a parameter or buffer, such as ``"layer1.0.conv1.weight"``.
        axis: of it.
        inputs: of the model: a tensor, a tuple of arguments or a dict of keyword arguments. Values do not matter.
        size: that the axis is to have, if that is known: what is found out by a trial at this size need not be tried again.
        returned: whether the dim may be one of what the model returns, which is then of another size.
        calls: of the model as it is now, on these inputs, if they are known.

    Effects:
        Runs modules of the model on fake tensors.

    Raises:
        TopologyError: there is no such axis, or nothing can change its size; says what keeps it.
    """
    tensor = _tensor(model, tensor_name, axis)
    axis %= tensor.dim()
    if size is not None and (isinstance(size, bool) or not isinstance(size, int)):
        raise TopologyError(f"{tensor_name}[{axis}]: size: expected an integer, got {size!r}.")
    if calls is None:
        calls, failure = look(model, inputs)
        if calls is None:
            raise TopologyError(f"{tensor_name}: the model cannot be run on fake tensors: {failure}.")
    example = Example(inputs)
    given = Arguments(example.args, example.kwargs)
    reasons: list[str] = []
    paths = [(path, False) for path in _paths(model, calls, tensor_name, axis)]
    for path, thorough in paths:
        try:
            scope = Scope(model, given, calls, path, tensor, axis, thorough=thorough, returned=returned)
            scope.settle(tensor.shape[axis] + 1 if size is None or size < 1 else size)
            check_owners(scope)
            calls.scopes[tensor_name, axis] = path
            return _describe(model, scope, tensor_name, axis)
        except Refused as refused:
            reasons.append(str(refused))
            if isinstance(refused, KeptByCode) and not thorough:
                paths.append((path, True))
        finally:
            forget_history()
    raise TopologyError(f"{tensor_name}[{axis}]: its size cannot change: {reasons[-1]}.")


def _tensor(model: nn.Module, name: str, axis: int) -> Tensor:
    known = {known: tensor for known, _, _, tensor in owned_tensors(model)}
    if name not in known:
        near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
        hint = f" The nearest: {', '.join(map(repr, near))}." if near else ""
        raise TopologyError(f"{type(model).__name__} has no parameter or buffer {name!r}.{hint}")
    tensor = known[name]
    if isinstance(axis, bool) or not isinstance(axis, int) or not -tensor.dim() <= axis < tensor.dim():
        raise TopologyError(f"{name}: axis: expected one of {tensor.dim()} axes, got {axis!r}. Its shape is {tuple(tensor.shape)}.")
    return tensor


def _module(model: nn.Module, path: str) -> nn.Module | None:
    try:
        return model.get_submodule(path)
    except AttributeError:
        return None


def _paths(model: nn.Module, calls: Calls, name: str, axis: int) -> Iterator[str]:
    """The modules to ask, smallest first; before them the one that knew the last time."""
    before = calls.scopes.get((name, axis))
    if before is not None and _module(model, before) is not None:
        yield before
    path = name.rpartition(".")[0]
    owner = model.get_submodule(path)
    if path and type(owner).__module__.startswith("torch.nn.") and next(owner.children(), None) is None:
        path = path.rpartition(".")[0]  # a single layer takes or gives all of its dims
    while path:
        if calls.of(path):
            yield path
        path = path.rpartition(".")[0]
    yield ""


def _describe(model: nn.Module, scope: Scope, name: str, axis: int) -> Coupled:
    paths = {module: path for path, module in model.named_modules()}
    bindings = []
    for key, _ in scope.coupled():
        path, _, own = f"{scope.path}.{key}".lstrip(".").rpartition(".")
        for index, structure in enumerate(scope.axes.tensors[key]):
            if scope.has(structure):
                bindings.append(Binding(path, own, index, scope.stretches(structure)))
    attributes = [
        Attribute(paths[module], own, index, scope.stretches(structure))
        for (module, own, index), structure in scope.trial.follows.items()
        if scope.has(structure)
    ]
    fixed, once = scope.length(scope.axis, 0), scope.length(scope.axis, 1)
    return Coupled(
        name,
        axis,
        scope.length(scope.axis, scope.atom.size),
        once - fixed,
        fixed,
        scope.length(scope.axis, scope.atom.minimum),
        tuple(bindings),
        tuple(attributes),
        scope.mixed(),
        scope.path,
        model,
        scope,
    )
