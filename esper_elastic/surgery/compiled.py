"""What ``torch.compile`` knows of a model that is edited: names that lead through its wrappers, and code that it compiled before the edit.

Guards see every edit, and what was compiled for another structure is not used. But torch compiles a function for so many structures only,
and from then on runs it as written; an edited model has to be compiled at every edit.
"""

from __future__ import annotations

import sys

import torch
from torch import nn

from ..convert.restore import plain_modules
from .edits.edited import Edited

_WRAPPED = "_orig_mod"


def plain_path(path: str) -> str:
    """A path without the names of wrappers that ``torch.compile`` puts around modules."""
    return ".".join(name for name in path.split(".") if name != _WRAPPED)


def forget_compiled(model: nn.Module) -> None:
    """Let what was compiled of a model be compiled anew at its next call.

    That is the code of its modules' classes. Code that others run as well (what torch wraps its own modules in, functions that a break of
    the graph has made frames of their own) is compiled anew once half of its limit is reached.
    """
    frames, converted = sys.modules.get("torch._dynamo.eval_frame"), sys.modules.get("torch._dynamo.convert_frame")
    if frames is None or converted is None:
        return
    own = set()
    for kind in {type(module) for module in plain_modules(model)}:
        own |= {id(getattr(function, "__code__", None)) for function in (kind.forward, kind.__call__ if issubclass(kind, Edited) else None)}
    many = torch._dynamo.config.recompile_limit // 2
    for reference in list(converted.input_codes.seen):
        code = reference()
        if code is not None and (id(code) in own or len(frames._debug_get_cache_entry_list(code)) >= many):
            frames.reset_code(code)
