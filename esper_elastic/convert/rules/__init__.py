"""What each op says of the axes of its operands: which are the same units, which are regrouped, which can only stay as they are.

One rule per op, by its ATen name. A rule sets the axes of the outputs and unifies those of the inputs. An op without a rule makes every
axis that it touches rigid.
"""

from __future__ import annotations

from typing import Any

import torch

from . import images, lookups, norms, parts, products, reductions, views  # noqa: F401  each enters its rules in RULES
from .elementwise import pointwise
from .registry import RULES, Rule, Scope, argument, op_name, values

__all__ = ["RULES", "Rule", "Scope", "argument", "find", "op_name", "pointwise", "values"]


def find(op: Any) -> Rule | None:
    """The rule of an op, if there is one."""
    name = op_name(op)
    if name in RULES:
        return RULES[name]
    if name.startswith("_scaled_dot_product"):
        return products.attention
    if torch.Tag.pointwise in op.tags:
        return pointwise
    return None
