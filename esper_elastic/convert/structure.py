"""The index structure of tensor axes: what an axis is a product or a concatenation of, and which parts of two axes are one and the same.

An axis is a product of factors in row-major order; a factor is an :class:`Atom`, a size not known to have parts, or a :class:`Concat` of
axes laid end to end. ``()`` is an axis of size one. To :func:`unify` two axes is to say that equal indices of both mean the same unit.
It merges atoms, and refines them where one side has parts that the other has not: 64 channels viewed as 8 x 8 become a product, a
``chunk`` makes a concatenation. What cannot be expressed that way is made rigid, with the reason: the structure is never wrong, at worst
nothing in it can change size.

Source: unification as in Robinson, "A Machine-Oriented Logic Based on the Resolution Principle" (JACM 1965), with union-find.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any


class Atom:
    """A size without known parts, in a union-find forest; once refined it stands for an axis of finer atoms.

    Attributes:
        size: how many indices.
        rigid: why it cannot change size, or ``None``.
        compact_only: why it cannot change size in static layout, or ``None``.
        mixed: what makes one unit's results depend on the others, or ``None``.
        minimum: the smallest size that code is known to take as it takes this one.
    """

    __slots__ = ("compact_only", "minimum", "mixed", "parent", "rigid", "size", "value")

    def __init__(self, size: int, rigid: str | None = None) -> None:
        self.size = size
        self.rigid = rigid
        self.compact_only: str | None = None
        self.mixed: str | None = None
        self.minimum = 1
        self.parent: Atom | None = None
        self.value: Structure | None = None

    def root(self) -> Atom:
        """The atom that stands for this one's class."""
        atom = self
        while atom.parent is not None:
            atom = atom.parent
        return atom

    def note(self, **fields: Any) -> None:
        """Set attributes, in a way that :func:`undo` takes back."""
        for name, value in fields.items():
            _trail.append((self, name, getattr(self, name)))
            setattr(self, name, value)

    def __repr__(self) -> str:
        return f"Atom({self.size}{', rigid' if self.rigid else ''})"


_trail: list[tuple[Atom, str, Any]] = []


def mark() -> int:
    """A point in the history of all atoms, for :func:`undo`."""
    return len(_trail)


def undo(point: int) -> None:
    """Take back everything that was found out of any atom since ``point``."""
    while len(_trail) > point:
        atom, name, value = _trail.pop()
        setattr(atom, name, value)


def forget_history() -> None:
    """Drop what :func:`undo` would need."""
    _trail.clear()


#: The same as a call that runs no line of this package.
forgetting_history = _trail.clear


class Concat:
    """Axes laid end to end."""

    __slots__ = ("parts", "size")

    def __init__(self, parts: Iterable[Structure]) -> None:
        self.parts = tuple(parts)
        self.size = sum(size(part) for part in self.parts)

    def __repr__(self) -> str:
        return f"Concat{self.parts}"


Factor = Atom | Concat
Structure = tuple[Factor, ...]


def fresh(n: int, rigid: str | None = None) -> Structure:
    """The axis of an atom of its own; the one of size one has no parts to speak of."""
    return () if n == 1 else (Atom(n, rigid),)


def size(axis: Structure) -> int:
    """The number of indices of an axis."""
    return math.prod(factor.size for factor in axis)


def concat(parts: Iterable[Structure]) -> Structure:
    """The axis of ``parts`` laid end to end."""
    kept = [part for part in parts if size(part)]
    return kept[0] if len(kept) == 1 else (Concat(kept),)


def resolve(axis: Structure) -> Structure:
    """The axis with what is known of its atoms put in their places, outermost level only."""
    found: list[Factor] = []
    for factor in axis:
        if isinstance(factor, Atom):
            atom = factor.root()
            if atom.value is None:
                found.append(atom)
            else:
                found += resolve(atom.value)
        elif len(factor.parts) == 1:
            found += resolve(factor.parts[0])
        else:
            found.append(factor)
    return tuple(found)


def atoms(axis: Structure) -> Iterator[Atom]:
    """Every atom of an axis that has no parts."""
    for factor in resolve(axis):
        if isinstance(factor, Atom):
            yield factor
        else:
            for part in factor.parts:
                yield from atoms(part)


def stiffen(axis: Structure, reason: str) -> None:
    """Make an axis rigid throughout. The first reason given to an atom stays, here and below."""
    for atom in atoms(axis):
        if atom.rigid is None:
            atom.note(rigid=reason)


def restrict(axis: Structure, reason: str) -> None:
    """Note that an axis can change size in compact layout alone."""
    for atom in atoms(axis):
        if atom.compact_only is None:
            atom.note(compact_only=reason)


def mix(axis: Structure, reason: str) -> None:
    """Note that results which do not have the axis depend on all of its units."""
    for atom in atoms(axis):
        if atom.mixed is None:
            atom.note(mixed=reason)


def at_least(axis: Structure, minimum: int) -> None:
    """Note the smallest size that an axis can have."""
    for atom in atoms(axis):
        atom.note(minimum=max(atom.minimum, minimum))


def measure(axis: Structure, width: Callable[[Atom], int]) -> int:
    """The size of an axis when each atom has the size that ``width`` says."""
    return math.prod(
        width(factor) if isinstance(factor, Atom) else sum(measure(part, width) for part in factor.parts) for factor in resolve(axis)
    )


def unify(one: Structure, other: Structure, reason: str) -> None:
    """Equal indices of both axes are the same unit from now on. ``reason`` says of what cannot be expressed why it is rigid."""
    if size(one) != size(other):
        stiffen(one, reason)
        stiffen(other, reason)
        return
    left, right = list(resolve(one)), list(resolve(other))
    while left and right:
        a, b = left[0], right[0]
        if a is b:
            del left[0], right[0]
        elif a.size == b.size:
            del left[0], right[0]
            _unify_factors(a, b, reason)
        else:
            if a.size < b.size:
                left, right, a, b = right, left, b, a
            taken = None if a.size % b.size else _divide(a, tuple(right), reason)
            if taken is None:
                stiffen(tuple(left), reason)
                stiffen(tuple(right), reason)
                return
            if taken:
                del left[0], right[:taken]
        left, right = list(resolve(tuple(left))), list(resolve(tuple(right)))


def _unify_factors(a: Factor, b: Factor, reason: str) -> None:
    if isinstance(a, Atom) and isinstance(b, Atom):
        _merge(a, b)
    elif isinstance(a, Atom):
        _bind(a, (b,), reason)
    elif isinstance(b, Atom):
        _bind(b, (a,), reason)
    else:
        cuts = sorted({*_boundaries(a), *_boundaries(b)})
        pairs = zip(cut((a,), cuts, reason), cut((b,), cuts, reason), strict=True)
        for x, y in pairs:
            unify(x, y, reason)


def _merge(a: Atom, b: Atom) -> None:
    b.note(parent=a)
    _pass_on(b, (a,))


def _bind(atom: Atom, value: Structure, reason: str) -> None:
    """Say what an atom consists of. An atom inside its own parts would be of no finite size; then all of it is rigid."""
    if any(inside is atom for inside in atoms(value)):
        stiffen(value, reason)
        return
    atom.note(value=value)
    _pass_on(atom, value)


def _pass_on(atom: Atom, to: Structure) -> None:
    """What is known of an atom holds for what takes its place."""
    if atom.rigid is not None:
        stiffen(to, atom.rigid)
    if atom.compact_only is not None:
        restrict(to, atom.compact_only)
    if atom.mixed is not None:
        mix(to, atom.mixed)
    at_least(to, min(atom.minimum, 2))


def _divide(larger: Factor, others: Structure, reason: str) -> int | None:
    """Refine a factor by the first of ``others``, which is smaller and divides it.

    Returns:
        how many of ``others`` it has been unified with: none for an atom, which now has two factors to go on with. ``None``: no way.
    """
    first = others[0]
    inner = larger.size // first.size
    if isinstance(larger, Atom):
        _bind(larger, (Atom(first.size), Atom(inner)), reason)
        return 0
    rest: list[Factor] = []
    for factor in others[1:]:
        if math.prod(f.size for f in rest) >= inner:
            break
        rest.append(factor)
    if math.prod(f.size for f in rest) != inner or any(size(part) % inner for part in larger.parts):
        return None
    counts = [fresh(size(part) // inner) for part in larger.parts]
    for part, count in zip(larger.parts, counts, strict=True):
        unify(part, (*count, *rest), reason)
    if any(counts):
        unify((first,), (Concat(counts),), reason)
    else:
        stiffen((first,), "it counts parts that lie end to end")
    return 1 + len(rest)


def _boundaries(factor: Concat) -> list[int]:
    return list(itertools.accumulate(size(part) for part in factor.parts))


def cut(axis: Structure, ends: list[int], reason: str) -> list[Structure]:
    """The pieces of an axis that end at ``ends``, the last of which is its size. Atoms that a cut goes through are refined."""
    axis = resolve(axis)
    pieces: list[Structure] = []
    start = 0
    if len(ends) == 1:
        return [axis]
    first, inner = axis[0], axis[1:]
    step = size(inner)
    if any(end % step for end in ends):
        stiffen(axis, reason)
        return [fresh(b - a, reason) for a, b in itertools.pairwise([0, *ends])]
    if isinstance(first, Atom):
        parts = [fresh(length) for length in (b - a for a, b in itertools.pairwise([0, *(end // step for end in ends)]))]
        _bind(first, (Concat(parts),), reason)
        return [(*part, *inner) for part in parts]
    wanted = [end // step for end in ends]
    known = _boundaries(first)
    for part, low, high in zip(first.parts, [0, *known], known, strict=False):
        here = [end - low for end in wanted if low < end < high]
        pieces += cut(part, [*here, high - low], reason)
    every = sorted({*wanted, *known})
    found: list[Structure] = []
    for end in wanted:
        count = sum(start < e <= end for e in every)
        found.append((*concat(pieces[:count]), *inner))
        del pieces[:count]
        start = end
    return found
