"""``guard``: lets an optimizer of ``torch.optim`` serve elastic parameters, by showing it nothing but what is active.

For the time of a step the parameters of its groups are replaced by views of their active slices, with views of gradient and state, and
those under a switch that is off are left out. Whatever the rule is then computes on active elements alone. State lives at capacity in
``optimizer.state[parameter]`` in between. The fused kernels of torch are not used: they write outside a strided slice.

How an optimizer lays out its state is found by a *probe*: one step of a twin on a small stand-in of zeros.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.optim import LBFGS, Optimizer, SparseAdam

from ..control import Runs
from ..errors import OptimizerError
from ..followers import follow, follows
from ..layers import registry
from ..ops.reference import take
from .counts import StepCounts, is_dense

O = TypeVar("O", bound=Optimizer)

_REFUSED = {
    LBFGS: "its direction is one product over all parameters at once, and its history has no parameter shape",
    SparseAdam: "it takes sparse gradients only, and elastic layers have dense ones",
}


def guard(optimizer: O, model: nn.Module) -> O:
    """Let ``optimizer`` step only what is active in ``model``; in place, and harmless when repeated.

    Args:
        optimizer: any of ``torch.optim`` but LBFGS and SparseAdam, or another that keeps per parameter nothing but state of its shape, of
            that shape with axes of size 1, and numbers.
        model: that holds the parameters.

    Returns:
        The same object. Schedulers, hooks, closures, ``state_dict``, gradient scalers, copies and pickles go on working.

    Effects: its class becomes a subclass of what it was; fused kernels are off.

    Raises:
        OptimizerError: the optimizer cannot be served; nothing has changed.
    """
    label = type(optimizer).__name__
    if not isinstance(optimizer, Optimizer):
        raise OptimizerError(f"guard: expected a torch.optim.Optimizer, got {label}.")
    if follows(optimizer):
        return optimizer
    for refused, reason in _REFUSED.items():
        if isinstance(optimizer, refused):
            raise OptimizerError(f"guard: cannot serve {label}: {reason}. Use ee.optim.AdamW or another optimizer.")
    if optimizer.defaults.get("differentiable") or any(group.get("differentiable") for group in optimizer.param_groups):
        raise OptimizerError(f"guard: cannot serve {label} with differentiable=True: it steps detached views. Build it without.")
    own = {id(param) for param in model.parameters()}
    if not any(id(param) in own for group in optimizer.param_groups for param in group["params"]):
        raise OptimizerError(
            f"guard: expected {label} to hold parameters of the model, got none. Build it from model.parameters(), "
            "after the model became elastic."
        )
    tracked = vars(optimizer).get("step")
    if tracked is not None and not hasattr(tracked, "_wrapped_by_lr_sched"):
        raise OptimizerError(f"guard: cannot serve {label}: its step was replaced on the instance. Guard it first, then wrap it.")
    _require_layout(optimizer, label)
    optimizer.__class__ = _guarded_class(type(optimizer))
    vars(optimizer).pop("_step_supports_amp_scaling", None)
    if tracked is not None:
        _track(optimizer)
    follow(optimizer)
    return optimizer


def widen_state(optimizer: Optimizer, param: Tensor, shape: tuple[int, ...], write: Callable[[Tensor, Tensor], None]) -> None:
    """Let the state of a parameter have the parameter's present shape, where it had ``shape``.

    Args:
        optimizer: that holds it, guarded or yet to be.
        param: the parameter.
        shape: that it had.
        write: copies a tensor of that shape, or with axes of size 1, into the active part of one that has the present shape there.

    Raises:
        OptimizerError: how the optimizer lays out its state cannot be found; nothing has changed.
    """
    kept = optimizer.state.get(param)
    if not kept:
        return
    layout = state_layout(optimizer, param)
    ours = follows(optimizer) and not isinstance(optimizer, _Guarded)
    for name, value in list(kept.items()):
        if ours and name == "step" and not is_dense(value, shape):  # of a length of its own, which may be that of the parameter by chance
            kept[name] = StepCounts.unpack(value, shape).moved(param.shape, write).packed
            continue
        known = layout.get(name)
        axes = tracked_axes(value, shape) if known is None else known.axes
        if axes and value.shape == tuple(size if axis in axes else 1 for axis, size in enumerate(shape)):
            made = value.new_zeros([size if axis in axes else 1 for axis, size in enumerate(param.shape)])
            if known is not None and known.initial is not None:
                made.copy_(known.initial)
            write(made, value)
            kept[name] = made


def state_layout(optimizer: Optimizer, param: Tensor) -> dict[str, _Layout]:
    """How ``optimizer`` lays out the state of ``param``, by names; empty for ours, whose state has the parameter's shape.

    Raises:
        OptimizerError: part of it is of a shape that has nothing to do with units.
    """
    if follows(optimizer) and not isinstance(optimizer, _Guarded):
        return {}
    group = next((group for group in optimizer.param_groups if any(other is param for other in group["params"])), None)
    return {} if group is None else _layout_of(optimizer, group, param, type(optimizer).__name__)


class _Guarded:
    """What a guarded optimizer does instead of its class; mixed in before that class."""

    _plain: type[Optimizer]
    state: defaultdict[Tensor, Any]
    param_groups: list[dict[str, Any]]

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update the active elements of every parameter that has a gradient, by the rule of the class.

        Raises:
            OptimizerError: a gradient of a partly dormant parameter is sparse; nothing has changed.
        """
        arguments: tuple[Any, ...] = ()
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
            arguments = (lambda: loss,)
        with self._only_active():
            return _rule(self._plain)(self, *arguments)

    @contextlib.contextmanager
    def _only_active(self) -> Iterator[None]:
        """Replace parameters and state by active views; carry what the body made of them back at its end."""
        slices: list[_Slice] = []
        shown: list[list[Tensor]] = []
        for group in self.param_groups:
            shown.append([])
            for param in group["params"]:
                known = registry.lookup(param)
                if param.grad is None or (known is not None and known.asleep):
                    continue
                runs = () if known is None else known.runs(param.shape)
                if all(run == [(0, size)] for run, size in zip(runs, param.shape, strict=known is not None)):
                    shown[-1].append(param)
                    continue
                slices.append(_Slice(param, runs, self.state.get(param, {}), group))
                shown[-1].append(slices[-1].view)
        state, originals = self.state, [dict(group) for group in self.param_groups]
        self.state = defaultdict(dict)
        self.state.update((param, state[param]) for params in shown for param in params if param in state)
        self.state.update((part.view, part.state) for part in slices if part.state)
        try:
            for group, params in zip(self.param_groups, shown, strict=True):
                group["params"] = params
                if group.get("fused"):
                    group["fused"] = False
            yield
        finally:
            stepped, self.state = self.state, state
            for group, original in zip(self.param_groups, originals, strict=True):
                group["params"] = original["params"]
                if "fused" in original:
                    group["fused"] = original["fused"]
        views = {id(part.view) for part in slices}
        self.state.update((param, kept) for param, kept in stepped.items() if id(param) not in views)
        for part in slices:
            if part.view in stepped:
                part.carry_back(self.state[part.param], stepped[part.view], self)
            elif part.copied:
                part.put(part.param, part.view)

    @torch.no_grad()
    def permute_state(self, param: Tensor, axis: int, order: Tensor) -> None:
        for tensor in self.state.get(param, {}).values():
            if axis in tracked_axes(tensor, param.shape):
                tensor.copy_(tensor.index_select(axis, order.to(tensor.device)))

    @torch.no_grad()
    def reset_state(self, param: Tensor, axis: int, start: int, stop: int) -> None:
        kept = self.state.get(param)
        if not kept:
            return
        group = next(group for group in self.param_groups if any(other is param for other in group["params"]))
        layout = _probe(self, group, param)
        for name, tensor in kept.items():
            if axis in tracked_axes(tensor, param.shape):
                part = tensor.narrow(axis, start, stop - start)
                if name in layout and layout[name].initial is not None:
                    part.copy_(layout[name].initial)
                else:
                    part.zero_()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[misc]
        follow(self)  # type: ignore[arg-type]

    def __reduce__(self) -> Any:
        return _revive, (self._plain,), self.__getstate__()


class _Slice:
    """The active slice of one parameter during a step.

    Attributes:
        view: the slice, with the slice of the gradient; a copy where an axis has several runs.
        state: the slices of the state tensors.
    """

    def __init__(self, param: Tensor, runs: tuple[Runs, ...], kept: dict[str, Any], group: dict[str, Any]) -> None:
        if param.grad is not None and param.grad.layout != torch.strided:
            raise OptimizerError(
                f"guard: a parameter of shape {tuple(param.shape)}: expected a dense gradient, got {param.grad.layout}. "
                "Build the layer that it belongs to with sparse=False."
            )
        self.param, self.runs, self.group = param, runs, group
        self.copied = any(len(run) > 1 for run in runs)
        self.view = self.take(param.detach())
        self.view.grad = None if param.grad is None else self.take(param.grad)
        self.state = {name: self.take(value) if tracked_axes(value, param.shape) else value for name, value in kept.items()}
        self.shown = dict(self.state)

    def take(self, tensor: Tensor) -> Tensor:
        """The active part of ``tensor``, whose axes are those of the parameter or have size 1."""
        for axis in tracked_axes(tensor, self.param.shape):
            tensor = take(tensor, axis, self.runs[axis])
        return tensor

    def put(self, tensor: Tensor, part: Tensor) -> None:
        """The inverse of :meth:`take`, in place."""
        pieces = [(tensor.detach(), part.detach())]
        for axis in tracked_axes(tensor, self.param.shape):
            lengths = [length for _, length in self.runs[axis]]
            pieces = [
                (target.narrow(axis, start, length), source)
                for target, whole in pieces
                for (start, length), source in zip(self.runs[axis], whole.split(lengths, axis), strict=True)
            ]
        for target, source in pieces:
            target.copy_(source)

    def carry_back(self, kept: dict[str, Any], stepped: dict[str, Any], optimizer: Any) -> None:
        """Write what a step left in the slice into the parameter and its state ``kept`` at capacity; allocate what is new."""
        if self.copied:
            self.put(self.param, self.view)
        layout: dict[str, _Layout] | None = None
        for name, value in stepped.items():
            present = kept.get(name)
            if isinstance(present, Tensor) and tracked_axes(present, self.param.shape):
                if self.copied or value is not self.shown[name]:
                    self.put(present, value)
                continue
            if isinstance(value, Tensor) and value.dim() == self.param.dim() > 0:
                layout = _probe(optimizer, self.group, self.param) if layout is None else layout
                axes, initial = layout.get(name, _Layout((), None))
                if axes:
                    shape = [size if axis in axes else 1 for axis, size in enumerate(self.param.shape)]
                    whole = torch.zeros_like(self.param, dtype=value.dtype) if len(axes) == len(shape) else value.new_zeros(shape)
                    if initial is not None:
                        whole.copy_(initial)
                    self.put(whole, value)
                    value = whole
            kept[name] = value
        for name in kept.keys() - stepped.keys():
            del kept[name]


class _Layout(NamedTuple):
    """Which axes of the parameter a state tensor has, and its value before the first step where that is the same for all elements."""

    axes: tuple[int, ...]
    initial: Tensor | None


def tracked_axes(value: Any, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The axes of a parameter of ``shape`` that a state tensor has too; none if it is not that shape, with some axes of size 1."""
    if not isinstance(value, Tensor) or value.dim() != len(shape):
        return ()
    if not all(size in (1, whole) for size, whole in zip(value.shape, shape, strict=True)):
        return ()
    return tuple(axis for axis, size in enumerate(value.shape) if size == shape[axis])


def _probe(optimizer: Any, group: dict[str, Any], param: Tensor) -> dict[str, _Layout]:
    """What state one step of a twin leaves on a stand-in of zeros, whose sizes all differ."""
    shape = tuple(range(2, 2 + param.dim()))
    stand_in = torch.zeros(shape, dtype=param.dtype, device=param.device)
    stand_in.grad = torch.zeros_like(stand_in)
    plain: Any = getattr(optimizer, "_plain", type(optimizer))
    twin: Any = plain.__new__(plain)
    vars(twin).update(vars(optimizer), state=defaultdict(dict), param_groups=[{**group, "params": [stand_in]}])
    if group.get("fused"):
        twin.param_groups[0]["fused"] = False
    with contextlib.ExitStack() as end:
        end.callback(torch.set_rng_state, torch.get_rng_state())
        try:
            _rule(plain)(twin)
        except KeyError:
            twin.state[stand_in] = _state_before_any_step(plain, group, stand_in)
            _rule(plain)(twin)
    layout = {}
    for name, value in twin.state[stand_in].items():
        axes = tracked_axes(value, shape)
        if isinstance(value, Tensor) and value.numel() > 1 and not axes:
            raise OptimizerError(
                f"state {name!r} of a parameter of shape {shape} has shape {tuple(value.shape)}, of which no part belongs to a unit"
            )
        if axes:
            layout[name] = _Layout(axes, value.flatten()[0].detach())
    return layout


def _state_before_any_step(plain: type[Optimizer], group: dict[str, Any], param: Tensor) -> dict[str, Any]:
    """What the constructor of a class gives a parameter, as that of Adagrad did in torch 2.11, whose step expects it."""
    accepted = inspect.signature(plain).parameters.keys() - {"params"}
    return plain([param], **{name: value for name, value in group.items() if name in accepted}).state[param]


def _require_layout(optimizer: Optimizer, label: str) -> None:
    """Refuse an optimizer whose state no slice can be taken of, or that cannot step a parameter it was not built with."""
    tried = set()
    for number, group in enumerate(optimizer.param_groups):
        for param in group["params"]:
            kind = (number, param.dim(), param.dtype, param.device)
            if registry.lookup(param) is None or kind in tried:
                continue
            tried.add(kind)
            _layout_of(optimizer, group, param, label)


def _layout_of(optimizer: Optimizer, group: dict[str, Any], param: Tensor, label: str) -> dict[str, _Layout]:
    try:
        return _probe(optimizer, group, param)
    except Exception as error:
        raise OptimizerError(f"guard: cannot serve {label}: {error}. Use ee.optim.AdamW or another optimizer.") from error


def _rule(plain: type[Optimizer]) -> Callable[..., Any]:
    """The step of a class without the hooks around it, which fire around the guarded step."""
    step = plain.step
    rule: Callable[..., Any] = getattr(step, "__wrapped__", step) if getattr(step, "hooked", False) else step
    return rule


_classes: dict[type[Any], type[Any]] = {}


def _guarded_class(plain: type[Any]) -> type[Any]:
    if plain not in _classes:
        step: Any = Optimizer.profile_hook_step(_Guarded.step)
        step.hooked = True
        names = {"__module__": plain.__module__, "__qualname__": plain.__qualname__, "__doc__": plain.__doc__}
        _classes[plain] = type(plain.__name__, (_Guarded, plain), {**names, "_plain": plain, "step": step})
    return _classes[plain]


def _revive(plain: type[Optimizer]) -> Any:
    guarded: Any = _guarded_class(plain)
    return guarded.__new__(guarded)


def _track(optimizer: Any) -> None:
    """Renew what a scheduler had put around the step to see that it is called: it holds the step of the former class."""
    reference, step = weakref.ref(optimizer), type(optimizer).step

    @functools.wraps(step)
    def tracked(*args: Any, **kwargs: Any) -> Any:
        here: Any = reference()
        here._opt_called = True
        return step(here, *args, **kwargs)

    tracked._wrapped_by_lr_sched = True  # type: ignore[attr-defined]
    optimizer.step = tracked
