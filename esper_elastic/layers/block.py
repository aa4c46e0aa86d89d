"""``ElasticBlock``: a part of a model that a switch in the control block turns on and off."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Self

import torch
from torch import Tensor, nn

from .. import ops
from ..control import Axis, ControlBlock, Switch, keep_for_graphs, of_fixed_shape
from ..errors import LayoutError
from ..ops.reference import fence
from . import registry, state
from .base import ElasticLayer

KINDS = ("block", "branch")


class _Position:
    """Stands for a block among the users of its switch."""

    def __init__(self, block: Switchable) -> None:
        self.block = block

    def tensor_axes(self) -> dict[str, tuple[Axis | None, ...]]:
        return {}

    def bind_control(self) -> None:
        self.block.bind_switch()


class Switchable(nn.Module):
    """What has a switch. A concrete class says what is inside, and computes it."""

    speaks_of_widths = True  # a state_dict does
    control: Tensor
    slot: Tensor
    kind: str
    static: bool
    switch: Switch

    @property
    def inside(self) -> nn.Module:
        """The module that holds everything under the switch."""
        return self

    def governed(self) -> Iterator[nn.Module]:
        """The modules under the switch."""
        return self.inside.modules()

    def compute(self, *args: Any, **kwargs: Any) -> Any:
        """What the block gives while it is on."""
        raise NotImplementedError

    def install_switch(self, kind: str, on: bool = True) -> None:
        """Put everything inside under a switch of its own."""
        state.wrap_module_methods()
        if kind not in KINDS:
            raise LayoutError(f"{type(self).__name__}: kind: expected 'block' or 'branch', got {kind!r}.")
        self.kind = kind
        self.static = False
        self.switch = Switch(on)
        self._position = _Position(self)
        self.switch.attach(self._position)
        self.govern_inside()

    @property
    def on(self) -> bool:
        """Whether the block takes part."""
        return self.switch.on

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if self.static and (torch.compiler.is_compiling() or args[0].device.type != "cpu"):
            otherwise = args[0] if self.kind == "block" else None
            return ops.switch(self.compute(*args, **kwargs), otherwise, self.control, self.slot, self.backend)
        if self.switch.on:
            output = self.compute(*args, **kwargs)
        else:
            output = args[0] if self.kind == "block" else torch.zeros_like(args[0])
        return fence(output, self.control, "ElasticBlock") if isinstance(output, Tensor) else output

    def govern_inside(self) -> None:
        """Put everything inside under the switch. Needed again only after modules or parameters inside were replaced."""
        inside = list(self.governed())
        ControlBlock.merge((self.switch.block, *(m._widths.block for m in inside if isinstance(m, ElasticLayer))))
        for module in inside:
            if isinstance(module, ElasticLayer):
                module.govern(self.switch)
            for parameter in module._parameters.values():
                if parameter is not None:
                    registry.add_switch(parameter, self.switch)
        self.bind_switch()

    def be_static(self, static: bool) -> None:
        """Choose the layout of what goes in and out."""
        self.static = static
        self.bind_switch()

    def bind_switch(self) -> None:
        """Fetch the control tensor and the slot again, after they moved."""
        device = next((p.device for p in self.inside.parameters()), torch.device("cpu")) if self.static else torch.device("cpu")
        self.control = self.switch.block.on(device)
        self.backend = ops.choose(device, self.static)
        keep_for_graphs(self.__dict__.get("slot"))
        with torch.inference_mode(False):
            self.slot = of_fixed_shape(torch.tensor([self.switch.slot], dtype=torch.int32, device=self.control.device))

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        for parameter in self.inside.parameters():
            registry.forget(parameter)  # as ElasticLayer does
        super()._apply(fn, recurse)
        self.govern_inside()
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in super().__getstate__().items() if key not in ("control", "slot")}

    def __setstate__(self, attributes: dict[str, Any]) -> None:
        state.wrap_module_methods()
        super().__setstate__(attributes)
        self.switch.attach(self._position)
        self.govern_inside()


class ElasticBlock(Switchable):
    """A module with a switch. While it is off, everything inside is dormant: parameters, optimizer state and batch-norm counters.

    Args:
        module: maps one tensor to one tensor; further arguments are passed through to it.
        kind: what the block gives while it is off. ``"block"``: its first input, for a part that preserves shapes. ``"branch"``: zeros of
            the shape of that input, for a residual branch.
        on: the first position of the switch.

    Shape:
        Those of ``module``; where the switch is meant to be used, output and input have one shape.

    Effects:
        In compact layout the switch is read on the host and an off block runs nothing. In static layout, under ``torch.compile`` or on a
        GPU, it is data: elastic layers inside skip their work, other modules run and their result is dropped.
    """

    def __init__(self, module: nn.Module, kind: str = "block", *, on: bool = True) -> None:
        super().__init__()
        self.module = module
        self.install_switch(kind, on)

    @property
    def inside(self) -> nn.Module:
        return self.module

    def compute(self, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)

    @property
    def layout(self) -> str:
        """``"compact"`` or ``"static"``; set by :func:`esper_elastic.set_layout`."""
        return "static" if self.static else "compact"

    @layout.setter
    def layout(self, layout: str) -> None:
        self.be_static(layout == "static")

    def extra_repr(self) -> str:
        return f"kind={self.kind!r}, {'on' if self.on else 'off'}"
