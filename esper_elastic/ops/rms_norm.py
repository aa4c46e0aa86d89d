"""``rms_norm``: meaning in :func:`reference.rms_norm`."""

from __future__ import annotations

from torch import Tensor

from . import reference
from .layer_norm import require_sizes
from .widths import Widths


def rms_norm(input: Tensor, fixed_shape: tuple[int, ...], weight: Tensor | None, widths: Widths, eps: float | None) -> Tensor:
    """Each row's active units over the root of their mean square, times ``weight``.

    Args:
        input: ``(*, units, *fixed_shape)``, the active units in compact layout, all in static layout.
        fixed_shape: the normalised sizes behind the elastic one.
        weight: ``(capacity, *fixed_shape)`` or ``None``.
        widths: of the one axis of the units.
        eps: added to the mean square; ``None`` for the machine epsilon of the type that it is computed in.

    Shape:
        That of ``input``; zeros behind the active units in static layout.

    Raises:
        LayoutError: the normalised sizes of ``input`` are not those that the layer has now.
    """
    require_sizes(input, fixed_shape, widths)
    return reference.rms_norm(input, fixed_shape, weight, widths, eps)
