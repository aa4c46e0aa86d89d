"""How often the units of a dim were born or moved, by which statistics of them know whether they still speak of the same units."""

from __future__ import annotations

from weakref import WeakKeyDictionary

from ..control import ElasticDim

_revisions: WeakKeyDictionary[ElasticDim, int] = WeakKeyDictionary()


def units_changed(dim: ElasticDim) -> None:
    """Take note that units of ``dim`` are born or move."""
    _revisions[dim] = _revisions.get(dim, 0) + 1


def stamp(dim: ElasticDim) -> tuple[int, int]:
    """What changes with the active units of ``dim``: their number and revision. It comes back with a width that ``resize`` brings back."""
    return dim.active, _revisions.get(dim, 0)
