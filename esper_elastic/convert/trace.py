"""One run of a model on fake tensors, recorded: which ops ran on which values, in which module's forward, at which line of whose code.

The run sees what Python code does, hooks and all, below autograd, where composite functions have come apart into a smaller set of ops.
Parameters and buffers are replaced by fake ones for the time of the run, at sizes of one's choice, and attributes of modules by other
values; afterwards the model is as it was, whatever its code wrote to its modules.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import sys
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensor, FakeTensorMode
from torch.nn.modules import module as module_hooks
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from ..errors import ConversionError
from .restore import as_it_was, plain_modules

_LIBRARY = str(Path(torch.__file__).parent)
_HERE = str(Path(__file__).parent)
_SMALL = 64
_PLAIN = frozenset((int, float, bool, str, torch.dtype, torch.device, torch.layout, torch.memory_format))


class Value:
    """A tensor of the run.

    Attributes:
        shape: its sizes.
        stride: between indices of each axis.
        offset: of its first element in memory.
        dtype: of its elements.
        name: of the parameter or buffer that it is, or ``None``.
        axes: what :mod:`axes` finds out of each axis.
        content: numbers that it holds, where it is a small constant of the model's code.
    """

    __slots__ = ("axes", "content", "dtype", "name", "offset", "shape", "stride")

    def __init__(self, tensor: Tensor, name: str | None = None) -> None:
        self.shape = tuple(int(n) for n in tensor.shape)
        self.stride = tuple(int(n) for n in tensor.stride())
        self.offset = int(tensor.storage_offset())
        self.dtype = tensor.dtype
        self.name = name
        self.axes: list[Any] | None = None
        self.content: list[Any] | None = None

    def describes(self, tensor: Tensor) -> bool:
        """Whether a tensor still has the sizes that this value has."""
        return self.shape == tuple(tensor.shape) and self.stride == tuple(tensor.stride())

    def __repr__(self) -> str:
        return f"Value({self.name or ''}{list(self.shape)})"


@dataclasses.dataclass(slots=True)
class Call:
    """One run of a module's forward."""

    path: str
    module: nn.Module
    order: int
    start: int
    inputs: list[Value]
    parent: Call | None
    args: tuple[Any, ...] = ()  # with values in the place of tensors, as `kwargs`
    kwargs: dict[str, Any] = dataclasses.field(default_factory=dict)
    end: int = -1
    outputs: list[Value] = dataclasses.field(default_factory=list)
    single: bool = False  # whether it gives one tensor, and takes one first

    def chain(self) -> Iterator[Call]:
        """This call and those around it, innermost first."""
        call: Call | None = self
        while call is not None:
            yield call
            call = call.parent


class Node(NamedTuple):
    """One op of the run: what it was called with, values in the place of tensors, and what it gave."""

    op: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    outputs: list[Value]
    call: Call
    line: str


class Failure(NamedTuple):
    """A function of torch that ended a run, and what it was called with."""

    error: Exception
    function: str
    args: Any
    call: Call
    line: str


@dataclasses.dataclass(slots=True)
class Run:
    """What was recorded.

    Attributes:
        nodes: the ops in order.
        calls: the runs of modules, in the order of their beginnings.
        inputs: tensors that the model was given.
        outputs: tensors that it gave.
        tensors: parameters and buffers by name.
        constants: real tensors that are neither.
        result: what the model returned, values in the place of tensors.
    """

    nodes: list[Node]
    calls: list[Call]
    inputs: list[Value]
    outputs: list[Value]
    tensors: dict[str, Value]
    constants: list[Value]
    result: Any = None


class Stop(Exception):
    """Raised by an observer to end a run."""


class Example:
    """The example inputs of a model: a tensor, a tuple or list of positional arguments, or a mapping of keyword arguments.

    It also keeps the fake tensors that stand for a model's own, from one run to the next.

    Attributes:
        fake: the mode that runs are made in. ``None``: they are made on plain meta tensors, which takes a fourth of the time and fails
            where code mixes in tensors of a device; what succeeds gives the same sizes.
    """

    def __init__(self, inputs: Any, *, fake: bool = True) -> None:
        self.fake = FakeTensorMode(allow_non_fake_inputs=True) if fake else None
        self._stand_ins: dict[tuple[int, tuple[int, ...]], Tensor] = {}
        if isinstance(inputs, Mapping):
            self.args: tuple[Any, ...] = ()
            self.kwargs = dict(inputs)
        elif isinstance(inputs, tuple | list):
            self.args, self.kwargs = tuple(inputs), {}
        elif isinstance(inputs, Tensor):
            self.args, self.kwargs = (inputs,), {}
        else:
            raise ConversionError(
                f"example_inputs: expected a tensor, a tuple of arguments or a dict of keyword arguments, got {type(inputs).__name__}."
            )

    def stand_in(self, tensor: Tensor, shape: tuple[int, ...] | None) -> Tensor:
        """A fake tensor like ``tensor``, at a size of its own; inside the fake mode."""
        key = (id(tensor), tuple(tensor.shape) if shape is None else shape)
        found = self._stand_ins.get(key)
        if found is None:
            if shape is None:
                made = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=self.device(tensor))
            else:
                made = torch.empty(shape, dtype=tensor.dtype, device=self.device(tensor))
            found = nn.Parameter(made, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else made
            self._stand_ins[key] = found
        return found

    def device(self, tensor: Tensor) -> torch.device:
        """Where the tensor that stands for ``tensor`` is."""
        return tensor.device if self.fake is not None else torch.device("meta")


def tensors_in(result: Any) -> Iterator[Tensor]:
    """The tensors in a result made of tuples, lists, mappings and dataclasses, in order. Other objects, such as caches, are passed over."""
    if isinstance(result, Tensor):
        yield result
    elif isinstance(result, Mapping):
        for value in result.values():
            yield from tensors_in(value)
    elif isinstance(result, tuple | list):
        for value in result:
            yield from tensors_in(value)
    elif dataclasses.is_dataclass(result) and not isinstance(result, type):
        for field in dataclasses.fields(result):
            yield from tensors_in(getattr(result, field.name))


def owned_tensors(model: nn.Module) -> Iterator[tuple[str, nn.Module, str, Tensor]]:
    """Every parameter and buffer as ``(name, module, key, tensor)``; a shared one under each of its names. Scripted parts are left out."""
    for path, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            continue
        for key, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None:
                yield (f"{path}.{key}" if path else key), module, key, tensor


def run(
    model: nn.Module,
    example: Example,
    *,
    shapes: Mapping[str, tuple[int, ...]] | None = None,
    attributes: Mapping[tuple[nn.Module, str], Any] | None = None,
    observer: Any = None,
    grad: bool = True,
) -> Run:
    """Record one run.

    Args:
        model: whose parameters, buffers and attributes are replaced for the time of the run.
        example: its inputs.
        shapes: sizes of parameters and buffers by name, where they are not their own.
        attributes: values of attributes that modules are to have meanwhile.
        observer: called with each node as it is recorded, and with a :class:`Failure` if an op fails; may raise :class:`Stop`.
        grad: whether autograd is on.

    Raises:
        ConversionError: the model decides by the values of tensors, or its code fails.
    """
    shapes = shapes or {}
    fake: Any = contextlib.nullcontext() if example.fake is None else example.fake
    with fake:
        recorder = _Recorder(model, observer)
        stand_ins: dict[int, Tensor] = {}
        named: dict[int, str] = {}
        for name, _, _, tensor in owned_tensors(model):
            if id(tensor) not in stand_ins:
                named[id(tensor)] = name
                stand_ins[id(tensor)] = example.stand_in(tensor, shapes.get(name))
        for key, stand_in in stand_ins.items():
            recorder.run.tensors[named[key]] = recorder.note(stand_in, Value(stand_in, named[key]))
        args, kwargs = tree_map(lambda x: _fake_input(x, example, recorder), (example.args, example.kwargs))
    functions = _Functions(recorder)  # also without an observer: modules that ask for such a mode take another path in one
    with (
        quiet(),
        eager(),
        as_it_was(model),
        recorder.writing_nothing(),
        recorder.watching(),
        torch.set_grad_enabled(grad),
        fake,
        recorder,
        functions,
    ):
        try:
            _swap(model, stand_ins, attributes or {})
            result = model(*args, **kwargs)
        except Stop:
            raise
        except Exception as error:
            if observer is not None:
                observer(Failure(error, "forward", (), recorder.call, line_of(error)))
            raise recorder.explain(error) from error
    recorder.run.outputs = [recorder.value(tensor) for tensor in tensors_in(result)]
    recorder.run.result = recorder.abstract(result)
    return recorder.run


def _fake_input(x: Any, example: Example, recorder: _Recorder) -> Any:
    if not isinstance(x, Tensor):
        return x
    with torch.no_grad():
        made = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=example.device(x))
    recorder.run.inputs.append(recorder.note(made, Value(made)))
    return made.requires_grad_(x.requires_grad)


#: Says of each op that fails on fake tensors that it does.
LOGGER = logging.getLogger("torch._subclasses.fake_tensor")


def quiet() -> contextlib.ExitStack:
    """Keep to ourselves what torch says of ops that fail at widths which are being tried."""
    end = contextlib.ExitStack()
    end.callback(setattr, LOGGER, "disabled", LOGGER.disabled)
    LOGGER.disabled = True
    end.enter_context(warnings.catch_warnings())
    warnings.simplefilter("ignore")
    return end


def eager() -> contextlib.AbstractContextManager[Any]:
    """Have functions that are compiled run as written."""
    return torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else contextlib.nullcontext()


def _swap(model: nn.Module, stand_ins: dict[int, Tensor], attributes: Mapping[tuple[nn.Module, str], Any]) -> None:
    """Have the model's modules hold other tensors and other attributes, and run as written where they are compiled."""
    for module in plain_modules(model):
        tables: tuple[Any, ...] = (module._parameters, module._buffers)
        for table in tables:
            table.update((key, stand_ins[id(tensor)]) for key, tensor in table.items() if tensor is not None)
        if module.__dict__.get("_compiled_call_impl") is not None:
            module.__dict__["_compiled_call_impl"] = None
    for (module, name), value in attributes.items():
        module.__dict__[name] = value


def in_mode(model: nn.Module, training: bool | None) -> contextlib.ExitStack:
    """Put every module in training or evaluation mode for a while; ``None`` leaves each as it is."""
    end = contextlib.ExitStack()
    modules = list(model.modules())
    for module in modules:
        end.callback(setattr, module, "training", module.training)
    for module in modules if training is not None else ():
        module.training = bool(training)
    return end


class _Recorder(TorchDispatchMode):
    """Writes down each op as it runs."""

    def __init__(self, model: nn.Module, observer: Any) -> None:
        super().__init__()
        self.run = Run([], [], [], [], {}, [])
        self.observer = observer
        self.known: dict[int, Value] = {}  # by identity
        self.saved: dict[int, Tensor] = {}
        self.end = contextlib.ExitStack()
        self.kept: list[Tensor] = []  # a tensor that dies could give its identity to another
        self.paths = {id(module): path for path, module in model.named_modules()}
        self.call = Call("", model, -1, 0, [], None)

    # Values

    def note(self, tensor: Tensor, value: Value) -> Value:
        self.known[id(tensor)] = value
        self.kept.append(tensor)
        return value

    def value(self, tensor: Tensor) -> Value:
        """The value that a tensor is; one not seen before is a constant of the model's code."""
        found = self.known.get(id(tensor))
        if found is None:
            found = self.note(tensor, Value(tensor))
            self.run.constants.append(found)
            if type(tensor) is Tensor and tensor.numel() <= _SMALL and not tensor.is_meta:
                with torch._C._DisableTorchDispatch():
                    found.content = tensor.flatten().tolist()
        return found

    def abstract(self, tree: Any) -> Any:
        """What was given or returned, values in the place of tensors."""
        if isinstance(tree, Tensor):
            return self.value(tree)
        kind = type(tree)
        if kind is tuple or kind is list:
            return kind(map(self.abstract, tree))
        if kind is dict:
            return {key: self.abstract(item) for key, item in tree.items()}
        if tree is None or kind in _PLAIN:
            return tree
        return tree_map(lambda x: self.value(x) if isinstance(x, Tensor) else x, tree)

    # Ops

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "prim":  # what device or type a tensor has
            return func(*args, **kwargs)
        if torch.is_inference_mode_enabled() and torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd"):
            with self:  # without autograd, which takes composite functions apart, they come here whole
                return func.decompose(*args, **kwargs)
        call, line = self.call, _line()
        if func._schema.is_mutable:
            self._save_real_tensors(args, kwargs)
        before, options = self.abstract(args), self.abstract(kwargs)
        result = _batch_norm(func, args) or func(*args, **kwargs)
        outputs = []
        for tensor in tensors_in(result):
            known = self.known.get(id(tensor))
            if known is None or not known.describes(tensor):  # in place, as by transpose_, a tensor can come to be of another shape
                known = self.note(tensor, Value(tensor))
            outputs.append(known)
        node = Node(func, before, options, outputs, call, line)
        self.run.nodes.append(node)
        if self.observer is not None:
            self.observer(node)
        return result

    def _save_real_tensors(self, args: Any, kwargs: Any) -> None:
        """Note what tensors that are neither parameters nor buffers hold before an op that may write to them, which no mode prevents."""
        for tensor in tensors_in((args, kwargs)):
            if not (isinstance(tensor, FakeTensor) or tensor.is_meta or id(tensor) in self.saved):
                with torch._C._DisableTorchDispatch():
                    part = tensor.detach()
                    self.end.callback(part.copy_, part.clone())
                    self.saved[id(tensor)] = tensor

    def writing_nothing(self) -> contextlib.ExitStack:
        """Let real tensors hold at the end what they hold now."""
        return self.end

    # Modules

    def watching(self) -> contextlib.ExitStack:
        end = contextlib.ExitStack()
        end.callback(register_module_forward_pre_hook(self._enter).remove)
        after = register_module_forward_hook(self._leave, with_kwargs=True)
        end.callback(module_hooks._global_forward_hooks_with_kwargs.pop, after.id, None)  # torch 2.13 leaves this entry behind
        end.callback(after.remove)
        return end

    def _enter(self, module: nn.Module, args: Any) -> None:
        path = self.paths.get(id(module), f"{self.call.path}.<{type(module).__name__}>")
        inputs = [self.value(t) for t in tensors_in(args)]
        self.call = Call(path, module, len(self.run.calls), len(self.run.nodes), inputs, self.call, self.abstract(args))
        self.run.calls.append(self.call)

    def _leave(self, module: nn.Module, args: Any, kwargs: Any, result: Any) -> None:
        call = next((call for call in self.call.chain() if call.module is module), None)
        if call is None or call.parent is None:
            return
        call.end = len(self.run.nodes)
        call.inputs += [self.value(t) for t in tensors_in(kwargs)]
        call.kwargs = self.abstract(kwargs)
        call.outputs = [self.value(t) for t in tensors_in(result)]
        call.single = isinstance(result, Tensor) and bool(args) and isinstance(args[0], Tensor)
        self.call = call.parent

    def explain(self, error: Exception) -> ConversionError:
        where = f"module {self.call.path!r}" if self.call.path else f"the forward of {type(self.call.module).__name__}"
        line = line_of(error)
        if isinstance(error, DataDependentOutputException | DynamicOutputShapeException):
            return ConversionError(
                f"{where}: its code decides by the values of tensors ({error.func}, {line}): which path another width takes cannot be "
                "known. Exclude the module or take the decision out of forward; nothing has changed."
            )
        return ConversionError(
            f"{where}: forward failed on the example inputs{'' if line == '?' else f', at {line}'}: {type(error).__name__}: "
            f"{str(error).rstrip('.')}. Do they suit the model?"
        )


def _batch_norm(func: Any, args: Any) -> Any:
    """What a batch norm gives on fake tensors. Torch derives it through some thirty ops, which would be most of a run of a ResNet."""
    if func.overloadpacket is not torch.ops.aten.native_batch_norm:
        return None
    x, *vectors = args[:5]
    channels = x.shape[1]
    if any(vector is not None and vector.shape[0] != channels for vector in vectors):
        return None
    statistics = [x.new_empty(channels if args[5] else 0) for _ in range(2)]
    return torch.empty_like(x), *statistics


class _Functions(TorchFunctionMode):
    """Tells the observer which function of torch failed: composite ones do so before they come to any op."""

    def __init__(self, recorder: _Recorder) -> None:
        super().__init__()
        self.recorder = recorder
        self.failed = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        try:
            return func(*args, **kwargs)
        except (Stop, DataDependentOutputException, DynamicOutputShapeException):
            raise
        except Exception as error:
            recorder = self.recorder
            if recorder.observer is not None and not self.failed:
                self.failed = True
                seen = recorder.abstract((args, kwargs))
                recorder.observer(Failure(error, getattr(func, "__name__", str(func)), seen, recorder.call, _line()))
            raise


def _line() -> str:
    """The line of the nearest code that is neither torch's nor ours."""
    frame = sys._getframe(1)
    while frame is not None:
        name = frame.f_code.co_filename
        if not name.startswith((_LIBRARY, _HERE)):
            return f"{name}:{frame.f_lineno}"
        frame = frame.f_back  # type: ignore[assignment]
    return "?"


def line_of(error: BaseException) -> str:
    """The line of the innermost code that is neither torch's nor ours, on an exception's way."""
    found, trace = "?", error.__traceback__
    while trace is not None:
        name = trace.tb_frame.f_code.co_filename
        if not name.startswith((_LIBRARY, _HERE)):
            found = f"{name}:{trace.tb_lineno}"
        trace = trace.tb_next
    return found
