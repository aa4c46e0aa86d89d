"""Widths as data: the only writer of widths and switches."""

from .block import ControlBlock, Entry, Switch, exact_int
from .dims import Axis, Binding, DerivedAxis, ElasticDim, Runs, Segment, concat, install_verb

__all__ = [
    "Axis",
    "Binding",
    "ControlBlock",
    "DerivedAxis",
    "ElasticDim",
    "Entry",
    "Runs",
    "Segment",
    "Switch",
    "concat",
    "exact_int",
    "install_verb",
]
