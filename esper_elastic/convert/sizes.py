"""The sizes that modules of ``torch.nn`` keep as attributes, and the axes that they are the sizes of."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

from .structure import Structure, resolve, size

if TYPE_CHECKING:
    from .axes import Axes
    from .verify import Place


def known_sizes(model: nn.Module, axes: Axes) -> dict[Place, Structure]:
    """Every attribute of the modules of ``torch.nn`` in ``model`` that is the size of an axis."""
    found: dict[Place, Structure] = {}
    for module in model.modules():

        def axis(name: str, index: int, module: nn.Module = module) -> Structure | None:
            tensor = module._parameters.get(name)
            own = axes.tensors.get(axes.names.get(id(tensor), ""))  # a tied one has the name that it has in another module
            return None if own is None else own[index]

        sizes: dict[tuple[str, int | None], Structure | None] = {}
        if isinstance(module, nn.Linear):
            sizes = {("in_features", None): axis("weight", 1), ("out_features", None): axis("weight", 0)}
        elif isinstance(module, nn.modules.conv._ConvNd):
            into, out = (0, 1) if module.transposed else (1, 0)
            if module.groups == 1:
                sizes = {("in_channels", None): axis("weight", into), ("out_channels", None): axis("weight", out)}
            else:
                sizes = _grouped(module, axes, axis("weight", 0), axis("weight", 1))
        elif isinstance(module, nn.modules.batchnorm._NormBase):
            sizes = {("num_features", None): axes.normalised.get(module)}
        elif isinstance(module, nn.LayerNorm | nn.RMSNorm):
            sizes = {("normalized_shape", 0): axes.normalised.get(module)}
        elif isinstance(module, nn.GroupNorm):
            channels = axes.normalised.get(module)
            sizes = {("num_channels", None): channels}
            if channels is not None and module.num_groups > 1:
                sizes["num_groups", None] = leading(channels, module.num_groups)
        elif isinstance(module, nn.Embedding):
            sizes = {("num_embeddings", None): axis("weight", 0), ("embedding_dim", None): axis("weight", 1)}
        elif isinstance(module, nn.PReLU):
            sizes = {("num_parameters", None): axis("weight", 0)}
        elif isinstance(module, nn.MultiheadAttention):
            embedded = axis("out_proj.weight", 0)
            sizes = {("embed_dim", None): embedded}
            if module._qkv_same_embed_dim:
                sizes |= {("kdim", None): embedded, ("vdim", None): embedded}
            else:
                sizes |= {("kdim", None): axis("k_proj_weight", 1), ("vdim", None): axis("v_proj_weight", 1)}
        for (name, index), structure in sizes.items():
            kept = module.__dict__.get(name)
            number = kept[index] if index is not None and kept is not None else kept
            if structure is not None and size(structure) == number:
                found[module, name, index] = structure
    return found


def _grouped(
    module: nn.modules.conv._ConvNd, axes: Axes, first: Structure | None, second: Structure | None
) -> dict[tuple[str, int | None], Structure | None]:
    entered = axes.entered.get(module)
    if first is None or second is None or entered is None:
        return {}
    groups = leading(first, module.groups)
    into, out = ("out_channels", "in_channels") if module.transposed else ("in_channels", "out_channels")
    produced = None if groups is None else (*groups, *second)
    return {
        (into, None): produced if module.transposed else entered,
        (out, None): entered if module.transposed else first,
        ("groups", None): groups,
    }


def leading(axis: Structure, count: int) -> Structure | None:
    """The leading factors of an axis that make ``count``."""
    factors = resolve(axis)
    for end in range(len(factors) + 1):
        if size(factors[:end]) == count:
            return factors[:end]
    return None
