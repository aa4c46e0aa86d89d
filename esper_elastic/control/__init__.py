"""Widths as data: the only writer of widths and switches."""

from .block import ControlBlock, Entry, Switch, exact_int, of_fixed_shape
from .dims import Axis, Binding, DerivedAxis, ElasticDim, Runs, Segment, concat, install_verb, segments_at, set_capacity
from .replica import Replica, keep_for_graphs

__all__ = [
    "Axis",
    "Binding",
    "ControlBlock",
    "DerivedAxis",
    "ElasticDim",
    "Entry",
    "Replica",
    "Runs",
    "Segment",
    "Switch",
    "concat",
    "exact_int",
    "install_verb",
    "keep_for_graphs",
    "of_fixed_shape",
    "segments_at",
    "set_capacity",
]
