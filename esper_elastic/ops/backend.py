"""Which backend serves an op: loads the compiled library if there is one, and keeps the reason if there is none."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
import warnings
from pathlib import Path
from typing import Any

import torch

from ..control import Replica
from ..errors import LayoutError

BACKENDS = ("auto", "reference", "native", "triton")


def _load_library() -> tuple[Any, str | None]:
    """Register the compiled ops; returns the library, or why there is none."""
    try:
        return importlib.import_module("esper_elastic._C"), None
    except ImportError as error:
        failure = Path(__file__).parents[1] / "_build_failure.txt"
        return None, failure.read_text().strip() if failure.exists() else f"the library was not built ({error})"


def _choice() -> str:
    chosen = os.environ.get("ESPER_ELASTIC_BACKEND", "auto")
    if chosen not in BACKENDS:
        raise ValueError(f"ESPER_ELASTIC_BACKEND: expected one of {', '.join(BACKENDS)}, got {chosen!r}.")
    return chosen


LIBRARY, LIBRARY_MISSING = _load_library()
CHOICE = _choice()
if hasattr(LIBRARY, "commit"):
    Replica.write_device = staticmethod(LIBRARY.commit)


def choose(device: torch.device, static: bool) -> str:
    """The backend for layers on ``device``: ``"native"``, ``"triton"`` or ``"reference"``.

    On the CPU, and on CUDA in compact layout, where widths are read on the host, compiled ops serve; Triton's kernels serve static layout.
    """
    if static and triton_wanted(device):
        missing = triton_missing(device)
        if missing is None:
            from . import triton  # noqa: F401  now rather than at the first forward, so that what counts or traces that one knows its ops

            return "triton"
        refuse_triton(f"layers on {device}", missing)
    if CHOICE != "reference" and LIBRARY_MISSING is None and (device.type in ("cpu", "meta") or (device.type == "cuda" and not static)):
        return "native"
    return "reference"


def triton_wanted(device: torch.device) -> bool:
    """Whether Triton's kernels are to serve ``device``, if they can: CUDA unless another backend was chosen, the CPU only if they were."""
    return CHOICE == "triton" and device.type != "meta" if device.type != "cuda" else CHOICE in ("auto", "triton")


@functools.cache
def triton_missing(device: torch.device) -> str | None:
    """Why Triton's kernels do not run on ``device``; ``None`` if they do."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if device.type == "cpu" and os.environ.get("TRITON_INTERPRET", "0") != "1":
        return "on the CPU they run in the interpreter alone: set TRITON_INTERPRET=1"
    if device.type not in ("cpu", "cuda") or (device.type == "cuda" and torch.version.hip is not None):
        return f"they run on NVIDIA's CUDA, not on {device.type if device.type != 'cuda' else 'HIP'}"
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0):
        return f"they need compute capability 8.0, and {torch.cuda.get_device_name(device)} has less"
    return None


@functools.cache
def refuse_triton(what: str, reason: str) -> None:
    """Say, once for each ``what``, that Triton's kernels do not serve it, and why.

    Raises:
        LayoutError: ``ESPER_ELASTIC_BACKEND`` asks for them.
    """
    message = f"esper_elastic: Triton's kernels do not serve {what}: {reason}."
    if CHOICE == "triton":
        raise LayoutError(f"{message} ESPER_ELASTIC_BACKEND=triton allows no other backend; unset it.")
    warnings.warn(f"{message} They run on the reference backend, whose widths no captured graph follows.", stacklevel=2)


def _home() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def backend_info() -> dict[str, Any]:
    """What serves the ops here, and why not more.

    Returns:
        ``choice`` (``ESPER_ELASTIC_BACKEND`` or ``"auto"``), ``backends`` (name -> ``True``, or why it is not available), the version
        of ``torch`` and the number of ``threads``.
    """
    return {
        "choice": CHOICE,
        "backends": {
            "reference": True,
            "native": True if LIBRARY_MISSING is None else LIBRARY_MISSING,
            "triton": triton_missing(_home()) or True,
        },
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
    }
