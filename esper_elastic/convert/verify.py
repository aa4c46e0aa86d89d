"""Whether a model's own code goes along when dims change size: it is run on fake tensors at other widths, op by op beside the first run.

Axes say what every intermediate must measure. Where code gives something else, or fails, one of three things is tried, in this order: a
number that a module keeps as an attribute follows the axis whose size it was; two axes are tied whose sizes code takes for one; the dims
that run through the op are left as they are, with the line that keeps their size. What is found out in one module is tried at once in
all others of its class.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, NamedTuple

from torch import nn
from torch.utils._pytree import tree_leaves

from ..errors import ConversionError
from ..layers import ElasticView
from . import rules
from .axes import Axes, short
from .names import taken_name
from .sizes import known_sizes
from .structure import Atom, Concat, Structure, atoms, mark, measure, mix, resolve, restrict, size, stiffen, undo, unify
from .trace import Call, Example, Failure, Node, Run, Stop, Value, in_mode, line_of, run

#: A size that a module keeps: ``(module, attribute, index)``, the index of a tuple's element or ``None``.
Place = tuple[nn.Module, str, int | None]


class Mode(NamedTuple):
    """How a model is run: in training or evaluation mode, with autograd or without."""

    training: bool | None
    grad: bool


class Mismatch(NamedTuple):
    """Where a run at other widths left what axes predict."""

    at: int
    node: Node | None  # of the first run
    literals: list[tuple[int, int]]  # integers in the op's arguments, then and now
    call: Call
    line: str
    what: str


class Verification:
    """The runs of one model, what is known of its axes, and the sizes that its modules keep.

    Attributes:
        follows: sizes that modules keep -> the axis that each follows.
    """

    def __init__(self, model: nn.Module, example: Example, axes: Axes, runs: Mapping[Mode, Run]) -> None:
        self.model = model
        self.example = example
        self.axes = axes
        self.runs = runs
        self.follows: dict[Place, Structure] = known_sizes(model, axes)
        self.attempts = 0
        self._followers: dict[nn.Module, bool] = {}
        self._width: Callable[[Atom], int] = lambda atom: atom.size  # in the last run

    def settle(self) -> None:
        """Find attributes to follow, axes to tie and dims to leave as they are, until code goes along at two more widths."""
        for mode, first in self.runs.items():
            self._settle(mode, first, 0)
        self._settle(*list(self.runs.items())[-1], 1)

    def _settle(self, mode: Mode, first: Run, trial: int) -> None:
        mismatch = self._try(mode, first, trial)
        while mismatch is not None:
            mismatch = self._mend(mode, first, trial, mismatch)

    def _mend(self, mode: Mode, first: Run, trial: int, mismatch: Mismatch) -> Mismatch | None:
        """Apply the first remedy that takes the run further; if none does alone, the first two that do together."""
        without_effect = []
        for remedy in self._remedies(first, mismatch):
            after, take_back = self._attempt(mode, first, trial, remedy)
            if after is None or after.at > mismatch.at:
                return after
            take_back()
            if after.at == mismatch.at:
                without_effect.append(remedy)
        for remedy in without_effect:
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
        taken: set[int] = set()
        found = {}
        for atom in sorted(self.axes.choose(), key=lambda atom: atom.size):
            low = max(atom.minimum, min(2, atom.size - 1))
            options = list(range(low, atom.size))
            generator.shuffle(options)
            found[atom] = next((n for n in options if n not in taken), options[0] if options else atom.size)
            taken.add(found[atom])
        return found

    def _try(self, mode: Mode, first: Run, trial: int, widths: dict[Atom, int] | None = None) -> Mismatch | None:
        self.attempts += 1
        widths = self.widths(trial) if widths is None else widths

        def width(atom: Atom) -> int:
            return widths.get(atom, atom.size)

        self._width = width
        shapes = {name: tuple(measure(axis, width) for axis in axes) for name, axes in self.axes.tensors.items()}
        observer = _Comparison(first, width)
        try:
            with in_mode(self.model, mode.training):
                run(
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
        parts = self._parts_of_followed_sizes(mismatch)
        if parts:
            yield partial(self._tie_all, mismatch, parts)
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
        parts = [(part, size(part)) for axis, _ in whole for part in self._runs(axis)]
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

    def _ties(self, mismatch: Mismatch) -> Iterator[tuple[Structure, Structure]]:
        """Axes whose size code took, and the axes that were predicted in their place."""

        if mismatch.node is None:
            return
        moved = {then for then, now in mismatch.literals if then != now}
        outputs = [axis for value in mismatch.node.outputs for axis in value.axes or [] if self._moves(axis)]
        predicted = outputs + [part for axis in self._axes_of(mismatch) if self._moves(axis) for part in (axis, *self._runs(axis))]
        candidates = [axis for call in mismatch.call.chain() for value in call.inputs for axis in value.axes or [] if self._moves(axis)]
        candidates += [axis for name, axes in self._tensors_of(mismatch.call) for axis in axes if self._moves(axis)]
        alike = [(a, b) for a, b in itertools.product(predicted, candidates) if size(a) == size(b) and resolve(a) != resolve(b)]
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
            if mismatch.node is None or _kind(node.op) != _kind(mismatch.node.op):
                continue
            found = _find(_values(node), where)
            if found is not None and _kept(call.module, name, index) == size(found):
                self.follows[other] = found

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
                    if _kind(node.op) == _kind(mismatch.node.op) and here is not None and there is not None and size(here) == size(there):
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
        return any(self.axes.elastic(atom) for atom in atoms(axis))

    def _runs(self, axis: Structure) -> Iterator[Structure]:
        """Neighbouring factors of an axis that can change size together, longest first; then those of each part of a concatenation."""
        factors = resolve(axis)
        for length in range(len(factors) - 1, 0, -1):
            for start in range(len(factors) - length + 1):
                part = factors[start : start + length]
                if self._moves(part):
                    yield part
        for factor in factors:
            for part in factor.parts if isinstance(factor, Concat) else ():
                if self._moves(part):
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


#: Ops that some widths need and others do not: they leave values as they are.
_OPTIONAL = ("clone", "alias", "detach", "contiguous")


def _kind(op: Any) -> str:
    name = rules.op_name(op)
    return "view" if rules.RULES.get(name) in (rules.RULES["view"], rules.RULES["as_strided"]) else name


class _Comparison:
    """Compares a run with the first one as it goes, and ends it where they part."""

    def __init__(self, first: Run, width: Any) -> None:
        self.first = first
        self.width = width
        self.nodes = [index for index, node in enumerate(first.nodes) if _kind(node.op) not in _OPTIONAL]
        self.count = 0
        self.last: Call | None = None
        self.mismatch: Mismatch | None = None

    def __call__(self, event: Node | Failure) -> None:
        if isinstance(event, Node) and _kind(event.op) in _OPTIONAL:
            return
        self.last = event.call
        index = self.nodes[self.count] if self.count < len(self.nodes) else len(self.first.nodes)
        known = self.first.nodes[index] if index < len(self.first.nodes) else None
        if isinstance(event, Failure):
            if known is not None and known.line != event.line:
                known = None
            self._end(event, known, index, (event.args,), f"{type(event.error).__name__}: {event.error}")
        elif known is None or _kind(known.op) != _kind(event.op):
            self._end(event, None, index, (), f"it runs {rules.op_name(event.op)} where it ran {_ran(known)}")
        else:
            self.count += 1
            if rules.find(known.op) is rules.pointwise and _numbers((known.args, known.kwargs)) != _numbers((event.args, event.kwargs)):
                self._note_scale(known, event)
            for then, now in zip(known.outputs, event.outputs, strict=True):
                predicted = tuple(measure(axis, self.width) for axis in then.axes or [])
                if predicted != now.shape:
                    what = f"{rules.op_name(event.op)} gives {list(now.shape)}, expected {list(predicted)}"
                    self._end(event, known, index, (event.args, event.kwargs), what)

    def _note_scale(self, known: Node, event: Node) -> None:
        """A number that code computes from sizes: in static layout it would count what sleeps."""
        call = self.first.calls[event.call.order] if 0 <= event.call.order < len(self.first.calls) else event.call
        for value in (*_values(known), *call.inputs):
            for axis in value.axes or []:
                why = f"code computes a number from sizes ({short(known.line)})"
                restrict(axis, why)
                mix(axis, why)

    def _end(self, event: Node | Failure, known: Node | None, index: int, arguments: Any, what: str) -> None:
        then = [] if known is None else list(_literals((known.args, known.kwargs)))
        now = list(_literals(arguments))
        call = self.first.calls[event.call.order] if 0 <= event.call.order < len(self.first.calls) else event.call
        self.mismatch = Mismatch(index, known, list(zip(then, now, strict=False)), call, event.line, " ".join(what.split())[:200])
        raise Stop

    @property
    def reached(self) -> int:
        """How far the run came, in ops of the first one."""
        return self.nodes[self.count] if self.count < len(self.nodes) else len(self.first.nodes)


def _ran(node: Node | None) -> str:
    return "nothing" if node is None else rules.op_name(node.op)


def _numbers(tree: Any) -> list[float]:
    """The numbers among arguments."""
    return [x for x in tree_leaves(tree) if isinstance(x, int | float) and not isinstance(x, bool)]


def _literals(tree: Any) -> Iterator[int]:
    if isinstance(tree, bool):
        return
    if isinstance(tree, int):
        yield tree
    elif isinstance(tree, dict):
        for item in tree.values():
            yield from _literals(item)
    elif isinstance(tree, tuple | list):
        for item in tree:
            yield from _literals(item)
