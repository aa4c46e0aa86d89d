"""What is known of a run of a model: each module's calls as specs of tensors, and who reads which parameter."""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree

from .shapes import fake_tensor

#: Types of arguments that say all of themselves.
PLAIN = (type(None), bool, int, float, complex, str, bytes, slice, type(...), torch.dtype, torch.device, torch.layout, torch.memory_format)


@dataclasses.dataclass(frozen=True, slots=True)
class TensorSpec:
    """What a tensor is, without its values; the stride of an axis of size one is 0, since nothing depends on it."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    @staticmethod
    def of(tensor: Tensor) -> TensorSpec:
        with torch._C.DisableTorchFunction():
            shape = tuple(tensor.shape)
            strided = tensor.layout is torch.strided
            stride = tuple(0 if n == 1 else s for n, s in zip(shape, tensor.stride(), strict=True)) if strided else ()
            return TensorSpec(shape, stride, tensor.dtype, tensor.device)

    def fake(self, mode: FakeTensorMode) -> Tensor:
        """A tensor of this spec without values."""
        return fake_tensor(mode, self.shape, self.stride or None, self.dtype, self.device)

    def __str__(self) -> str:
        kind = "" if self.dtype is torch.get_default_dtype() else f" {str(self.dtype).removeprefix('torch.')}"
        where = "" if self.device.type == "cpu" else f" on {self.device}"
        return f"{self.shape}{kind}{where}"


@dataclasses.dataclass(frozen=True, slots=True)
class Opaque:
    """Stands for an object whose contents are not known, such as a cache of keys and values."""

    kind: str


@dataclasses.dataclass(slots=True, eq=False)
class CallSpec:
    """One call of a module.

    Attributes:
        path: of the module.
        args: positional arguments: trees with a :class:`TensorSpec` for each tensor.
        kwargs: arguments by name, likewise.
        result: likewise.
        parent: the call in whose forward it happened.
    """

    path: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    parent: CallSpec | None
    result: Any = None

    def chain(self) -> Iterator[CallSpec]:
        """This call and those around it, innermost first."""
        call: CallSpec | None = self
        while call is not None:
            yield call
            call = call.parent

    @property
    def repeatable(self) -> bool:
        """Whether the call can be made again from what is known of it."""
        return not any(isinstance(leaf, Opaque) for leaf in pytree.tree_leaves((self.args, self.kwargs)))


class Calls:
    """The calls of one run by the paths of modules, and which parameters and buffers it read.

    Attributes:
        args: positional arguments of the model, as specs.
        kwargs: those by name.
        used: names of the parameters and buffers whose values were read.
        open: paths of modules that take or give tensors by other ways than their arguments and results.
        scopes: ``(tensor, axis)`` -> the module that a dim along that axis was last found not to leave.
    """

    def __init__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.args = args
        self.kwargs = kwargs
        self.used: set[str] = set()
        self.open: set[str] = set()
        self.scopes: dict[tuple[str, int], str] = {}
        self._calls: dict[str, list[CallSpec]] = {}
        self._readers: dict[str, set[str]] = {}
        self._aliases: dict[str, str] = {}

    def of(self, path: str) -> list[CallSpec]:
        """The calls of the module at ``path``, in order; none if no forward called it."""
        return list(self._calls.get(self.canonical(path), ()))

    def readers(self, name: str) -> tuple[str, ...]:
        """Paths of the modules in whose forward the parameter or buffer was read, other than those that hold it.

        A module that takes a child's weight and calls a function with it is one; one that only asks for its shape or type is not.
        """
        return tuple(sorted(self._readers.get(name, ())))

    @property
    def paths(self) -> tuple[str, ...]:
        """Paths of the modules that were called."""
        return tuple(self._calls)

    def canonical(self, path: str) -> str:
        """The path under which the calls of a module are noted that is registered under several."""
        path = path[len("_orig_mod") :].removeprefix(".") if path.split(".")[0] == "_orig_mod" else path
        return self._aliases.get(path, path)

    def with_parts(self, path: str, parts: list[Calls]) -> Calls:
        """These calls with those made inside the module at ``path`` replaced: what is known after an edit in there.

        Args:
            path: of a module.
            parts: for each call of the module, in order, the calls of a run of it.
        """
        made = Calls(self.args, self.kwargs)
        parents = [call.parent for call in self.of(path)]
        for where, calls in self._calls.items():
            kept = [call for call in calls if all(above.path != path for above in call.chain())]
            if kept:
                made._calls[where] = kept
        for name, readers in self._readers.items():
            others = {reader for reader in readers if reader != path and not reader.startswith(f"{path}.")}
            if others:
                made._readers[name] = others
        for part, parent in zip(parts, parents, strict=True):
            for where, calls in part._calls.items():
                for call in calls:
                    if call.parent is None:
                        call.parent = parent
                made._calls.setdefault(where, []).extend(calls)
            for name, readers in part._readers.items():
                made._readers.setdefault(name, set()).update(readers)
        crossed = path in self.open  # then what is inside may be open to what is outside, which no run of the part shows
        made.open = {each for each in self.open if crossed or not each.startswith(f"{path}.")}.union(*(part.open for part in parts))
        made.scopes = self.scopes
        for each in (self, *parts):
            made._aliases.update(each._aliases)
            made.used |= each.used
        return made


@dataclasses.dataclass(frozen=True)
class Failure:
    """Why a run did not come to its end.

    Attributes:
        path: the innermost module whose forward failed.
        op: the function of torch that did, or ``""``.
        operands: the tensors that it was given, as ``name shape``.
        line: of the code that called it.
        reason: what was said.
        decided: whether it would fail on real tensors too; a model that decides by values cannot be run without them.
    """

    path: str
    op: str
    operands: tuple[str, ...]
    line: str
    reason: str
    decided: bool

    def __str__(self) -> str:
        where = f"{self.path or 'the model'}: " + (f"{self.op}: " if self.op else "")
        shapes = f"{', '.join(self.operands)}: " if self.operands else ""
        return f"{where}{shapes}{self.reason}" + ("" if self.line == "?" else f" (at {self.line})")


def spec_of(value: Any) -> Any:
    """What stands for one leaf of a tree of arguments."""
    if isinstance(value, Tensor):
        return TensorSpec.of(value)
    if isinstance(value, (*PLAIN, TensorSpec, Opaque)):
        return value
    if isinstance(value, type | types.BuiltinFunctionType) or (isinstance(value, types.FunctionType) and value.__closure__ is None):
        return value
    return Opaque(type(value).__name__)


def specs_of(tree: Any, *, inside: bool = False) -> Any:
    """A tree with specs for its leaves; ``inside``: also for those of dataclasses, which cannot be made again from them."""
    kind = type(tree)
    if kind is tuple:
        return tuple([specs_of(item, inside=inside) for item in tree])
    if kind is list:
        return [specs_of(item, inside=inside) for item in tree]
    if kind is dict:
        return {key: specs_of(item, inside=inside) for key, item in tree.items()}
    if isinstance(tree, Tensor):
        return TensorSpec.of(tree)
    if kind in PLAIN:
        return tree
    if inside and dataclasses.is_dataclass(tree) and not isinstance(tree, type | TensorSpec | Opaque | Mapping):
        values = {field.name: getattr(tree, field.name, None) for field in dataclasses.fields(tree)}
        return (kind.__name__, specs_of(values, inside=True))
    return pytree.tree_map(spec_of, tree)
