"""Whether a model's own code goes along when dims change size: it is run on fake tensors at other widths, op by op beside the first run.

Axes say what every intermediate must measure. Where code gives something else, or fails, one of three things is tried, in this order: a
number that a module keeps as an attribute follows the axis whose size it was; two axes are tied whose sizes code takes for one; the dims
that run through the op are left as they are, with the line that keeps their size. What is found out in one module is tried at once in
all others of its class.
"""

from __future__ import annotations

import itertools
import random
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, NamedTuple

from torch import nn

from ..errors import ConversionError
from ..layers import ElasticView
from . import rules
from .axes import Axes, short
from .comparison import Comparison, Mismatch, kind
from .names import taken_name
from .sizes import known_sizes
from .structure import Atom, Concat, Structure, atoms, mark, measure, mix, resolve, restrict, size, stiffen, undo, unify
from .trace import Call, Example, Node, Run, Stop, Value, in_mode, line_of, run

#: A size that a module keeps: ``(module, attribute, index)``, the index of a tuple's element or ``None``.
Place = tuple[nn.Module, str, int | None]


class Mode(NamedTuple):
    """How a model is run: in training or evaluation mode, with autograd or without."""

    training: bool | None
    grad: bool


class Verification:
    """The runs of one model, what is known of its axes, and the sizes that its modules keep.

    Attributes:
        follows: sizes that modules keep -> the axis that each follows.
        computed: the first op that the latest run called with other numbers than the first run, if any.
        latest: the latest run, if it came to its end.
    """

    def __init__(self, model: nn.Module, example: Example, axes: Axes, runs: Mapping[Mode, Run]) -> None:
        self.model = model
        self.example = example
        self.axes = axes
        self.runs = runs
        self.follows: dict[Place, Structure] = known_sizes(model, axes)
        self.computed: Node | None = None
        self.latest: Run | None = None
        self.attempts = 0
        self._followers: dict[nn.Module, bool] = {}
        self._width: Callable[[Atom], int] = lambda atom: atom.size  # in the last run

    def settle(self) -> None:
        """Find attributes to follow, axes to tie and dims to leave as they are, until code goes along at two more widths."""
        self._settle_written()
        computing = {}
        for mode, first in self.runs.items():
            self._settle(mode, first, 0)
            if self.computed is not None:
                computing[mode] = first
        self._settle(*list(self.runs.items())[-1], 1)
        if self._settle_written():
            self.settle()
            return
        for mode, first in computing.items():
            self._attribute(mode, first, self.axes.choose())

    def _settle(self, mode: Mode, first: Run, trial: int) -> None:
        mismatch = self._try(mode, first, trial)
        while mismatch is not None:
            mismatch = self._mend(mode, first, trial, mismatch)

    def _settle_written(self) -> bool:
        """What code writes in place has to be seen as a view of storage: one stretch of it, in compact layout. Whether that took a dim."""
        taken = False
        for name in self.axes.written:
            for axis in self.axes.tensors[name]:
                self.axes.choose()
                if self._moves(axis) and len(self.axes.stretches(axis)) > 1:
                    stiffen(axis, f"code writes part of a tensor in place: {name}")
                    taken = True
                elif self._moves(axis):
                    restrict(axis, f"code writes a tensor in place: {name}")
        return taken

    def _attribute(self, mode: Mode, first: Run, suspects: list[Atom]) -> None:
        """Find the dims that code computes numbers from, by halves: in static layout these would count what sleeps."""
        widths = {atom: n for atom, n in self.widths(0).items() if atom in suspects}
        mismatch = self._try(mode, first, 0, widths)
        while mismatch is not None:  # it took all dims together to go along
            self._leave(mismatch)
            widths = {atom: n for atom, n in widths.items() if self.axes.elastic(atom)}
            mismatch = self._try(mode, first, 0, widths)
        if self.computed is None or not widths:
            return
        if len(widths) == 1:
            why = f"code computes a number from sizes ({short(self.computed.line)})"
            restrict(tuple(widths), why)
            mix(tuple(widths), why)
            return
        suspects = list(widths)
        for half in (suspects[: len(suspects) // 2], suspects[len(suspects) // 2 :]):
            self._attribute(mode, first, half)

    def _mend(self, mode: Mode, first: Run, trial: int, mismatch: Mismatch) -> Mismatch | None:
        """Apply the first remedy that takes the run further; if none does alone, the first two that do together."""
        insufficient = []
        for remedy in self._remedies(first, mismatch):
            after, take_back = self._attempt(mode, first, trial, remedy)
            if after is None or after.at > mismatch.at:
                return after
            take_back()
            insufficient.append(remedy)
        for remedy in insufficient:
            after, take_back = self._attempt(mode, first, trial, remedy)
            for second in () if after is None else self._remedies(first, after):
                further, take_back_second = self._attempt(mode, first, trial, second)
                if further is None or further.at > mismatch.at:
                    return further
                take_back_second()
            take_back()
        elastic = set(self.axes.choose())
        self._leave(mismatch)
        after = self._try(mode, first, trial)
        if after is not None and set(self.axes.choose()) == elastic:
            where = f"module {after.call.path!r}" if after.call.path else f"the forward of {type(self.model).__name__}"
            raise ConversionError(
                f"{where}: its code does not run twice in the same way, with nothing changed between ({after.line}: {after.what}): "
                "which path another width takes cannot be known. Exclude the module or take the difference out of forward; "
                "nothing has changed."
            )
        return after

    def _attempt(self, mode: Mode, first: Run, trial: int, remedy: Callable[[], None]) -> tuple[Mismatch | None, Callable[[], None]]:
        """Where the run ends with a remedy, and how to take the remedy back."""
        point, kept = mark(), dict(self.follows)

        def take_back() -> None:
            undo(point)
            self.follows = kept

        remedy()
        return self._try(mode, first, trial), take_back

    def check_growth(self, wanted: Mapping[Atom, int]) -> dict[Atom, str]:
        """The atoms that code does not let grow to the widths wanted, and why."""
        refused: dict[Atom, str] = {}
        mode, first = next(iter(self.runs.items()))
        while set(wanted) - set(refused):
            widths = {atom: n for atom, n in wanted.items() if atom not in refused}
            mismatch = self._try(mode, first, 0, widths)
            if mismatch is None:
                break
            hit = {atom for axis in self._axes_of(mismatch) for atom in atoms(axis) if atom in widths}
            why = f"code goes no further ({short(mismatch.line)}: {mismatch.what})"
            refused.update(dict.fromkeys(hit or widths, why))
        return refused

    # One run at other widths

    def widths(self, trial: int) -> dict[Atom, int]:
        """Widths of all elastic atoms, as distinct as can be, so that a size tells whose it is."""
        generator = random.Random(trial)
        taken: Counter[int] = Counter()
        found = {}
        for atom in sorted(self.axes.choose(), key=lambda atom: atom.size):
            low = max(atom.minimum, min(2, atom.size - 1))
            options = list(range(low, atom.size))
            generator.shuffle(options)
            if trial or not options:  # now some may stay, so that others of the same few options can part from them
                options.append(atom.size)
            found[atom] = min(options, key=lambda n: taken[n] + (n == atom.size) / 2)
            taken[found[atom]] += 1
        return found

    def _try(self, mode: Mode, first: Run, trial: int, widths: dict[Atom, int] | None = None) -> Mismatch | None:
        self.attempts += 1
        widths = self.widths(trial) if widths is None else widths

        def width(atom: Atom) -> int:
            return widths.get(atom, atom.size)

        self._width = width
        shapes = {name: tuple(measure(axis, width) for axis in axes) for name, axes in self.axes.tensors.items()}
        observer = Comparison(first, width)
        self.latest = None
        try:
            with in_mode(self.model, mode.training):
                self.latest = run(
                    self.model,
                    self.example,
                    shapes={name: shape for name, shape in shapes.items() if shape != first.tensors[name].shape},
                    attributes=self._attributes(width),
                    observer=observer,
                    grad=mode.grad,
                )
        except Stop:
            pass
        except Exception as error:
            if observer.mismatch is None:
                call = observer.last or Call("", self.model, -1, 0, [], None)
                call = first.calls[call.order] if 0 <= call.order < len(first.calls) else call
                what = f"{type(error.__cause__).__name__}: {error.__cause__}"
                observer.mismatch = Mismatch(observer.reached, None, [], call, line_of(error.__cause__ or error), what)
        self.computed = observer.computed
        return observer.mismatch

    def _attributes(self, width: Any) -> dict[tuple[nn.Module, str], Any]:
        changed: dict[tuple[nn.Module, str], Any] = {}
        for (module, name, index), axis in self.follows.items():
            value = measure(axis, width)
            if index is None:
                changed[module, name] = value
            else:
                items = list(changed.get((module, name), module.__dict__[name]))
                items[index] = value
                changed[module, name] = type(module.__dict__[name])(items) if not hasattr(module.__dict__[name], "_fields") else items
        return changed

    # Remedies

    def _remedies(self, first: Run, mismatch: Mismatch) -> Iterator[Callable[[], None]]:
        """What may take a run past a mismatch, likeliest first."""
        self.axes.choose()
        seen: set[Any] = set()
        for place, axis in list(self._attributes_to_follow(mismatch)):
            key: Any = (place, resolve(axis))
            if place not in self.follows and key not in seen:
                seen.add(key)
                yield partial(self._generalise, first, mismatch, place, axis)
        for pairs in list(self._lists_to_follow(mismatch)):
            if any(place not in self.follows for place, _ in pairs):
                yield partial(self._generalise_all, first, mismatch, pairs)
        parts = self._parts_of_followed_sizes(mismatch)
        if parts:
            yield partial(self._tie_all, mismatch, parts)
        for part in list(self._literal_parts(mismatch)):
            if resolve(part) not in seen:
                seen.add(resolve(part))
                yield partial(stiffen, part, f"code keeps its size ({short(mismatch.line)}: {mismatch.what})")
        for one, other in list(self._ties(mismatch)):
            key = (resolve(one), resolve(other))
            if key not in seen:
                seen.add(key)
                yield partial(self._tie, first, mismatch, one, other)

    def _attributes_to_follow(self, mismatch: Mismatch) -> Iterator[tuple[Place, Structure]]:
        """Attributes whose value is a number that the op was called with, or a factor of one, and the axis that had this size."""
        stuck = {then for then, now in mismatch.literals if then == now and then > 1}
        axes = self._axes_of(mismatch)
        whole = [(axis, size(axis)) for axis in axes if self._moves(axis)]
        wanted = [(axis, n) for axis, n in whole if not stuck or n in stuck]
        parts = [(part, size(part)) for axis, _ in whole for part in self._runs(axis) if self._moves(part)]
        wanted += [(part, n) for part, n in parts if not stuck or any(then % n == 0 for then in stuck)]
        for call in mismatch.call.chain():
            for name, value in list(vars(call.module).items()) if self._may_follow(call.module) else ():
                for index, number in _integers(value):
                    for axis, n in wanted:
                        if number == n:
                            yield (call.module, name, index), axis

    def _may_follow(self, module: nn.Module) -> bool:
        """Whether sizes that a module keeps can be made to follow dims."""
        if module not in self._followers:
            self._followers[module] = taken_name(module, ElasticView) is None
        return self._followers[module]

    def _lists_to_follow(self, mismatch: Mismatch) -> Iterator[list[tuple[Place, Structure]]]:
        """Attributes that list the sizes of all parts of an axis, as a split takes them."""
        factors = [factor for axis in self._axes_of(mismatch) for factor in resolve(axis) if isinstance(factor, Concat)]
        for call, factor in itertools.product(mismatch.call.chain(), factors):
            for name, value in list(vars(call.module).items()) if self._may_follow(call.module) else ():
                if isinstance(value, tuple | list) and list(value) == [size(part) for part in factor.parts]:
                    yield [((call.module, name, index), part) for index, part in enumerate(factor.parts)]

    def _literal_parts(self, mismatch: Mismatch) -> Iterator[Structure]:
        """First and last parts of the operands' axes whose size is written in code, or that with a minus sign, as in ``x[:, 3:]``."""
        stuck = {abs(then) for then, now in mismatch.literals if then == now}
        if mismatch.node is None:
            return
        for value in rules.values((mismatch.node.args, mismatch.node.kwargs)):
            for axis in value.axes or []:
                for factor in resolve(axis)[:1]:
                    if isinstance(factor, Concat):
                        yield from (part for part in (factor.parts[0], factor.parts[-1]) if size(part) in stuck and self._moves(part))

    def _ties(self, mismatch: Mismatch) -> Iterator[tuple[Structure, Structure]]:
        """Axes whose size code took, and the axes that were predicted in their place."""

        if mismatch.node is None:
            return
        moved = {then for then, now in mismatch.literals if then != now}
        outputs = [axis for value in mismatch.node.outputs for axis in value.axes or [] if self._elastic(axis)]
        predicted = outputs + [part for axis in self._axes_of(mismatch) if self._elastic(axis) for part in (axis, *self._runs(axis))]
        known = [axis for call in mismatch.call.chain() for value in call.inputs for axis in value.axes or []]
        known += [axis for name, axes in self._tensors_of(mismatch.call) for axis in axes]
        candidates = [axis for axis in known if self._elastic(axis)]
        alike = [(a, b) for a, b in itertools.product(predicted, candidates) if size(a) == size(b) and resolve(a) != resolve(b)]
        alike = [(a, b) for a, b in alike if self._moves(a) or self._moves(b)]
        yield from sorted(alike, key=lambda pair: size(pair[1]) not in moved)

    def _parts_of_followed_sizes(self, mismatch: Mismatch) -> list[tuple[Structure, Structure]]:
        """Parts of a concatenation that code cuts by sizes that follow other axes, as it does where a module has several of a kind."""
        known = [axis for (module, _, _), axis in self.follows.items() for call in mismatch.call.chain() if call.module is module]
        now = {then_now: axis for axis in known for then_now in [(size(axis), measure(axis, self._width))]}
        for axis in self._axes_of(mismatch):
            factors = resolve(axis)
            parts = factors[0].parts if len(factors) == 1 and isinstance(factors[0], Concat) else ()
            for start in range(len(mismatch.literals) - len(parts) + 1):
                here = mismatch.literals[start : start + len(parts)]
                pairs = [(part, now[cut]) for part, cut in zip(parts, here, strict=True) if cut in now and size(part) == cut[0]]
                if len(pairs) == len(parts) > 1:
                    return [(one, other) for one, other in pairs if resolve(one) != resolve(other)]
        return []

    def _tie_all(self, mismatch: Mismatch, pairs: list[tuple[Structure, Structure]]) -> None:
        for one, other in pairs:
            unify(one, other, f"code takes two sizes for one ({short(mismatch.line)})")

    def _leave(self, mismatch: Mismatch) -> None:
        """Give up the dims that run through the op."""
        self.axes.choose()
        axes = [axis for axis in self._axes_of(mismatch) if self._moves(axis)]
        if mismatch.node is not None:
            outputs = [axis for value in mismatch.node.outputs for axis in value.axes or [] if self._moves(axis)]
            axes = outputs or axes
        if not axes:
            axes = [axis for call in mismatch.call.chain() for _, own in self._tensors_of(call) for axis in own if self._moves(axis)]
        why = f"code keeps its size ({short(mismatch.line)}: {mismatch.what})"
        for axis in axes or [axis for own in self.axes.tensors.values() for axis in own]:
            stiffen(axis, why)

    def _generalise(self, first: Run, mismatch: Mismatch, place: Place, axis: Structure) -> None:
        """Let an attribute follow an axis, and that of every other module of the class the axis in the same place of its own calls."""
        module, name, index = place
        self.follows[place] = axis
        where = self._locate(mismatch, axis)
        home = next(call for call in mismatch.call.chain() if call.module is module)
        if where is None:
            return
        offset = mismatch.at - home.start
        for call in first.calls:
            other: Place = (call.module, name, index)
            if type(call.module) is not type(module) or other in self.follows or call.start + offset >= len(first.nodes):
                continue
            if not self._may_follow(call.module):
                continue
            node = first.nodes[call.start + offset]
            if mismatch.node is None or kind(node.op) != kind(mismatch.node.op):
                continue
            found = _find(_values(node), where)
            if found is not None and _kept(call.module, name, index) == size(found):
                self.follows[other] = found

    def _generalise_all(self, first: Run, mismatch: Mismatch, pairs: list[tuple[Place, Structure]]) -> None:
        for place, axis in pairs:
            if place not in self.follows:
                self._generalise(first, mismatch, place, axis)

    def _tie(self, first: Run, mismatch: Mismatch, one: Structure, other: Structure) -> None:
        """Make one of two axes, and of those in the same places of the calls of other modules of the class."""
        why = f"code takes two sizes for one ({short(mismatch.line)})"
        where = self._locate(mismatch, one)
        homes = [(call, source) for call in mismatch.call.chain() if (source := _among(call.inputs, other)) is not None]
        pairs = [(one, other)]
        if where is not None and homes and mismatch.node is not None:
            home, source = homes[0]
            offset = mismatch.at - home.start
            for call in first.calls:
                if type(call.module) is type(home.module) and call is not home and call.start + offset < len(first.nodes):
                    node = first.nodes[call.start + offset]
                    here, there = _find(_values(node), where), _find(call.inputs, source)
                    if kind(node.op) == kind(mismatch.node.op) and here is not None and there is not None and size(here) == size(there):
                        pairs.append((here, there))
        for here, there in pairs:
            unify(here, there, why)

    def _locate(self, mismatch: Mismatch, axis: Structure) -> tuple[int, int, int, int] | None:
        """Where an axis is among those of an op: ``(value, axis, first factor, last factor)``."""
        return None if mismatch.node is None else _among(_values(mismatch.node), axis)

    def _axes_of(self, mismatch: Mismatch) -> list[Structure]:
        if mismatch.node is not None:
            return [axis for value in _values(mismatch.node) for axis in value.axes or []]
        return [axis for value in mismatch.call.inputs for axis in value.axes or []] + [
            axis for _, own in self._tensors_of(mismatch.call) for axis in own
        ]

    def _tensors_of(self, call: Call) -> Iterator[tuple[str, list[Structure]]]:
        prefix = call.path + "." if call.path else ""
        for key in (*call.module._parameters, *call.module._buffers):
            if prefix + key in self.axes.tensors:
                yield prefix + key, self.axes.tensors[prefix + key]

    def _moves(self, axis: Structure) -> bool:
        """Whether trials change the size of an axis."""
        return self._elastic(axis)

    def _elastic(self, axis: Structure) -> bool:
        return any(self.axes.elastic(atom) for atom in atoms(axis))

    def _runs(self, axis: Structure) -> Iterator[Structure]:
        """Neighbouring factors of an axis that can change size together, longest first; then those of each part of a concatenation."""
        factors = resolve(axis)
        for length in range(len(factors) - 1, 0, -1):
            for start in range(len(factors) - length + 1):
                part = factors[start : start + length]
                if self._elastic(part):
                    yield part
        for factor in factors:
            for part in factor.parts if isinstance(factor, Concat) else ():
                if self._elastic(part):
                    yield resolve(part)
                    yield from self._runs(part)


def _values(node: Node) -> list[Value]:
    return [*node.outputs, *rules.values((node.args, node.kwargs))]


def _among(values: list[Value], axis: Structure) -> tuple[int, int, int, int] | None:
    """Where an axis, or run of factors, is among those of values: ``(value, axis, first factor, last factor)``."""
    wanted = resolve(axis)
    for i, value in enumerate(values):
        for j, known in enumerate(value.axes or []):
            factors = resolve(known)
            for start, end in itertools.combinations(range(len(factors) + 1), 2):
                if factors[start:end] == wanted:
                    return i, j, start, end
    return None


def _find(values: list[Value], where: tuple[int, int, int, int]) -> Structure | None:
    """The run of factors in a place that :func:`_among` found in other values."""
    i, j, start, end = where
    if i >= len(values) or values[i].axes is None or j >= len(values[i].axes or []):
        return None
    factors = resolve((values[i].axes or [])[j])
    return factors[start:end] if end <= len(factors) else None


def _integers(value: Any) -> Iterator[tuple[int | None, int]]:
    """The integers that an attribute is or holds."""
    if isinstance(value, bool):
        return
    if isinstance(value, int):
        yield None, value
    elif isinstance(value, tuple | list):
        for index, item in enumerate(value):
            if isinstance(item, int) and not isinstance(item, bool):
                yield index, item


def _kept(module: nn.Module, name: str, index: int | None) -> int | None:
    value = module.__dict__.get(name)
    return next((number for at, number in _integers(value) if at == index), None)
