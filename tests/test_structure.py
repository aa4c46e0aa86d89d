"""The structure of axes against a model of it by brute force: the unit of every single index."""

import itertools
import random
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from esper_elastic.convert import structure
from esper_elastic.convert.structure import (
    Atom,
    Concat,
    Structure,
    at_least,
    atoms,
    concat,
    cut,
    forget_history,
    fresh,
    mark,
    measure,
    mix,
    resolve,
    restrict,
    size,
    stiffen,
    undo,
    unify,
)

WHY = "its indices are regrouped"
Label = tuple[tuple[Atom, int], ...]


@pytest.fixture(autouse=True)
def no_history_left() -> Iterator[None]:
    yield
    forget_history()


def labels(axis: Structure) -> list[Label]:
    """For every index of an axis, the units that it belongs to: one of each of its atoms, outermost first."""
    found: list[Label] = [()]
    for factor in resolve(axis):
        if isinstance(factor, Atom):
            own: list[Label] = [((factor, i),) for i in range(factor.size)]
        else:
            own = [label for part in factor.parts for label in labels(part)]
        found = [outer + inner for outer in found for inner in own]
    return found


def moving(axis: Structure) -> list[Label]:
    """The same for atoms that can change size."""
    return [tuple(unit for unit in label if unit[0].rigid is None) for label in labels(axis)]


def survivors(axis: Structure, widths: dict[Atom, int]) -> list[int]:
    """The indices left when atoms have other widths."""
    return [index for index, label in enumerate(labels(axis)) if all(unit < widths.get(atom, atom.size) for atom, unit in label)]


def narrow_widths(axes: list[Structure], seed: int) -> dict[Atom, int]:
    generator = random.Random(seed)
    return {atom: generator.randint(1, atom.size) for axis in axes for atom in atoms(axis) if atom.rigid is None}


def state_of(known: list[Atom]) -> list[tuple[object, ...]]:
    return [tuple(getattr(atom, name) for name in Atom.__slots__) for atom in known]


def every_atom(axis: Structure) -> Iterator[Atom]:
    """The atoms that an axis was written with, refined or not."""
    for factor in axis:
        if isinstance(factor, Atom):
            yield factor
        else:
            for part in factor.parts:
                yield from every_atom(part)


@st.composite
def axes_of(draw: st.DrawFn, n: int, pool: list[Structure], depth: int = 2) -> Structure:
    """An axis of ``n`` indices: an atom, new or from the pool, a product or a concatenation."""
    if n == 1:
        return ()
    known = [axis for axis in pool if size(axis) == n]
    kinds = ["atom"] + ["known"] * bool(known)
    divisors = [d for d in range(2, n) if n % d == 0]
    if depth:
        kinds += ["product"] * bool(divisors) + ["concat", "repeat"]
    kind = draw(st.sampled_from(kinds))
    if kind == "atom":
        pool.append(fresh(n))
        return pool[-1]
    if kind == "known":
        return draw(st.sampled_from(known))
    if kind == "product":
        outer = draw(st.sampled_from(divisors))
        return (*draw(axes_of(outer, pool, depth - 1)), *draw(axes_of(n // outer, pool, depth - 1)))
    if kind == "repeat" and divisors:
        count = draw(st.sampled_from(divisors))
        return concat([draw(axes_of(n // count, pool, depth - 1))] * count)
    first = draw(st.integers(1, n - 1))
    return concat([draw(axes_of(first, pool, depth - 1)), draw(axes_of(n - first, pool, depth - 1))])


@st.composite
def constraints(draw: st.DrawFn) -> tuple[list[tuple[Structure, Structure]], int]:
    """Pairs of axes that share atoms, and a seed for widths."""
    pool: list[Structure] = []
    pairs = []
    for _ in range(draw(st.integers(1, 4))):
        n = draw(st.sampled_from([2, 3, 4, 6, 8, 12]))
        other = n if draw(st.integers(0, 9)) else n + 1
        pairs.append((draw(axes_of(n, pool)), draw(axes_of(other, pool))))
    return pairs, draw(st.integers(0, 999))


@settings(max_examples=120, deadline=None)
@given(constraints())
def test_unified_axes_are_alike_in_every_unit_that_can_go(made):
    pairs, seed = made
    for one, other in pairs:
        unify(one, other, WHY)
    every = [axis for pair in pairs for axis in pair]
    widths = narrow_widths(every, seed)
    for one, other in pairs:
        if size(one) == size(other):
            assert moving(one) == moving(other)
            assert survivors(one, widths) == survivors(other, widths)
        else:
            assert all(atom.rigid for axis in (one, other) for atom in atoms(axis))
    for axis in every:
        assert size(resolve(axis)) == len(labels(axis)) == size(axis)
        assert measure(axis, lambda atom: widths.get(atom, atom.size)) == len(survivors(axis, widths))


@settings(max_examples=120, deadline=None)
@given(constraints(), st.integers(0, 3))
def test_undo_takes_back_everything(made, before):
    pairs, _ = made
    for one, other in pairs[:before]:
        unify(one, other, WHY)
    known = list({id(atom): atom for pair in pairs for axis in pair for atom in (*every_atom(axis), *atoms(axis))}.values())
    axes = [axis for pair in pairs for axis in pair]
    state, shown, point = state_of(known), [labels(axis) for axis in axes], mark()
    for one, other in pairs[before:]:
        unify(one, other, WHY)
    for axis in axes:
        cut(axis, sorted({1, size(axis)}), WHY)
        stiffen(axis, "a")
        restrict(axis, "b")
        mix(axis, "c")
        at_least(axis, 2)
    undo(point)
    assert state_of(known) == state
    assert [labels(axis) for axis in axes] == shown
    assert mark() == point


@settings(max_examples=120, deadline=None)
@given(st.data())
def test_pieces_of_a_cut_are_what_lies_between_its_ends(data):
    pool: list[Structure] = []
    axis = data.draw(axes_of(data.draw(st.sampled_from([4, 6, 12])), pool, 3))
    ends = sorted({*data.draw(st.lists(st.integers(1, size(axis)), max_size=3)), size(axis)})
    pieces = cut(axis, ends, WHY)
    assert [size(piece) for piece in pieces] == [b - a for a, b in itertools.pairwise([0, *ends])]
    assert [unit for piece in pieces for unit in moving(piece)] == moving(axis)


@settings(max_examples=80, deadline=None)
@given(constraints())
def test_what_is_known_of_atoms_is_never_lost(made):
    pairs, _ = made
    for one, _ in pairs:
        stiffen(one, "the first reason")
        restrict(one, "in compact alone")
        mix(one, "mixed")
        at_least(one, 2)
    for one, other in pairs:
        unify(one, other, WHY)
    for one, other in pairs:
        for atom in (*atoms(one), *(atoms(other) if size(one) == size(other) else ())):
            assert atom.rigid is not None
            if atom.rigid == "the first reason":  # one that is rigid for a reason of its own need not share what else is known
                assert (atom.compact_only, atom.mixed) == ("in compact alone", "mixed")
                assert atom.minimum >= 2


def test_equal_atoms_become_one():
    a, b, c = fresh(6), fresh(6), fresh(6)
    unify(a, b, WHY)
    unify(c, b, WHY)
    assert resolve(a) == resolve(b) == resolve(c)
    assert not any(atom.rigid for atom in atoms(a))


def test_an_atom_is_refined_by_a_product():
    channels, heads, width = fresh(24), fresh(4), fresh(6)
    unify(channels, (*heads, *width), WHY)
    assert resolve(channels) == resolve((*heads, *width))
    assert [factor.size for factor in resolve(channels)] == [4, 6]


def test_products_that_split_differently_stay():
    one, other = (*fresh(4), *fresh(6)), (*fresh(6), *fresh(4))
    unify(one, other, WHY)
    assert {atom.rigid for axis in (one, other) for atom in atoms(axis)} == {WHY}


def test_products_are_refined_together():
    one, other = (*fresh(2), *fresh(12)), (*fresh(8), *fresh(3))
    unify(one, other, WHY)
    assert [factor.size for factor in resolve(one)] == [2, 4, 3]
    assert resolve(one) == resolve(other)
    assert not any(atom.rigid for atom in atoms(one))


def test_a_concatenation_and_its_reverse_have_the_period_of_their_parts():
    a, b = fresh(4), fresh(6)
    unify(concat([a, b]), concat([b, a]), WHY)
    assert len({atom for axis in (a, b) for atom in atoms(axis)}) == 1
    assert labels(concat([a, b])) == labels(concat([b, a]))


def test_a_concatenation_of_one_axis_with_itself_is_a_product_of_copies():
    count, width, part = fresh(3), fresh(4), fresh(4)
    unify(concat([part] * 3), (*count, *width), WHY)
    assert resolve(part) == resolve(width)
    assert next(atoms(width)).rigid is None
    assert next(atoms(count)).rigid == "it counts parts that lie end to end"


def test_an_axis_that_would_contain_itself_stays():
    a, b = fresh(6), fresh(6)
    unify((*fresh(2), *a), concat([b, a]), WHY)
    unify((*a, *fresh(2)), concat([a, b]), WHY)
    assert {atom.rigid for atom in atoms(a)} != {None}


def test_a_cut_through_the_inside_of_units_stays():
    axis = (*fresh(3), *fresh(4))
    pieces = cut(axis, [6, 12], WHY)
    assert {atom.rigid for part in (axis, *pieces) for atom in atoms(part)} == {WHY}


def test_parts_without_indices_are_left_out():
    a = fresh(5)
    assert concat([fresh(0), a, fresh(0)]) == a
    assert isinstance(concat([a, fresh(2)])[0], Concat)
    assert fresh(1) == ()


def test_history_ends_where_it_is_forgotten():
    atom = Atom(3)
    atom.note(rigid="why")
    forget_history()
    undo(0)
    assert atom.rigid == "why"
    assert structure.mark() == 0
