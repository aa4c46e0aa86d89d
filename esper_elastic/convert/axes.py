"""From recorded runs to dims: which axes of which parameters and buffers are one size, and why the others cannot change.

:class:`Axes` applies the rules of :mod:`rules` to every op of a run and so unifies the axes of a model's tensors. :meth:`Axes.choose` then
picks what is elastic: of each product at most one factor, the outermost that can be (heads, not the size of a head).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from torch import nn

from . import rules
from .structure import Atom, Concat, Structure, at_least, atoms, fresh, mix, resolve, restrict, size, stiffen, unify
from .trace import Node, Run, Value

#: A tensor axis in more stretches than this is left rigid: each is a row of the table that kernels walk.
MAX_STRETCHES = 64


class Stretch(NamedTuple):
    """Part of an axis: ``atom.size * inner`` indices of an elastic atom, or ``inner`` fixed ones where ``atom`` is ``None``."""

    atom: Atom | None
    inner: int


class Axes:
    """What is known of the axes of a model's tensors.

    Attributes:
        tensors: name of a parameter or buffer -> the structure of each axis.
        names: identity of a parameter or buffer -> the first of its names, by which everything here calls it.
        consumed: ``(name, axis)`` of weights that are summed over.
        produced: ``(name, axis)`` of weights that make units.
        normalised: module -> the axis that its norm works on, where the norm is all that the module does.
        entered: module -> the input channels of a grouped convolution.
        readers: name -> modules in whose forward the tensor is used.
        written: names of buffers and parameters that code writes in place.
    """

    def __init__(self) -> None:
        self.tensors: dict[str, list[Structure]] = {}
        self.names: dict[int, str] = {}
        self.consumed: set[tuple[str, int]] = set()
        self.produced: set[tuple[str, int]] = set()
        self.normalised: dict[nn.Module, Structure] = {}
        self.entered: dict[nn.Module, Structure] = {}
        self.readers: dict[str, dict[nn.Module, None]] = {}
        self.written: dict[str, None] = {}
        self._weights: list[Structure] = []
        self._groups: list[Structure] = []
        self._counts: list[Structure] = []
        self._sources: dict[int, tuple[str, list[int | None]]] = {}
        self._chosen: dict[Atom, None] = {}
        self._inner: dict[Atom, str] = {}
        self._node: Node | None = None

    # Reading runs

    def read(self, run: Run) -> None:
        """Take in what a run says."""
        self._sources = {}
        for name, value in run.tensors.items():
            axes = self.tensors.get(name)
            if axes is None:
                axes = self.tensors[name] = [fresh(n) for n in value.shape]
            value.axes = axes
            self._sources[id(value)] = (name, list(range(len(axes))))
        for values, why in ((run.inputs, "it is an axis of the model's input"), (run.constants, "it belongs to a tensor kept by code")):
            for value in values:
                value.axes = [fresh(n, why) for n in value.shape]
        for node in run.nodes:
            self._apply(node)
        used = {id(value) for node in run.nodes for value in rules.values((node.args, node.kwargs))}
        for value in run.outputs:
            if id(value) not in used:  # an intermediate that is returned as well goes with the model
                for axis in value.axes or []:
                    stiffen(axis, "it is an axis of the model's output")
        self._node = None

    def _apply(self, node: Node) -> None:
        self._node = node
        operands = rules.values((node.args, node.kwargs))
        for value in operands:
            source = self._sources.get(id(value))
            if source is not None:
                self.readers.setdefault(source[0], {})[node.call.module] = None
        known = rules.find(node.op)
        if known is None:
            self._refuse(node, "is not understood")
        else:
            known(self, node)
        for output in node.outputs:
            if output.axes is not None and tuple(size(axis) for axis in output.axes) != output.shape:
                self._refuse(node, "is called in a way that is not understood")
                output.axes = None
            if output.axes is None:
                output.axes = [fresh(n, self._why(f"the op {rules.op_name(node.op)} gives it")) for n in output.shape]
            if any(output is value for value in operands):
                self.write(output)

    def _refuse(self, node: Node, why: str) -> None:
        for value in rules.values((node.args, node.kwargs)):
            for axis in value.axes or []:
                stiffen(axis, self._why(f"the op {rules.op_name(node.op)} {why}"))

    def _why(self, why: str) -> str:
        return why if self._node is None else f"{why} ({short(self._node.line)})"

    # What rules call

    def unify(self, one: Structure, other: Structure) -> None:
        unify(one, other, self._why("its indices are regrouped"))

    def fix(self, axis: Structure, why: str) -> None:
        stiffen(axis, self._why(why))

    def mix(self, axis: Structure, why: str, *, static: bool = False) -> None:
        mix(axis, self._why(why))
        if not static:
            restrict(axis, self._why(why))

    def produce(self, weight: Value, axis: int) -> None:
        assert weight.axes is not None
        source = self._source(weight, axis)
        if source is not None:
            self.produced.add(source)
            self._weights.append(weight.axes[axis])

    def consume(self, weight: Value, axis: int) -> bool:
        assert weight.axes is not None
        source = self._source(weight, axis)
        if source is None:
            return False
        self.consumed.add(source)
        self._weights.append(weight.axes[axis])
        return True

    def at_least(self, axis: Structure, minimum: int) -> None:
        at_least(axis, minimum)

    def group(self, groups: Structure, width: Structure) -> None:
        self._groups.append((*groups, *width))
        self._counts.append(groups)

    def normalise(self, axis: Structure) -> bool:
        assert self._node is not None
        module = self._node.call.module
        dense: Any = next((c for c in type(module).__mro__ if c.__module__.startswith("torch.nn.modules")), nn.Module)
        if dense is nn.Module or type(module).forward is not dense.forward:
            return False
        self.normalised[module] = axis
        return True

    def enter(self, axis: Structure) -> None:
        assert self._node is not None
        self.entered[self._node.call.module] = axis

    def write(self, value: Value) -> None:
        source = self._sources.get(id(value))
        if source is not None:
            self.written[source[0]] = None

    def follow(self, output: Value, input: Value, order: Sequence[int | None]) -> None:
        source = self._sources.get(id(input))
        if source is not None and output is not input:
            self._sources[id(output)] = (source[0], [None if place is None else source[1][place] for place in order])

    def _source(self, weight: Value, axis: int) -> tuple[str, int] | None:
        source = self._sources.get(id(weight))
        if source is None:
            return None
        place = source[1][axis]
        return None if place is None else (source[0], place)

    # Choosing

    def choose(self) -> list[Atom]:
        """Pick the elastic atoms anew, in the order of tensors; what is known of rigid ones is taken into account."""
        weights = {atom for axis in self._weights for atom in atoms(axis)}
        known = [(name, index, axis, list(atoms(axis))) for name, axes in self.tensors.items() for index, axis in enumerate(axes)]
        made = {atom for name, index, _, own in known if (name, index) not in self.consumed for atom in own}
        present = {atom for *_, own in known for atom in own}
        self._chosen, self._inner = {}, {}
        for atom in present:
            if atom not in weights:
                self._inner[atom] = "no matrix product or convolution has it"
            elif atom not in made:
                self._inner[atom] = "no weight makes its units"
        for axis in (*(axis for _, _, axis, _ in known), *self._groups):
            self._choose(axis)
        for _, _, axis, own in known:
            if len(own) > 1 and self._count(axis) > MAX_STRETCHES:
                for atom in own:
                    self._drop(atom, f"it would lie in more than {MAX_STRETCHES} stretches")
        return [atom for atom in self._chosen if atom in present]

    def _choose(self, axis: Structure) -> None:
        factors = resolve(axis)
        for index, factor in enumerate(factors):
            rest = factors[index + 1 :]
            if isinstance(factor, Concat):
                for part in factor.parts:
                    self._choose((*part, *rest))
                return
            if self.why_fixed(factor) is None:
                self._chosen[factor] = None
                for atom in atoms(rest):
                    self._drop(atom, "it lies inside of units that come and go as wholes")
                return

    def _drop(self, atom: Atom, why: str) -> None:
        self._inner.setdefault(atom, why)
        self._chosen.pop(atom, None)

    def _count(self, axis: Structure) -> int:
        return len(self.stretches(axis)) if any(self.elastic(atom) for atom in atoms(axis)) else 1

    def elastic(self, atom: Atom) -> bool:
        """Whether an atom has been chosen."""
        return atom.root() in self._chosen

    def why_fixed(self, atom: Atom) -> str | None:
        """Why an atom cannot change size; ``None`` if it can."""
        if atom.size == 1:
            return "it has one index"
        return atom.rigid or self._inner.get(atom)

    def counted_in_groups(self) -> set[Atom]:
        """Atoms that count the groups of a norm or convolution."""
        return {atom for axis in self._counts for atom in atoms(axis)}

    def stretches(self, axis: Structure) -> list[Stretch]:
        """An axis as stretches of elastic and of fixed indices, neighbouring fixed ones joined."""
        found: list[Stretch] = []
        for stretch in self._stretches(resolve(axis)):
            if stretch.atom is None and found and found[-1].atom is None:
                found[-1] = Stretch(None, found[-1].inner + stretch.inner)
            else:
                found.append(stretch)
        return found

    def _stretches(self, factors: Structure) -> Iterator[Stretch]:
        if not any(self.elastic(atom) for atom in atoms(factors)):
            yield Stretch(None, size(factors))
            return
        first, rest = factors[0], factors[1:]
        if isinstance(first, Concat):
            for part in first.parts:
                yield from self._stretches(resolve((*part, *rest)))
        elif self.elastic(first):
            yield Stretch(first, math.prod(factor.size for factor in rest))
        else:
            for _ in range(first.size):
                yield from self._stretches(rest)


def short(line: str) -> str:
    """The last two parts of the path of a line."""
    return "/".join(line.split("/")[-2:])
