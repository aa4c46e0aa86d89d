"""The Triton kernels of ``rms_norm``, launched by hand, NaN in everything dormant."""

import pytest
import torch
import torch.nn.functional as F
from contract import assert_as_exact
from kernels import active_part, poisoned, widths
from test_triton_layer_norm import AXES, CONFIGS
from test_triton_linear import DTYPES, functional

from esper_elastic.triton_kernels.rms_norm import rms_norm_backward, rms_norm_forward


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize(
    ("axis", "dtype", "activation"),
    [*((axis, torch.float32, "none") for axis in ("one", "odd", "concat")), *(("odd", dtype, "silu") for dtype in DTYPES)],
    ids=str,
)
def test_forward_and_gradients_are_those_of_the_active_units(axis, dtype, activation, config):
    torch.manual_seed(0)
    at = widths(AXES[axis], switches=(1,))
    columns, units, n = (1, at.active[0], at.capacity[0]), (0, at.active[0], at.capacity[0]), len(at.active[0])
    x, grad, add, weight = (torch.randn(*shape, dtype=torch.float64).to(dtype) for shape in ((5, n), (5, n), (5, n), (n,)))
    operands = (poisoned(x, columns), 1, poisoned(weight, units), poisoned(add, columns))
    where = (at.control, at.slots, at.segments)
    y, rstd = rms_norm_forward(*operands, *where, 1e-5, activation, config=CONFIGS[config])
    gx, gw, gadd = rms_norm_backward(poisoned(grad, columns), *operands, rstd, *where, activation, config=CONFIGS[config])
    got = [active_part(t, place) for t, place in ((y, columns), (gx, columns), (gw, units), (gadd, columns))]

    def plain(kind):
        leaves = [t.to(kind).detach().requires_grad_() for t in (x, weight, add)]
        y = functional(activation)(F.rms_norm(leaves[0], (n,), leaves[1], 1e-5) + leaves[2])
        y.backward(grad.to(kind))
        return [y.detach(), *(leaf.grad for leaf in leaves)]

    for name, ours, dense, exact in zip(("y", "gx", "gw", "gresidual"), got, plain(dtype), plain(torch.float64), strict=True):
        assert_as_exact(ours, dense, exact, name)
