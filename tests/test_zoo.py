"""The zoo itself: its models run, learn and trace, so that what the converter's tests find is the converter's doing."""

import pytest
import torch
from torch import nn
from zoo import MODELS, Case, Inputs


def built(case: Case, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return case.build()


def as_call(inputs: Inputs) -> tuple[tuple, dict]:
    if isinstance(inputs, dict):
        return (), inputs
    return (inputs if isinstance(inputs, tuple) else (inputs,)), {}


ALL = MODELS
CASES = [pytest.param(case, id=name) for name, case in ALL.items()]
EXPORTED = [pytest.param(case, id=name) for name, case in ALL.items() if case.exports]


@pytest.mark.parametrize("case", CASES)
def test_model_runs_and_learns(case):
    model = built(case)
    assert 1_000 < sum(parameter.numel() for parameter in model.parameters()) < 1_500_000
    model.train()
    torch.manual_seed(1)
    outputs = case.run(model)
    assert outputs
    assert all(output.isfinite().all() for output in outputs)
    sum(output.square().mean() for output in outputs).backward()
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == (parameter.grad is not None), name
        assert parameter.grad is None or parameter.grad.isfinite().all(), name
    model.eval()
    with torch.no_grad():
        first, second = case.run(model), case.run(model)
    assert all(output.isfinite().all() for output in first)
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


@pytest.mark.parametrize("case", CASES)
def test_build_is_deterministic(case):
    first, second = built(case).state_dict(), built(case).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
    other = built(case, seed=7).state_dict()
    assert any(not torch.equal(first[name], other[name]) for name in first)


@pytest.mark.parametrize("case", EXPORTED)
def test_model_traces(case):
    args, kwargs = as_call(case.inputs())
    model = built(case).eval()
    program = torch.export.export(model, args, kwargs, strict=False)
    assert len(program.graph.nodes) > 5
