"""The hard cases of the zoo, made elastic: each equals its export at random widths, and leaves rigid what it has to, with the reason."""

import re

import pytest
import torch
from converting import active_outcome, assert_close, assert_same, built, inputs_of, poison, random_widths, run
from zoo import AWKWARD, call

import esper_elastic as ee

pytestmark = pytest.mark.wide

DIMS_OF = {
    "module_called_twice": {"first": 24},
    "tied_weights": {"hidden": 40, "back": 24},
    "weight_norm_parametrization": {"0": 24, "2": 24},
    "weight_norm_hook": {"0": 24, "2": 24},
    "spectral_norm": {"0": 24, "2": 24},
    "frozen_part": {"backbone.0": 12, "backbone.3": 20, "hidden": 28},
    "scripted_part": {"fc1": 40},
    "same_padding_conv": {"0": 16, "4": 24},
    "standardised_conv": {"4": 24},
    "bare_rms_norm": {"0": 24},
    "gated_mlp": {"fc1": 24, "fc2": 40, "fc3": 28, "glu": 32},
    "conv1d": {"causal": 16, "filter": 24},
    "embedding_bags": {"users": 12, "items": 20, "dense": 16, "fc1": 40},
    "structured_outputs": {"backbone": 24},
    "shape_preserving_blocks": {"stem": 24, "blocks.0.2": 16, "blocks.1.2": 28, "blocks.2.2": 36},
    "pixel_shuffle": {"conv1": 24, "conv2": 16, "up1": 20},
    "split_branches": {"conv:0": 12, "conv:1": 20, "left": 28},
    "size_in_attribute": {"conv1": 16, "conv2": 24},
    "literal_in_view": {"conv1": 16},
    "flatten_after_conv": {"conv1": 16, "conv2": 20},
    "mean_over_channels": {"conv1": 16, "conv2": 24, "conv3": 12},
    "softmax_over_channels": {"conv1": 16, "conv2": 24, "conv3": 12},
    "gather_channels": {"conv1": 16, "conv3": 12},
    "select_channels": {"conv1": 16, "conv3": 12},
    "cumsum_over_channels": {"conv1": 16, "conv3": 12},
    "scale_by_size": {"conv1": 16, "conv2": 24, "conv3": 12},
}
REASONS = {
    "literal_in_view": ("conv2.weight[0]", r"code keeps its size \(.*awkward_channels\.py:73: .*'\[-1, 360\]' is invalid"),
    "gather_channels": ("conv2.weight[0]", r"it is looked up by index \(.*awkward_channels\.py:132"),
    "select_channels": ("conv2.weight[0]", r"code keeps its size \(.*awkward_channels\.py:139"),
    "cumsum_over_channels": ("conv2.weight[0]", r"cumsum depends on the order of its indices"),
    "scripted_part": ("fc2.weight[0]", r"it belongs to a tensor kept by code"),
    "tied_weights": ("embedding.weight[0]", r"it is looked up by index"),
    "parallel_heads": ("heads.kind.weight[0]", r"it is an axis of the model's output"),
    "structured_outputs": ("scores.weight[0]", r"it is an axis of the model's output"),
    "frozen_part": ("backbone.0.weight[2]", r"a kernel slides along it"),
}
"""Rigid axes that say why."""


@pytest.mark.filterwarnings("ignore:The tensor attribute:UserWarning", "ignore:The .grad attribute:UserWarning")
@pytest.mark.parametrize("capacity", [1.0, 1.5])
@pytest.mark.parametrize("name", [name for name in AWKWARD if name != "data_dependent"])
def test_hard_cases(name, capacity):
    case = AWKWARD[name]
    inputs, plain = inputs_of(case), built(case)
    elastic = ee.elasticize(built(case), inputs, capacity=capacity)
    if name in DIMS_OF:
        assert sorted(dim.active for dim in ee.dims(elastic).values()) == sorted(DIMS_OF[name].values())
    poison(elastic)
    for training in (False, True):
        assert_same(active_outcome(elastic, run(elastic, case, inputs, training)), run(plain, case, inputs, training))
    for seed in (1, 2):
        elastic = ee.elasticize(built(case), inputs, capacity=capacity)
        ee.resize(elastic, random_widths(elastic, seed))
        poison(elastic)
        with torch.no_grad():
            plain = ee.export(elastic)
        for training in (False, True):
            assert_same(active_outcome(elastic, run(elastic, case, inputs, training)), run(plain, case, inputs, training))
        with torch.no_grad():
            for got, expected in zip(case.outputs(call(elastic.eval(), inputs)), case.outputs(call(plain.eval(), inputs)), strict=True):
                assert_close(got, expected, "output without autograd")


@pytest.mark.parametrize("name", REASONS)
def test_what_stays_rigid_says_why(name):
    where, why = REASONS[name]
    plan = ee.plan(built(AWKWARD[name]), inputs_of(AWKWARD[name]))
    reasons = {f"{axis.tensor}[{axis.axis}]": axis.reason for axis in plan.rigid}
    assert re.search(why, reasons[where])
