"""A run of a model on tensors without values, of which its calls are written down.

Nothing is computed and the model is left alone: its twin runs (:mod:`twins`). Sizes come from plain rules where these know them
(:mod:`shapes`); a run that fails is run again by torch alone, under autograd, so that what is said of it is torch's own word.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeCopyMode,
    FakeTensorMode,
    UnsupportedFakeTensorException,
    UnsupportedOperatorException,
)
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from ...convert.restore import generators_kept
from ...convert.trace import eager, quiet, tensors_in
from ...errors import SurgeryError
from .calls import PLAIN, Calls, CallSpec, Failure, TensorSpec, spec_of, specs_of
from .elastic_shapes import ELASTIC_RULES
from .shapes import PLAIN_RULES, SAME_TYPE, fake_tensor, require_same_type
from .twins import Twins, unwrapped

#: Errors that speak of the values that a tensor has not, or of an op that torch cannot run without them.
UNDECIDED = (DataDependentOutputException, DynamicOutputShapeException, UnsupportedFakeTensorException, UnsupportedOperatorException)

#: The rule of a function that a run may ask, by the function.
RULES = PLAIN_RULES | ELASTIC_RULES

_HOLDERS = (nn.ParameterList, nn.ParameterDict)
_TREES = (list, tuple, dict)
_NOT_THE_USERS = (str(Path(torch.__file__).parent), str(Path(__file__).parent))


def record(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any] | None = None) -> Calls:
    """Run ``model`` once on tensors without values and write down its calls.

    Args:
        model: in the modes that it is in.
        args: positional arguments: tensors, or :class:`TensorSpec` in their place.
        kwargs: arguments by name.

    Effects:
        None on the model or on random generators; a hook that writes to an object of the user's own may still do so.

    Raises:
        SurgeryError: the model does not run on them.
    """
    calls, failure = attempt(model, args, kwargs or {})
    if calls is None:
        raise SurgeryError(f"record: {type(model).__name__} does not run on these inputs: {failure}. Do they suit the model?")
    return calls


def attempt(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    *,
    within: tuple[nn.Module, str] | None = None,
    training: bool | None = None,
    explain: bool = True,
) -> tuple[Calls | None, Failure | None]:
    """The calls of a run, or why it failed.

    Args:
        model: the module to run.
        args: positional arguments.
        kwargs: arguments by name.
        within: the whole model and the path of ``model`` in it, for the names of what is inside.
        training: the mode for all modules; ``None`` leaves each in its own.
        explain: whether torch alone is to run again what fails; otherwise a run may fail that it would not refuse.
    """
    model = unwrapped(model)
    for precise in (False, True) if explain else (False,):
        run = _Run(model, within or (model, ""), precise, training)
        with generators_kept(), quiet(), eager():
            run(args, dict(kwargs))
        if run.failure is None:
            break
    return (run.calls, None) if run.failure is None else (None, run.failure)


class _Run:
    """One run of a twin on fake tensors."""

    def __init__(self, model: nn.Module, within: tuple[nn.Module, str], precise: bool, training: bool | None) -> None:
        self.mode = FakeTensorMode(allow_non_fake_inputs=True)
        self.precise = precise
        self.model = model
        self.failure: Failure | None = None
        self._stack: list[CallSpec] = []
        self._failed: tuple[BaseException, str] | None = None
        self._failed_op: tuple[BaseException, str, tuple[str, ...]] | None = None
        self._paths: dict[int, str] = {}
        self._names: dict[int, list[str]] = {}
        self._owners: dict[int, set[str]] = {}
        self._makers: dict[int, CallSpec | None] = {}  # of tensors by identity; nobody, of the inputs
        self._given: dict[int, set[int]] = {}  # tensors among the arguments of a call, and
        self._gave: dict[int, set[int]] = {}  # in its result
        self._kept: list[Tensor] = []  # a tensor that dies could give its identity to another
        self._within = within
        self._twins = Twins(self._stand_in, self._watch)
        self._training = training

    def __call__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.calls = Calls(*pytree.tree_map(spec_of, (args, kwargs)))
        with self.mode:
            args, kwargs = pytree.tree_map(self._input, (args, kwargs))
        autocast = torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda")
        rules = {} if self.precise or autocast else RULES
        same_type = frozenset[Any]() if autocast else SAME_TYPE
        with with_autograd(self.precise):
            twin = self._twins.module(self.model)
            if self._training is not None:
                for module in twin.modules():
                    module.__dict__["training"] = self._training
            self._learn_names(twin)
            self._note_made((args, kwargs), None)
            try:
                with self.mode, _Functions(self, rules, same_type):
                    twin(*args, **kwargs)
            except Exception as error:
                self.failure = self._explain(error)
                return
        self._note_fast_paths()

    # What goes in

    def _stand_in(self, tensor: Tensor) -> Tensor:
        with torch._C._DisableTorchDispatch(), torch._C.DisableTorchFunction():
            plain = tensor.layout is torch.strided
        if not plain:
            return self.mode.from_tensor(tensor)
        made = fake_tensor(self.mode, tensor.shape, tensor.stride(), tensor.dtype, tensor.device)
        if self.precise and tensor.requires_grad and tensor.is_leaf:
            made.requires_grad_()
        if isinstance(tensor, nn.Parameter):
            made._is_param = True
        return made

    def _input(self, value: Any) -> Any:
        if isinstance(value, TensorSpec):
            return value.fake(self.mode)
        if isinstance(value, Tensor):
            made = self._stand_in(value.detach())
            return made.requires_grad_() if self.precise and value.requires_grad else made
        if isinstance(value, PLAIN) or callable(value):
            return value
        return self._twins.value(value) if isinstance(value, nn.Module) else self._copied(value)

    def _copied(self, value: Any) -> Any:
        """A copy of an object among the inputs, which the model may write to."""
        with FakeCopyMode(self.mode):
            return copy.deepcopy(value)

    def _learn_names(self, twin: nn.Module) -> None:
        root, prefix = self._within
        known = {id(module): path for path, module in root.named_modules()}
        originals = (module for _, module in self.model.named_modules(remove_duplicate=False))
        twins = twin.named_modules(prefix=prefix, remove_duplicate=False)
        for original, (path, module) in zip(originals, twins, strict=False):
            first = self._paths.setdefault(id(module), known.get(id(original), path))
            if first != path:
                self.calls._aliases[path] = first
            owner = path.rpartition(".")[0] if isinstance(module, _HOLDERS) else path
            for key, tensor in (*module._parameters.items(), *module._buffers.items()):
                if tensor is not None:
                    self._names.setdefault(id(tensor), []).append(f"{path}.{key}".lstrip("."))
                    self._owners.setdefault(id(tensor), set()).update((owner, first))

    # What happens

    def _watch(self, twin: nn.Module, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        parent = self._stack[-1] if self._stack else None
        path = self._paths.get(id(twin))
        if path is None:
            path = f"{parent.path if parent else ''}.<{type(twin).__name__}>".lstrip(".")
        spec = CallSpec(path, specs_of(args), specs_of(kwargs), parent)
        self._given[id(spec)] = {id(tensor) for tensor in tensors_in((args, kwargs))}
        self._stack.append(spec)
        try:
            result = call(*args, **kwargs)
        except Exception as error:
            if self._failed is None or self._failed[0] is not error:
                self._failed = (error, path)
            raise
        finally:
            self._stack.pop()
        spec.result = specs_of(result, inside=True)
        self._gave[id(spec)] = self._note_made(result, spec)
        self.calls._calls.setdefault(path, []).append(spec)
        return result

    def read(self, values: Iterable[Any]) -> None:
        """Note whose parameters are among the operands of a function, and what has come to it past the arguments and results of modules."""
        call = self._stack[-1] if self._stack else None
        here = call.path if call is not None else self._within[1]
        for value in values:
            kind = type(value)
            if kind in _TREES:
                self.read(value.values() if kind is dict else value)
                continue
            key = id(value)
            names = self._names.get(key)
            if names is not None:
                self.calls.used.update(names)
                if here not in self._owners[key]:
                    for name in names:
                        self.calls._readers.setdefault(name, set()).add(here)
            elif self._makers.get(key, call) is not call:
                self._note_way(key, self._makers[key], call)

    def made(self, result: Any) -> None:
        """Note who has made the tensors that a function gave."""
        self._note_made(result, self._stack[-1] if self._stack else None)

    def _note_made(self, result: Any, call: CallSpec | None) -> set[int]:
        found = set()
        for tensor in tensors_in(result):
            found.add(id(tensor))
            if id(tensor) not in self._makers:
                self._makers[id(tensor)] = call
                self._kept.append(tensor)
        return found

    def _note_way(self, tensor: int, maker: CallSpec | None, reader: CallSpec | None) -> None:
        """Note the modules that a tensor has left without being in their result, or come into without being among their arguments."""
        around = set() if maker is None else {id(call) for call in maker.chain()}
        while reader is not None and id(reader) not in around:
            if tensor not in self._given[id(reader)]:
                self.calls.open.add(reader.path)
            reader = reader.parent
        while maker is not reader and maker is not None:
            if tensor not in self._gave.get(id(maker), ()):
                self.calls.open.add(maker.path)
            maker = maker.parent

    def note_failure(self, error: Exception, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Note the innermost function of torch that an exception comes from."""
        if self._failed_op is None or self._failed_op[0] is not error:
            name = getattr(func, "__name__", str(func))
            self._failed_op = (error, name, tuple(_operands(func, args, kwargs)))

    def _explain(self, error: Exception) -> Failure:
        path = self._failed[1] if self._failed is not None and self._failed[0] is error else self._within[1]
        op, operands = "", tuple[str, ...]()
        if self._failed_op is not None and self._failed_op[0] is error:
            _, op, operands = self._failed_op
        decided = not isinstance(error, UNDECIDED)
        text = " ".join(str(error).split()) or type(error).__name__
        if not decided:
            text = f"its code decides by the values of tensors ({error})"
        elif not op or not isinstance(error, RuntimeError | ValueError):
            text = f"{type(error).__name__}: {text}"
        return Failure(path, op, operands, _line_of(error), text[:400].rstrip("."), decided)

    def _note_fast_paths(self) -> None:
        """In evaluation mode an encoder layer of torch's reads its children's parameters, and calls none of them."""
        for path, module in unwrapped(self.model).named_modules(prefix=self._within[1]):
            if isinstance(module, nn.TransformerEncoderLayer):
                for name, _ in module.named_parameters(prefix=path):
                    self.calls._readers.setdefault(name, set()).add(path)


class _Functions(TorchFunctionMode):
    """Sees every function of torch that a run calls, and answers where a rule can."""

    def __init__(self, run: _Run, rules: Mapping[Any, Any], same_type: frozenset[Any]) -> None:
        super().__init__()
        self._run = run
        self._rules = rules
        self._same_type = same_type

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name == "__get__":
            if getattr(getattr(func, "__self__", None), "__name__", "") in _VIEWS:
                self._run.read(args)
        elif name not in _QUESTIONS:
            self._run.read(args)
            if kwargs:
                self._run.read(kwargs.values())
            rule = self._rules.get(func)
            if rule is not None:
                try:
                    result = rule(*args, **kwargs)
                except (TypeError, ValueError, AttributeError):  # a way to call it that the rule does not know
                    result = None
                if result is not None:
                    self._run.made(result)
                    return result
        try:
            if func in self._same_type:
                require_same_type(*args, *kwargs.values())
            result = func(*args, **kwargs)
            self._run.made(result)
            return result
        except Exception as error:
            self._run.note_failure(error, func, args, kwargs)
            raise


#: What can be asked of a tensor without reading its values.
_QUESTIONS = frozenset(
    (
        *(
            "size",
            "dim",
            "numel",
            "nelement",
            "stride",
            "storage_offset",
            "ndimension",
            "element_size",
            "get_device",
            "data_ptr",
            "__len__",
        ),
        *("is_floating_point", "is_complex", "is_signed", "is_contiguous", "is_same_size", "is_shared", "is_pinned", "is_inference"),
        *("requires_grad_", "__hash__", "__repr__", "__set__"),
    )
)
_VIEWS = frozenset(("data", "T", "mT", "H", "mH", "real", "imag"))


def _operands(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Iterator[str]:
    """The tensors that a function was given, each with its shape."""
    names = _NAMES.get(getattr(func, "__name__", "").removesuffix("_").strip("_"), ())
    for index, value in enumerate(args):
        name = names[index] if index < len(names) else ""
        yield from _shapes(name, value)
    for name, value in kwargs.items():
        yield from _shapes(name, value)


def _shapes(name: str, value: Any) -> Iterator[str]:
    if isinstance(value, Tensor):
        yield f"{name} {TensorSpec.of(value)}".strip()
    elif isinstance(value, tuple | list):
        for item in value:
            if isinstance(item, Tensor):
                yield str(TensorSpec.of(item))


_NAMES: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("linear", "conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d"), ("input", "weight", "bias")),
    "batch_norm": ("input", "running_mean", "running_var", "weight", "bias"),
    "layer_norm": ("input", "", "weight", "bias"),
    "group_norm": ("input", "", "weight", "bias"),
    "embedding": ("input", "weight"),
}


def with_autograd(enabled: bool) -> contextlib.ExitStack:
    """Have autograd on or off, outside of inference mode."""
    end = contextlib.ExitStack()
    if torch.is_inference_mode_enabled():
        end.enter_context(torch.inference_mode(False))
    end.enter_context(torch.set_grad_enabled(enabled))
    return end


def _line_of(error: BaseException) -> str:
    """The line of the innermost code that is neither torch's nor of this package's surgery, on an exception's way."""
    found, trace = "?", error.__traceback__
    while trace is not None:
        name = trace.tb_frame.f_code.co_filename
        if not name.startswith(_NOT_THE_USERS):
            found = f"{name}:{trace.tb_lineno}"
        trace = trace.tb_next
    return found
