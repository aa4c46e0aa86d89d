"""A case for an axis rule: a small network around an op, and by hand, which indices of which weight each unit has.

An axis is written as its stretches in order: ``"a"`` is the units of dim ``a``, ``"a*4"`` four indices for each of them, ``"3:a"`` three
runs of its units, ``"5"`` five indices that stay. Nothing here asks the converter what it makes of a network: :func:`sliced` builds the
narrow one anew and copies the kept weights.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

Sizes = Mapping[str, int]

KINDS: dict[str, tuple[type[nn.Module], tuple[int, ...]]] = {
    "rows": (nn.Linear, (3, 5)),
    "sequences": (nn.Linear, (2, 7, 5)),
    "signals": (nn.Conv1d, (2, 5, 8)),
    "images": (nn.Conv2d, (2, 5, 4, 6)),
}


@dataclass(frozen=True)
class Case:
    """One op or trap.

    Attributes:
        name: of the case.
        op: what happens between the layers that make units and the one that uses them: ``op(net, *made)``.
        made: the axis of each layer's outputs.
        used: the axis of the last layer's inputs; ``None`` for no last layer.
        dims: name in axes -> size.
        kind: of data, a key of :data:`KINDS`.
        setup: gives the network more parameters, buffers, modules or sizes: ``setup(net, sizes)``.
        own: axes of what ``setup`` gave, by name, separated by commas.
        batch: of the data, if it is not as usual.
        compact: why no dim can be static, as a pattern; for some dims alone, a dict.
        mixed: why no dim can grow exactly, likewise.
        rigid: parameter axis -> why it stays.
        multiple: dim -> what widths are multiples of.
        minimum: the smallest width that is asked for.
        normed: whether a layer of ours norms over the units: they change what it gives.
        random: whether results depend on where random numbers fall.
    """

    name: str
    op: Callable[..., Tensor]
    made: tuple[str, ...] = ("a",)
    used: str | None = "a"
    dims: Sizes = field(default_factory=lambda: {"a": 12})
    kind: str = "rows"
    setup: Callable[[Any, Sizes], None] = lambda net, sizes: None
    own: Mapping[str, str] = field(default_factory=dict)
    batch: int | None = None
    compact: str | Mapping[str, str] | None = None
    mixed: str | Mapping[str, str] | None = None
    rigid: Mapping[str, str] = field(default_factory=dict)
    multiple: Sizes = field(default_factory=dict)
    minimum: int = 1
    normed: bool = False
    random: bool = False

    def inputs(self) -> Tensor:
        shape = list(KINDS[self.kind][1])
        shape[0] = self.batch or shape[0]
        return torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    def build(self, sizes: Sizes | None = None) -> nn.Module:
        """The network at sizes of one's choice, the same at each call."""
        torch.manual_seed(0)
        return Net(self, self.dims if sizes is None else sizes).double()

    def live(self) -> list[str]:
        """The dims that occur in some axis."""
        return [name for name in self.dims if any(name in named(spec) for axes in self.axes().values() for spec in axes)]

    def axes(self) -> dict[str, list[str]]:
        """The axes of every parameter and buffer that has some with units."""
        found = {name: [part.strip() for part in spec.split(",")] for name, spec in self.own.items()}
        for index, spec in enumerate(self.made):
            found |= {f"makers.{index}.weight": [spec], f"makers.{index}.bias": [spec]}
        if self.used is not None:
            found["last.weight"] = ["4", self.used]
        return found

    def bindings(self, dim: str) -> set[str]:
        """Every tensor axis that a dim runs through."""
        return {f"{name}[{index}]" for name, axes in self.axes().items() for index, spec in enumerate(axes) if dim in named(spec)}


class Net(nn.Module):
    """Layers that make units, an op, and a layer that uses them."""

    def __init__(self, case: Case, sizes: Sizes):
        super().__init__()
        layer = KINDS[case.kind][0]
        window = () if layer is nn.Linear else (1,)
        self.makers = nn.ModuleList(layer(5, length(spec, sizes), *window) for spec in case.made)
        self.last = None if case.used is None else layer(length(case.used, sizes), 4, *window)
        self.op = case.op
        case.setup(self, sizes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.op(self, *[maker(x) for maker in self.makers])
        return x if self.last is None else self.last(x)


def stretches(spec: str) -> list[tuple[str, int, int]]:
    """What is written of an axis: ``(dim or number, runs, inner)``."""
    found = []
    for text in spec.split():
        runs, _, rest = text.rpartition(":")
        name, _, inner = rest.partition("*")
        found.append((name, int(runs or 1), int(inner or 1)))
    return found


def named(spec: str) -> set[str]:
    return {name for name, _, _ in stretches(spec) if not name.isdigit()}


def length(spec: str, sizes: Sizes) -> int:
    return len(kept(spec, sizes, sizes))


def kept(spec: str, full: Sizes, now: Sizes) -> list[int]:
    """The indices of an axis that stay when dims go from their sizes ``full`` to ``now``."""
    found, start = [], 0
    for name, runs, inner in stretches(spec):
        size, width = (int(name), int(name)) if name.isdigit() else (full[name], now[name])
        for _ in range(runs):
            found += range(start, start + width * inner)
            start += size * inner
    return found


def part(tensor: Tensor, axes: list[str], full: Sizes, now: Sizes) -> Tensor:
    """The part of a tensor that stays; axes beyond those that are written stay whole."""
    for index, spec in enumerate(axes):
        tensor = tensor.index_select(index, torch.tensor(kept(spec, full, now)))
    return tensor


def sliced(case: Case, net: nn.Module, full: Sizes, now: Sizes) -> nn.Module:
    """An ordinary narrow network with the weights that stay of ``net``, which has sizes ``full``."""
    narrow = case.build(now)
    axes = case.axes()
    state = {name: part(tensor, axes.get(name, []), full, now) for name, tensor in net.state_dict().items()}
    narrow.load_state_dict(state)
    return narrow


def by_name(*cases: Case) -> dict[str, Case]:
    """The cases under their names, each of which may occur once."""
    found = {case.name: case for case in cases}
    assert len(found) == len(cases), [case.name for case in cases]
    return found


def simple(ops: Mapping[str, Callable[..., Tensor]], **fields: Any) -> list[Case]:
    """Cases that differ in their ops alone."""
    return [Case(name, op, **fields) for name, op in ops.items()]


def still(rigid: str, ops: Mapping[str, Callable[..., Tensor]], **fields: Any) -> list[Case]:
    """Cases in which the units of the first layer stay, and why."""
    fields = {"made": ("12",), "used": "12", **fields}
    return [Case(name, op, rigid={"makers.0.weight[0]": rigid}, **fields) for name, op in ops.items()]
