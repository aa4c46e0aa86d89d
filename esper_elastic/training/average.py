"""An average of the weights that keeps up with widths: its units are moved, born and put to sleep with those of the model.

Surgery takes averages along by itself (:func:`esper_elastic.transaction`); this is for what changes without it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .. import followers
from ..control import ElasticDim, Switch
from ..model import known
from ..surgery.following import Following


class Average:
    """Follows the units of the parameters of ``model`` in an average of them.

    Args:
        model: that is averaged.
        ema: as :func:`esper_elastic.transaction` takes one.

    Attributes:
        state: per parameter, a dict that holds its average, as :class:`esper_elastic.followers.Follower` needs it.
    """

    def __init__(self, model: nn.Module, ema: Any) -> None:
        self.param_groups: list[dict[str, Any]] = []
        self.state: dict[Tensor, dict[str, Tensor]] = {}
        self._model, self._ema = model, ema
        self._twins: list[nn.Module] = []
        self.refresh()
        followers.follow(self)  # type: ignore[arg-type]

    def refresh(self) -> None:
        """Look up anew which tensor is the average of which parameter, after parameters have come or gone; and follow widths."""
        found = Following(self._model, [], self._ema)
        self._twins = found.twins
        averages = found.average or {}
        named = dict(self._model.named_parameters())
        if self._twins:
            averages = {name: tensor for twin in self._twins for name, tensor in twin.named_parameters()}
            self.state = {parameter: {"average": averages[name]} for name, parameter in named.items() if name in averages}
        else:
            keys = {name: found._key(parameter) for name, parameter in named.items()}
            self.state = {named[name]: {"average": averages[key]} for name, key in keys.items() if isinstance(averages.get(key), Tensor)}
        self.follow_widths()

    def follow_widths(self) -> None:
        """Have the widths and switches of the model, in one commit."""
        dims, blocks = known(self._model)
        for twin in self._twins:
            their_dims, their_blocks = known(twin)
            changes: list[tuple[ElasticDim | Switch, int]] = [
                (their_dims[name], dim.active) for name, dim in dims.items() if name in their_dims
            ]
            changes += [(their_blocks[path].switch, int(block.switch.on)) for path, block in blocks.items() if path in their_blocks]
            if changes:
                changes[0][0].block.stage_all(changes)

    @torch.no_grad()
    def take_buffers(self) -> None:
        """Have the buffers of the model, whose units may have moved: averages of parameters do not average them."""
        buffers = dict(self._model.named_buffers())
        for twin in self._twins:
            for name, buffer in twin.named_buffers():
                if name in buffers and buffers[name].shape == buffer.shape:
                    buffer.copy_(buffers[name])

    @torch.no_grad()
    def permute_state(self, param: Tensor, axis: int, order: Tensor) -> None:
        """Bring index ``order[i]`` of ``axis`` to place ``i``."""
        average = self.state[param]["average"]
        if average.shape == param.shape:
            average.copy_(average.index_select(axis, order.to(average.device)))

    @torch.no_grad()
    def reset_state(self, param: Tensor, axis: int, start: int, stop: int) -> None:
        """Let the average of newborn units begin at what they are."""
        average = self.state[param]["average"]
        if average.shape == param.shape:
            average.narrow(axis, start, stop - start).copy_(param.narrow(axis, start, stop - start))
