"""Settings for every test: one thread, so that the suite runs beside itself, and one order of float operations."""

import torch

torch.set_num_threads(1)
