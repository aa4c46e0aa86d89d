"""Settings for every test: one thread, so that the suite runs beside itself, and one order of float operations."""

import gc
import importlib.util
import os
from typing import Any

import torch
from interpreter import compute_integers_once, patch_language_once, round_as_hardware_does

torch.set_num_threads(1)
# `make test-gpu` runs the contract of the layers on the GPU.
if "ESPER_ELASTIC_TEST_DEVICE" in os.environ:
    torch.set_default_device(os.environ["ESPER_ELASTIC_TEST_DEVICE"])

# Without a GPU, Triton's kernels run in its interpreter, which has to be said before they are defined.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
    if importlib.util.find_spec("triton") is not None:
        round_as_hardware_does()
        patch_language_once()
        compute_integers_once()


def pytest_collection_finish(session: Any) -> None:
    """Take what is imported out of the garbage collector's sight, which looked through all of it again and again, a tenth of the time."""
    gc.collect()
    gc.freeze()
