"""Settings for every test: one thread, so that the suite runs beside itself, and one order of float operations."""

import os

import torch

torch.set_num_threads(1)

# Without a GPU, Triton's kernels run in its interpreter, which has to be said before they are defined.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
