"""save and load: what comes back is what was there, bit for bit, or nothing has changed."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import types
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from contract import poison
from interrupting import Lines
from torch import Tensor, nn

import esper_elastic as ee
from esper_elastic import checkpoint
from esper_elastic.errors import OwnerError

safetensors_torch = pytest.importorskip("safetensors.torch")
from safetensors import safe_open  # noqa: E402


class Net(nn.Module):
    """Elastic and plain layers, a norm with buffers, a switch, and two layers that share a weight."""

    def __init__(self) -> None:
        super().__init__()
        hidden, inner = ee.ElasticDim(8, multiple_of=2, name="hidden"), ee.ElasticDim(6, name="inner")
        self.first = ee.ElasticLinear(4, 8, out_dim=hidden)
        self.norm = ee.ElasticBatchNorm1d(8, dim=hidden)
        up = ee.ElasticLinear(8, 6, in_dim=hidden, out_dim=inner)
        self.branch = ee.ElasticBlock(nn.Sequential(up, nn.Tanh(), ee.ElasticLinear(6, 8, in_dim=inner, out_dim=hidden)), kind="branch")
        self.again = ee.ElasticLinear(8, 6, in_dim=hidden, out_dim=inner)
        self.again.weight = up.weight
        self.plain = nn.Linear(6, 3)
        self.mix = ee.ElasticLinear(6, 6, in_dim=inner)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.first(x)).relu()
        return self.plain(self.mix(self.again(x + self.branch(x))))


def network(seed: int = 0) -> Net:
    torch.manual_seed(seed)
    return Net()


def narrow(net: Net) -> Net:
    ee.resize(net, {"first": 6, "branch.module.0": 3})
    for layer in (net.first, net.norm, net.branch.module[0], net.branch.module[2], net.again, net.mix):
        poison(layer)
    return net


def raw(tensor: Tensor) -> tuple[Any, ...]:
    return tuple(tensor.shape), tensor.stride(), tensor.dtype, tensor.detach().contiguous().flatten().view(torch.uint8).tolist()


def flat(value: Any) -> Any:
    if isinstance(value, Tensor):
        return raw(value)
    if isinstance(value, tuple | list):
        return type(value)(flat(part) for part in value)
    return {key: flat(part) for key, part in value.items()} if isinstance(value, dict) else value


def everything(model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> dict[str, Any]:
    """All that a load could change, objects by identity where that may not change."""
    modules = dict(model.named_modules())
    return {
        "modules": {name: (id(module), type(module)) for name, module in modules.items()},
        "tensors": {name: (id(t), t.data_ptr(), raw(t)) for name, t in (*model.named_parameters(), *model.named_buffers())},
        "widths": {name: dim.active for name, dim in ee.dims(model).items()},
        "switches": {name: module.on for name, module in modules.items() if isinstance(module, ee.ElasticBlock)},
        "layouts": {name: getattr(module, "layout", None) for name, module in modules.items()},
        "optimizer": None if optimizer is None else flat(optimizer.state_dict()),
    }


def train(net: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        x = torch.randn(5, 4, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        net(x).square().mean().backward()
        optimizer.step()


OPTIMIZERS: dict[str, Callable[[nn.Module], torch.optim.Optimizer]] = {
    "AdamW": lambda net: ee.optim.AdamW(net.parameters(), lr=1e-2, amsgrad=True),
    "SGD": lambda net: ee.optim.SGD(net.parameters(), lr=1e-2, momentum=0.9, dampening=0.1, nesterov=False),
    "groups": lambda net: ee.optim.AdamW(
        [{"params": net.plain.parameters(), "weight_decay": 0.3}, {"params": [p for n, p in net.named_parameters() if "plain" not in n]}],
        lr=torch.tensor(1e-2),
    ),
    "guarded Adam": lambda net: ee.optim.guard(torch.optim.Adam(net.parameters(), lr=1e-2), net),
    "guarded NAdam": lambda net: ee.optim.guard(torch.optim.NAdam(net.parameters(), lr=1e-2), net),
    "guarded Adafactor": lambda net: ee.optim.guard(torch.optim.Adafactor(net.parameters(), lr=1e-2), net),
    "guarded Rprop": lambda net: ee.optim.guard(torch.optim.Rprop(net.parameters(), lr=1e-2), net),
}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "model.safetensors"


@pytest.mark.parametrize("layout", ["compact", "static", "mixed"])
def test_a_model_comes_back_bit_for_bit(path: Path, layout: str) -> None:
    net = narrow(network())
    net.norm.num_batches_tracked.fill_(5)
    ee.disable(net, "branch")
    if layout == "mixed":
        net.first.layout = "static"
    else:
        ee.set_layout(net, layout)
    ee.save(path, net)
    other = network(1)
    ids = [id(parameter) for parameter in other.parameters()]
    ee.load(path, other)
    expected, got = everything(net), everything(other)
    for name in ("widths", "switches", "layouts"):
        assert got[name] == expected[name]
    assert [raw(t) for t in other.state_dict().values()] == [raw(t) for t in net.state_dict().values()]
    assert [id(parameter) for parameter in other.parameters()] == ids
    assert other.again.weight is other.branch.module[0].weight
    assert list(path.parent.iterdir()) == [path]


def test_widths_and_switches_are_one_commit(path: Path) -> None:
    net = narrow(network())
    ee.disable(net, "branch")
    ee.save(path, net)
    other = network(1)
    before = ee.control_block(other).generation
    ee.load(path, other)
    assert ee.control_block(other).generation == before + 1


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_resumed_training_equals_training_that_was_never_interrupted(path: Path, kind: str) -> None:
    def first_half(net: Net, optimizer: torch.optim.Optimizer) -> None:
        train(net, optimizer, range(2))
        ee.resize(net, {"first": 4, "branch.module.0": 5})
        train(net, optimizer, range(2, 5))
        ee.dims(net)["branch.module.0"].keep([0, 2, 3])
        ee.disable(net, "branch")
        train(net, optimizer, range(5, 6))

    def second_half(net: Net, optimizer: torch.optim.Optimizer) -> None:
        train(net, optimizer, range(6, 7))
        ee.enable(net, "branch")
        torch.manual_seed(9)
        ee.dims(net)["first"].grow(8)
        ee.resize(net, {"branch.module.0": 6})
        train(net, optimizer, range(7, 10))

    net = network()
    optimizer = OPTIMIZERS[kind](net)
    first_half(net, optimizer)
    ee.save(path, net, optimizer)
    second_half(net, optimizer)

    other = network(1)
    resumed = OPTIMIZERS[kind](other)
    train(other, resumed, range(20, 22))  # what is there is replaced
    ee.load(path, other, resumed)
    second_half(other, resumed)
    assert flat(other.state_dict()) == flat(net.state_dict())
    assert flat(resumed.state_dict()) == flat(optimizer.state_dict())


def test_state_comes_back_in_the_memory_format_of_its_parameter(path: Path) -> None:
    net = ee.ElasticConv2d(3, 4, 3, max_out_channels=6).to(memory_format=torch.channels_last)
    optimizer = ee.optim.AdamW(net.parameters())
    net(torch.randn(2, 3, 5, 5)).sum().backward()
    optimizer.step()
    ee.save(path, net, optimizer)
    before = flat(optimizer.state_dict())
    ee.load(path, net, optimizer)
    assert optimizer.state[net.weight]["exp_avg"].stride() == net.weight.stride() != net.weight.contiguous().stride()
    assert flat(optimizer.state_dict()) == before


def test_a_learning_rate_that_is_one_tensor_for_all_groups_stays_one(path: Path) -> None:
    net = network()
    optimizer = OPTIMIZERS["groups"](net)
    ee.save(path, net, optimizer)
    ee.load(path, net, optimizer)
    first, second = (group["lr"] for group in optimizer.param_groups)
    assert first is second and first.item() == torch.tensor(1e-2).item()
    assert optimizer.param_groups[0]["betas"] == (0.9, 0.999)


def test_numbers_that_json_has_no_word_for(path: Path) -> None:
    net = network()
    optimizer = torch.optim.SGD(net.parameters(), lr=math.inf)
    optimizer.param_groups[0]["note"] = [None, ("a", -math.inf), {"tensor": "x"}]
    ee.save(path, net, optimizer)
    metadata(path)
    optimizer.param_groups[0].update(lr=1.0, note=None)
    ee.load(path, net, optimizer)
    assert optimizer.param_groups[0]["lr"] == math.inf
    assert optimizer.param_groups[0]["note"] == [None, ("a", -math.inf), {"tensor": "x"}]


def test_tensors_keep_the_type_and_the_place_that_they_have(path: Path) -> None:
    net = network()
    optimizer = ee.optim.AdamW(net.parameters())
    train(net, optimizer, range(2))
    ee.save(path, net, optimizer)
    other = network(1).double()
    resumed = ee.optim.AdamW(other.parameters())
    ee.load(path, other, resumed)
    assert all(torch.equal(a.float(), b) for a, b in zip(other.parameters(), net.parameters(), strict=True))
    assert other.first.weight.dtype == resumed.state[other.first.weight]["exp_avg"].dtype == torch.float64
    assert torch.equal(resumed.step_counts(other.first.weight), optimizer.step_counts(net.first.weight))


@pytest.mark.parametrize("wrap", [nn.DataParallel, torch.compile], ids=["parallel", "compiled"])
def test_wrappers_are_looked_through(path: Path, wrap: Callable[[nn.Module], nn.Module]) -> None:
    net = narrow(network())
    ee.save(path, wrap(net), ee.optim.AdamW(net.parameters()))
    other = network(1)
    ee.load(path, other)
    assert flat(other.state_dict()) == flat(net.state_dict())
    ee.save(path, net)
    third = network(2)
    ee.load(path, wrap(third))
    assert flat(third.state_dict()) == flat(net.state_dict())


def test_tensors_are_readable_without_this_package_and_shared_ones_are_stored_once(path: Path) -> None:
    net = narrow(network())
    ee.save(path, net)
    tensors = safetensors_torch.load_file(path)
    assert "again.weight" not in tensors and "_esper_elastic" not in tensors
    assert metadata(path)["aliases"] == {"again.weight": "branch.module.0.weight"}
    assert all(raw(tensor) == raw(net.state_dict()[key]) for key, tensor in tensors.items())


def test_a_shared_tensor_is_loaded_into_two_where_it_is_not_shared(path: Path) -> None:
    net, other = network(), network(1)
    other.again.weight = nn.Parameter(torch.zeros(6, 8))
    ee.save(path, net)
    ee.load(path, other)
    assert torch.equal(other.again.weight, net.again.weight) and flat(other.state_dict()) == flat(net.state_dict())


def test_a_thread_that_does_not_own_the_widths_loads_nothing(path: Path) -> None:
    ee.save(path, narrow(network()))
    other = network(1)
    before = everything(other)
    with ThreadPoolExecutor() as pool, pytest.raises(OwnerError):
        pool.submit(ee.load, path, other).result()
    assert everything(other) == before


def test_parameters_that_lie_in_one_buffer_are_saved_apart(path: Path) -> None:
    model = nn.ModuleList([nn.Linear(3, 3), nn.Linear(3, 3)])
    buffer = torch.arange(12.0)
    for layer in model:
        layer.weight.data, layer.bias.data = buffer[:9].view(3, 3), buffer[9:]
    model[1].weight.data = model[1].weight.data.t()
    ee.save(path, model)
    other = nn.ModuleList([nn.Linear(3, 3), nn.Linear(3, 3)])
    ee.load(path, other)
    assert all(torch.equal(a, b) for a, b in zip(other.parameters(), model.parameters(), strict=True))


def test_a_plain_model_and_an_optimizer_of_torch_are_served_too(path: Path) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    optimizer = torch.optim.AdamW(model.parameters())
    train(model, optimizer, range(2))
    ee.save(path, model, optimizer)
    expected = flat(model.state_dict()), flat(optimizer.state_dict())
    train(model, optimizer, range(2))
    ee.load(path, model, optimizer)
    assert (flat(model.state_dict()), flat(optimizer.state_dict())) == expected


def test_the_model_can_be_loaded_without_its_optimizer(path: Path) -> None:
    net = network()
    ee.save(path, net, ee.optim.AdamW(net.parameters()))
    other = network(1)
    ee.load(path, other)
    assert flat(other.state_dict()) == flat(net.state_dict())


# Interrupted saves


KILLED = """
import os, random, signal, sys, time
import torch
from torch import nn
import esper_elastic as ee

path, model = sys.argv[1], nn.Sequential(*(ee.ElasticLinear(60, 60) for _ in range(6)))
torch.set_num_threads(1)

def fill(number):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(number)

fill(0)
ee.save(path, model)
random.seed(0)
seen = set()
for round in range(1000):
    if round >= 60 and len(seen) > 10:  # a busy machine may kill many before they have saved
        break
    child = os.fork()
    if child == 0:
        for number in range(round * 1000 + 1, round * 1000 + 1000):
            fill(number)
            ee.save(path, model)
        os._exit(0)
    time.sleep(random.uniform(0.0, 0.03))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    ee.load(path, model)
    values = {float(value) for parameter in model.parameters() for value in parameter.unique()}
    assert len(values) == 1, values
    seen |= values
assert len(seen) > 10, seen
"""


def test_a_process_killed_while_it_saves_leaves_a_whole_file(path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", KILLED, str(path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def failing_at(nth: int, real: Any, calls: list[str], error: type[BaseException]) -> types.SimpleNamespace:
    """``os``, of which the ``nth`` call that touches the file system raises."""

    def fails(name: str) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            calls.append(name)
            if len(calls) == nth:
                raise error("injected")
            return getattr(real, name)(*args, **kwargs)

        return call

    touching = ("open", "close", "fstat", "chmod", "fsync", "replace")
    return types.SimpleNamespace(**{**vars(real), **{name: fails(name) for name in touching}})


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_a_save_that_fails_anywhere_leaves_the_old_file_or_the_new_one(
    path: Path, error: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    old, new = network(0), network(1)
    ee.save(path, new)
    expected = path.read_bytes()
    order = ["open", "fstat", "close", "chmod", "open", "fsync", "close", "replace", "open", "fsync", "close"]
    for nth in range(1, len(order) + 1):
        ee.save(path, old)
        before, calls = path.read_bytes(), []
        with monkeypatch.context() as patch:
            patch.setattr(checkpoint, "os", failing_at(nth, os, calls, error))
            with pytest.raises((error, ee.CheckpointError), match="injected"):
                ee.save(path, new)
        assert path.read_bytes() == (expected if "replace" in calls[:-1] else before)
        assert list(path.parent.iterdir()) == [path]
    assert calls == order


def test_a_save_that_safetensors_fails_leaves_the_old_file(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    net = network()
    ee.save(path, net)
    before = path.read_bytes()

    def fail(tensors: Any, filename: str, metadata: Any) -> None:
        Path(filename).write_bytes(b"half")
        raise OSError("no space left")

    monkeypatch.setattr(safetensors_torch, "save_file", fail)
    with pytest.raises(ee.CheckpointError, match=r"save: .*model.safetensors: could not be written: no space left"):
        ee.save(path, network(1))
    assert path.read_bytes() == before and list(path.parent.iterdir()) == [path]


def test_a_file_is_as_readable_as_others_and_a_link_stays_one(path: Path) -> None:
    link = path.with_name("latest")
    ee.save(path, network())
    link.symlink_to(path)
    ee.save(link, network(1))
    other = path.with_name("other")
    other.touch()
    assert link.is_symlink() and path.stat().st_mode == other.stat().st_mode


# What a load refuses


def metadata(path: Path) -> dict[str, Any]:
    with safe_open(path, "pt") as file:
        return json.loads(file.metadata()[checkpoint.ENTRY], parse_constant=lambda word: pytest.fail(f"no JSON: {word}"))


def rewritten(path: Path, content: Callable[[dict[str, Any]], Any], tensors: Callable[[dict[str, Tensor]], Any]) -> None:
    entry, stored = metadata(path), safetensors_torch.load_file(path)
    entry = content(entry) or entry
    tensors(stored)
    safetensors_torch.save_file(stored, path, {checkpoint.ENTRY: entry if isinstance(entry, str) else json.dumps(entry)})


def same(_: Any) -> None:
    pass


STATE = "optimizer:first.weight:exp_avg"
BAD: dict[str, tuple[Callable[[dict[str, Any]], Any], Callable[[dict[str, Tensor]], Any], str]] = {
    "format": (lambda c: c.update(format=2), same, r"format: expected 1, got 2. Load it with the version"),
    "no format": (lambda c: c.pop("format") and None, same, r"metadata that do not read as JSON with a format"),
    "no JSON": (lambda c: "{", same, r"metadata that do not read as JSON"),
    "JSON of another kind": (lambda c: "[]", same, r"metadata that do not read as JSON"),
    "no widths": (lambda c: c.pop("widths") and None, same, r"widths: expected .*dict.*, got None. The metadata are damaged"),
    "journal": (lambda c: c["journal"].append({}), same, r"journal: expected no edits, got 1. Replay them"),
    "missing": (same, lambda t: t.pop("norm.running_mean"), r"does not fit Net:\n\tnorm.running_mean: missing"),
    "missing alias": (lambda c: c["aliases"].clear(), same, r"again.weight: missing"),
    "dangling alias": (lambda c: c["aliases"].update({"again.weight": "nowhere"}), same, r"again.weight: missing"),
    "alias of no key": (lambda c: c["aliases"].update({"again.weight": []}), same, r"aliases: expected keys, got .*\[\]"),
    "unexpected": (same, lambda t: t.update(extra=torch.zeros(1)), r"extra: unexpected"),
    "no longer shared": (
        lambda c: c["aliases"].clear(),
        lambda t: t.update({"again.weight": torch.zeros(6, 8)}),
        r"again.weight: expected to be shared with branch.mod",
    ),
    "shape": (same, lambda t: t.update({"plain.bias": torch.zeros(4)}), r"plain.bias: shape: expected \(3,\), got \(4,\)"),
    "dtype": (
        same,
        lambda t: t.update({"plain.bias": torch.zeros(3, dtype=torch.int64)}),
        r"plain.bias: dtype: expected torch.float32, got torch.i",
    ),
    "width": (
        lambda c: c["widths"].update({"first.out": 5}),
        same,
        r"widths: first.out: .* cannot activate 5 units: expected a multiple of 2",
    ),
    "beyond capacity": (lambda c: c["widths"].update({"first.out": 10}), same, r"widths: first.out: .*capacity is 8"),
    "no width": (lambda c: c["widths"].update({"first.out": True}), same, r"widths: first.out: .*expected an integer, got True"),
    "width missing": (lambda c: c["widths"].pop("first.out") and None, same, r"widths: first.out: missing"),
    "width unexpected": (lambda c: c["widths"].update(nobody=3), same, r"widths: nobody: unexpected"),
    "switch": (lambda c: c["switches"].update({"branch.switch": 1}), same, r"switches: branch.switch: expected true or false, got 1"),
    "switch missing": (lambda c: c["switches"].clear(), same, r"switches: branch.switch: missing"),
    "layout": (lambda c: c.update(layout="dense"), same, r"layout: : expected 'compact' or 'static', got 'dense'"),
    "layout of nobody": (lambda c: c.update(layout={"plain": "static"}), same, r"layout: plain: unexpected"),
    "no optimizer": (lambda c: c.update(optimizer=None), same, r"optimizer: expected its state, got a checkpoint without"),
    "class": (
        lambda c: c["optimizer"].update({"class": "x.Lion"}),
        same,
        r"expected the state of a esper_elastic.optim.adamw.AdamW, got that of a x",
    ),
    "groups": (lambda c: c["optimizer"]["groups"].append({}), same, r"optimizer: expected 1 parameter groups, got 2"),
    "order": (
        lambda c: c["optimizer"]["groups"][0]["params"].reverse(),
        same,
        r"optimizer: group 0: expected parameter 'first.weight', got 'mix.bias'",
    ),
    "fewer": (lambda c: c["optimizer"]["groups"][0]["params"].pop() and None, same, r"group 0: expected parameter 'mix.bias', got None"),
    "state of nobody": (lambda c: c["optimizer"]["state"].update(nobody={}), same, r"optimizer: state: .* got an entry for 'nobody'"),
    "state missing": (same, lambda t: t.pop(STATE), rf"optimizer: the metadata are damaged \(KeyError\('{STATE}'\)\)"),
    "state shape": (same, lambda t: t.update({STATE: torch.zeros(8, 1)}), r"optimizer: first.weight: exp_avg: expected the shape \(8, 4\)"),
    "counts": (
        same,
        lambda t: t.update({"optimizer:first.weight:step": torch.tensor([1, 1, 0, 3])}),
        r"step counts: expected bands of a parameter",
    ),
    "damaged optimizer": (lambda c: c["optimizer"].update(groups=3), same, r"optimizer: the metadata are damaged"),
    "unknown kind": (
        lambda c: c["optimizer"]["groups"][0]["options"].update(lr={"what": 1}),
        same,
        r"damaged \(ValueError\(\"a value of unknown kind 'what'",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_a_file_that_does_not_fit_changes_nothing(path: Path, case: str) -> None:
    net = narrow(network())
    optimizer = ee.optim.AdamW(net.parameters())
    ee.resize(net, {"first": 8, "branch.module.0": 6})
    for parameter in net.parameters():
        torch.nan_to_num_(parameter.data)
    train(net, optimizer, range(2))
    ee.save(path, net, optimizer)
    content, tensors, message = BAD[case]
    rewritten(path, content, tensors)
    other = network(1)
    resumed = ee.optim.AdamW(other.parameters())
    train(other, resumed, range(3))
    ee.resize(other, {"first": 4})
    before = everything(other, resumed)
    with pytest.raises(ee.CheckpointError, match=rf"load: .*model.safetensors: (.|\n)*{message}"):
        ee.load(path, other, resumed)
    assert everything(other, resumed) == before


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda data: b"", "cut off or of another kind"),
        (lambda data: data[:-1], "cut off or of another kind"),
        (lambda data: data[:100], "cut off or of another kind"),
        (lambda data: b"PK\x03\x04" + bytes(200), "cut off or of another kind"),
        (lambda data: safetensors_torch.save({"a": torch.zeros(2)}), "without the entry 'esper_elastic' in its metadata"),
    ],
    ids=["empty", "truncated", "header alone", "zip", "foreign"],
)
def test_a_file_that_is_no_checkpoint_is_refused(path: Path, damage: Callable[[bytes], bytes], message: str) -> None:
    net = network()
    ee.save(path, net)
    path.write_bytes(damage(path.read_bytes()))
    before = everything(net)
    with pytest.raises(ee.CheckpointError, match=f"load: .*model.safetensors: expected a checkpoint that ee.save wrote, got .*{message}"):
        ee.load(path, net)
    assert everything(net) == before


def test_a_file_that_is_not_there_is_not_found(path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        ee.load(path, network())


def test_what_cannot_be_saved_is_named(path: Path) -> None:
    net = network()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    optimizer.param_groups[0]["note"] = object()
    with pytest.raises(
        ee.CheckpointError, match=r"save: .*: optimizer: groups:0:note: expected a tensor, number, string or None.* got object"
    ):
        ee.save(path, net, optimizer)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    optimizer.state[torch.zeros(2)] = {"step": 1}
    with pytest.raises(ee.CheckpointError, match=r"optimizer: state: .* got an entry for a tensor of shape \(2,\)"):
        ee.save(path, net, optimizer)
    with pytest.raises(ee.CheckpointError, match=r"save: .*: weight: expected a tensor with values, got one on the meta device"):
        ee.save(path, nn.Linear(2, 2, device="meta"))
    net.register_module("optimizer:x", nn.Linear(1, 1))
    with pytest.raises(ee.CheckpointError, match=r"optimizer:x.weight: keys of a model may not begin with 'optimizer:'"):
        ee.save(path, net, torch.optim.SGD(net.parameters(), lr=0.1))

    class Extra(nn.Linear):
        def get_extra_state(self) -> dict[str, int]:
            return {"calls": 1}

    with pytest.raises(
        ee.CheckpointError, match=r"_extra_state: expected a parameter or buffer, got dict, which a hook or get_extra_state"
    ):
        ee.save(path, Extra(2, 2))
    assert list(path.parent.iterdir()) == []


def test_without_safetensors_the_remedy_is_named(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "safetensors", None)
    for call in (ee.save, ee.load):
        with pytest.raises(ee.CheckpointError, match=r"safetensors is not installed. pip install safetensors"):
            call(path, network())


# Interrupted loads


#: The files that load.
FILES = (checkpoint.__file__, sys.modules["esper_elastic.optim.packing"].__file__)


def assert_whole_or_nothing(path: Path, make: Callable[[], tuple[nn.Module, torch.optim.Optimizer]]) -> None:
    """Interrupts a load at many lines, at each of the last ones: nothing has changed, but at the very last line, where all is done."""
    with Lines(files=FILES) as lines:
        ee.load(path, *make())
    model, optimizer = make()
    before, params = everything(model, optimizer), [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert lines.count > 200
    for nth in sorted({*range(1, lines.count - 60, lines.count // 60), *range(lines.count - 60, lines.count)}):
        with Lines(nth, files=FILES), pytest.raises(KeyboardInterrupt):
            ee.load(path, model, optimizer)
        assert everything(model, optimizer) == before, f"line {nth} of {lines.count}"
        assert [id(p) for group in optimizer.param_groups for p in group["params"]] == params
    with Lines(lines.count, files=FILES), pytest.raises(KeyboardInterrupt):
        ee.load(path, model, optimizer)
    whole, stepper = make()
    ee.load(path, whole, stepper)
    assert flat(model.state_dict()) == flat(whole.state_dict()) and flat(optimizer.state_dict()) == flat(stepper.state_dict())


def test_a_load_that_is_interrupted_anywhere_changes_nothing(path: Path) -> None:
    net = narrow(network())
    ee.disable(net, "branch")
    ee.set_layout(net, "static")
    ee.save(path, net, ee.optim.AdamW(net.parameters(), lr=0.5))

    def make() -> tuple[nn.Module, torch.optim.Optimizer]:
        other = network(1)
        optimizer = ee.optim.AdamW(other.parameters())
        train(other, optimizer, range(2))
        ee.resize(other, {"first": 4})
        return other, optimizer

    assert_whole_or_nothing(path, make)


# Plans


def plain(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))


@pytest.fixture
def converted(path: Path) -> tuple[nn.Module, torch.optim.Optimizer]:
    """A converted model and its optimizer, which ``path`` holds."""
    model = plain()
    optimizer = ee.optim.AdamW(model.parameters())
    ee.elasticize(model, torch.randn(3, 4), capacity={"0": 6}, optimizer=optimizer)
    train(model, optimizer, range(2))
    ee.resize(model, {"0": 5})
    train(model, optimizer, range(2))
    ee.save(path, model, optimizer)
    return model, optimizer


def test_a_plain_model_is_made_elastic_by_the_plan(path: Path, converted: tuple[nn.Module, torch.optim.Optimizer]) -> None:
    model, optimizer = converted
    other = plain(1)
    resumed = ee.optim.AdamW(other.parameters())
    ee.load(path, other, resumed)
    for net, stepper in ((model, optimizer), (other, resumed)):
        train(net, stepper, range(5, 7))
        ee.resize(net, {"0": 6})
        train(net, stepper, range(7, 9))
    assert flat(other.state_dict()) == flat(model.state_dict()) and flat(resumed.state_dict()) == flat(optimizer.state_dict())
    ee.load(path, other, resumed)  # it is elastic now, and the plan is left aside
    assert ee.dims(other)["0"].active == 5


def plainly() -> tuple[nn.Module, torch.optim.Optimizer]:
    model = plain(1)
    optimizer = ee.optim.AdamW(model.parameters())
    train(model, optimizer, range(1))
    return model, optimizer


def test_a_plain_model_stays_plain_where_the_load_is_interrupted(path: Path, converted: tuple[nn.Module, torch.optim.Optimizer]) -> None:
    assert_whole_or_nothing(path, plainly)


@pytest.mark.parametrize("case", ["plan", "shape", "optimizer", "state"])
def test_a_plain_model_stays_plain_where_the_file_does_not_fit(
    path: Path, converted: tuple[nn.Module, torch.optim.Optimizer], case: str
) -> None:
    if case == "plan":
        rewritten(path, lambda c: c["plan"]["modules"][0].update(path="nowhere"), same)
    elif case == "shape":
        rewritten(path, same, lambda t: t.update({"1.bias": torch.zeros(3)}))
    elif case == "optimizer":
        rewritten(path, lambda c: c["optimizer"].update({"class": "x"}), same)
    else:
        rewritten(path, same, lambda t: t.update({"optimizer:0.weight:exp_avg": torch.zeros(4, 4)}))  # as in the plain model
    other, resumed = plainly()
    before = everything(other, resumed)
    message = {
        "plan": "plan: cannot make Sequential elastic by it: plan: module 'nowhere' is missing",
        "shape": "1.bias: shape",
        "state": "exp_avg: expected the",
    }
    with pytest.raises(ee.CheckpointError, match=message.get(case, "optimizer: expected the state of a")):
        ee.load(path, other, resumed)
    assert everything(other, resumed) == before
