"""``ElasticEmbedding``."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from .. import ops
from ..control import Axis
from ..errors import CapacityError, LayoutError
from .base import ElasticLayer, resolve_dim


class ElasticEmbedding(ElasticLayer, nn.Embedding):
    """An ``nn.Embedding`` whose widths are data: the size of its vectors, and how many of them there are.

    Args:
        num_embeddings: active vectors: indices are below it.
        embedding_dim: active size of each.
        padding_idx: the index whose vector is not trained, as in ``nn.Embedding``; ``keep`` of the vectors renumbers it with them, and
            while it sleeps there is none.
        max_norm: as in ``nn.Embedding``: the norm of the active part of a vector looked up is made no larger.
        norm_type: of ``max_norm``.
        scale_grad_by_freq: as in ``nn.Embedding``.
        sparse: must be ``False``.
        _weight: the active vectors, instead of random ones.
        _freeze: whether the weight needs no gradient.
        device: of the weight.
        dtype: of the weight.
        max_num_embeddings: capacity; defaults to ``num_embeddings``.
        max_embedding_dim: capacity; defaults to ``embedding_dim``.
        in_dim: a dim of the indices to share, instead of a new one: one dim, or a multiple of one.
        out_dim: a dim of the vectors' units to share, instead of a new one.

    Shape:
        Input: any, of indices. Output ``(*, embedding_dim)``: the active size in compact layout, capacity in static layout. ``weight`` is
        ``(indices' capacity, vectors' capacity)``, for ever.

    Effects:
        With ``max_norm`` a forward writes the active part of the vectors that it looks up; nothing while a switch above is off.

    Raises:
        CapacityError: a size is no valid width, or disagrees with the dim given.
        LayoutError: gradients are to be sparse.
    """

    dense_class = nn.Embedding
    newborn: ClassVar = {"weight": ("draw", "draw")}
    in_dim: Axis
    out_dim: Axis

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None = None,
        max_norm: float | None = None,
        norm_type: float = 2.0,
        scale_grad_by_freq: bool = False,
        sparse: bool = False,
        _weight: Tensor | None = None,
        _freeze: bool = False,
        device: Any = None,
        dtype: Any = None,
        *,
        max_num_embeddings: int | None = None,
        max_embedding_dim: int | None = None,
        in_dim: Axis | None = None,
        out_dim: Axis | None = None,
    ) -> None:
        _require_dense_gradients(sparse)
        dims = _dims(num_embeddings, embedding_dim, max_num_embeddings, max_embedding_dim, in_dim, out_dim)
        factory = {"device": device, "dtype": dtype}
        dense = nn.Embedding(
            num_embeddings, embedding_dim, padding_idx, max_norm, norm_type, scale_grad_by_freq, sparse, _weight, _freeze, **factory
        )
        self._adopt(dense, dims)

    @classmethod
    def from_dense(
        cls,
        module: nn.Embedding,
        *,
        max_num_embeddings: int | None = None,
        max_embedding_dim: int | None = None,
        in_dim: Axis | None = None,
        out_dim: Axis | None = None,
    ) -> Self:
        """The elastic form of ``module``, with copies of its vectors as the active ones; no random number is drawn."""
        cls._require_dense(module)
        _require_dense_gradients(module.sparse)
        dims = _dims(module.num_embeddings, module.embedding_dim, max_num_embeddings, max_embedding_dim, in_dim, out_dim)
        return cls._from(module, dims)

    @property
    def num_embeddings(self) -> int:  # type: ignore[override]
        """How many vectors there are now, as a classifier over the indices would count them."""
        return self._widths.size(1)

    @property
    def embedding_dim(self) -> int:  # type: ignore[override]
        """The size of the vectors that activations have now."""
        return self._widths.size(0)

    def tensor_axes(self) -> dict[str, tuple[Axis | None, ...]]:
        return {"weight": (self.in_dim, self.out_dim)}

    def forward(self, input: Tensor) -> Tensor:
        return ops.embedding(input, self.weight, self._widths, self.padding_idx, self.max_norm, self.norm_type, self.scale_grad_by_freq)

    def draw(self, values: Tensor, generator: torch.Generator | None = None, axis: int = 1) -> None:
        values.normal_(generator=generator)
        if self.padding_idx is not None and axis == 1:
            values[self.padding_idx].zero_()

    def renumber(self, axis: int, order: Tensor) -> None:
        if self.padding_idx is not None and axis == 0:
            self.padding_idx = int((order == self.padding_idx).nonzero())

    def _dense(self, device: Any, dtype: Any) -> nn.Embedding:
        rows = self.in_dim.active
        padding_idx = self.padding_idx if self.padding_idx is not None and self.padding_idx < rows else None
        settings = (padding_idx, self.max_norm, self.norm_type, self.scale_grad_by_freq)
        return nn.Embedding(rows, self.out_dim.active, *settings, device=device, dtype=dtype)

    def extra_repr(self) -> str:
        shown = SimpleNamespace(**self.__dict__, num_embeddings=self.num_embeddings, embedding_dim=self.embedding_dim)
        text = nn.Embedding.extra_repr(shown)  # type: ignore[arg-type]
        return f"{text}, max_num_embeddings={self.in_dim.capacity}, max_embedding_dim={self.out_dim.capacity}"


def _require_dense_gradients(sparse: bool) -> None:
    if sparse:
        raise LayoutError(
            "ElasticEmbedding: sparse: expected False, got True: growth, pruning and the optimizers of active slices need gradients of the "
            "weight's shape. Leave sparse out; the gradient has the size of the weight, and only rows looked up are not zero."
        )


def _dims(
    num_embeddings: int,
    embedding_dim: int,
    max_num_embeddings: int | None,
    max_embedding_dim: int | None,
    in_dim: Axis | None,
    out_dim: Axis | None,
) -> dict[str, Axis]:
    """The axes of the vectors' units and of the indices: in this order, since the first is what the layer produces."""
    label = "ElasticEmbedding"
    rows = resolve_dim(label, num_embeddings, "num_embeddings", max_num_embeddings, in_dim)
    if len(rows.segments) > 1:
        raise CapacityError(
            f"{label}: in_dim: expected one dim or a multiple of one, got {rows!r}: the numbers of what comes second would change with the "
            "width of what comes first. Use an embedding for each."
        )
    return {"out_dim": resolve_dim(label, embedding_dim, "embedding_dim", max_embedding_dim, out_dim), "in_dim": rows}
