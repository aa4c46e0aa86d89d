"""Validators: each breaks a model in one way and expects to be told so; models that are whole are told nothing."""

import re

import pytest
import torch
import torch.nn.functional as F
from test_trial import ALL, Writer, built, fingerprint
from torch import Tensor, nn
from zoo import AWKWARD, BIG, MODELS

import esper_elastic as ee
from esper_elastic.errors import SurgeryError
from esper_elastic.surgery import gradients
from esper_elastic.surgery.validators import SurgeryValidator, ValidationResult


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))


def every(model: nn.Module, inputs=None) -> list[ValidationResult]:
    validator = SurgeryValidator(inputs)
    return [
        validator.validate_graph_integrity(model),
        validator.validate_dimension_compatibility(model),
        validator.validate_gradient_flow(model),
    ]


def integrity(model: nn.Module) -> ValidationResult:
    return SurgeryValidator().validate_graph_integrity(model)


def told(result: ValidationResult, pattern: str) -> None:
    """One error, of these words."""
    assert not result
    assert len(result.errors) == 1, result
    assert re.search(pattern, result.errors[0]), result


def warned(result: ValidationResult, pattern: str) -> None:
    """One warning, of these words, and no error."""
    assert result, result
    assert len(result.warnings) == 1, result
    assert re.search(pattern, result.warnings[0]), result


# Whole models


@pytest.mark.parametrize("name", [name for name in ALL if name != "data_dependent"])
def test_whole_models_are_valid(name):
    model, inputs = built(ALL[name]), ALL[name].inputs()
    for result in every(model, inputs):
        assert result.errors == result.warnings == ()


@pytest.mark.parametrize("name", ["resnet_bottleneck", "mobilenet_v2", "vit", "gpt2", "t5", "lstm", "embedding_bags", "spectral_norm"])
def test_whole_models_are_valid_without_inputs_and_in_evaluation_mode(name):
    for result in every(built(ALL[name], training=False)):
        assert result.errors == ()


@pytest.mark.parametrize("share", [1.0, 0.5])
@pytest.mark.parametrize("name", ["resnet_basic", "llama", "vit_multihead"])
def test_elastic_models_are_valid(name, share):
    case = MODELS[name]
    model = ee.elasticize(built(case), case.inputs(), capacity=1.5)
    ee.resize(model, {k: max(d.minimum, int(d.active * share) // d.multiple_of * d.multiple_of) for k, d in ee.dims(model).items()})
    for result in every(model):
        assert result.errors == result.warnings == ()


def test_what_is_under_a_switch_that_is_off_needs_no_gradient():
    case = MODELS["resnet_basic"]
    model = ee.elasticize(built(case), case.inputs())
    ee.disable(model, "layer1.1")
    for result in every(model):
        assert result == ValidationResult(True)


def test_a_compiled_model_is_validated_as_written():
    assert all(every(torch.compile(net())))
    told(every(torch.compile(nn.Sequential(nn.Linear(6, 8), nn.Linear(7, 8))), torch.randn(2, 6))[1], "1: linear: ")


def test_results_print_themselves():
    result = ValidationResult(False, ("a: wrong.",), ("b: odd.",))
    assert str(result) == "invalid\nerror: a: wrong.\nwarning: b: odd."
    assert str(ValidationResult(True)) == "valid"
    assert not result and ValidationResult(True)


@pytest.mark.parametrize("check", ["validate_graph_integrity", "validate_dimension_compatibility", "validate_gradient_flow"])
def test_what_is_no_module_is_refused(check):
    with pytest.raises(SurgeryError, match=f"{check}: model: expected an nn.Module, got dict"):
        getattr(SurgeryValidator(), check)({})


@pytest.mark.parametrize("end", [None, RuntimeError("broken"), KeyboardInterrupt()], ids=["success", "failure", "interrupt"])
def test_validators_leave_no_trace(end):
    model = Writer(end)
    model.fc.weight.grad = torch.ones(6, 6)
    x = torch.randn(3, 6)
    before = fingerprint(model)
    validator = SurgeryValidator(x)
    for check in (validator.validate_graph_integrity, validator.validate_dimension_compatibility, validator.validate_gradient_flow):
        if isinstance(end, KeyboardInterrupt):
            with pytest.raises(KeyboardInterrupt):
                check(model)
        else:
            check(model)
        assert fingerprint(model) == before
    assert not model.seen and not model.history


def test_a_backward_that_is_interrupted_leaves_no_trace():
    class Interrupt(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            raise KeyboardInterrupt

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.fc = nn.BatchNorm1d(6), nn.Linear(6, 6)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(Interrupt.apply(self.fc(F.dropout(self.norm(x)))))

    model, x = Net(), torch.randn(3, 6)
    before = fingerprint(model)
    with pytest.raises(KeyboardInterrupt):
        SurgeryValidator(x).validate_gradient_flow(model)
    assert fingerprint(model) == before


@pytest.mark.parametrize("name", ["scripted_part", "spectral_norm", "lstm", "gpt2", "mobilenet_v3"])
def test_validators_leave_no_trace_in_the_zoo(name):
    model, inputs = built(ALL[name]), ALL[name].inputs()
    before = fingerprint(model)
    every(model, inputs)
    assert fingerprint(model) == before


# Integrity


def test_a_cycle_is_found():
    model = net()
    model[0].add_module("up", model)
    told(integrity(model), "0.up: cycle: it is the model, which holds it")
    inner = nn.Sequential(nn.Sequential(nn.Linear(2, 2)))
    inner[0][0].add_module("up", inner[0])
    told(integrity(inner), "0.0.up: cycle: it is 0, which holds it")


def test_a_module_under_two_parents_is_no_cycle():
    shared = nn.Sequential(nn.Linear(6, 6))
    assert integrity(nn.Sequential(nn.Sequential(shared), nn.Sequential(shared), shared))


def test_a_child_that_is_no_module_is_found():
    model = net()
    model._modules["1"] = torch.relu
    told(integrity(model), "the model: child '1' is registered as a module: expected an nn.Module, got builtin_function_or_method")


class Holder(nn.Module):
    def __init__(self, **children: nn.Module) -> None:
        super().__init__()
        self.fc = nn.Linear(6, 6)
        for name, child in children.items():
            setattr(self, name, child)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x)


def test_a_module_registered_twice_under_one_parent_is_found():
    model = Holder()
    model.head = model.fc
    told(integrity(model), "the model: Linear is registered twice, as 'fc' and 'head'")


def test_a_layer_in_several_places_of_a_list_is_meant():
    relu = nn.ReLU()
    assert integrity(nn.Sequential(nn.Linear(6, 6), relu, nn.Linear(6, 6), relu))
    layer = nn.Linear(6, 6)
    assert integrity(nn.Sequential(layer, relu, layer))


@pytest.mark.parametrize(
    ("kind", "value", "pattern"),
    [
        ("_parameters", torch.zeros(8, 6), "0.weight: registered as a parameter: expected Parameter, got Tensor"),
        ("_buffers", [1.0], "0.weight: registered as a buffer: expected Tensor, got list"),
    ],
)
def test_tensors_of_the_wrong_kind_are_found(kind, value, pattern):
    model = net()
    del model[0].weight
    getattr(model[0], kind)["weight"] = value
    result = integrity(model)
    assert not result
    assert re.search(pattern, "\n".join(result.errors))


def test_a_tensor_without_values_is_found():
    model = net()
    model[2] = nn.Linear(8, 8, device="meta")
    told(integrity(model), r"2.weight: on the meta device, without values \(and 1 more\)")
    with torch.device("meta"):
        model = net()
    assert all(every(model))


SIZES = {
    "conv": (nn.Conv2d(4, 6, 3), "weight", (6, 4, 3, 1), r"expected \(6, 4, 3, 3\) by in_channels, out_channels, kernel_size and groups"),
    "grouped": (nn.Conv1d(4, 6, 3, groups=2), "weight", (6, 4, 3), r"weight: expected \(6, 2, 3\)"),
    "transposed": (nn.ConvTranspose2d(4, 6, 3), "weight", (6, 4, 3, 3), r"weight: expected \(4, 6, 3, 3\)"),
    "conv bias": (nn.Conv2d(4, 6, 3), "bias", (4,), r"bias: expected \(6,\) by out_channels"),
    "linear": (nn.Linear(4, 6), "weight", (4, 6), r"weight: expected \(6, 4\) by out_features and in_features"),
    "linear bias": (nn.Linear(4, 6), "bias", (5,), r"bias: expected \(6,\) by out_features"),
    "embedding": (nn.Embedding(4, 6), "weight", (4, 5), r"expected \(4, 6\) by num_embeddings and embedding_dim"),
    "batch norm": (nn.BatchNorm2d(4), "weight", (5,), r"weight: expected \(4,\) by num_features"),
    "statistics": (nn.BatchNorm2d(4), "running_var", (5,), r"running_var: expected \(4,\) by num_features"),
    "group norm": (nn.GroupNorm(2, 4), "bias", (2,), r"bias: expected \(4,\) by num_channels"),
    "group norm weight": (nn.GroupNorm(2, 4), "weight", (2,), r"weight: expected \(4,\) by num_channels"),
    "layer norm": (nn.LayerNorm((3, 4)), "weight", (4,), r"weight: expected \(3, 4\) by normalized_shape"),
    "layer norm bias": (nn.LayerNorm((3, 4)), "bias", (4,), r"bias: expected \(3, 4\) by normalized_shape"),
    "rms norm": (nn.RMSNorm(4), "weight", (3,), r"weight: expected \(4,\) by normalized_shape"),
    "attention": (nn.MultiheadAttention(4, 2), "in_proj_weight", (8, 4), r"in_proj_weight: expected \(12, 4\) by embed_dim"),
    "attention bias": (nn.MultiheadAttention(4, 2), "in_proj_bias", (8,), r"in_proj_bias: expected \(12,\) by embed_dim"),
    "prelu": (nn.PReLU(4), "weight", (1,), r"weight: expected \(4,\) by num_parameters"),
    "elastic": (ee.ElasticLinear(4, 6, max_out_features=8), "weight", (7, 4), r"expected the capacity of its dims, \(8, 4\), got \(7, 4\)"),
}


@pytest.mark.parametrize("name", SIZES)
def test_attributes_that_tell_other_sizes_are_found(name):
    layer, key, shape, pattern = SIZES[name]
    assert integrity(nn.Sequential(layer))
    kept = layer._parameters.get(key, layer._buffers.get(key))
    data, kept.data = kept.data, torch.zeros(shape)
    try:
        told(integrity(nn.Sequential(layer)), f"0: {type(layer).__name__}: .*{pattern}")
    finally:
        kept.data = data


def test_groups_that_do_not_divide_are_found():
    norm = nn.GroupNorm(2, 4)
    norm.num_groups = 3
    told(integrity(nn.Sequential(norm)), "0: GroupNorm: num_channels=4 is no multiple of num_groups=3")
    convolution = nn.Conv2d(4, 6, 1, groups=2)
    convolution.out_channels, convolution.weight.data, convolution.bias.data = 5, torch.zeros(5, 2, 1, 1), torch.zeros(5)
    told(integrity(nn.Sequential(convolution)), "0: Conv2d: out_channels=5 is no multiple of groups=2")


def test_parameters_that_share_memory_are_found():
    storage = torch.randn(100)
    model = net()
    model[0].bias.data, model[2].bias.data = storage[:8], storage[8:16]
    assert integrity(model)
    model[2].bias.data = storage[7:15]
    told(integrity(model), "2.bias: its memory overlaps that of '0.bias', another parameter")
    model[2].bias.data = storage[:8]
    told(integrity(model), "2.bias: its memory overlaps that of '0.bias'")
    model[2].bias = model[0].bias
    assert integrity(model).errors == ()


def test_names_that_meet_in_a_state_dict_are_found():
    model = net()
    model._parameters["0.weight"] = nn.Parameter(torch.zeros(8, 6))
    told(integrity(model), "0.weight: 2 tensors have this name: a state_dict can hold but one")


def test_a_state_dict_that_the_model_would_not_load_is_found():
    class Renames(nn.Linear):
        def _save_to_state_dict(self, destination, prefix, keep_vars):
            super()._save_to_state_dict(destination, prefix, keep_vars)
            destination[prefix + "kernel"] = destination.pop(prefix + "weight")

    told(integrity(nn.Sequential(Renames(2, 2))), "state_dict: the model does not load its own: .*0.kernel")

    class Transposes(nn.Linear):
        def _save_to_state_dict(self, destination, prefix, keep_vars):
            super()._save_to_state_dict(destination, prefix, keep_vars)
            destination[prefix + "weight"] = destination[prefix + "weight"].t()

    told(integrity(nn.Sequential(Transposes(2, 3))), "size mismatch for 0.weight")


def test_a_module_that_was_removed_and_is_still_referred_to_is_found():
    model = Holder(extra=nn.Linear(6, 6))
    model.__dict__["again"] = [model.extra]
    assert integrity(model)
    del model._modules["extra"]
    told(integrity(model), "the model: attribute 'again' refers to a Linear that was removed from the model")
    model.__dict__["again"] = {"a": nn.Linear(6, 6)}
    warned(integrity(model), "attribute 'again' refers to a Linear that is not registered: its parameters are neither trained nor saved")
    model.__dict__["again"] = nn.ReLU()
    assert integrity(model) == ValidationResult(True)


def test_a_removed_module_is_known_also_where_no_input_is():
    model = nn.Bilinear(2, 3, 4)
    model.extra = nn.Linear(6, 6)
    model.__dict__["again"] = model.extra
    assert integrity(model)
    del model._modules["extra"]
    told(integrity(model), "refers to a Linear that was removed from the model")


def test_a_module_that_no_forward_calls_is_a_warning():
    model = Holder(extra=nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6)), act=nn.ReLU())
    warned(integrity(model), "extra: Sequential is registered, but no forward calls it")


def test_new_ties_are_a_warning():
    model = net()
    assert integrity(model) == ValidationResult(True)
    model[2].bias = model[0].bias
    warned(integrity(model), "0.bias: one parameter under 2 names: 0.bias, 2.bias. Is that meant")
    tied = net()
    tied[2].bias = tied[0].bias
    assert integrity(tied) == ValidationResult(True)
    twice = nn.Linear(6, 6)
    twice.kernel = twice.weight
    warned(integrity(twice), "kernel: one parameter under 2 names: kernel, weight")


def test_a_model_too_broken_to_look_at_is_an_error():
    class Broken(nn.Linear):
        @property
        def in_features(self) -> int:
            raise RuntimeError("no size")

        in_features = in_features.setter(lambda self, value: None)

    result = integrity(nn.Sequential(Broken(2, 2)))
    assert not result
    assert "size errors: could not be checked: RuntimeError: no size" in result.errors
    model = net()
    model._modules = None
    for result in every(model, torch.randn(2, 6)):
        assert not result
        assert "'NoneType' object has no attribute 'items'" in result.errors[0] + result.errors[-1]


def test_nothing_is_copied(monkeypatch):
    model = net()
    monkeypatch.setattr(Tensor, "clone", lambda *args: pytest.fail("copied"))
    written = []
    monkeypatch.setattr(Tensor, "copy_", lambda self, other: written.append(self.is_meta))
    assert integrity(model)
    assert written and all(written)


# Dimensions


@pytest.mark.parametrize(
    ("change", "pattern"),
    [
        pytest.param(
            lambda m: m.__setitem__(2, nn.Linear(7, 8)),
            r"2: linear: input \(2, 8\), weight \(8, 7\), bias \(8,\): .*\[2, 8\] X \[7, 8\]",
            id="linear",
        ),
        pytest.param(lambda m: m.insert(1, nn.BatchNorm1d(7)), r"1: batch_norm: input \(2, 8\), running_mean \(7,\)", id="norm"),
        pytest.param(lambda m: m.insert(1, nn.LayerNorm(7)), r"1: layer_norm: input \(2, 8\), weight \(7,\)", id="layer norm"),
        pytest.param(lambda m: m.insert(1, nn.Unflatten(1, (3, 3))), r"1: unflatten: \(2, 8\)", id="view"),
        pytest.param(
            lambda m: m.__setitem__(2, nn.Linear(8, 8).double()),
            r"2: linear: input \(2, 8\), weight \(8, 8\) float64.*of one type",
            id="type",
        ),
        pytest.param(lambda m: m._modules.update({"1": None}), "the model: TypeError: 'NoneType' object is not callable", id="none"),
    ],
)
def test_the_first_op_that_disagrees_is_named(change, pattern):
    model = net()
    change(model)
    told(SurgeryValidator(torch.randn(2, 6)).validate_dimension_compatibility(model), pattern)


def test_two_branches_that_do_not_meet_are_named_with_both_shapes():
    case = MODELS["resnet_basic"]
    model = built(case)
    model.layer1[0].conv2 = nn.Conv2d(model.layer1[0].conv2.in_channels, 3, 3, padding=1)
    model.layer1[0].bn2 = nn.BatchNorm2d(3)
    told(
        SurgeryValidator(case.inputs()).validate_dimension_compatibility(model),
        r"layer1.0: \w*add\w*: \(2, 3, \d+, \d+\), \(2, \d+, \d+, \d+\): .*residual.py:\d+",
    )


def test_without_a_known_input_there_is_a_warning():
    for result in every(nn.Bilinear(2, 3, 4)):
        assert result
    model = nn.Bilinear(2, 3, 4)
    warned(SurgeryValidator().validate_dimension_compatibility(model), "no input of the model is known: it was not tried")
    warned(SurgeryValidator().validate_gradient_flow(model), "no input of the model is known")
    case = AWKWARD["data_dependent"]
    warned(SurgeryValidator(case.inputs()).validate_dimension_compatibility(built(case)), "could not be tried: .*by the values of tensors")
    assert SurgeryValidator(case.inputs()).validate_gradient_flow(built(case)).errors == ()


def test_inputs_that_are_none_are_an_error():
    told(SurgeryValidator(3).validate_dimension_compatibility(net()), "trial run could not be made: SurgeryError: example_inputs")
    assert not SurgeryValidator(3).validate_gradient_flow(net())


# Gradients


def flow(model: nn.Module, optimizer=None, inputs=None) -> ValidationResult:
    return SurgeryValidator(inputs).validate_gradient_flow(model, optimizer)


def test_a_parameter_that_the_optimizer_has_not_is_found():
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    assert flow(model, optimizer) == ValidationResult(True)
    model[2].bias = nn.Parameter(torch.zeros(8))
    result = flow(model, optimizer)
    told(result, "2.bias: trainable, but in no group of the optimizer: it would never be stepped")
    assert result.warnings == ("the optimizer holds 1 parameter that the model has not.",)
    optimizer.param_groups[0]["params"] += [model[2].bias, model[0].weight]
    told(flow(model, optimizer), "0.weight: in 2 places of the optimizer's groups: it would be stepped 2 times")
    model[0].weight.requires_grad_(False)
    optimizer.param_groups[0]["params"].pop()
    optimizer.param_groups[0]["params"] = [p for p in optimizer.param_groups[0]["params"] if p is not model[0].weight]
    assert flow(model, optimizer).errors == ()


def test_optimizers_known_here_are_looked_at():
    model = net()
    optimizer = ee.optim.AdamW(model.parameters(), lr=0.1)
    assert flow(model) == ValidationResult(True)
    model[2].bias = nn.Parameter(torch.zeros(8))
    told(flow(model), "2.bias: trainable, but in no group of the optimizer")
    assert optimizer is not None
    plain = net()
    stranger = torch.optim.SGD(plain.parameters(), lr=0.1)
    plain(torch.randn(2, 6)).sum().backward()
    stranger.step()
    plain[0].bias = nn.Parameter(torch.zeros(8))
    told(flow(plain), "0.bias: trainable, but in no group")


class Through(nn.Module):
    """A layer with something done to its output."""

    def __init__(self, function) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 8)
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self.fc(x))


def within(function) -> nn.Module:
    torch.manual_seed(0)
    model = net()
    model[2] = Through(function)
    return model


def test_a_layer_that_is_cut_off_is_named():
    result = flow(within(lambda x: x.detach()))
    assert [error.split(":")[0] for error in result.errors] == ["0.weight", "0.bias", "2.fc.weight", "2.fc.bias"]
    assert "trainable and used by the forward, but no gradient reaches it" in result.errors[0]


class Side(nn.Module):
    """A second layer beside the first, of whose output little or nothing is left."""

    def __init__(self, function) -> None:
        super().__init__()
        self.first, self.side, self.last = nn.Linear(6, 8), nn.Linear(6, 8), nn.Linear(8, 3)
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.first(x) + self.function(self.side(x)))


@pytest.mark.parametrize("factor", [0.0, 1e-14])
def test_a_layer_whose_gradient_vanishes_is_named(factor):
    told(flow(Side(lambda x: factor * x)), "side: its gradient vanishes: norm .*, median of the layers")
    assert flow(Side(lambda x: 1e-6 * x)) == ValidationResult(True)


def test_a_layer_whose_gradient_explodes_is_named():
    told(flow(Side(lambda x: 1e8 * x - (1e8 * x).detach())), "side: its gradient explodes: norm .*, median of the layers")


def test_a_saturated_layer_is_named():
    model = Side(torch.relu)
    nn.init.constant_(model.side.bias, -1000.0)
    told(flow(model), "side: its gradient vanishes: norm 0.0e")


def test_values_that_are_not_finite_are_named_with_their_module():
    model = net()
    with torch.no_grad():
        model[2].weight[0, 0] = float("nan")
    told(flow(model), "2: its output is not finite")
    told(flow(within(lambda x: x / 0)), "2: its output is not finite")


def test_a_gradient_that_is_not_finite_is_named():
    result = flow(Side(lambda x: (x * 0).abs().sqrt()))
    assert result.errors[0] == "side.weight: its gradient is not finite."


def test_a_forward_that_fails_on_real_tensors_is_named():
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(6, 6)

        def forward(self, x: Tensor) -> Tensor:
            assert not x.isnan().all() if type(x) is Tensor else True
            if type(x) is Tensor:
                raise ValueError("no")
            return self.fc(x)

    told(flow(nn.Sequential(Net())), "0: fails on real tensors: ValueError: no")


class Residual(nn.Module):
    """A branch that adds nothing yet."""

    def __init__(self, gate: bool) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(6, 6), nn.Linear(6, 6)
        self.gate = nn.Parameter(torch.zeros(())) if gate else None
        if not gate:
            nn.init.zeros_(self.outer.weight)
            nn.init.zeros_(self.outer.bias)

    def forward(self, x: Tensor) -> Tensor:
        branch = self.outer(torch.relu(self.inner(x)))
        return x + (branch if self.gate is None else self.gate * branch)


@pytest.mark.parametrize("gate", [False, True])
def test_a_branch_that_starts_at_zero_is_explained(gate):
    assert flow(nn.Sequential(nn.Linear(6, 6), Residual(gate), nn.Linear(6, 2))) == ValidationResult(True)
    assert flow(nn.Sequential(Residual(gate), Residual(gate))) == ValidationResult(True)


def test_a_parameter_that_nothing_uses_is_a_warning():
    result = flow(Holder(extra=nn.Linear(6, 6)))
    assert result
    assert result.warnings[0] == "extra.weight: trainable, but no output depends on it: it gets no gradient."


def test_frozen_parameters_need_no_gradient():
    model = net()
    model[0].requires_grad_(False)
    assert flow(model) == ValidationResult(True)
    model.requires_grad_(False)
    assert flow(model).errors == ()


def test_half_precision_is_looked_at_in_single():
    model = net().half()
    assert flow(model, inputs=torch.randn(2, 6).half()) == ValidationResult(True)


def test_a_large_batch_is_cut(monkeypatch):
    shapes, run = [], gradients._run
    monkeypatch.setattr(
        gradients, "_run", lambda model, args, *rest, **options: shapes.append(args[0].shape) or run(model, args, *rest, **options)
    )
    assert flow(net(), inputs=torch.randn(64, 6)) == ValidationResult(True)
    assert shapes == [(4, 6)]


def test_modes_are_kept():
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(1.0), nn.Linear(8, 3))
    assert not flow(model)
    assert flow(model.eval()) == ValidationResult(True)
    assert not model.training


def test_a_model_of_full_size_is_valid():
    case = BIG["resnet50"]
    model = case.build()
    validator = SurgeryValidator(case.inputs())
    assert validator.validate_dimension_compatibility(model) == validator.validate_graph_integrity(model) == ValidationResult(True)
