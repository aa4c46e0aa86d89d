"""The zoo itself: its models run, learn and trace, so that what the converter's tests find is the converter's doing."""

import pytest
import torch
from torch import nn
from zoo import AWKWARD, BIG, MODELS, Case, Inputs

pytestmark = pytest.mark.wide


def built(case: Case) -> nn.Module:
    torch.manual_seed(0)
    return case.build()


def as_call(inputs: Inputs) -> tuple[tuple, dict]:
    if isinstance(inputs, dict):
        return (), inputs
    return (inputs if isinstance(inputs, tuple) else (inputs,)), {}


ALL = MODELS | AWKWARD
CASES = [pytest.param(case, id=name) for name, case in ALL.items()]
EXPORTED = [pytest.param(case, id=name) for name, case in ALL.items() if case.exports]
UNTRACEABLE = [pytest.param(case, id=name) for name, case in ALL.items() if not case.exports]


@pytest.mark.parametrize("case", CASES)
def test_model_runs_and_learns(case):
    model, again = built(case), built(case)
    assert all(torch.equal(one, other) for one, other in zip(model.parameters(), again.parameters(), strict=True))
    assert 500 < sum(parameter.numel() for parameter in model.parameters()) < 1_500_000
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


# nn.LSTM and the hook of weight_norm assign tensors while they run
@pytest.mark.filterwarnings("ignore:The tensor attribute:UserWarning")
@pytest.mark.parametrize("case", EXPORTED)
def test_model_traces(case):
    args, kwargs = as_call(case.inputs())
    model = built(case).eval()
    program = torch.export.export(model, args, kwargs, strict=False)
    assert len(program.graph.nodes) > 5


@pytest.mark.parametrize("case", UNTRACEABLE)
def test_model_does_not_trace(case):
    args, kwargs = as_call(case.inputs())
    with pytest.raises((RuntimeError, TypeError, ValueError)):
        torch.export.export(built(case).eval(), args, kwargs, strict=False)


@pytest.mark.parametrize(("name", "num_parameters"), [("resnet50", 25_557_032), ("encoder_base", 109_480_704)])
def test_full_size_models_are_of_full_size(name, num_parameters):
    with torch.device("meta"):
        model = BIG[name].build()
    assert sum(parameter.numel() for parameter in model.parameters()) == num_parameters
