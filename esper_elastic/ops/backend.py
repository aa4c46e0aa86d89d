"""Which backend serves an op: loads the compiled library if there is one, and keeps the reason if there is none."""

from __future__ import annotations

import importlib
import os
from pathlib import Path
from typing import Any

import torch

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


def native_serves(device: torch.device, static: bool) -> bool:
    """Whether the compiled ops serve layers on ``device``: on the CPU always, on CUDA where widths are read on the host."""
    if LIBRARY_MISSING is not None or CHOICE == "reference":
        return False
    return device.type in ("cpu", "meta") or (device.type == "cuda" and not static)


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
            "triton": "not part of this version",
        },
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
    }
