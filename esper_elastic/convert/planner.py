"""Makes a plan from a model and example inputs, which it leaves alone: runs, axes, verification, and what comes of them as data."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from ..errors import ConversionError
from ..layers import ElasticView
from .arguments import check_capacity, check_minimum, check_model, matches, nearest, patterns
from .axes import Axes
from .forms import Form, form_of
from .names import taken_name
from .plan import Plan, PlannedDim, PlannedModule, RigidAxis, Stretches
from .statics import check_static
from .structure import Atom, Structure, atoms, forget_history, size, stiffen
from .switches import find_switches
from .trace import Example, Run, in_mode, owned_tensors, run
from .verify import Mode, Verification


def make_plan(
    model: nn.Module,
    example_inputs: Any,
    *,
    capacity: float | Mapping[str, float] = 1.0,
    minimum: int = 1,
    include: str | Iterable[str] | None = None,
    exclude: str | Iterable[str] | None = None,
) -> Plan:
    """Find out what in a model can be elastic. See :func:`esper_elastic.plan`."""
    check_model(model)
    check_minimum(minimum)
    check_capacity(capacity)
    wanted, unwanted = patterns("include", include), patterns("exclude", exclude)
    example = Example(example_inputs)
    axes = Axes()
    for name, _, _, tensor in owned_tensors(model):
        axes.names.setdefault(id(tensor), name)
    try:
        runs = _runs(model, example, axes)
        _fix_excluded(model, axes, unwanted)
        _fix_taken_names(model, axes)
        verification = Verification(model, example, axes, runs)
        verification.settle()
        if wanted:
            _fix_others(model, axes, wanted)
        return _Planner(model, axes, verification, runs, capacity, minimum).plan()
    finally:
        forget_history()


#: Modules that hand their children's tensors to a fused kernel in evaluation, which no run on fake tensors sees.
_FUSED_READERS: dict[type[nn.Module], tuple[str, ...]] = {
    nn.TransformerEncoderLayer: ("linear1", "linear2", "norm1", "norm2"),
    nn.MultiheadAttention: ("out_proj",),
}


def _runs(model: nn.Module, example: Example, axes: Axes) -> dict[Mode, Run]:
    """Runs in every mode that code may branch on. What evaluation does not reach, training may, and the other way round."""
    runs: dict[Mode, Run] = {}
    for mode in (Mode(False, True), Mode(True, True), Mode(False, False)):
        try:
            with in_mode(model, mode.training):
                runs[mode] = run(model, example, grad=mode.grad)
        except ConversionError:
            if not runs:
                raise
            continue  # layers dropped at random, in training alone
        axes.read(runs[mode])
    keep_recurrent(model, axes)
    for path, module in model.named_modules():
        for kind, names in _FUSED_READERS.items():
            if isinstance(module, kind):
                for key in (f"{path}.{name}.{tensor}".lstrip(".") for name in names for tensor in ("weight", "bias")):
                    axes.readers.setdefault(key, {})[module] = None
    return runs


def keep_recurrent(model: nn.Module, axes: Axes) -> None:
    """Keep the sizes of recurrent layers, which cuDNN and the kernels beside it take as one packed piece."""
    for path, module in model.named_modules():
        if isinstance(module, nn.RNNBase):
            for key in module._parameters:
                for axis in axes.tensors.get(f"{path}.{key}".lstrip("."), ()):
                    stiffen(axis, "a recurrent layer keeps its weights packed")


def _fix_excluded(model: nn.Module, axes: Axes, unwanted: list[str]) -> None:
    used: set[str] = set()
    for path, module in model.named_modules():
        hits = [pattern for pattern in unwanted if matches(path, [pattern])]
        used.update(hits)
        if hits:
            prefix = path + "." if path else ""
            own = [axis for key in (*module._parameters, *module._buffers) for axis in axes.tensors.get(prefix + key, ())]
            for axis in (*own, *([axes.normalised[module]] if module in axes.normalised else ())):
                stiffen(axis, f"{hits[0]!r} is excluded")
    unknown = [pattern for pattern in unwanted if pattern not in used]
    if unknown:
        near = nearest(unknown[0], [path for path, _ in model.named_modules()])
        raise ConversionError(f"elasticize: exclude: {unknown[0]!r} fits no module of {type(model).__name__}. {near}")


def _fix_taken_names(model: nn.Module, axes: Axes) -> None:
    """Keep modules as they are whose code has a name of its own for something that it would find another thing under."""
    for path, module in model.named_modules():
        name = taken_name(module, ElasticView)
        if name is not None:
            prefix = path + "." if path else ""
            for key in (*module._parameters, *module._buffers):
                for axis in axes.tensors.get(prefix + key, ()):
                    stiffen(axis, f"{path or type(module).__name__} has a {name!r} of its own, a name that an elastic module needs")


def _fix_others(model: nn.Module, axes: Axes, wanted: list[str]) -> None:
    """Keep elastic only the dims that a module which fits produces."""
    kept: set[Atom] = set()
    used: set[str] = set()
    chosen = axes.choose()
    producing: dict[str, None] = {}
    rigid: dict[str, str] = {}
    for name, index in axes.produced:
        path = name.rpartition(".")[0]
        hits = [pattern for pattern in wanted if matches(path, [pattern])]
        units = tuple(atoms(axes.tensors[name][index]))
        if any(atom in chosen for atom in units):
            used.update(hits)
            kept.update(units if hits else ())
            producing[path] = None
        else:
            why = next((why for atom in units if (why := axes.why_fixed(atom))), "nothing changes them")
            rigid.update((pattern, f"The units of {path!r} stay: {why}. ") for pattern in hits if pattern not in rigid)
    unknown = [pattern for pattern in wanted if pattern not in used]
    if unknown:
        why = rigid.get(unknown[0], "")
        raise ConversionError(
            f"elasticize: include: {unknown[0]!r} fits no module of {type(model).__name__} that produces a dim. "
            f"{why}{nearest(unknown[0], producing)}"
        )
    for atom in chosen:
        if atom not in kept:
            stiffen((atom,), "it is not included")


class _Planner:
    """Turns what is known of axes into a plan."""

    def __init__(
        self,
        model: nn.Module,
        axes: Axes,
        verification: Verification,
        runs: Mapping[Mode, Run],
        capacity: float | Mapping[str, float],
        minimum: int,
    ) -> None:
        self.model = model
        self.axes = axes
        self.verification = verification
        self.runs = runs
        self.capacity = capacity
        self.minimum = minimum
        self.index: dict[Atom, int] = {}
        self.scale: dict[Atom, int] = {}

    def plan(self) -> Plan:
        elastic = set(self.axes.choose())
        forms = {path: form_of(module, self.axes, self.verification.follows) for path, module in self.model.named_modules()}
        modules_of = dict(self.model.named_modules())
        check_static(self.axes, self.runs.values(), {modules_of[path]: form for path, form in forms.items()})
        self._order(forms, elastic)
        self._scale(forms)
        dims = [self._dim(atom) for atom in self.index]
        self._name(dims, forms)
        self._bind(dims)
        self._bound(dims)
        switches = find_switches(self.model, self.runs)
        modules = []
        for path, form in forms.items():
            planned = self._module(path, form)
            planned.switch = switches.get(path)
            if planned.layer or planned.tensors or planned.sizes or planned.switch:
                modules.append(planned)
        return Plan(dims, modules, self._rigid(), self._count())

    # Dims

    def _order(self, forms: Mapping[str, Form], elastic: set[Atom]) -> None:
        """Number the elastic atoms in the order of the modules that produce them."""
        for form in forms.values():
            for axis in form.produced:
                for atom in atoms(axis):
                    if atom in elastic:
                        self.index.setdefault(atom, len(self.index))
        for axes in self.axes.tensors.values():
            for axis in axes:
                for atom in atoms(axis):
                    if atom in elastic:
                        self.index.setdefault(atom, len(self.index))

    def _scale(self, forms: Mapping[str, Form]) -> None:
        """Let dims that count groups count channels: their widths are multiples of the group's."""
        grouped = self.axes.counted_in_groups()
        inner: dict[Atom, int] = {}
        structures = [axis for axes in self.axes.tensors.values() for axis in axes]
        for axis in (*structures, *self.verification.follows.values()):
            for stretch in self.axes.stretches(axis):
                if stretch.atom is not None and not self._counts_groups(axis, stretch.atom):
                    inner[stretch.atom] = math.gcd(inner.get(stretch.atom, 0), stretch.inner)
        for form in forms.values():  # a convolution whose groups are of two widths takes whole groups alone
            widths = {stretch for axis in form.axes.values() for stretch in self.axes.stretches(axis) if stretch.atom in grouped}
            for atom in {atom for atom, _ in widths if atom is not None}:
                if len({inner for other, inner in widths if other is atom}) > 1:
                    inner[atom] = 1
        self.scale = {atom: inner.get(atom, 1) if atom in grouped else 1 for atom in self.index}

    def _counts_groups(self, axis: Structure, atom: Atom) -> bool:
        return size(axis) == atom.size and any(
            name in ("groups", "num_groups") and structure is axis for (_, name, _), structure in self.verification.follows.items()
        )

    def _dim(self, atom: Atom) -> PlannedDim:
        scale = self.scale[atom]
        n = atom.size * scale
        floor = max(self.minimum, atom.minimum * scale)
        floor = min(-(-floor // scale) * scale, n)
        return PlannedDim("", n, n, floor, scale, [], atom.compact_only, atom.mixed)

    def _name(self, dims: list[PlannedDim], forms: Mapping[str, Form]) -> None:
        """Name dims as ``ee.dims`` will."""
        taken: set[str] = set()
        for path, form in forms.items():
            made = list(dict.fromkeys(atom for axis in form.produced for atom in atoms(axis) if atom in self.index))
            for index, atom in enumerate(made):
                if not dims[self.index[atom]].name:
                    whole = path or next(key for key, own in form.tensors.items() if any(atom in atoms(axis) for axis in own))
                    several = len(made) > 1 if path else whole in taken
                    dims[self.index[atom]].name = f"{whole}:{index}" if several else whole
                    taken.add(dims[self.index[atom]].name)
        for atom, index in self.index.items():
            if not dims[index].name:
                name = next(n for n, axes in self.axes.tensors.items() if any(a is atom for axis in axes for a in atoms(axis)))
                dims[index].name = name

    def _bind(self, dims: list[PlannedDim]) -> None:
        for name, axes in self.axes.tensors.items():
            for index, axis in enumerate(axes):
                for atom in dict.fromkeys(atoms(axis)):
                    if atom in self.index:
                        dims[self.index[atom]].bindings.append(f"{name}[{index}]")

    def _bound(self, dims: list[PlannedDim]) -> None:
        """Set capacities, as far as code goes along beyond the present sizes."""
        wanted = {atom: self._capacity(dims[index]) for atom, index in self.index.items()}
        names = {dim.name for dim in dims}
        if isinstance(self.capacity, Mapping):
            unknown = [name for name in self.capacity if name not in names]
            if unknown:
                raise ConversionError(
                    f"elasticize: capacity: {unknown[0]!r} names no dim. A dim is named after the module that produces it. "
                    f"{nearest(unknown[0], [dim.name for dim in dims])}"
                )
        grown = {atom: n // self.scale[atom] for atom, n in wanted.items() if n > atom.size * self.scale[atom]}
        refused = self.verification.check_growth(grown)
        for atom, index in self.index.items():
            if atom in refused:
                dims[index].note = f"its capacity is its size, since beyond it {refused[atom]}"
            else:
                dims[index].capacity = wanted[atom]

    def _capacity(self, dim: PlannedDim) -> int:
        given: Any = self.capacity.get(dim.name, 1.0) if isinstance(self.capacity, Mapping) else self.capacity
        absolute = isinstance(self.capacity, Mapping) and isinstance(given, int) and given >= dim.size
        units = given if absolute else math.ceil(dim.size * given)
        return -(-int(units) // dim.multiple_of) * dim.multiple_of

    # Modules

    def _spell(self, axis: Structure) -> Stretches:
        found: Stretches = []
        for stretch in self.axes.stretches(axis):
            if stretch.atom is None:
                found.append([None, stretch.inner])
            else:
                found.append([self.index[stretch.atom], stretch.inner // self.scale[stretch.atom]])
        return found

    def _spell_size(self, axis: Structure) -> dict[str, Any]:
        """A size that a module keeps: that of an axis, over a number where it counts groups of what the dim counts."""
        stretches = self.axes.stretches(axis)
        over = math.lcm(*(self.scale[s.atom] // math.gcd(s.inner, self.scale[s.atom]) for s in stretches if s.atom is not None))
        found: Stretches = []
        for stretch in stretches:
            if stretch.atom is None:
                found.append([None, stretch.inner * over])
            else:
                found.append([self.index[stretch.atom], stretch.inner * over // self.scale[stretch.atom]])
        return {"axis": found, "over": over}

    def _moves(self, axis: Structure | None) -> bool:
        return axis is not None and any(atom in self.index for atom in atoms(axis))

    def _module(self, path: str, form: Form) -> PlannedModule:
        planned = PlannedModule(path)
        if form.layer is not None:
            planned.layer = form.layer.__name__
            planned.axes = {name: self._spell(axis) for name, axis in form.axes.items()}
        elif any(self._moves(axis) for own in form.tensors.values() for axis in own):
            planned.tensors = {
                name: [self._spell(axis) if self._moves(axis) else None for axis in own] for name, own in form.tensors.items()
            }
            planned.newborn = form.newborn
            planned.mixed = form.mixed
        for name, kept in form.sizes.items():
            if isinstance(kept, list):
                if any(self._moves(axis) for axis in kept):
                    planned.sizes[name] = [self._spell_size(a) if a is not None and self._moves(a) else None for a in kept]
            elif self._moves(kept):
                planned.sizes[name] = self._spell_size(kept)
        return planned

    # What stays

    def _rigid(self) -> list[RigidAxis]:
        found = []
        for name, _, _, tensor in owned_tensors(self.model):
            if not isinstance(tensor, nn.Parameter):
                continue
            for index, axis in enumerate(self.axes.tensors.get(name, ())):
                if not self._moves(axis) and size(axis) > 1:
                    reasons = [self.axes.why_fixed(atom) for atom in atoms(axis)]
                    vague = "nothing changes it" if reasons else "code tells its indices apart one by one"
                    found.append(RigidAxis(name, index, size(axis), next((why for why in reasons if why), vague)))
        return found

    def _count(self) -> tuple[int, int]:
        total = elastic = 0
        seen: set[int] = set()
        for name, _, _, tensor in owned_tensors(self.model):
            if not isinstance(tensor, nn.Parameter) or id(tensor) in seen:
                continue
            seen.add(id(tensor))
            total += tensor.numel()
            if any(self._moves(axis) for axis in self.axes.tensors.get(name, ())):
                elastic += tensor.numel()
        return total, elastic
