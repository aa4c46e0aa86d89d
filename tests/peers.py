"""What peers say of the same models: the coupled groups of Torch-Pruning, to hold the converter's dims against.

Source: Fang et al. 2023, "DepGraph: Towards Any Structural Pruning" (arXiv:2301.12900).
"""

import contextlib
import copy
import signal
import warnings
from collections.abc import Iterator
from typing import Any

import torch_pruning
from torch import nn
from torch_pruning.ops import OPTYPE


class EndlessError(Exception):
    """A peer has not come to an end in its time."""


GroupMember = tuple[str, str, list[int]]


def dependency_graph(model: nn.Module, example_inputs: Any) -> torch_pruning.DependencyGraph:
    """Torch-Pruning's graph of `model` itself, which it traces in eval mode and leaves in its own mode.

    Raises:
        Exception: whatever Torch-Pruning raises on a model that it does not understand.
    """
    modes = {module: module.training for module in model.modules()}
    arguments = example_inputs if isinstance(example_inputs, dict | tuple) else (example_inputs,)
    try:
        with warnings.catch_warnings(action="ignore"):
            return torch_pruning.DependencyGraph().build_dependency(model, arguments, verbose=False)
    finally:
        for module, mode in modes.items():
            module.training = mode


def pruned_by_torch_pruning(
    model: nn.Module, example_inputs: Any, layer_path: str, out_channel_indices: list[int]
) -> tuple[nn.Module, list[GroupMember]]:
    """Remove output channels of one layer, and all that is coupled to them, from a copy of `model`.

    Args:
        model: left as it is.
        example_inputs: a tensor, a tuple or a dict.
        layer_path: the layer whose output channels go.
        out_channel_indices: which of them.

    Effects:
        Torch-Pruning 1.6.1 does not come to an end on a dim that is sliced and concatenated again: the projections of Llama's queries, keys
        and values, whose heads are rotated so, and the case `select_channels`.

    Raises:
        ValueError: the indices would leave a member of the group without a unit, or the layer took no part in the trace.

    Returns:
        The pruned copy, and the group: each layer's path, the side that is cut ("in" or "out"; "out" for norms and for bare parameters,
        which stand under their own path), and the sorted indices on that side. Concatenations and other functions are left out.
    """
    pruned = copy.deepcopy(model)
    graph = dependency_graph(pruned, example_inputs)
    layer = pruned.get_submodule(layer_path)
    group = graph.get_pruning_group(layer, graph.get_pruner_of_module(layer).prune_out_channels, list(out_channel_indices))
    paths = {module: path for path, module in pruned.named_modules()}
    members = []
    for dependency, indices in group:
        target = dependency.target
        if target.type == OPTYPE.PARAMETER:
            members.append((graph._param_to_name[target.module], "out", sorted(indices)))
        elif target.module in paths:
            side = "out" if graph.is_out_channel_pruning_fn(dependency.handler) else "in"
            members.append((paths[target.module], side, sorted(indices)))
    if not graph.check_pruning_group(group):
        raise ValueError(f"{layer_path}: Torch-Pruning would leave no unit in a member of the group: {members}")
    group.prune()
    return pruned, sorted(members)


@contextlib.contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Interrupt Python code that goes on for longer; in the main thread, and where nothing else uses the alarm.

    Raises:
        EndlessError: the time is over.
    """

    def stop(*_: Any) -> None:
        raise EndlessError(f"does not come to an end in {seconds:g} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
