"""Whether gradients reach every parameter: a real forward and backward pass of the model's twin, which holds copies of its tensors.

The model is not written to at all, so that nothing need be put back. What looks wrong has to look so again for other inputs and with every
parameter moved a little: a gradient that is zero behind a zero-initialised layer or gate, or behind units that happen to be dead, appears
then.
"""

from __future__ import annotations

import contextlib
import dataclasses
import statistics
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..convert.restore import generators_kept
from ..convert.trace import eager, tensors_in
from ..layers import registry
from .trial.calls import Calls
from .trial.inputs import Inputs
from .trial.recording import attempt, with_autograd
from .trial.twins import Twins

VANISHED = 1e-12  # of the median layer's norm
EXPLODED = 1e6
_BATCH = 4
_AGAIN = 5  # passes that have to find again what one found
_LOW = (torch.float16, torch.bfloat16)


@dataclasses.dataclass
class Pass:
    """What one forward and backward pass showed.

    Attributes:
        gradients: name of a trainable parameter -> its gradient, ``None`` where none came.
        error: why the pass failed; ``""`` if it did not.
        finite: whether the outputs were.
        infinite: the first module that gave a value that is not finite from finite ones, where it was looked for.
    """

    gradients: dict[str, Tensor | None]
    error: str = ""
    finite: bool = True
    infinite: str | None = None


def gradient_errors(model: nn.Module, inputs: Inputs, calls: Calls | None) -> tuple[list[str], list[str]]:
    """Errors and warnings of one pass; a second one, elsewhere, confirms what looks wrong."""
    args, kwargs = _of_few(model, inputs)
    first = _run(model, args, kwargs, seed=0)
    if not first.error and not first.finite:
        first = _run(model, args, kwargs, seed=0, locate=True)
        return [f"{first.infinite or 'the model'}: its output is not finite: the layer explodes."], []
    if first.error:
        return [first.error], []
    asleep = _asleep(model)
    trained = {name: grad for name, grad in first.gradients.items() if name not in asleep}
    errors, notes = _missing(trained, calls)
    errors += [f"{name}: its gradient is not finite." for name, grad in trained.items() if grad is not None and not _finite(grad)]
    layers = _by_layer(trained)
    suspects = _suspects(layers)
    for seed in range(1, 1 + _AGAIN):
        if not suspects:
            break
        again = _by_layer(_run(model, args, kwargs, seed=seed, nudge=True).gradients)
        confirmed = _suspects({path: again[path] for path in layers if path in again})
        suspects = {path: said for path, said in suspects.items() if confirmed.get(path, ("",))[0] == said[0]}
    for kind, sentence in suspects.values():  # code that decides by values may leave a layer out
        (notes if calls is None and kind == "vanished" else errors).append(sentence)
    return errors, notes


def _missing(gradients: dict[str, Tensor | None], calls: Calls | None) -> tuple[list[str], list[str]]:
    errors, notes = [], []
    for name, grad in gradients.items():
        if grad is not None:
            continue
        if calls is not None and name in calls.used:
            errors.append(f"{name}: trainable and used by the forward, but no gradient reaches it. Is something detached behind it?")
        else:
            notes.append(f"{name}: trainable, but no output depends on it: it gets no gradient.")
    return errors, notes


def _by_layer(gradients: dict[str, Tensor | None]) -> dict[str, float]:
    """The norm of the gradient of each module's own parameters."""
    squares: dict[str, float] = {}
    for name, grad in gradients.items():
        if grad is not None and _finite(grad):
            path = name.rpartition(".")[0]
            squares[path] = squares.get(path, 0.0) + float(grad.detach().abs().double().square().sum())
    return {path: square**0.5 for path, square in squares.items()}


def _suspects(layers: dict[str, float]) -> dict[str, tuple[str, str]]:
    """Layers whose gradient is out of proportion: path -> kind and sentence."""
    norms = [norm for norm in layers.values() if norm > 0]
    median = statistics.median(norms) if norms else 0.0
    found = {}
    for path, norm in layers.items():
        where = path or "the model"
        if norm <= VANISHED * median or norm == 0.0:
            found[path] = "vanished", f"{where}: its gradient vanishes: norm {norm:.1e}, median of the layers {median:.1e}."
        elif norm > EXPLODED * median:
            found[path] = "exploded", f"{where}: its gradient explodes: norm {norm:.1e}, median of the layers {median:.1e}."
    return found


def _run(model: nn.Module, args: Any, kwargs: Any, *, seed: int, nudge: bool = False, locate: bool = False) -> Pass:
    """One pass of a twin; ``nudge`` moves parameters and inputs, ``locate`` looks where values stop being finite."""
    generator = torch.Generator("cpu").manual_seed(seed)
    found = Pass({})
    innermost: list[tuple[BaseException, str]] = []
    stack: list[str] = []
    paths: dict[int, str] = {}

    def watch(twin: nn.Module, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        path = paths.get(id(twin), stack[-1] if stack else "")
        stack.append(path)
        try:
            result = call(*args, **kwargs)
        except Exception as error:
            if not innermost or innermost[-1][0] is not error:
                innermost.append((error, path))
            raise
        finally:
            stack.pop()
        if locate and found.infinite is None and not all(map(_finite, _floats(result))) and all(map(_finite, _floats((args, kwargs)))):
            found.infinite = path
        return result

    def stand_in(tensor: Tensor) -> Tensor:
        made = _in_full(tensor.detach()).clone()
        if nudge and isinstance(tensor, nn.Parameter) and made.is_floating_point():
            drawn = torch.randn(made.shape, generator=generator, device="cpu").to(made.device, made.dtype)
            made = torch.where(made == 0, 0.05 * drawn, made + _scale(made) * drawn)
        return nn.Parameter(made, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else made

    def input_of(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        made = _in_full(value.detach()).clone()
        if nudge and made.is_floating_point():
            drawn = torch.randn(made.shape, generator=generator, device="cpu").to(made.device, made.dtype)
            made = made + drawn
        return made.requires_grad_(value.requires_grad)

    with _untouched_generators(), with_autograd(True), warnings.catch_warnings(), eager():
        warnings.simplefilter("ignore")
        twin = Twins(stand_in, watch, copy_scripted=True).module(model)
        paths.update((id(module), path) for path, module in twin.named_modules())
        try:
            args, kwargs = pytree.tree_map(input_of, (args, kwargs))
            leaves = [(name, tensor) for name, tensor in twin.named_parameters() if tensor.requires_grad]
            outputs = [tensor for tensor in _floats(twin(*args, **kwargs)) if tensor.requires_grad]
            found.finite = all(map(_finite, outputs))
            terms = [(tensor * _direction(tensor, generator)).sum() / max(tensor.numel(), 1) ** 0.5 for tensor in outputs]
            if terms:
                torch.stack([term.real.float() for term in terms]).sum().backward()
        except Exception as error:
            path = innermost[-1][1] if innermost and innermost[-1][0] is error else ""
            found.error = f"{path or 'the model'}: fails on real tensors: {type(error).__name__}: {' '.join(str(error).split())[:300]}"
            return found
    found.gradients = {name: tensor.grad for name, tensor in leaves}
    return found


def _scale(values: Tensor) -> float:
    """By how much to move values: as much as they are large, vectors more; not so much that what is saturated or far off comes to life."""
    size = float(values.square().mean().sqrt()) if values.numel() else 0.0
    return min(size if values.dim() > 1 else 3 * size, 1.0)


def _in_full(tensor: Tensor) -> Tensor:
    """A tensor of half precision as one of single precision, whose range holds any gradient worth having."""
    return tensor.float() if tensor.dtype in _LOW else tensor


def _direction(tensor: Tensor, generator: torch.Generator) -> Tensor:
    """Weights for a sum of outputs: drawn, since a plain sum has no gradient behind a softmax or a norm."""
    return torch.randn(tensor.shape, generator=generator, device="cpu").to(tensor.device, tensor.dtype)


def _floats(tree: Any) -> Iterator[Tensor]:
    return (tensor for tensor in tensors_in(tree) if tensor.is_floating_point() or tensor.is_complex())


def _finite(tensor: Tensor) -> bool:
    values = tensor._values() if tensor.is_sparse else tensor
    return bool(values.detach().isfinite().all())


def _asleep(model: nn.Module) -> set[str]:
    """Names of the parameters under a switch that is off."""
    known = ((name, registry.lookup(parameter)) for name, parameter in model.named_parameters())
    return {name for name, axes in known if axes is not None and axes.asleep}


def _of_few(model: nn.Module, inputs: Inputs) -> Inputs:
    """The inputs with a batch of four, where it is larger and the model takes that: soon done."""
    tensors = [leaf for leaf in pytree.tree_leaves(inputs) if isinstance(leaf, Tensor)]
    sizes = {tensor.shape[0] if tensor.dim() else 0 for tensor in tensors}
    if len(sizes) != 1 or max(sizes) <= _BATCH:
        return inputs
    made: Inputs = pytree.tree_map(lambda leaf: leaf[:_BATCH] if isinstance(leaf, Tensor) else leaf, inputs)
    return made if attempt(model, *made, explain=False)[0] is not None else inputs


def _untouched_generators() -> contextlib.ExitStack:
    end = generators_kept()
    for device in range(torch.cuda.device_count() if torch.cuda.is_initialized() else 0):
        end.callback(torch.cuda.set_rng_state, torch.cuda.get_rng_state(device), device)
    return end
