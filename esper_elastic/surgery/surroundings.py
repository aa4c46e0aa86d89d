"""What runs of a model change beside it, for their time: modes of torch, hooks for all modules, warnings. A log puts these back as well.

An exception may arrive where a ``with`` ends, before the end is made. So all that surgery enters is noted when a transaction begins.
"""

from __future__ import annotations

import functools
import operator
import sys
import warnings
from collections import deque
from collections.abc import Callable
from typing import Any

import torch
from torch.nn.modules import module as module_hooks
from torch.overrides import _get_current_function_mode
from torch.utils import _python_dispatch as dispatch
from torch.utils._python_dispatch import _get_current_dispatch_mode

from ..convert.structure import forgetting_history
from ..convert.trace import LOGGER
from ..layers.state import call_under_way

_Call = Callable[[], Any]
_torch: Any = torch._C


def surroundings() -> list[_Call]:
    """Calls that end what has begun since, in the calling thread; none runs a line of this package."""
    calls: list[_Call] = [
        _ending(_get_current_function_mode, torch._C._len_torch_function_stack),
        _ending(_get_current_dispatch_mode, torch._C._len_torch_dispatch_stack),
        *_flags_of_modes(),
        functools.partial(_torch._set_torch_function_state, _torch._get_torch_function_state()),
        *(functools.partial(torch._C._dispatch_tls_set_dispatch_key_excluded, key, _is_excluded(key)) for key in _KEYS),
        functools.partial(torch._C._set_grad_enabled, torch.is_grad_enabled()),
        functools.partial(setattr, call_under_way, "inside", call_under_way.inside),
        forgetting_history,
        functools.partial(setattr, LOGGER, "disabled", LOGGER.disabled),
        *(functools.partial(setattr, warnings, name, getattr(warnings, name)) for name in _WARNINGS if hasattr(warnings, name)),
    ]
    if hasattr(warnings, "_filters_mutated"):
        calls.append(warnings._filters_mutated)
    frames = sys.modules.get("torch._dynamo.eval_frame")
    if frames is not None:
        calls.append(functools.partial(setattr, frames, "_stance", frames._stance))
    return calls


def _flags_of_modes() -> list[_Call]:
    """Modes keep flags of what was on before them, which are wrong once an outer one ends before an inner one."""
    calls: list[_Call] = [
        functools.partial(setattr, dispatch, name, value) for name, value in vars(dispatch).items() if name.startswith("_is_in_")
    ]
    calls.append(functools.partial(torch._C._set_only_lift_cpu_tensors, torch._C._only_lift_cpu_tensors()))
    if hasattr(dispatch, "set_is_in_mode_without_ignore_compile_internals"):
        compiled = dispatch._is_in_any_mode_without_ignore_compile_internals
        calls.append(functools.partial(dispatch.set_is_in_mode_without_ignore_compile_internals, compiled))
    return calls


#: What is left out while modes are not to see what runs.
_KEYS = ("Python", "PythonTLSSnapshot")
_is_excluded = torch._C._dispatch_tls_is_dispatch_key_excluded

#: What ``warnings.catch_warnings`` changes.
_WARNINGS = ("filters", "showwarning", "_showwarnmsg_impl")


def hooks_of_all_modules() -> list[dict[Any, Any]]:
    """Where torch keeps hooks that every module calls."""
    return [value for name, value in vars(module_hooks).items() if name.startswith("_global_") and isinstance(value, dict)]


def _ending(innermost: _Call, count: Callable[[], int]) -> _Call:
    """A call that leaves modes, the innermost first, until there are as many as now."""
    beyond = map(operator.itemgetter(1), zip(iter(count, count()), iter(innermost, None), strict=False))
    return functools.partial(deque, map(operator.methodcaller("__exit__", None, None, None), beyond), 0)
