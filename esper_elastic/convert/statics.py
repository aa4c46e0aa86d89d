"""Which dims can be static: whether zeros for dormant units stay without effect through all of a model's plain ops.

In static layout activations have capacity size and dormant units are zero. Layers of ours write these zeros and never read dormant units.
Plain ops between them do not know: what they make of zeros is followed here, value by value. A sigmoid makes halves of them; that is no
harm until something sums over the axis. Ops that count its indices (means, softmax) have been noted by :mod:`rules` already.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from . import rules
from .axes import Axes, short
from .forms import Form
from .restore import generators_kept
from .structure import Atom, Structure, atoms, restrict
from .trace import Node, Run, Value

#: Ops whose result is zero where their operand is.
_KEEPING = frozenset(
    [
        "sum",
        "mean",
        "amax",
        "amin",
        "prod",
        "var",
        "std",
        "linalg_vector_norm",
        "norm",
        "max",
        "min",
        "cumsum",
        "topk",
        "sort",
        "flip",
        "roll",
        "view",
        "_unsafe_view",
        "reshape",
        "as_strided",
        "permute",
        "transpose",
        "t",
        "unsqueeze",
        "squeeze",
        "expand",
        "repeat",
        "select",
        "unbind",
        "slice",
        "narrow",
        "diagonal",
        "split",
        "split_with_sizes",
        "unsafe_split",
        "chunk",
        "glu",
        "cat",
        "stack",
        "clone",
        "detach",
        "alias",
        "_to_copy",
        "contiguous",
        "positive",
        "lift_fresh",
        "pixel_shuffle",
        "pixel_unshuffle",
        "channel_shuffle",
        "native_channel_shuffle",
        "im2col",
        "col2im",
        "unfold",
        "tril",
        "triu",
        "gather",
        "index",
        "index_select",
        "scatter",
        "scatter_add",
        "index_add",
        "embedding",
        "zeros",
        "zeros_like",
        "new_zeros",
        "zero",
        "native_batch_norm",
        "_native_batch_norm_legit",
        "_native_batch_norm_legit_no_training",
        "native_group_norm",
    ]
)
_IMAGE_OPS = ("pool", "upsample", "reflection_pad", "replication_pad", "grid_sampler")
_PRODUCTS = ("mm", "bmm", "addmm", "baddbmm", "mv", "addmv", "dot", "linear", "convolution")
_NORMS = ("native_layer_norm", "_fused_rms_norm", "native_group_norm")
_RANDOM = ("bernoulli", "normal", "uniform", "exponential", "random", "rand", "randn", "rand_like", "randn_like")

Dirt = frozenset[Atom]
_CLEAN: Dirt = frozenset()


def check_static(axes: Axes, runs: Iterable[Run], forms: Mapping[nn.Module, Form]) -> None:
    """Note of every elastic atom that cannot be static why it cannot."""
    for run in runs:
        _Follower(axes, forms).follow(run)


class _Follower:
    """Follows dormant units through one run; a value is dirty along an atom if its dormant units may differ from zero."""

    def __init__(self, axes: Axes, forms: Mapping[nn.Module, Form]) -> None:
        self.axes = axes
        self.forms = forms
        self.dirt: dict[int, Dirt] = {}
        self.bases: dict[int, list[Value]] = {}
        self.known: dict[Any, bool | None] = {}

    def follow(self, run: Run) -> None:
        for node in run.nodes:
            own = self._own(node)
            found = self._outcome(node, own)
            for output in node.outputs:
                here = found & self._elastic(output.axes or [])
                self._set(node, output, here)

    def _set(self, node: Node, output: Value, dirt: Dirt) -> None:
        inputs = rules.values((node.args, node.kwargs))
        if any(output is value for value in inputs):  # written in place: other views of the memory see it
            for value in self.bases.get(id(output), [output]):
                self.dirt[id(value)] = self.dirt.get(id(value), _CLEAN) | dirt
            return
        self.dirt[id(output)] = dirt
        if inputs and rules.op_name(node.op) in _KEEPING:
            group = self.bases.setdefault(id(inputs[0]), [inputs[0]])
            group.append(output)
            self.bases[id(output)] = group

    def _own(self, node: Node) -> Dirt:
        """The atoms that the layer around an op writes zeros for."""
        form = self.forms.get(node.call.module)
        if form is None or form.layer is None:
            return _CLEAN
        return self._elastic(form.axes.values())

    def _elastic(self, axes: Iterable[Structure]) -> Dirt:
        return frozenset(atom for axis in axes for atom in atoms(axis) if self.axes.elastic(atom))

    def _of(self, tree: Any) -> Dirt:
        return frozenset().union(*(self.dirt.get(id(value), _CLEAN) for value in rules.values(tree)))

    def _outcome(self, node: Node, own: Dirt) -> Dirt:
        """The atoms along which an op's results may be dirty."""
        name = rules.op_name(node.op)
        inputs = rules.values((node.args, node.kwargs))
        everything = self._elastic(axis for value in (*inputs, *node.outputs) for axis in value.axes or [])
        if not everything:
            return _CLEAN
        if name in _NORMS and not own:
            self._refuse_norm(node)
        if name in _PRODUCTS:
            found = self._product(node, name, own)
        elif name in ("_weight_norm_interface", "_weight_norm"):
            found = everything
            for atom in everything:
                self._refuse(atom, node, "a weight norm divides by the norm of what sleeps")
        elif name in _RANDOM or rules.find(node.op) is None:
            found = everything
        elif name in _KEEPING or any(kind in name for kind in _IMAGE_OPS):
            found = self._of((node.args, node.kwargs))
            if name == "sum":
                self._refuse_sum(node, found)
        elif name.startswith("_scaled_dot_product"):
            found = self._of(node.args[2])
        elif name == "constant_pad_nd":
            value = rules.argument(node, 2, "value", 0)
            found = everything if value else self._of(node.args)
        elif rules.find(node.op) is rules.pointwise:
            found = frozenset(atom for atom in everything if self._evaluate(node, atom))
        else:
            found = everything
        return found - own

    def _product(self, node: Node, name: str, own: Dirt) -> Dirt:
        """Of a product of matrices, and of what is added to it. What is summed over has to be zero in one of the two."""
        first = 1 if name in ("addmm", "baddbmm", "addmv") else 0
        a, b = node.args[first : first + 2]
        if name == "convolution":
            summed = self._elastic([(a.axes or [])[1]]) & self._elastic(b.axes or []) - self._elastic(node.outputs[0].axes or [])
        else:
            summed = self._elastic([(a.axes or [()])[-1]]) & self._elastic(b.axes or [])
        for atom in (self.dirt.get(id(a), _CLEAN) & self.dirt.get(id(b), _CLEAN) & summed) - own:
            self._refuse(atom, node, "plain code sums over it what is not zero where units sleep")
        added = [node.args[0]] if first else [node.args[2]] if name in ("convolution", "linear") and len(node.args) > 2 else []
        here = self._elastic(node.outputs[0].axes or [])
        missing = frozenset(atom for value in rules.values(added) for atom in here - self._elastic(value.axes or []))
        return self._of((a, b, added)) | missing

    def _refuse_sum(self, node: Node, dirt: Dirt) -> None:
        left = self._elastic(node.outputs[0].axes or [])
        for atom in dirt - left:
            self._refuse(atom, node, "plain code sums over it what is not zero where units sleep")

    def _refuse_norm(self, node: Node) -> None:
        """Of the norms of ``torch.nn`` that stay as they are, since others read their tensors; the rest has been noted already."""
        axis = self.axes.normalised.get(node.call.module)
        if axis is not None and not (rules.op_name(node.op) == "native_group_norm" and rules.argument(node, 6, "group") > 1):
            for atom in self._elastic([axis]):
                self._refuse(atom, node, "a norm runs over it")

    def _refuse(self, atom: Atom, node: Node, why: str) -> None:
        restrict((atom,), f"{why} ({short(node.line)})")

    def _evaluate(self, node: Node, atom: Atom) -> bool:
        """Whether an elementwise op gives something else than zero where units sleep: tried with numbers."""
        pattern = tuple(
            None if not self._has(value, atom) else id(value) in self.dirt and atom in self.dirt[id(value)]
            for value in rules.values((node.args, node.kwargs))
        )
        key = (node.op, pattern, repr(_literals((node.args, node.kwargs))))
        if key not in self.known:
            self.known[key] = self._try(node, atom)
        outcome = self.known[key]
        if outcome is None:
            self._refuse(atom, node, "plain code has no finite value where units sleep")
        return outcome is not False

    def _has(self, value: Value, atom: Atom) -> bool:
        return any(other is atom for axis in value.axes or [] for other in atoms(axis))

    def _try(self, node: Node, atom: Atom) -> bool | None:
        smooth = not node.op._schema.is_mutable

        def number(value: Any, sample: float) -> Any:
            if not isinstance(value, Value):
                return value
            asleep = self._has(value, atom) and atom not in self.dirt.get(id(value), _CLEAN)
            made = torch.tensor(0.0 if asleep else sample).to(value.dtype)
            return made.requires_grad_() if made.is_floating_point() and smooth else made

        for sample in (0.37, -1.7, 2.3):
            with generators_kept(), torch.enable_grad():
                args, kwargs = tree_map(partial(number, sample=sample), (node.args, node.kwargs))
                results = node.op(*args, **kwargs)
            for result in results if isinstance(results, tuple | list) else (results,):
                if not isinstance(result, Tensor):
                    continue
                if result.is_floating_point() and not (result.isfinite().all() and _differentiable(result, (args, kwargs))):
                    return None
                if bool((result != 0).any()):
                    return True
        return False


def _differentiable(result: Tensor, arguments: Any) -> bool:
    """Whether the derivatives by all operands are finite."""
    leaves = [x for x in tree_leaves(arguments) if isinstance(x, Tensor) and x.requires_grad]
    if not result.requires_grad:
        return True
    grads = torch.autograd.grad(result, leaves, torch.ones_like(result), allow_unused=True, retain_graph=True)
    return all(grad is None or bool(grad.isfinite().all()) for grad in grads)


def _literals(tree: Any) -> Any:
    return tree_map(lambda x: "value" if isinstance(x, Value) else x, tree)
