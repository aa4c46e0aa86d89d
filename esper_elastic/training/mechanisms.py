"""How a decision is served: by metadata where that can do it, else by the surgeon. Found without changing anything.

Whether it may happen is asked before, in ``safety.py``.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch import nn

from ..errors import DecisionError
from ..model import known
from ..surgery import ModelSurgeon
from ..surgery.edits.holder import edits_inside
from ..surgery.edits.skip import Skip
from .cost import of_switch
from .decisions import AdaptationDecision
from .names import find, paths_of, unknown
from .step import Mechanism, NeedsCommit, Step, require_only
from .surgery_steps import add_layer, add_skip, modify_layer, remove_layer, remove_skip
from .width_steps import width_step

__all__ = ["Mechanism", "NeedsCommit", "Step", "step_for"]


def step_for(decision: AdaptationDecision, model: nn.Module, surgeon: ModelSurgeon) -> Step:
    """How ``decision`` would be served on ``model`` as it is now, earlier changes of an open batch included.

    Raises:
        DecisionError: it names what the model does not have, or parameters that it cannot take.
        CapacityError: a dim cannot take the width.
        NeedsCommit: what is staged has to be published first.
    """
    return _STEPS[decision.adaptation_type](decision, model, surgeon)


def _switch(decision: AdaptationDecision, model: nn.Module, surgeon: ModelSurgeon) -> Step:
    assert decision.layer_name is not None
    require_only(decision, set())
    _, blocks = known(model)
    name = find(decision.layer_name, blocks, "block")
    if name is None:
        if decision.layer_name in paths_of(model):
            raise DecisionError(
                f"decision: {decision}: {decision.layer_name} has no switch. Put it into an ee.ElasticBlock, or remove it (remove_layer)."
            )
        unknown(decision.layer_name, blocks, "block")
    switch, on = blocks[name].switch, decision.adaptation_type == "enable"
    if not on and any(edits.taps for edits in edits_inside(blocks[name].inside)):
        _require_no_skip_out(decision, name, model)

    def carry_out() -> dict[str, Any]:
        before = bool(switch.staged)
        switch.set(on)
        return {"name": name, "from": before, "to": on}

    direction = on - bool(switch.staged)
    return Step(decision, "metadata", name, carry_out, direction, functools.partial(of_switch, model, switch, on))


def _require_no_skip_out(decision: AdaptationDecision, block: str, model: nn.Module) -> None:
    """Refuse to switch off what a skip takes its input from: the skip would find none."""
    inside = f"{block}."
    for path, module in paths_of(model).items():
        if isinstance(module, Skip) and module.source.startswith(inside) and not path.startswith(inside):
            raise DecisionError(
                f"decision: {decision}: {module.source} inside is where the skip {path} begins, which would find no input while the block "
                f"is off. Remove the skip first (remove_skip_connection)."
            )


_STEPS: dict[str, Callable[[AdaptationDecision, nn.Module, ModelSurgeon], Step]] = {
    "resize": width_step,
    "grow": width_step,
    "prune": width_step,
    "enable": _switch,
    "disable": _switch,
    "add_layer": add_layer,
    "remove_layer": remove_layer,
    "modify_layer": modify_layer,
    "add_skip_connection": add_skip,
    "remove_skip_connection": remove_skip,
}
