"""Growth where the loss stalls."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ...control import ElasticDim
from ...model import known
from ..decisions import AdaptationDecision
from ..state import TrainingState
from .plateau import PlateauDetector


class GrowOnPlateau:
    """Grows when the loss has stalled: all dims named, by a factor, in one request.

    Args:
        dims: names, as of :func:`ee.dims`; all of the model's by default.
        factor: of the present width, up to the capacity.
        window: losses in each of the two means that are compared.
        min_improvement: the relative fall from one mean to the next below which the loss counts as stalled.
        parameters: of the decisions beside the width, as ``{"init": "split"}``. With ``"gradmax"``, one more step is made and observed
            before the network grows.
        confidence: of the decisions.
    """

    name = "grow on plateau"

    def __init__(
        self,
        dims: Sequence[str] | None = None,
        *,
        factor: float = 1.5,
        window: int = 50,
        min_improvement: float = 0.01,
        parameters: Mapping[str, Any] | None = None,
        confidence: float = 1.0,
    ) -> None:
        self._dims = None if dims is None else list(dims)
        self._factor, self._confidence = factor, confidence
        self._parameters = dict(parameters or {})
        self._detector = PlateauDetector(window, min_improvement)
        self._stalled: str | None = None

    def observes(self, state: TrainingState) -> str | None:
        """The step after a stall, for the birth of units by GradMax."""
        return "gradmax" if self._stalled is not None and self._parameters.get("init") == "gradmax" else None

    def decisions(self, state: TrainingState) -> Iterable[Any]:
        """One request at a stall; the detector begins anew after it."""
        self._detector.update(state.loss)
        self._stalled = reason = self._stalled or self._detector.stalled()
        if reason is None or (self._parameters.get("init") == "gradmax" and state.observed is None):
            return ()
        self._stalled = None
        self._detector.reset()
        dims = known(state.model)[0]
        found = {name: dims[name] for name in (self._dims if self._dims is not None else dims)}
        targets = {name: _grown(dim, self._factor) for name, dim in found.items()}
        wanted = [
            AdaptationDecision(
                "grow", name, parameters={"width": width, **self._parameters}, confidence=self._confidence, metadata={"reason": reason}
            )
            for name, width in targets.items()
            if width > found[name].active
        ]
        return [wanted] if wanted else ()

    def state_dict(self) -> dict[str, Any]:
        """The losses that it looks at."""
        return {"losses": self._detector.losses, "stalled": self._stalled}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what :meth:`state_dict` gave."""
        self._detector.reset()
        for loss in state["losses"]:
            self._detector.update(loss)
        self._stalled = state["stalled"]


def _grown(dim: ElasticDim, factor: float) -> int:
    step = dim.multiple_of
    width = max(round(dim.active * factor / step) * step, dim.active + step)
    return min(width, dim.capacity - dim.capacity % step)
