"""Trial runs: what a model calls, found without computing; parts that are tried alone; inputs that are known. The model notices nothing."""

import copy
import gc
import random
import weakref

import numpy
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from zoo import AWKWARD, BIG, MODELS, Case

import esper_elastic as ee
from esper_elastic.errors import SurgeryError
from esper_elastic.surgery.trial import recording, trial
from esper_elastic.surgery.trial.inputs import known_inputs
from esper_elastic.surgery.trial.memory import memory_of, stamp_of
from esper_elastic.surgery.trial.recording import attempt
from esper_elastic.surgery.trial.trial import Calls, TensorSpec, calls_of, record, smallest_closed
from esper_elastic.surgery.trial.trial import trial as try_part

ALL = MODELS | AWKWARD


def built(case: Case, training: bool = True) -> nn.Module:
    torch.manual_seed(0)
    return case.build().train(training)


def as_call(inputs) -> tuple[tuple, dict]:
    if isinstance(inputs, dict):
        return (), inputs
    return (inputs if isinstance(inputs, tuple) else (inputs,)), {}


def described(calls: Calls) -> dict:
    return {path: [(call.args, call.kwargs, call.result) for call in calls.of(path)] for path in calls.paths}


def fingerprint(model: nn.Module) -> list:
    """Objects by identity and contents by value: of every module's attributes, tensors and gradients, and the generators."""
    found: list = []
    for path, module in model.named_modules():
        found.append((path, id(module), type(module)))
        if isinstance(module, torch.jit.ScriptModule):
            found += [(tensor.tolist(), tensor.grad) for tensor in (*module.parameters(), *module.buffers())]
            continue
        for name, value in module.__dict__.items():
            found.append((name, id(value)))
            if isinstance(value, dict):
                found.append([(key, id(item)) for key, item in value.items()])
                for item in value.values():
                    if isinstance(item, Tensor):
                        found.append((item._version, item.detach().numpy().tobytes(), None if item.grad is None else id(item.grad)))
            elif isinstance(value, list):
                found.append([id(item) for item in value])
    numpy_state = numpy.random.get_state()
    return [*found, torch.get_rng_state().tolist(), random.getstate(), numpy_state[1].tolist(), numpy_state[2]]


# What a run shows


EVALUATED = ("resnet_basic", "inception", "gpt2", "vit_multihead", "lstm", "spectral_norm")
TRIED = [(name, True) for name in ALL if name != "data_dependent"] + [(name, False) for name in EVALUATED]


@pytest.mark.parametrize(("name", "training"), TRIED, ids=[f"{name}-{'train' if training else 'eval'}" for name, training in TRIED])
def test_rules_give_what_torch_gives(name, training, monkeypatch):
    case = ALL[name]
    args, kwargs = as_call(case.inputs())
    model = built(case, training)
    quick, failure = attempt(model, args, kwargs, explain=False)
    assert quick is not None, failure
    monkeypatch.setattr(recording, "RULES", {})
    precise = record(model, args, kwargs)
    assert described(quick) == described(precise)
    assert quick.used == precise.used


CONVOLUTION, LINEAR, NORM = "convolution.default", "linear.default", "layer_norm.default"


@pytest.mark.parametrize(
    ("name", "layout", "training", "wanted"),
    [
        ("resnet_basic", "compact", True, {CONVOLUTION, "batch_norm.default", LINEAR}),
        ("resnet_basic", "compact", False, {CONVOLUTION, "batch_norm_eval.default", LINEAR}),
        ("resnet_basic", "static", True, {CONVOLUTION, "batch_norm.default", LINEAR}),
        ("unet", "compact", True, {CONVOLUTION, "batch_norm.default"}),
        ("mobilenet_v3", "compact", False, {CONVOLUTION, "batch_norm_eval.default", LINEAR}),
        ("convnext", "compact", True, {CONVOLUTION, LINEAR, NORM}),
        ("gpt2", "compact", True, {LINEAR}),
        ("vit_multihead", "static", False, {LINEAR, NORM}),
    ],
)
def test_rules_give_what_torch_gives_of_an_elastic_model(name, layout, training, wanted, monkeypatch):
    case = ALL[name]
    model = built(case, training)
    ee.elasticize(model, case.inputs(), capacity=1.5)
    if layout == "static":
        ee.set_layout(model, "static")
    for dim in ee.dims(model).values():
        if dim.rigid is None:
            dim.resize(max(dim.minimum, dim.active - dim.multiple_of))
    asked, (args, kwargs) = set(), as_call(case.inputs())
    for function, rule in list(recording.RULES.items()):
        monkeypatch.setitem(recording.RULES, function, noting(asked, function, rule))
    quick, failure = attempt(model, args, kwargs, explain=False)
    assert quick is not None, failure
    monkeypatch.setattr(recording, "RULES", {})
    precise = record(model, args, kwargs)
    assert described(quick) == described(precise)
    assert wanted <= asked


def noting(asked: set[str], function, rule):
    """A rule that notes its function where it says anything."""

    def noted(*args, **kwargs):
        result = rule(*args, **kwargs)
        if result is not None:
            asked.add(function.__name__)
        return result

    return noted


@pytest.mark.parametrize("name", ["resnet_basic", "unet", "mobilenet_v3", "gpt2", "swin", "t5", "lstm", "structured_outputs"])
def test_a_record_tells_what_a_real_run_gives(name):
    case = ALL[name]
    model = built(case)
    args, kwargs = as_call(case.inputs())
    calls = record(model, args, kwargs)
    seen: dict[str, list] = {}
    for path, module in model.named_modules():
        module.register_forward_hook(
            lambda m, a, result, path=path: seen.setdefault(path, []).append(recording.specs_of(result, inside=True))
        )
    model(*args, **kwargs)
    assert {path: [call.result for call in calls.of(path)] for path in calls.paths} == seen


RULED = {
    "linear": lambda x: F.linear(x, torch.empty(5, 6), torch.empty(5)),
    "conv": lambda x: F.conv2d(x[None], torch.empty(8, 2, 3, 2), None, (2, 1), (1, 0), (1, 2), 2),
    "conv of one size": lambda x: F.conv1d(x, torch.empty(8, 4, 3), torch.empty(8), 2, 1),
    "batch norm": lambda x: F.batch_norm(x, torch.empty(4), torch.empty(4)),
    "layer norm": lambda x: F.layer_norm(x, (5, 6), torch.empty(5, 6)),
    "group norm": lambda x: F.group_norm(x, 2),
    "embedding": lambda x: F.embedding(torch.zeros(2, 3, dtype=torch.int64), torch.empty(4, 6)),
    "activation": lambda x: F.silu(F.relu(x, inplace=True)),
    "gelu": lambda x: F.gelu(x, approximate="tanh"),
    "dropout": lambda x: F.dropout(x),
    "arithmetic": lambda x: (x + x) * 2.0 - 1,
    "in place": lambda x: x.mul_(2).add_(x),
    # what the rules leave to torch
    "broadcast": lambda x: x[0, 0] + x,
    "promotion": lambda x: torch.zeros(4, 5, 6, dtype=torch.int64).add(1.5) + x.half(),
    "transposed": lambda x: F.relu(x.transpose(0, 1)),
    "same padding": lambda x: F.conv1d(x, torch.empty(8, 4, 3), padding="same"),
    "double": lambda x: F.linear(x.double(), torch.empty(5, 6, dtype=torch.float64)),
}


@pytest.mark.parametrize("name", RULED)
def test_a_rule_tells_what_torch_does(name):
    class Net(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return RULED[name](x)

    x = (
        torch.randn(4, 4, 6)
        if name.startswith(("conv of", "same"))
        else torch.randn(4, 5, 6)
        if name != "batch norm"
        else torch.randn(3, 4, 6)
    )
    if name == "group norm":
        x = torch.randn(3, 4, 6)
    assert record(Net(), (x.clone(),)).of("")[0].result == TensorSpec.of(Net()(x))


@pytest.mark.parametrize(
    "function",
    [
        pytest.param(lambda x: F.linear(x, torch.empty(5, 7)), id="linear"),
        pytest.param(lambda x: F.linear(x, torch.empty(5, 6), torch.empty(4)), id="bias"),
        pytest.param(lambda x: F.linear(x, torch.empty(5, 6, dtype=torch.float64)), id="type"),
        pytest.param(lambda x: F.conv1d(x, torch.empty(8, 3, 3)), id="conv"),
        pytest.param(lambda x: F.conv1d(x, torch.empty(8, 4, 9)), id="kernel beyond the input"),
        pytest.param(lambda x: F.conv1d(x, torch.empty(9, 2, 3), groups=2), id="groups"),
        pytest.param(lambda x: F.batch_norm(x, torch.empty(5), torch.empty(5)), id="batch norm"),
        pytest.param(lambda x: F.batch_norm(x[:1, :, :1], None, None, training=True), id="one value per channel"),
        pytest.param(lambda x: F.layer_norm(x, (5,)), id="layer norm"),
        pytest.param(lambda x: F.group_norm(x, 3), id="group norm"),
        pytest.param(lambda x: x + x[:, :2], id="arithmetic"),
        pytest.param(lambda x: x[:, :1].add_(x), id="in place"),
        pytest.param(lambda x: F.dropout(x, 1.5), id="dropout"),
        pytest.param(
            lambda x: F.embedding(x, torch.empty(3, 4)),
            id="embedding",
            marks=pytest.mark.skipif(torch.__version__ < "2.13", reason="torch 2.11 refuses real indices only where there are values"),
        ),
    ],
)
def test_what_torch_refuses_is_refused(function):
    class Net(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return function(x)

    x = torch.randn(2, 4, 6)
    with pytest.raises(Exception):  # noqa: B017
        Net()(x.clone())
    with pytest.raises(SurgeryError, match="record: Net does not run on these inputs"):
        record(Net(), (x,))


def test_the_rules_are_asked(monkeypatch):
    asked = []
    for function, rule in list(recording.RULES.items()):
        monkeypatch.setitem(recording.RULES, function, lambda *args, rule=rule, **kwargs: asked.append(rule) or rule(*args, **kwargs))
    case = BIG["resnet50"]
    assert calls_of(case.build(), case.inputs()) is not None
    assert len(asked) > 150


# Who reads what


class Reader(nn.Module):
    """Reads a child's weight in several ways."""

    def __init__(self, how: str):
        super().__init__()
        self.how = how
        self.fc = nn.Linear(6, 6)
        self.weights = nn.ParameterList([nn.Parameter(torch.zeros(6))])

    def forward(self, x: Tensor) -> Tensor:
        match self.how:
            case "function":
                return F.linear(x, self.fc.weight)
            case "keyword":
                return F.linear(x, weight=self.fc.weight)
            case "list":
                return self.fc(x) + torch.cat([self.fc.weight]).sum()
            case "forward":
                return self.fc.forward(x)
            case "data":
                return x @ self.fc.weight.data.t()
            case "operator":
                return x @ self.fc.weight
            case "shape":
                return self.fc(x.to(self.fc.weight.dtype)).view(-1, self.fc.weight.shape[0]).view(-1, self.fc.weight.size(0))
            case "own list":
                return self.fc(x) + self.weights[0]
        return self.fc(x)


@pytest.mark.parametrize("how", ["function", "keyword", "list", "forward", "data", "operator"])
def test_a_weight_read_outside_its_module_is_noted(how):
    assert record(Reader(how), (torch.randn(2, 6),)).readers("fc.weight") == ("",)


@pytest.mark.parametrize("how", ["call", "shape", "own list"])
def test_what_is_no_reading_is_not_noted(how):
    calls = record(Reader(how), (torch.randn(2, 6),))
    assert calls.readers("fc.weight") == calls.readers("weights.0") == ()
    assert ("weights.0" in calls.used) == (how == "own list")


def test_attention_reads_its_projection_and_an_encoder_layer_its_children():
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    calls = record(nn.Sequential(layer), (torch.randn(2, 5, 8),))
    assert calls.readers("0.self_attn.out_proj.weight") == ("0", "0.self_attn")
    assert calls.readers("0.linear1.weight") == ("0",)


def test_tied_weights_are_read_by_their_owners():
    case = MODELS["gpt2"]
    model = built(case)
    calls = record(model, (), case.inputs())
    assert model.lm_head.weight is model.transformer.wte.weight
    assert calls.readers("lm_head.weight") == calls.readers("transformer.wte.weight") == ()


def test_every_call_of_a_module_is_noted_under_each_of_its_names():
    case = AWKWARD["module_called_twice"]
    model = built(case)
    calls = record(model, *as_call(case.inputs()))
    counts = {path: len(calls.of(path)) for path in calls.paths if path}
    assert max(counts.values()) == 2
    shared = nn.Linear(4, 4)
    calls = record(nn.Sequential(shared, nn.ReLU(), shared), (torch.randn(2, 4),))
    assert len(calls.of("0")) == len(calls.of("2")) == 2


def test_calls_of_a_module_without_registration_are_named_after_its_holder():
    class Hidden(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.hidden = [nn.Linear(4, 4)]

        def forward(self, x: Tensor) -> Tensor:
            return self.hidden[0](x)

    assert record(Hidden(), (torch.randn(2, 4),)).paths == ("<Linear>", "")


# The model is left alone


class Writer(nn.Module):
    """Writes wherever a forward can: attributes, containers, buffers, gradients' tensors, generators, what hooks close over."""

    def __init__(self, end: BaseException | None = None) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(6)
        self.fc = nn.Linear(6, 6)
        self.rnn = nn.LSTM(6, 6)
        self.drop = nn.Dropout(0.5)
        self.embedding = nn.Embedding(4, 6, max_norm=0.1)
        self.register_buffer("count", torch.zeros(3))
        self.history: list = []
        self.table = {"last": None}
        self.end = end
        self.noted = self.note
        self.seen: list = []
        seen = self.seen
        self.fc.register_forward_hook(lambda module, args, result: seen.append(result))
        self.fc.register_forward_pre_hook(self.note)
        self.spare = nn.utils.weight_norm(nn.Linear(6, 6)) if end is None else nn.Identity()

    def note(self, module: nn.Module, args: tuple) -> None:
        self.table["last"] = args[0]

    def forward(self, x: Tensor) -> Tensor:
        x = self.drop(self.norm(x))
        self.history.append(x)
        self.last = x
        self.count += 1
        self.table["other"] = x
        self.noted(self, (x,))
        torch.manual_seed(len(self.history))
        random.random()
        numpy.random.rand()
        x = self.fc(x) + torch.rand_like(x) + self.embedding(torch.zeros(len(x), dtype=torch.int64))
        x = self.rnn(self.spare(x))[0]
        if self.end is not None:
            raise self.end
        return x


@pytest.mark.parametrize("end", [None, RuntimeError("broken"), KeyboardInterrupt()], ids=["success", "failure", "interrupt"])
def test_a_run_leaves_no_trace(end):
    model = Writer(end)
    model.fc.weight.grad = torch.ones(6, 6)
    x = torch.randn(3, 6)
    before = fingerprint(model)
    if isinstance(end, KeyboardInterrupt):
        with pytest.raises(KeyboardInterrupt):
            calls_of(model, x)
    else:
        assert (calls_of(model, x) is None) == (end is not None)
    assert fingerprint(model) == before
    assert not model.seen and not model.history and model.table == {"last": None}


@pytest.mark.parametrize("name", ["scripted_part", "spectral_norm", "weight_norm_hook", "lstm", "gpt2"])
def test_a_run_leaves_no_trace_in_the_zoo(name):
    model = built(ALL[name])
    inputs = ALL[name].inputs()
    before = fingerprint(model)
    assert calls_of(model, inputs) is not None
    assert fingerprint(model) == before


def test_a_hook_that_is_an_object_writes_to_a_copy():
    class Recorder:
        def __init__(self) -> None:
            self.results: list = []

        def __call__(self, module: nn.Module, args: tuple, result: Tensor) -> None:
            self.results.append(result)

    recorder = Recorder()
    model = nn.Sequential(nn.Linear(4, 4))
    model[0].register_forward_hook(recorder)
    model[0].register_forward_hook(recorder.__call__)
    calls_of(model)
    assert recorder.results == []
    model(torch.randn(2, 4))
    assert len(recorder.results) == 2


def test_hooks_that_change_results_count():
    model = nn.Sequential(nn.Linear(4, 4))
    model[0].register_forward_hook(lambda module, args, result: result[:, :3])
    calls = calls_of(model)
    assert calls.of("0")[0].result.shape == calls.of("")[0].result.shape == (2, 3)


def test_a_compiled_model_runs_as_written():
    def fails(*args):
        raise AssertionError("compiled")

    inner = nn.Sequential(nn.Linear(4, 5), nn.ReLU())
    model = torch.compile(inner, backend=fails)
    calls = calls_of(model)
    assert calls is calls_of(inner)
    assert calls.of("_orig_mod.0")[0].result.shape == (2, 5)
    part = nn.Sequential(nn.Linear(3, 4), torch.compile(nn.Linear(4, 5), backend=fails))
    assert calls_of(part).of("1")[0].result.shape == (2, 5)
    compiled_in_place = nn.Sequential(nn.Linear(3, 4))
    compiled_in_place[0].compile(backend=fails)
    calls = calls_of(compiled_in_place)
    assert calls.of("0")[0].result.shape == (2, 4)
    assert calls.used == {"0.weight", "0.bias"}


@pytest.mark.parametrize("name", ["resnet_basic", "gpt2", "lstm"])
def test_elastic_models_are_tried_at_their_widths(name):
    case = MODELS[name]
    model = ee.elasticize(built(case), case.inputs(), capacity=1.5)
    widths = {key: dim.minimum * dim.multiple_of for key, dim in ee.dims(model).items()}
    full = calls_of(model)
    before = fingerprint(model)
    ee.resize(model, widths)
    narrow = calls_of(model)
    assert narrow is not full
    assert described(narrow) != described(full)
    ee.resize(model, {key: dim.capacity for key, dim in ee.dims(model).items()})
    assert described(calls_of(model)) not in (described(full), described(narrow))
    assert [entry for entry in fingerprint(model) if isinstance(entry, tuple)] == [entry for entry in before if isinstance(entry, tuple)]


# What is remembered

CHANGES = {
    "size": lambda m: m.__setitem__(0, nn.Conv2d(3, 8, 5)),
    "stride": lambda m: setattr(m[0], "stride", (2, 2)),
    "mode": lambda m: m.eval(),
    "storage": lambda m: setattr(m[0].weight, "data", torch.randn(8, 3, 1, 1)),
    "hook": lambda m: m[0].register_forward_hook(lambda module, args, result: result[:1]),
    "class": lambda m: setattr(m[1], "__class__", nn.Identity),
    "order": lambda m: m._modules.update({"0": m._modules.pop("0")}),
    "child": lambda m: m.append(nn.Flatten()),
    "type": lambda m: m.double(),
    "list": lambda m: m.sizes.append(3),
}


@pytest.mark.parametrize("change", CHANGES)
def test_calls_are_remembered_until_something_changes(change):
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU())
    model.sizes = [2]
    x = torch.randn(2, 3, 9, 9)
    calls, stamp = calls_of(model, x), stamp_of(model)
    assert calls_of(model, torch.zeros(2, 3, 9, 9)) is calls
    assert calls_of(model, torch.randn(2, 3, 9, 8)) is not calls
    CHANGES[change](model)
    assert stamp_of(model) != stamp
    assert calls_of(model, x) is not calls


def test_another_hook_is_a_change():
    model = nn.Sequential(nn.Linear(4, 4))
    hook = model[0].register_forward_hook(lambda module, args, result: result[:1])
    assert calls_of(model).of("")[0].result.shape == (1, 4)
    hook.remove()
    model[0].register_forward_hook(lambda module, args, result: result[:, :1])
    assert calls_of(model).of("")[0].result.shape == (2, 1)


def test_calls_of_before_are_there_again_after_a_rollback():
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    calls, old = calls_of(model), model[0]
    model[0] = nn.Linear(4, 5)
    assert calls_of(model) is not calls
    model[0] = old
    assert calls_of(model) is calls


def test_nothing_is_kept_alive():
    case = MODELS["gpt2"]
    model = built(case)
    calls = calls_of(model, case.inputs())
    known_inputs(model)
    dead = weakref.ref(model)
    parts = [weakref.ref(module) for module in model.modules()]
    del model
    gc.collect()
    assert dead() is None
    assert all(part() is None for part in parts)
    assert calls.of("")


# Parts


def resnet() -> tuple[nn.Module, Tensor]:
    case = MODELS["resnet_bottleneck"]
    return built(case), case.inputs()


def test_a_part_is_tried_alone():
    model, x = resnet()
    calls = calls_of(model, x)
    path = next(path for path in calls.paths if path.count(".") == 1)
    outcome = try_part(model, path, calls)
    assert outcome
    assert outcome.same and outcome.decided and outcome.error == ""
    assert outcome._parts[0].paths and all(inside == path or inside.startswith(path + ".") for inside in outcome._parts[0].paths)


def test_a_part_that_fails_names_op_shapes_module_and_line():
    model, x = resnet()
    calls = calls_of(model, x)
    old = model.layer1[0].conv2
    model.layer1[0].conv2 = nn.Conv2d(old.in_channels + 2, old.out_channels, 3, padding=1)
    outcome = try_part(model, "layer1.0", calls)
    assert not outcome
    failure = outcome.failure
    assert (failure.path, failure.op) == ("layer1.0.conv2", "conv2d")
    shapes_told = f"input {calls.of('layer1.0.conv2')[0].args[0]}", f"weight {tuple(model.layer1[0].conv2.weight.shape)}"
    assert failure.operands[:2] == shapes_told
    assert all(text in outcome.error for text in (*shapes_told, "layer1.0.conv2: conv2d: ", "residual.py:"))
    assert smallest_closed(model, "layer1.0.conv2", calls).error == outcome.error


def test_a_part_whose_result_changes_says_what_it_gave():
    model, x = resnet()
    calls = calls_of(model, x)
    model.conv1.stride = (3, 3)
    outcome = try_part(model, "conv1", calls)
    assert outcome and not outcome.same
    assert str(calls.of("conv1")[0].result) in outcome.error
    assert "conv1: gives " in outcome.error


def test_the_smallest_closed_part_is_found_and_the_rest_follows(monkeypatch):
    model, x = resnet()
    calls = calls_of(model, x)
    runs = []
    monkeypatch.setattr(trial, "attempt", lambda module, *args, **kwargs: runs.append(module) or attempt(module, *args, **kwargs))
    for width in range(5, 15):
        block = model.layer1[0]
        block.conv1 = nn.Conv2d(block.conv1.in_channels, width, 1, bias=False)
        block.bn1 = nn.BatchNorm2d(width)
        block.conv2 = nn.Conv2d(width, block.conv2.out_channels, 3, padding=1, bias=False)
        outcome = smallest_closed(model, "layer1.0", calls)
        assert outcome and outcome.same and outcome.path == "layer1.0"
        calls = calls_of(model, x)
        assert calls.of("layer1.0.conv1")[0].result.shape[1] == width
    assert runs == [model.layer1[0]] * 10
    assert described(calls) == described(record(model, (x,)))
    assert calls.readers("layer1.0.conv1.weight") == ()


def test_readers_inside_an_edited_part_are_seen():
    model = nn.Sequential(nn.Linear(6, 6), Reader("call"))
    calls = calls_of(model)
    model[1].how = "function"
    assert smallest_closed(model, "1", calls).path == "1"
    calls = calls_of(model)
    assert calls.readers("1.fc.weight") == ("1",)
    model[1].how = "call"
    assert smallest_closed(model, "1", calls).path == "1"
    assert calls_of(model).readers("1.fc.weight") == ()


def test_a_change_that_shows_outside_is_tried_further_out():
    model, x = resnet()
    calls = calls_of(model, x)
    model.fc = nn.Linear(model.fc.in_features, 3)
    outcome = smallest_closed(model, "fc", calls)
    assert outcome and outcome.path == ""
    assert calls_of(model, x).of("fc")[0].result.shape[1] == 3


def test_a_part_that_is_called_otherwise_after_the_change_is_tried_with_the_whole():
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(x[:, : self.fc.in_features])

    model = Net()
    calls = calls_of(model, torch.randn(2, 4))
    model.fc = nn.Linear(2, 3)
    assert not try_part(model, "fc", calls)
    outcome = smallest_closed(model, "fc", calls)
    assert outcome and outcome.path == ""


def test_a_container_is_tried_by_what_calls_its_children():
    case = MODELS["encoder"]
    model = built(case)
    calls = calls_of(model, case.inputs())
    assert not try_part(model, "layers", calls).decided
    assert "no forward called it" in try_part(model, "layers", calls).error
    assert smallest_closed(model, "layers", calls).path == ""


def test_each_call_of_a_module_is_tried():
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inside = nn.Sequential(nn.Linear(4, 4))

        def forward(self, x: Tensor) -> Tensor:
            return self.inside(self.inside(x)) + self.inside(x[None])[0]

    model = Twice()
    calls = calls_of(model, torch.randn(2, 4))
    assert len(calls.of("inside.0")) == 3
    model.inside[0] = nn.Linear(4, 4)
    assert smallest_closed(model, "inside", calls).path == "inside"
    assert len(calls_of(model, torch.randn(2, 4)).of("inside.0")) == 3
    model.inside.append(nn.Unflatten(1, (4, 1)))
    model.inside.append(nn.Flatten())
    outcome = smallest_closed(model, "inside", calls)
    assert not outcome


class Cache:
    """Keeps what it was given, as a model's cache does."""

    def __init__(self) -> None:
        self.kept: list = []

    def update(self, x: Tensor) -> Tensor:
        self.kept.append(x)
        return torch.cat(self.kept)


class Cached(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block = CachedBlock()

    def forward(self, x: Tensor, cache: Cache | None = None) -> Tensor:
        return self.block(x, cache=cache or Cache())


class CachedBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x: Tensor, cache: Cache) -> Tensor:
        return cache.update(self.fc(x))


def test_a_part_called_with_an_object_of_unknown_contents_is_tried_further_out():
    model = Cached()
    calls = calls_of(model, torch.randn(2, 4))
    assert not calls.of("block")[0].repeatable
    assert "contents are not known" in try_part(model, "block", calls).error
    assert smallest_closed(model, "block.fc", calls).path == "block.fc"
    assert smallest_closed(model, "block", calls).path == ""


def test_an_object_among_the_inputs_is_not_written_to():
    cache = Cache()
    cache.update(torch.randn(3, 4))
    model = Cached()
    calls = calls_of(model, {"x": torch.randn(2, 4), "cache": cache})
    assert calls.of("")[0].result.shape == (5, 4)
    assert len(cache.kept) == 1


def test_code_that_decides_by_values_is_not_decided():
    case = AWKWARD["data_dependent"]
    model = built(case)
    assert calls_of(model, case.inputs()) is None
    failure = trial.look(model, case.inputs())[1]
    assert not failure.decided
    assert "decides by the values of tensors" in str(failure)
    assert "awkward.py" in failure.line


def test_a_path_that_is_not_there_is_refused():
    model, x = resnet()
    with pytest.raises(SurgeryError, match="trial: ResNet has no module 'layer9'"):
        try_part(model, "layer9", calls_of(model, x))


def test_an_error_that_no_op_raised_is_told_with_its_class():
    class Broken(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 4)
            self.norm = None

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(self.fc(x))

    failure = trial.look(Broken(), torch.randn(2, 4))[1]
    assert str(failure).startswith("the model: TypeError: 'NoneType' object is not callable (at ")


# Inputs


@pytest.mark.parametrize("name", ["resnet_basic", "conv1d", "lstm", "gpt2", "bert", "t5", "clip", "encoder", "gated_mlp"])
def test_inputs_are_derived(name):
    model = built(ALL[name])
    before = fingerprint(model)
    args, kwargs = known_inputs(model)
    assert fingerprint(model) == before
    model(*args, **kwargs)
    again = known_inputs(model)
    assert again[0] is args and again[1] is kwargs


@pytest.mark.parametrize(
    "layer",
    [nn.Linear(3, 4), nn.Conv1d(3, 4, 3), nn.Conv2d(3, 4, 3), nn.Conv3d(3, 4, 3), nn.Embedding(5, 4), nn.GRU(3, 4), nn.Conv2d(3, 4, 48)],
    ids=repr,
)
def test_inputs_are_derived_from_the_first_layer(layer):
    args, kwargs = known_inputs(layer)
    assert kwargs == {}
    layer(*args)


def test_sequences_are_tried_where_vectors_fail():
    model = nn.TransformerEncoderLayer(8, 2, 16)

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.proj = nn.Linear(3, 8)
            self.layer = model

        def forward(self, x: Tensor) -> Tensor:
            batch, length, _ = x.shape
            return self.layer(self.proj(x)).view(batch, length, 8)

    assert known_inputs(Net())[0][0].dim() == 3


def test_inputs_come_from_whoever_knows_them():
    case = MODELS["resnet_basic"]
    model = built(case)
    x = torch.randn(1, 2)
    assert known_inputs(model, x)[0][0] is x
    assert known_inputs(model, (x, None)) == ((x, None), {})
    assert known_inputs(model, {"x": x}) == ((), {"x": x})
    given = case.inputs()
    ee.elasticize(model, given)
    assert known_inputs(model)[0][0] is given
    with pytest.raises(SurgeryError, match="example_inputs: expected a tensor, a tuple of arguments or a dict"):
        known_inputs(model, 3)


def test_no_input_is_known_of_what_takes_something_else():
    assert known_inputs(nn.Bilinear(2, 3, 4)) is None
    assert known_inputs(nn.ReLU()) is None
    assert known_inputs(built(AWKWARD["data_dependent"])) is None
    assert not smallest_closed(nn.ReLU(), "").decided


def test_a_derived_input_stays_known_when_the_model_breaks():
    model = nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 6))
    inputs = known_inputs(model)
    model[1] = nn.Linear(7, 6)
    assert known_inputs(model) is inputs
    assert "linear: input (2, 5), weight (6, 7)" in str(trial.look(model)[1])
    model[0] = nn.Linear(3, 7)
    assert known_inputs(model)[0][0].shape == (2, 3)


def test_inputs_that_fail_in_training_are_not_derived():
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)
            self.head = nn.Linear(4 * 62 * 62, 2)

        def forward(self, x: Tensor) -> Tensor:
            x = self.conv(x)
            return self.head(x.flatten(1)) if self.training else x

    assert known_inputs(Net().eval())[0][0].shape == (2, 3, 32, 32)
    assert known_inputs(Net().train())[0][0].shape == (2, 3, 64, 64)


def test_copies_have_memories_of_their_own():
    model = nn.Sequential(nn.Linear(4, 5))
    calls = calls_of(model)
    twin = copy.deepcopy(model)
    assert memory_of(twin) is not memory_of(model)
    assert calls_of(twin) is not calls


# What modules take and give past their arguments and results


class Aside(nn.Module):
    """A holder whose parts hand a tensor on by an attribute."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.first, self.second, self.third = nn.Sequential(nn.Linear(4, 4)), nn.Sequential(Taker()), nn.Linear(4, 4)

    def forward(self, x):
        made = self.first[0](x) if self.how == "inside" else self.first(x)
        self.second[0].brought = {"given": None, "the input": x, "a result": made, "inside": made}[self.how]
        return self.third(self.second(made))


class Taker(nn.Module):
    brought = None

    def forward(self, x):
        return x if self.brought is None else x + self.brought


@pytest.mark.parametrize(
    ("how", "open"),
    [("given", set()), ("the input", {"second", "second.0"}), ("a result", set()), ("inside", set())],
)
def test_a_tensor_that_is_brought_past_the_arguments_is_seen(how, open):
    calls = record(Aside(how), (torch.randn(2, 4),))
    assert calls.open == open


def test_a_tensor_that_is_taken_from_inside_is_seen():
    class Keeper(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(4, 4)

        def forward(self, x):
            self.kept = self.inner(x)
            return self.kept * 2

    class Reader(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.keeper, self.last = Keeper(), nn.Linear(4, 4)

        def forward(self, x):
            return self.last(self.keeper(x) + self.keeper.kept)

    assert record(Reader(), (torch.randn(2, 4),)).open == {"keeper"}


def test_a_skip_opens_the_modules_between_its_ends_until_it_is_removed():
    model = nn.Sequential(*(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)) for _ in range(3)))
    x, hand = torch.randn(2, 4), ee.ModelSurgeon(torch.randn(2, 4))
    skip = hand.add_skip_connection(model, "0.0", "2.0")
    assert calls_of(model, x).open == {"0", "2", "2.0", "2.0.edits.skip_0"}
    assert hand.modify_layer(model, "1.0", {"out_features": 6}) and hand.modify_layer(model, "2.0", {"out_features": 6})
    assert calls_of(model, x).open == {"0", "2", "2.0", "2.0.edits.skip_0"} == record(model, (x,)).open
    assert hand.remove_skip_connection(model, skip.details["name"])
    assert calls_of(model, x).open == set()
