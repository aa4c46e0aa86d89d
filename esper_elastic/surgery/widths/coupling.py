"""Which dim runs along an axis of a parameter, and through what else: found by running the smallest module that it does not leave.

A module is run by itself on what it was called with in the model. Rules say which axes are one dim, and a trial at another size says
whether code goes along, which numbers that modules keep follow, and which axes code takes for one: see
:mod:`esper_elastic.convert.verify`. Where the dim comes in or goes out, the module around is asked.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ...convert.axes import Axes, short
from ...convert.comparison import Mismatch
from ...convert.planner import keep_recurrent
from ...convert.restore import plain_modules
from ...convert.structure import Atom, Concat, Structure, atoms, measure, resolve, size, stiffen
from ...convert.trace import Example, Node, Run, Value, owned_tensors
from ...convert.verify import Mode, Place, Verification
from ...errors import ConversionError
from ..trial.calls import Calls
from .alone import Alone, Arguments, arguments_of, own_paths


class Refused(Exception):
    """A module cannot tell; perhaps the one around it can."""


class KeptByCode(Refused):
    """Code did not go along with a change of this dim alone."""


class Trial(Verification):
    """Runs of a module at another size of one dim.

    Attributes:
        axis: along which the dim runs.
        size: of the axis that is to be tried. Units may turn out to be of several indices each, so that it can be met only nearly.
        ends: the latest run in each mode.
        computes: an op that was called with numbers which depend on the size.
    """

    def __init__(self, model: nn.Module, example: Example, axes: Axes, runs: Mapping[Mode, Run], axis: Structure) -> None:
        super().__init__(model, example, axes, runs)
        self.axis = axis
        self.size = 0
        self.ends: dict[Mode, Run] = {}
        self.computes: Node | None = None
        self._known: Atom | None = None

    def atom(self) -> Atom:
        """The dim that runs along the axis.

        Raises:
            Refused: there is none that can change, or more than one.
        """
        if self._known is None:
            self._known = self._find()
        return self._known

    def _find(self) -> Atom:
        chosen = set(self.axes.choose())
        found = list(dict.fromkeys(atom for atom in atoms(self.axis) if atom in chosen))
        if not found:
            reasons = [self.axes.why_fixed(atom) for atom in atoms(self.axis)] if size(self.axis) > 1 else ["it has one index"]
            raise Refused(next((why for why in reasons if why), "code tells its indices apart one by one"))
        if len(found) > 1:
            sizes = ", ".join(str(atom.size) for atom in found)
            raise Refused(f"{len(found)} dims lie along it, of {sizes} units: name the axis of a tensor that makes one of them")
        return found[0]

    def units(self) -> int:
        """How many units the dim has at the size to be tried."""
        atom = self.atom()
        fixed, once = (measure(self.axis, lambda each, n=n: n if each is atom else each.size) for n in (0, 1))  # type: ignore[misc]
        found, rest = divmod(self.size - fixed, once - fixed)
        found = max(1, found + (rest > 0 and self.size > size(self.axis)))
        return found if found != atom.size else found + 1

    def prove(self, size: int) -> None:
        """Have code run at another size of the axis in every mode, and find out what has to follow for that.

        Raises:
            Refused: it does not go along.
        """
        self.size = size
        modes = list(_distinct(self.runs))
        attempts = -1
        while attempts != len(modes):  # what one mode has found out, the others have to bear
            before = self.attempts
            for mode in modes:
                self._settle(mode, self.runs[mode], 0)
                self.atom()
                assert self.latest is not None
                self.ends[mode] = self.latest
                self.computes = self.computed or self.computes
                self._compare_results(self.runs[mode], self.latest)
            attempts = self.attempts - before

    def _compare_results(self, first: Run, now: Run) -> None:
        for one, other in zip(_numbers(first), _numbers(now), strict=False):
            if one != other:
                raise Refused(f"code returns its size as a number, {one}")

    def follow_unread(self, candidates: Mapping[Place, Structure]) -> None:
        """Let numbers follow that nothing in a run depends on, as a ``repr`` does."""
        mode = next(iter(self.ends))
        kept, computed = dict(self.follows), self.computed
        self.follows = {**candidates, **kept}
        if self._try(mode, self.runs[mode], 0) is None and (self.computed is None or computed is not None):
            assert self.latest is not None
            self.ends[mode] = self.latest
        else:
            self.follows = kept

    # What verification asks

    def _attempt(self, mode: Mode, first: Run, trial: int, remedy: Callable[[], None]) -> tuple[Mismatch | None, Callable[[], None]]:
        self._known = None
        after, take_back = super()._attempt(mode, first, trial, remedy)

        def forget() -> None:
            take_back()
            self._known = None

        return after, forget

    def _leave(self, mismatch: Mismatch) -> None:
        super()._leave(mismatch)
        self._known = None

    def widths(self, trial: int) -> dict[Atom, int]:
        try:
            return {self.atom(): self.units()}
        except Refused:
            return {}

    def _moves(self, axis: Structure) -> bool:
        own = {atom for atom in atoms(self.axis) if self.axes.elastic(atom)}
        return any(atom in own for atom in atoms(axis))

    def _may_follow(self, module: nn.Module) -> bool:
        return True


class Scope:
    """A module that a dim does not leave.

    Attributes:
        path: of the module.
        module: itself.
        axes: what is known of its tensors' axes.
        tensors: by the names that it has for them.
        trial: its runs at other sizes.
        axis: the one that was asked for.
        atom: the dim that runs along it.
        tried: how many units it had in the latest trial.
        returned: whether it may be a dim of what the whole model returns.

    Raises:
        Refused: it leaves the module, cannot change, or the module cannot be run by itself.
    """

    def __init__(
        self,
        model: nn.Module,
        inputs: Arguments,
        calls: Calls,
        path: str,
        tensor: Tensor,
        axis: int,
        *,
        thorough: bool = False,
        returned: bool = False,
    ) -> None:
        self.path = path
        self.returned = returned and not path
        self.module = model.get_submodule(path)
        self.axes = Axes()
        self.tensors: dict[str, Tensor] = {}
        for name, _, _, own in owned_tensors(self.module):
            if self.axes.names.setdefault(id(own), name) == name:
                self.tensors[name] = own
        self.runs: dict[Mode, Run] = {}
        self.tried = 0
        self._model, self._calls = model, calls
        given = arguments_of(calls, path) if path else inputs
        if given is None:
            raise Refused(f"{path!r} cannot be run by itself")
        alone = Alone(self.module, given)
        try:
            for mode, each in alone.runs():
                self.runs[mode] = each
                self.axes.read(each, outputs=self.returned)
                self.axis = self.axes.tensors[self.axes.names[id(tensor)]][axis]
                if path:
                    self._refuse_passing()
        except ConversionError as error:
            raise Refused(str(error)) from error
        keep_recurrent(self.module, self.axes)
        self.trial = Trial(self.module, alone.example, self.axes, self.runs, self.axis)
        if thorough:
            self._learn(alone.example)
        self._prefer()
        try:
            self.trial.atom()
        except Refused as refused:
            raise Refused(next(self._ends(set(atoms(self.axis))), str(refused))) from None
        self._check()

    def _learn(self, example: Example) -> None:
        """Find out how code depends on all dims of the module, at widths of their own, as conversion does."""
        known = Verification(self.module, example, self.axes, self.runs)
        try:
            known.settle()
        except ConversionError as error:
            raise Refused(str(error)) from error
        self.trial.follows = known.follows

    def _prefer(self) -> None:
        """Choose the dim of the axis where choice would fall on one around it: the size of a head, not the number of heads."""
        self.axes.choose()
        wanted = {atom for atom in atoms(self.axis) if atom.rigid is None}
        if not any(self.axes.elastic(atom) for atom in wanted):
            around = [atom for axes in self.axes.tensors.values() for axis in axes for atom in self._around(axis, wanted)]
            stiffen(tuple(around), "a dim inside of its units was asked for")

    def _around(self, axis: Structure, wanted: set[Atom]) -> Iterator[Atom]:
        factors = resolve(axis)
        for index, factor in enumerate(factors):
            rest = factors[index + 1 :]
            if isinstance(factor, Concat):
                for part in factor.parts:
                    yield from self._around((*part, *rest), wanted)
                return
            if self.axes.elastic(factor) and not wanted.isdisjoint(atoms(rest)):
                yield factor

    def _refuse_passing(self) -> None:
        """Refuse an axis of which every dim leaves the module: no other mode makes of that less."""
        for atom in atoms(self.axis):
            if atom.rigid is None and next(self._ends({atom}), None) is None:
                return
        for why in self._ends(set(atoms(self.axis))):
            raise Refused(why)

    def settle(self, size: int) -> None:
        """See that code goes along at another size of the axis, and what follows.

        Raises:
            KeptByCode: it does not.
            Refused: the dim turns out to leave the module.
        """
        try:
            self.trial.prove(size)
        except (ConversionError, Refused) as error:
            raise KeptByCode(str(error)) from error
        self._check()
        self.tried = self.trial.units()
        unread = dict(self._unread())
        if unread:
            self.trial.follow_unread(unread)

    def _check(self) -> None:
        """Refuse a dim that leaves the module, or whose tensors somebody outside has."""
        self.atom = self.trial.atom()
        for why in self._ends({self.atom}):
            raise Refused(why)
        if self.path:
            held = {id(tensor): name for name, tensor in self.coupled()}
            inside = set(self.module.modules())
            for name, module, _, tensor in owned_tensors(self._model):
                if id(tensor) not in held:
                    continue
                if module not in inside:
                    raise Refused(f"{name} shares a tensor with it")
                if any(self._called_outside(path) for path in (name.rpartition(".")[0], *self._calls.readers(name))):
                    raise Refused(f"{name} is read outside of {self.path!r}")

    def _called_outside(self, path: str) -> bool:
        """Whether a module runs without this one around it."""
        return any(all(above.path != self.path for above in call.chain()) for call in self._calls.of(path))

    def _ends(self, dims: set[Atom]) -> Iterator[str]:
        """Where the module takes or gives tensors that have one of the dims."""
        whose = repr(self.path) if self.path else "the model"
        for each in self.runs.values():
            outputs = [] if self.returned else each.outputs
            for what, values in (("given to {} (input", each.inputs), ("returned by {} (output", outputs)):
                for place, value in enumerate(values):
                    for index, axis in enumerate(value.axes or []):
                        if any(atom in dims for atom in atoms(axis)):
                            yield f"it is {what.format(whose)} {place}, axis {index})"

    def _unread(self) -> Iterator[tuple[Place, Structure]]:
        """Numbers kept by modules of the user's own beside a coupled tensor, equal to the size of that axis and of no other."""
        for module in plain_modules(self.module):
            own = [t for t in (*module._parameters.values(), *module._buffers.values()) if t is not None]
            if type(module).__module__.startswith("torch.nn.") or not own:
                continue
            axes = [axis for tensor in own for axis in self.axes.tensors[self.axes.names[id(tensor)]]]
            for name, value in vars(module).items():
                if type(value) is int and value > 1 and (module, name, None) not in self.trial.follows:
                    alike = [axis for axis in axes if size(axis) == value]
                    if alike and all(self.atom in set(atoms(axis)) for axis in alike):
                        yield (module, name, None), alike[0]

    # What was found

    def coupled(self) -> Iterator[tuple[str, Tensor]]:
        """Name, in the module, and tensor of everything that the dim runs through."""
        for name, axes in self.axes.tensors.items():
            if any(each is self.atom for axis in axes for each in atoms(axis)):
                yield name, self.tensors[name]

    def has(self, axis: Structure) -> bool:
        """Whether the dim runs along an axis."""
        return any(each is self.atom for each in atoms(axis))

    def length(self, axis: Structure, units: int) -> int:
        """The size of an axis at ``units`` units of the dim."""
        return measure(axis, lambda each: units if each is self.atom else each.size)

    def stretches(self, axis: Structure) -> tuple[tuple[bool, int], ...]:
        """An axis as stretches: ``(True, indices per unit)`` of the dim, ``(False, indices)`` of anything else."""
        found: list[tuple[bool, int]] = []
        for each, inner in self.axes.stretches(axis):
            ours = each is self.atom
            length = inner if ours or each is None else each.size * inner
            if found and not ours and not found[-1][0]:
                found[-1] = (False, found[-1][1] + length)
            else:
                found.append((ours, length))
        return tuple(found)

    def mixed(self) -> str | None:
        """Why new units change what the model computes, whatever they are; ``None`` if they need not."""
        if self.atom.mixed is not None:
            return self.atom.mixed
        for module, axis in self.axes.normalised.items():
            whole = isinstance(module, nn.LayerNorm | nn.RMSNorm) or getattr(module, "num_groups", 0) == 1
            if whole and self.atom in set(atoms(axis)):
                path = next(path for path, each in self.module.named_modules() if each is module)
                return f"{type(module).__name__} {f'{self.path}.{path}'.strip('.')!r} runs over all of its units"
        if self.trial.computes is not None:
            return f"code computes a number from its size ({short(self.trial.computes.line)})"
        known = {name for name, _ in (*self.axes.consumed, *self.axes.produced)}
        for name, tensor in self.coupled():
            if name not in known and sum(n > 1 for n in tensor.shape) > 1:
                return f"code computes something of its own from {f'{self.path}.{name}'.strip('.')}"
        return None


def _distinct(runs: Mapping[Mode, Run]) -> Iterator[Mode]:
    """The modes in which code takes paths of its own."""
    seen: list[Any] = []
    for mode, each in runs.items():
        path = own_paths(each)
        if path not in seen:
            seen.append(path)
            yield mode


def _numbers(run: Run) -> list[int]:
    """Integers in what a model returned."""
    return [leaf for leaf in tree_leaves(run.result) if isinstance(leaf, int) and not isinstance(leaf, Value)]
