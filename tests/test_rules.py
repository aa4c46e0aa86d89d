"""The axis rules, op by op: what the plan says, and a resized network against a narrow one that was sliced by hand.

The reference knows nothing of conversion: it is the network of the case built anew at the small sizes, with the weights that the case says
are kept. Dormant memory is full of NaN.
"""

import copy
import functools
import math
import re
from typing import NamedTuple

import pytest
import torch
from converting import EXACT, assert_close
from rule_cases import CASES, Case, Sizes, part, sliced
from torch import Tensor, nn

import esper_elastic as ee
from esper_elastic.convert import trace
from esper_elastic.convert.plan import PlannedDim
from esper_elastic.convert.rules import RULES, op_name

LIVE = [name for name, case in CASES.items() if case.live()]
#: Those with more than one dim plainly from the first layer to the last: with room to grow, the places of units in storage move.
INVOLVED = [name for name in LIVE if CASES[name].own or CASES[name].made != ("a",) or CASES[name].used != "a"]
FIXED = [name for name in LIVE if not CASES[name].random]

#: Rules of ops that no run on this machine comes to, and why there is one all the same.
UNSEEN = {
    **dict.fromkeys(("cudnn_batch_norm", "_fused_dropout", "_fused_rms_norm"), "on CUDA alone"),
    **dict.fromkeys(("mkldnn_convolution", "mkldnn_linear", "mkldnn_max_pool2d", "mkldnn_max_pool3d"), "on mkldnn tensors alone"),
    **dict.fromkeys(("convolution_overrideable", "linear", "native_channel_shuffle"), "on other devices alone"),
    "_convolution": "its caller is seen as `convolution`",
    "_embedding_bag_forward_only": "`_embedding_bag` without autograd",
    **dict.fromkeys(
        ("_batch_norm_with_update", "_batch_norm_no_update", "_native_batch_norm_legit", "_native_batch_norm_legit_no_training"),
        "what torch.export makes of `native_batch_norm`",
    ),
    "_native_batch_norm_legit_functional": "what torch.export makes of `native_batch_norm`",
    **dict.fromkeys(("_native_multi_head_attention", "_transformer_encoder_layer_fwd"), "fast paths, which the zoo's transformers take"),
}


def key_of(dim: PlannedDim) -> tuple[frozenset[str], int]:
    """What tells the dims of a case apart: through which axes they run, and of what size they are."""
    return frozenset(dim.bindings), dim.size


class Made(NamedTuple):
    """A converted network, its plan, a dim for each name in the case, and the plain network at full capacity whose weights it holds."""

    elastic: nn.Module
    plan: ee.Plan
    dims: dict[str, ee.ElasticDim]
    big: nn.Module
    full: Sizes


@functools.cache
def made(name: str, capacity: float) -> Made:
    case = CASES[name]
    elastic = case.build()
    ee.elasticize(elastic, case.inputs(), capacity=capacity, minimum=case.minimum)
    found = ee.dims(elastic)
    known = ee.convert.plan_of(elastic)
    planned = {key_of(dim): found[dim.name] for dim in known.dims}
    dims = {name: planned[frozenset(case.bindings(name)), case.dims[name]] for name in case.live()}
    full = {name: dims[name].capacity if name in dims else size for name, size in case.dims.items()}
    big = case.build(full)
    return Made(elastic, known, dims, big, full)


def refill(case: Case, made: Made, now: Sizes) -> None:
    """The weights of the big network, and NaN for every one that has no part in the narrow one, as the case says."""
    axes = case.axes()
    storages = dict((*made.elastic.named_parameters(), *made.elastic.named_buffers()))
    with torch.no_grad():
        for name, tensor in made.big.state_dict().items():
            assert storages[name].shape == tensor.shape, name
            storages[name].copy_(tensor)
            if tensor.is_floating_point() and name in axes:
                asleep = torch.ones(tensor.numel(), dtype=torch.bool)
                asleep[part(torch.arange(tensor.numel()).view(tensor.shape), axes[name], made.full, now).flatten()] = False
                storages[name].masked_fill_(asleep.view(tensor.shape), math.nan)


def widths_of(made: Made) -> list[dict[str, int]]:
    """Smallest, odd, middle, original and largest widths; where there are several dims, each at another place of its list."""
    lists = {}
    for name, dim in made.dims.items():
        valid = [n for n in range(dim.minimum, dim.capacity + 1) if n % dim.multiple_of == 0]
        odd = next((n for n in reversed(valid[:-1]) if n % 2), valid[0])
        lists[name] = list(dict.fromkeys((valid[0], odd, valid[len(valid) // 2], dim.active, valid[-1])))
    rounds = max(map(len, lists.values()))
    found = [{name: n[(index + shift) % len(n)] for shift, (name, n) in enumerate(lists.items())} for index in range(rounds)]
    return [*found, {name: n[-1] for name, n in lists.items()}]


def outcome(model: nn.Module, case: Case) -> tuple[Tensor, dict[str, Tensor | None], dict[str, Tensor]]:
    """Output of one forward, gradients of a sum with random weights, and buffers afterwards."""
    model.zero_grad()
    torch.manual_seed(5)
    output = model(case.inputs())
    (output * torch.randn(output.shape, generator=torch.Generator().manual_seed(6), dtype=output.dtype)).sum().backward()
    grads = {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}
    return output.detach(), grads, {name: buffer.clone() for name, buffer in model.named_buffers()}


def assert_narrow(case: Case, made: Made, now: Sizes) -> None:
    """The elastic network at widths ``now`` gives what the one sliced by hand gives."""
    axes = case.axes()
    refill(case, made, now)
    expected_output, expected_grads, expected_buffers = outcome(sliced(case, made.big, made.full, now).train(), case)
    output, grads, buffers = outcome(made.elastic.train(), case)
    assert_close(output, expected_output, f"output at {now}")
    largest = max((float(grad.abs().max()) for grad in expected_grads.values() if grad is not None), default=0.0)
    for name, expected in expected_grads.items():
        grad = grads[name]
        assert (grad is None) == (expected is None), f"gradient of {name} at {now}: {grad}"
        if grad is not None:
            own = part(grad, axes.get(name, []), made.full, now)
            assert_close(own, expected, f"gradient of {name} at {now}", EXACT, 1e-4 * EXACT * largest)
            assert grad.count_nonzero() == own.count_nonzero(), f"dormant gradients of {name} at {now}"
    for name, expected in expected_buffers.items():
        assert_close(part(buffers[name], axes.get(name, []), made.full, now), expected, f"buffer {name} at {now}")


def why(said: object, dim: str) -> str | None:
    return said.get(dim) if isinstance(said, dict) else said


@pytest.mark.parametrize("name", CASES)
def test_the_plan_says_what_can_change(name: str) -> None:
    case = CASES[name]
    plan = made(name, 1.0).plan if case.live() else ee.plan(case.build(), case.inputs())
    found = {key_of(dim): dim for dim in plan.dims}
    assert len(found) == len(plan.dims) == len({dim.name for dim in plan.dims})
    assert set(found) == {(frozenset(case.bindings(dim)), case.dims[dim]) for dim in case.live()}, [dim.bindings for dim in plan.dims]
    for dim in case.live():
        planned = found[frozenset(case.bindings(dim)), case.dims[dim]]
        assert planned.multiple_of == case.multiple.get(dim, 1)
        assert planned.minimum == max(case.minimum, planned.multiple_of)
        for said, reason in ((planned.compact_only, why(case.compact, dim)), (planned.mixed, why(case.mixed, dim))):
            assert (said is None) == (reason is None), said
            assert reason is None or re.search(reason, said), said
    reasons = {f"{axis.tensor}[{axis.axis}]": axis.reason for axis in plan.rigid}
    for axis, reason in case.rigid.items():
        assert reason in reasons[axis], reasons[axis]


@pytest.mark.parametrize(("name", "capacity"), [*((name, 1.0) for name in LIVE), *((name, 1.5) for name in INVOLVED)])
def test_any_width_equals_the_network_sliced_by_hand(name: str, capacity: float) -> None:
    case = CASES[name]
    network = made(name, capacity)
    names = {id(dim): name for name, dim in ee.dims(network.elastic).items()}
    for now in widths_of(network):
        ee.resize(network.elastic, {names[id(network.dims[dim])]: n for dim, n in now.items()})
        assert_narrow(case, network, {**case.dims, **now})


@pytest.mark.parametrize("name", FIXED)
def test_growth_is_exact_where_the_plan_says_so(name: str) -> None:
    case = CASES[name]
    planned = {key_of(dim): dim for dim in made(name, 1.0).plan.dims}
    for dim in case.live():
        network = copied(made(name, 1.0))
        now = {**case.dims, dim: widths_of(network)[1][dim]}
        network.dims[dim].resize(now[dim])
        refill(case, network, now)
        network.elastic.eval()
        before = network.elastic(case.inputs()).detach()
        if planned[frozenset(case.bindings(dim)), case.dims[dim]].mixed is None and not case.normed:
            network.dims[dim].grow(case.dims[dim])
            assert_close(network.elastic(case.inputs()).detach(), before, f"output after growth of {dim}")
        elif now[dim] < case.dims[dim]:
            with pytest.raises(ee.CapacityError, match="exact=False"):
                network.dims[dim].grow(case.dims[dim])


def copied(network: Made) -> Made:
    """A converted network to change, with the dims of the copy."""
    twin = copy.deepcopy(network.elastic)
    names = {id(dim): name for name, dim in ee.dims(network.elastic).items()}
    return network._replace(elastic=twin, dims={name: ee.dims(twin)[names[id(dim)]] for name, dim in network.dims.items()})


@pytest.mark.parametrize("name", FIXED)
def test_static_layout_computes_the_same_or_is_refused(name: str) -> None:
    case = CASES[name]
    network = copied(made(name, 1.0))
    now = {**case.dims, **widths_of(network)[1]}
    for name_of, dim in network.dims.items():
        dim.resize(now[name_of])
    if case.compact is not None:
        with pytest.raises(ee.LayoutError, match="cannot be static"):
            ee.set_layout(network.elastic, "static")
        return
    refill(case, network, now)
    ee.set_layout(network.elastic, "static")
    assert_narrow(case, network, now)


def test_every_rule_has_a_case() -> None:
    seen = {op_name(node.op) for case in CASES.values() for node in trace.run(case.build(), trace.Example(case.inputs())).nodes}
    assert set(RULES) - seen - set(UNSEEN) == set()
    assert set(UNSEEN) <= set(RULES) - seen


@pytest.mark.parametrize(
    "name", ["layer_norm", "rms_norm", "group_norm", "batch_norm", "weight_norm", "glu", "unequal_parts", "attention", "max_pool"]
)
def test_plans_are_the_same_in_inference_mode(name: str) -> None:
    """There composite functions are not taken apart on the way to the recorder."""
    case = CASES[name]
    with torch.inference_mode():
        found = ee.plan(case.build(), case.inputs())
    assert str(found) == str(ee.plan(case.build(), case.inputs()))
