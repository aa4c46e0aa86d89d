"""One edit under way: the model, what is known of its calls, what has been done so far and where it has to be tried."""

from __future__ import annotations

import functools
import inspect
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call
from torch.utils import _pytree as pytree

from ...convert.arguments import nearest
from ...convert.lightest import lightest_run
from ...convert.trace import Run, quiet
from ...errors import ConversionError, TopologyError
from ...layers import ElasticLayer
from ..compiled import plain_path
from ..examples import from_data, to_data
from ..trial.calls import Calls, CallSpec, TensorSpec
from ..trial.inputs import known_inputs
from ..trial.trial import calls_of, smallest_closed
from ..widths import widths
from .holder import EDITS, Edits


class Edit:
    """What the operations of the surgeon work on.

    Args:
        model: to be edited.
        given: example inputs, or ``None``.
        preserve: whether the function is to be kept.
        repeats: what a journal says of the edit that this one repeats: on which inputs it was made. Weights will be loaded.

    Attributes:
        name: path of what the edit has made or changed.
        details: what the surgeon's result tells.
        steps: what it has done, a line each.
        warnings: what could not be checked.
        said: what a journal says of the edit that this one repeats.
        widths: of an elastic model's dims when the edit was made, by name.
    """

    def __init__(self, model: nn.Module, given: Any = None, *, preserve: bool = True, repeats: dict[str, Any] | None = None) -> None:
        self.model = model
        self.given = given
        self.preserve = preserve
        self.repeats = repeats is not None
        self.said = repeats or {}
        self.widths: dict[str, int] = {}
        if repeats is not None and "inputs" in repeats:
            self.batch = from_data(repeats["inputs"])
        self.name = ""
        self.details: dict[str, Any] = {}
        self.steps: list[str] = []
        self.warnings: list[str] = []
        self._touched: list[str] = []
        self._runs: dict[str, Run | None] = {}

    # What is there

    @functools.cached_property
    def paths(self) -> dict[str, nn.Module]:
        """Every module under each of its names, as they were when the edit began."""
        return dict(self.model.named_modules(remove_duplicate=False))

    def registered(self, path: str) -> str:
        """The path of a module as it is registered: with the names of wrappers of ``torch.compile``, where it was given without."""
        if path in self.paths:
            return path
        return {plain_path(known): known for known in self.paths}.get(plain_path(path), path)

    @functools.cached_property
    def elastic(self) -> bool:
        """Whether the model holds elastic layers."""
        return any(isinstance(module, ElasticLayer) for module in self.model.modules())

    def module(self, path: str) -> nn.Module:
        """The module of a path.

        Raises:
            TopologyError: there is none.
        """
        found = self.paths.get(path) if path else None
        if found is not None:
            return found
        try:
            return self.model.get_submodule(path)
        except AttributeError:
            pass
        named = [name for name in self.paths if name]
        raise TopologyError(f"{path!r} names no module of {type(self.model).__name__}. {nearest(path, named)}")

    def layer(self, path: str) -> nn.Module:
        """The module of a path that may be edited: neither the model itself nor what holds edits."""
        module = self.module(path)
        if module is self.model:
            raise TopologyError(f"{path!r}: expected a module inside of {type(self.model).__name__}, got the model itself.")
        if isinstance(module, Edits):
            raise TopologyError(f"{path!r}: expected a layer, got the place where edits of {path.removesuffix('.' + EDITS)!r} are kept.")
        return module

    def names_of(self, module: nn.Module) -> list[str]:
        """Every path of a module."""
        return [path for path, known in self.model.named_modules(remove_duplicate=False) if known is module]

    def inside(self, path: str, outer: str) -> bool:
        """Whether a module lies inside of another one."""
        inner = self.module(path)
        return any(part is inner for part in self.module(outer).modules()) and inner is not self.module(outer)

    def like(self, module: nn.Module) -> dict[str, Any]:
        """Device and type that new parameters at a module are to have: those of its first floating parameter, else of the model's."""
        for owner in (module, self.model):
            for parameter in owner.parameters():
                if parameter.is_floating_point():
                    return {"device": parameter.device, "dtype": parameter.dtype}
        return {}

    def neighbour(self, *modules: nn.Module) -> nn.Parameter | None:
        """The first trainable parameter of some modules, whose optimizer group new ones join."""
        return next((parameter for module in modules for parameter in module.parameters() if parameter.requires_grad), None)

    # What is known of calls

    @functools.cached_property
    def calls(self) -> Calls | None:
        """The calls of one pass through the model, recorded before the edit; ``None`` if no input is known."""
        if self.batch is None:
            return None
        return calls_of(self.model, self.inputs if self.repeats else self.given)

    def check_called(self, path: str) -> None:
        """Refuse an edit at a module whose output an insertion would miss, or meet twice.

        Raises:
            TopologyError: it is never called, or has parameters and is called more than once.
        """
        self.layer(path)
        if self.calls is None:
            return
        count = self._count(path)
        module = self.module(path)
        if not count:
            raise TopologyError(
                f"{path!r} ({type(module).__name__}) is never called as a module in {type(self.model).__name__}'s forward: its "
                "tensors are read by other code, or it is not used. An edit there would have no effect; choose the module around it."
            )
        if count > 1 and any(True for _ in module.parameters()):
            raise TopologyError(
                f"{path!r} ({type(module).__name__}) has parameters and is called {count} times in one pass: the edit would change every "
                "call. Edit the modules around it, or give each call a module of its own."
            )

    def _count(self, path: str) -> int:
        assert self.calls is not None
        module = self.module(path)
        return max((len(self.calls.of(name)) for name in {path, *self.names_of(module)}), default=0)

    def call(self, path: str) -> CallSpec | None:
        """The first call of a module, if known."""
        if self.calls is None:
            return None
        for name in dict.fromkeys((path, *self.names_of(self.module(path)))):
            for call in self.calls.of(name):
                return call
        return None

    def other_reader(self, path: str, name: str) -> str | None:
        """A module whose forward reads a tensor of another one."""
        readers = () if self.calls is None else self.calls.readers(f"{path}.{name}")
        return next((repr(reader) if reader else "the model's own forward" for reader in readers), None)

    def run_around(self, path: str) -> Run | None:
        """A recorded run of the module around another one, if it can be called again."""
        around = path.rpartition(".")[0]
        while EDITS in around.split("."):
            around = around.rpartition(".")[0]
        call = self.call(around)
        while around and (call is None or not call.repeatable):
            around = around.rpartition(".")[0]
            call = self.call(around)
        if call is None or not call.repeatable:
            return None
        return self._recorded(around, *pytree.tree_map(_stand_in, (call.args, call.kwargs)))

    def run_of_all(self, path: str = "") -> Run | None:
        """A recorded run of the model, whichever module it is wanted for, if its inputs are known."""
        return None if self.batch is None else self._recorded("", *self.batch)

    def _recorded(self, path: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Run | None:
        """A recorded run of a module as it is, remembered until something is changed; ``None`` where it fails."""
        if path not in self._runs:
            try:
                self._runs[path] = lightest_run(self.module(path) if path else self.model, args, kwargs)[0]
            except ConversionError:
                self._runs[path] = None
        return self._runs[path]

    @functools.cached_property
    def batch(self) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Arguments to run the model on, if known."""
        return known_inputs(self.model, self.given)

    @property
    def inputs(self) -> Any:
        """Those arguments as :func:`esper_elastic.elasticize` takes example inputs.

        Raises:
            TopologyError: none are known.
        """
        if self.batch is None:
            raise TopologyError(
                f"{type(self.model).__name__}: which layers depend on each other is not known without an input of the model. "
                "Give ModelSurgeon example_inputs."
            )
        args, kwargs = self.batch
        if not (args and kwargs):
            return kwargs or args
        return dict(inspect.signature(self.model.forward).bind(*args, **kwargs).arguments)

    def to_journal(self) -> dict[str, Any]:
        """What a journal has to say so that the edit can be repeated."""
        data = None if self.batch is None else to_data(*self.batch)
        return ({} if data is None else {"inputs": data}) | ({"widths": self.widths} if self.elastic else {})

    def shape_in(self, path: str) -> tuple[int, ...] | None:
        """The shape of the first tensor that a module is called with, if known."""
        call = self.call(path)
        return None if call is None else first_shape((call.args, call.kwargs))

    def shape_out(self, path: str) -> tuple[int, ...] | None:
        """The shape of the first tensor that a module gives, if known."""
        call = self.call(path)
        return None if call is None else first_shape(call.result)

    # What is done

    def resize(self, tensor: str, axis: int, size: int, *, returned: bool = False) -> None:
        """Change the size of an axis of a parameter, of all that is coupled with it, and of what modules say of their sizes.

        Args:
            tensor: name of the parameter.
            axis: of it.
            size: that it is to have.
            returned: whether the model may return tensors of another size then.

        Raises:
            TopologyError: it cannot change, or not while the function is kept.
        """
        if self._touched:
            self.try_out()
        coupled = self._find(tensor, axis, size, returned)
        coupled.resize(size, preserve=self.preserve)
        if size < coupled.size:
            self.details["function_kept"] = False
        difference = (size - coupled.size) // coupled.multiple_of
        for binding in coupled.bindings:
            step = sum(inner for moves, inner in binding.stretches if moves)
            self.steps.append(f"{binding}: {abs(difference * step)} {'more' if difference > 0 else 'fewer'}")
        self.touch(coupled.scope)

    def _find(self, tensor: str, axis: int, size: int, returned: bool) -> widths.Coupled:
        try:
            coupled = widths.find(self.model, tensor, axis, self.inputs, size=size, returned=returned, calls=self.calls)
        except TopologyError as error:
            if not self.elastic:
                raise
            raise TopologyError(f"{error} Elastic layers follow their dims: ee.dims(model).") from error
        for binding in coupled.bindings:
            if isinstance(self.model.get_submodule(binding.path), ElasticLayer):
                raise TopologyError(
                    f"{tensor}[{axis}]: its size cannot change: the elastic layer {binding.path!r} would have to follow it, and follows "
                    "its dims alone. Resize those: ee.dims(model)."
                )
        return coupled

    def replace(self, layer: nn.Module, made: nn.Module) -> None:
        """Let a module take another one's place under each of its names, and in attributes that name it, alone or in a list or dict."""
        for module in self.model.modules():
            attributes = vars(module)
            for holder in (attributes, *(value for value in attributes.values() if isinstance(value, list | dict))):
                for key, value in list(holder.items() if isinstance(holder, dict) else enumerate(holder)):
                    if value is layer:
                        holder[key] = made

    def done(self, path: str, step: str) -> None:
        """Note a step; ``path`` is what the edit has made or changed, unless an earlier step has said so."""
        self.name = self.name or path
        self.steps.append(f"{path}: {step}" if path else step)

    def warn(self, message: str) -> None:
        """Note what could not be checked."""
        self.warnings.append(message)

    def touch(self, *paths: str) -> None:
        """Note modules in which, or in whose calls, something has changed."""
        self._touched.extend(paths)
        self._runs.clear()

    def try_out(self) -> None:
        """Run the smallest module that holds every change, on fake tensors, and those around it until one gives what it gave before.

        Raises:
            TopologyError: the code of the model does not take the change.
        """
        if self.calls is None:
            self.warn("no input of the model is known: the edit was not tried. Give ModelSurgeon example_inputs.")
            return
        outcome = smallest_closed(self.model, self._enclosing(), self.calls)
        if not outcome.decided:
            self.warn(f"the edit was not tried: {outcome.error}")
        elif not outcome.ok:
            raise TopologyError(f"after the edit the model fails: {outcome.error}")
        elif not outcome.same:
            self.details["function_kept"] = False
            self.warn(outcome.error)
        self.calls, self._touched = outcome.calls, []

    def _enclosing(self) -> str:
        """The path of the smallest module that holds all that was touched; what is inserted at a module counts as part of it."""
        touched = [path.split(".") if path else [] for path in self._touched]
        touched = [parts[: parts.index(EDITS)] if EDITS in parts else parts for parts in touched]
        common = touched[0] if touched else []
        for parts in touched[1:]:
            same = 0
            while same < min(len(common), len(parts)) and common[same] == parts[same]:
                same += 1
            common = common[:same]
        return ".".join(common)


def first_shape(specs: Any) -> tuple[int, ...] | None:
    """The shape of the first tensor in a tree of specs."""
    return next((leaf.shape for leaf in pytree.tree_leaves(specs) if isinstance(leaf, TensorSpec)), None)


def _stand_in(leaf: Any) -> Any:
    """A tensor of a spec, whose values nobody reads."""
    if not isinstance(leaf, TensorSpec):
        return leaf
    return torch.empty(leaf.shape, dtype=leaf.dtype, device=leaf.device)


def fake_shape(layer: nn.Module, shape: tuple[int, ...], **like: Any) -> tuple[int, ...]:
    """The shape that a layer gives for an input of a shape; nothing is computed.

    Raises:
        TopologyError: it does not take such an input.
    """
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    with quiet(), fake, torch.no_grad():
        tensors = {name: torch.empty_like(t) for name, t in (*layer.named_parameters(), *layer.named_buffers())}
        try:
            result = functional_call(layer, tensors, (torch.empty(shape, **like),))
        except Exception as error:
            raise TopologyError(f"{layer}: does not take an input of shape {shape}: {error}") from error
    if not isinstance(result, Tensor):
        raise TopologyError(f"{layer}: expected a layer that gives one tensor, got {type(result).__name__}.")
    return tuple(result.shape)
