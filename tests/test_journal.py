"""The journal: what it takes, how it travels, and that a replay makes the same structure or nothing at all."""

from __future__ import annotations

import contextlib
import copy
import json
import pickle
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import hostile
import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

import esper_elastic as ee
from esper_elastic import checkpoint
from esper_elastic.errors import CheckpointError, StateDictError, SurgeryError
from esper_elastic.surgery.journal import describe, journal, layer_of, record, replay, validated
from esper_elastic.surgery.specs.specs import LayerSpec

KEY = "_esper_elastic"


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(4, 6)
        self.fc2 = nn.Linear(6, 3)
        self.drop = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(self.fc2(self.fc1(x).relu()))


class Scale(nn.Module):
    """Nothing that a spec describes."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))


def add(after: str = "fc1", layer: Any = None, **more: Any) -> dict[str, Any]:
    layer = LayerSpec("Linear", {"in_features": 6, "out_features": 6}) if layer is None else layer
    arguments = {"position": f"after_{after}", "layer": describe(layer), "preserve": False}
    return {"format": 1, "operation": "add_layer", "arguments": arguments, "name": f"{after}.edits.after_0", **more}


def modify(path: str, **config: Any) -> dict[str, Any]:
    arguments = {"layer_name": path, "new_config": config, "preserve": True}
    return {"format": 1, "operation": "modify_layer", "arguments": arguments, "name": path, "details": {"sizes": [1, [2, None]]}}


def entry(operation: str, **arguments: Any) -> dict[str, Any]:
    return {"format": 1, "operation": operation, "arguments": arguments, "name": "fc1"}


class Surgeon:
    """Stands for the surgeon: it knows two operations, and writes the journal."""

    forgets = False

    def perform(self, model: nn.Module, entry: dict[str, Any], modules: dict[str, nn.Module]) -> Any:
        arguments = entry["arguments"]
        if arguments.get("layer_name") == "never":
            return Refused("no such layer")
        if entry["operation"] == "add_layer":
            place = model.get_submodule(arguments["position"].removeprefix("after_"))
            place.edits = nn.ModuleDict({"after_0": layer_of(entry, modules)})
        else:
            vars(model.get_submodule(arguments["layer_name"])).update(arguments["new_config"])
        if not self.forgets:
            record(model, entry)
        return Refused("")

    def __init__(self) -> None:
        """As the surgeon's, without example inputs."""


class Refused(SimpleNamespace):
    def __init__(self, error: str) -> None:
        super().__init__(error=error)

    def __bool__(self) -> bool:
        return not self.error


@contextlib.contextmanager
def transaction(model: nn.Module, optimizer: Any = None, *, validate: bool) -> Iterator[Any]:
    restore = checkpoint._structure_of(model, optimizer)
    try:
        yield SimpleNamespace(_following=SimpleNamespace(settle=lambda: None))
    except BaseException:
        restore()
        raise


@pytest.fixture(autouse=True)
def surgery(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "esper_elastic.surgery.surgeon", SimpleNamespace(ModelSurgeon=Surgeon))
    monkeypatch.setitem(sys.modules, "esper_elastic.surgery.transaction", SimpleNamespace(transaction=transaction))
    monkeypatch.setitem(sys.modules, "esper_elastic.surgery.undo", SimpleNamespace(save_values=lambda *tensors: None))


def edited(*entries: dict[str, Any], model: nn.Module | None = None) -> nn.Module:
    model = Net() if model is None else model
    for each in entries or (add(), modify("drop", p=0.25)):
        Surgeon().perform(model, each, {"fc2.edits.after_0": Scale()})
    return model


def look(model: nn.Module) -> Any:
    """All that a replay could change."""
    return (
        repr(model),
        [(name, id(t)) for name, t in model.named_parameters()],
        {p: set(vars(m)) for p, m in model.named_modules()},
        journal(model),
    )


# Keeping


def test_a_model_without_edits_has_an_empty_journal():
    net = Net()
    assert journal(net) == [] and journal(net.state_dict()) == []
    assert list(net.state_dict()) == ["fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias"]


def test_what_is_recorded_is_data_and_a_copy():
    net, given = Net(), modify("drop", p=0.25)
    record(net, given)
    kept = vars(net)["_surgery_journal"]
    given["arguments"]["new_config"]["p"] = 9
    assert journal(net) == [modify("drop", p=0.25)]
    journal(net).clear()
    record(net, add())
    assert journal(net) == [modify("drop", p=0.25), add()] == json.loads(json.dumps(journal(net), allow_nan=False))
    assert len(kept) == 1  # another list is in its place, so that whoever held the old one can put it back


@pytest.mark.parametrize("wrap", [nn.DataParallel, AveragedModel, torch.compile], ids=["parallel", "averaged", "compiled"])
def test_a_wrapper_has_the_journal_of_what_it_wraps(wrap):
    net = Net()
    wrapper = wrap(net)
    record(wrapper, add())
    inner = wrapper.module if isinstance(wrapper, AveragedModel) else net
    assert journal(inner) == journal(wrapper) == [add()]
    assert journal(wrapper.state_dict()) == [add()]


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["deepcopy", "pickle"])
def test_copies_carry_a_journal_of_their_own(copied):
    net = edited()
    other = copied(net)
    assert journal(other) == journal(net) and journal(other.state_dict()) == journal(net)
    record(other, modify("drop", p=0.0))
    assert len(journal(net)) == 2 and len(journal(other)) == 3


def test_an_unpickled_model_speaks_of_it_in_a_new_process(tmp_path):
    net = nn.Sequential(nn.Linear(2, 2))
    record(net, modify("0", bias=False))
    (tmp_path / "model").write_bytes(pickle.dumps(net))
    code = f"import pickle; model = pickle.load(open({str(tmp_path / 'model')!r}, 'rb')); print(*model.state_dict())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["0.weight", "0.bias", KEY]


def test_an_edit_notes_whether_the_model_was_elastic():
    net = Net().eval()
    record(net, add())
    ee.elasticize(net, torch.randn(2, 4))
    record(net, modify("drop", p=0.0) | {"elastic": False})
    assert [each.get("elastic") for each in journal(net)] == [None, True]


# What is refused

DAMAGED: dict[str, tuple[Any, str]] = {
    "no list": ({"0": add()}, r"journal: expected a list of at most 100000 edits, got a dict"),
    "no dict": ([3], r"entry 0: entry: expected a dict, got 3"),
    "format": ([add(), add(format=2)], r"entry 1: format: expected 1, got 2. Replay it with the version that wrote it"),
    "format of another type": ([add(format=True)], r"entry 0: format: expected 1, got True"),
    "operation": ([add(operation="eval")], r"operation: expected one of add_layer, remove_layer, .*, got 'eval'"),
    "no arguments": ([{"format": 1, "operation": "add_layer", "name": "a"}], r"add_layer: arguments: expected a dict, got None"),
    "unknown argument": ([entry("remove_layer", layer="fc1")], r"arguments: expected layer_name; got 'layer'. Did you mean layer_name\?"),
    "missing argument": ([entry("add_skip_connection", from_layer="a")], r"arguments: to_layer: expected a string .* got nothing"),
    "type of an argument": ([entry("remove_skip_connection", name=3)], r"arguments: name: expected a string .*; got 3"),
    "flag": ([entry("add_skip_connection", from_layer="a", to_layer="b", preserve=1)], r"preserve: expected true or false; got 1"),
    "unknown field": ([add(run="me")], r"add_layer: expected name, details, elastic; got 'run'"),
    "no name": ([{key: value for key, value in add().items() if key != "name"}], r"name: expected a string.*got nothing"),
    "long name": ([add(name="x" * 2000)], r"name: expected a string of at most 1024 characters; got 'x+'..., a string of 2000"),
    "layer": ([entry("add_layer", position="after_a", layer={"kind": "LSTM"})], r"layer: LayerSpec: kind: expected a layer on"),
    "no layer": ([entry("add_layer", position="after_a", layer=None)], r"layer: expected the JSON of a LayerSpec.* got None"),
    "class of a module": ([entry("add_layer", position="a", layer={"kind": "module"})], r"layer: expected the JSON of a LayerSpec, or"),
    "huge layer": (
        [entry("add_layer", position="a", layer={"kind": "Linear", "arguments": {"in_features": 2**28, "out_features": 2**28}})],
        r"layer: LayerSpec: Linear: elements to allocate: expected at most",
    ),
    "NaN": ([modify("a", p=float("nan"))], r"new_config: expected a dict of JSON with finite numbers"),
    "object": ([modify("a", p=object())], r"new_config: expected a dict of JSON"),
    "huge integer": ([modify("a", p=10**5000)], r"new_config: expected a dict of JSON"),
    "deep": ([add(details={"a": hostile.nested(20)})], r"details: expected a dict of JSON .* at most 8 levels deep"),
    "cyclic": ([add(details={"a": hostile.endless_list()})], r"details: expected a dict of JSON"),
    "wide": ([add(details={"a": [[0] * 1000] * 100})], r"details: expected a dict of JSON .* of 65536 parts"),
    "key": ([add(details={3: 4})], r"details: expected a dict of JSON"),
}  # fmt: skip


@pytest.mark.parametrize("case", DAMAGED)
def test_a_damaged_journal_is_refused(case):
    content, message = DAMAGED[case]
    net = Net()
    before = look(net)
    with pytest.raises(SurgeryError, match=r"^replay: .*" + message):
        replay(content, net)
    assert look(net) == before
    if type(content) is list and len(content) == 1:
        with pytest.raises(SurgeryError, match=message):
            record(net, content[0])
        assert look(net) == before


def test_ten_thousand_hostile_journals():
    rng, fine = random.Random(3), 0
    samples = [
        add(),
        modify("drop", p=0.1),
        entry("remove_layer", layer_name="a"),
        entry("add_skip_connection", from_layer="a", to_layer="b"),
    ]
    for _ in range(10**4):
        content: Any = [copy.deepcopy(rng.choice(samples)) for _ in range(rng.randint(0, 2))]
        for each in content:
            for target in (each["arguments"], each):
                if rng.random() < 0.3:
                    target[rng.choice([*target, "details", 3, "\ud800"])] = hostile.value(rng)
        content = content if rng.random() < 0.95 else hostile.value(rng)
        try:
            made = validated(content, "here")
        except SurgeryError as error:
            assert str(error).startswith("here: journal: ") and len(str(error)) < 2500
            continue
        fine += 1
        assert validated(json.loads(json.dumps(made)), "here") == made
    assert 2000 < fine < 8000


# Replaying


def test_a_replay_gives_the_same_structure_then_weights_load():
    net = edited(add(), modify("drop", p=0.25), add("fc2", nn.Sequential(nn.Linear(3, 3), nn.ReLU())))
    state = net.state_dict()
    fresh = Net()
    assert replay(journal(state), fresh) is fresh
    assert repr(fresh) == repr(net) and journal(fresh) == journal(net)
    assert fresh.load_state_dict(state).missing_keys == []
    assert all(torch.equal(a, b) for a, b in zip(fresh.state_dict().values(), state.values(), strict=True))
    before = look(fresh)
    replay(journal(net), fresh)  # nothing is left to do
    assert look(fresh) == before


def test_a_replay_goes_on_from_what_the_model_has_had():
    net, behind = edited(), edited(add())
    replay(journal(net), behind)
    assert journal(behind) == journal(net) and behind.drop.p == 0.25
    with pytest.raises(
        SurgeryError, match=r"expected one that begins with the 2 edits that Net has had, got another of 1. Replay it on a fresh"
    ):
        replay([add()], net)
    with pytest.raises(SurgeryError, match="begins with the 1 edits"):
        replay(journal(net), edited(modify("drop", p=0.25)))


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ([add(), modify("never")], r"replay: entry 1 \(modify_layer 'never'\): was refused: no such layer"),
        ([add(), modify("fc9")], r"replay: entry 1 \(modify_layer 'fc9'\): failed: Net has no attribute `fc9`"),
        ([add(), add("fc2", elastic=True)], r"entry 1 .*: expected a model that was elastic, as at the edit; this one is not. Replay and"),
    ],
    ids=["refused", "failed", "elastic"],
)
def test_all_edits_are_replayed_or_none(entries, message):
    net = Net()
    before = look(net)
    with pytest.raises(SurgeryError, match=message):
        replay(entries, net)
    assert look(net) == before


def test_an_edit_that_comes_out_otherwise_is_refused(monkeypatch):
    net = Net()
    before = look(net)
    monkeypatch.setattr(Surgeon, "forgets", True)
    with pytest.raises(
        SurgeryError, match=r"entry 0 \(add_layer 'fc1.edits.after_0'\): expected {.*}; got nothing. The model is not as it was"
    ):
        replay([add()], net)
    assert look(net) == before


def test_a_module_that_is_no_data_is_given_again():
    entries = [add("fc2", Scale()), modify("drop", p=0.0)]
    name, kind = "fc2.edits.after_0", f"{Scale.__module__}.Scale"
    assert entries[0]["arguments"]["layer"] == {"kind": "module", "class": kind}
    net = Net()
    for modules, message in (
        (None, rf"modules: expected a {kind} for 'fc2.edits.after_0', got nothing. Pass modules={{'fc2.edits.after_0': ...}}"),
        ({name: nn.ReLU()}, rf"modules: 'fc2.edits.after_0': expected a {kind}, got a torch.nn.modules.activation.ReLU"),
        ({name: Scale(), "fc1": nn.ReLU()}, r"modules: expected those that edits ask for, fc2.edits.after_0; got 'fc1'"),
    ):
        with pytest.raises(SurgeryError, match=message):
            replay(entries, net, modules=modules)
        assert journal(net) == []
    given = Scale()
    replay(entries, net, modules={name: given})
    assert net.fc2.edits["after_0"] is given
    replay([*entries, modify("drop", p=0.5)], net)  # the module has its place already
    with pytest.raises(SurgeryError, match="got nothing"):
        layer_of(entries[0], {})


def test_a_layer_is_described_by_its_spec_where_one_says_it():
    spec = LayerSpec("ReLU", {"inplace": True})
    assert describe(spec) == describe(nn.ReLU(inplace=True)) == spec.to_json()
    assert describe(ee.ElasticLinear(2, 3, max_out_features=5)) == describe(nn.Linear(2, 3))


# state_dict


def test_a_state_dict_speaks_of_edits():
    net = edited()
    state = net.state_dict()
    assert [key for key in state if key not in dict(net.named_parameters())] == [KEY]
    content = json.loads(bytes(state[KEY].tolist()))
    assert content == {"format": 1, "widths": {}, "switches": {}, "journal": journal(net)}
    net.load_state_dict(state)
    assert set(net.state_dict(prefix="a.")) == {f"a.{key}" for key in state}


def test_without_this_package_it_is_one_key_too_many():
    """As the docs say: where edits left the tensors as they were, the rest loads once the key is taken out."""
    state, load = edited(modify("drop", p=0.25)).state_dict(), nn.Module.load_state_dict.__wrapped__
    with pytest.raises(RuntimeError, match='Unexpected key.s. in state_dict: "_esper_elastic". $'):
        load(Net(), state)
    state.pop(KEY)
    load(Net(), state)


@pytest.mark.parametrize(
    ("had", "message"),
    [
        ((), r"journal: expected no edits, got 2. Replay them on the model first: ee.replay\(ee.journal\(state_dict\), model\)."),
        ((add(),), r"journal: expected the 1 edits that the model has had, got 2 other ones. Replay them on the model first"),
        ((modify("drop", p=0.1),), r"journal: expected the 1 edits .*, got 2 other ones. Load it into a fresh model, after ee.replay"),
        (
            (add(), modify("drop", p=0.25), modify("drop", p=0.3)),
            r"journal: expected the 3 edits .*, got 2 other ones. Load it into a fresh model",
        ),
    ],
    ids=["fresh", "behind", "other", "ahead"],
)
@pytest.mark.parametrize("strict", [True, False])
def test_a_model_of_another_journal_does_not_load(had, message, strict):
    state, net = edited().state_dict(), edited(*had) if had else Net()
    values = [t.clone() for t in net.parameters()]
    with pytest.raises(StateDictError, match=f"{KEY}: {message}"):
        net.load_state_dict(state, strict)
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), values, strict=True))


def test_an_unedited_key_does_not_load_into_an_edited_model():
    state = nn.ModuleDict({"fc1": ee.ElasticLinear(4, 3, max_out_features=6)}).state_dict()
    with pytest.raises(StateDictError, match="journal: expected the 2 edits that the model has had, got 0 other ones"):
        edited().load_state_dict(state, strict=False)


def test_a_key_of_a_part_is_compared_with_that_part():
    part = edited()
    whole = nn.ModuleDict({"part": copy.deepcopy(part)})
    whole.load_state_dict(part.state_dict(prefix="part."))
    with pytest.raises(StateDictError, match=r"part._esper_elastic: journal: expected no edits, got 2"):
        nn.ModuleDict({"part": Net(), "more": ee.ElasticLinear(2, 2)}).load_state_dict(part.state_dict(prefix="part."), strict=False)


def says(**fields: Any) -> Tensor:
    content = {"format": 1, "widths": {}, "switches": {}, "journal": []} | fields
    return torch.tensor(list(json.dumps(content).encode()), dtype=torch.uint8)


def test_a_foreign_key_is_unexpected_to_a_plain_model():
    state = Net().state_dict()
    for key in (torch.zeros(3), says(), torch.empty(0)):
        with pytest.raises(RuntimeError, match="Unexpected key"):
            Net().load_state_dict(state | {KEY: key})
    with pytest.raises(StateDictError, match="journal: expected a list of edits, got 3. Drop the key"):
        Net().load_state_dict(state | {KEY: says(journal=3)})
    with pytest.raises(SurgeryError, match=r"journal: _esper_elastic: expected a uint8 tensor of JSON with a journal, got something else"):
        journal({KEY: torch.zeros(3)})
    with pytest.raises(SurgeryError, match=r"journal: journal: entry 0: entry: expected a dict, got 3"):
        journal({KEY: says(journal=[3])})


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_a_scripted_module_has_no_journal():
    ee.ElasticLinear(2, 2)  # from here on state_dict looks
    assert list(torch.jit.script(nn.Sequential(nn.Linear(2, 2))).state_dict()) == ["0.weight", "0.bias"]


# Checkpoints

pytest.importorskip("safetensors")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "model.safetensors"


def equal_states(a: nn.Module, b: nn.Module) -> bool:
    ours, theirs = a.state_dict(), b.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


@pytest.mark.parametrize("had", [(), (add(),), (add(), modify("drop", p=0.25))], ids=["fresh", "behind", "same"])
def test_a_load_replays_what_the_model_has_not_had(path, had):
    net = edited()
    ee.save(path, net)
    other = edited(*had) if had else Net()
    ids = [id(other.fc1.weight), id(other.fc2.weight)]
    ee.load(path, other)
    assert equal_states(net, other) and repr(net) == repr(other) and journal(other) == journal(net)
    assert [id(other.fc1.weight), id(other.fc2.weight)] == ids


def test_a_model_of_another_journal_takes_no_checkpoint(path):
    ee.save(path, edited())
    for other in (edited(modify("drop", p=0.1)), edited(add(), modify("drop", p=0.25), modify("drop", p=0.3))):
        before = look(other)
        with pytest.raises(CheckpointError, match=r"load: .*: replay: journal: expected one that begins with the \d edits"):
            ee.load(path, other)
        assert look(other) == before


def elastic(model: nn.Module) -> nn.Module:
    return ee.elasticize(model, torch.randn(2, 4), capacity=2.0)


HISTORIES: dict[str, Callable[[], nn.Module]] = {
    "edited, then elastic": lambda: elastic(edited()),
    "elastic, then edited": lambda: edited(model=elastic(Net())),
    "edited, elastic, edited": lambda: edited(modify("drop", p=0.25), model=elastic(edited(add("fc2", Scale())))),
}


@pytest.mark.parametrize("history", HISTORIES)
def test_edits_and_conversion_are_repeated_in_their_order(path, history):
    torch.manual_seed(0)
    net = HISTORIES[history]()
    next(iter(ee.dims(net).values())).resize(3)
    ee.save(path, net)
    other = Net()
    modules = {"fc2.edits.after_0": Scale()} if history.count("edited") == 2 else None
    if modules is not None:
        with pytest.raises(CheckpointError, match=r"modules: expected a .*Scale for 'fc2.edits.after_0', got nothing"):
            ee.load(path, other)
        assert journal(other) == [] and type(other.fc1) is nn.Linear
    ee.load(path, other, modules=modules)
    assert equal_states(net, other) and journal(other) == journal(net)
    again = HISTORIES[history]()
    ee.load(path, again)
    assert equal_states(net, again)


@pytest.mark.parametrize("convert", [False, True])
def test_a_load_that_does_not_fit_leaves_the_model_unedited(path, convert):
    net = edited()
    net.fc2 = nn.Linear(6, 5)
    ee.save(path, elastic(net) if convert else net)
    other = Net()
    before = look(other)
    with pytest.raises(CheckpointError, match="fc2" if convert else r"fc2.bias: shape: expected \(3,\), got \(5,\)"):
        ee.load(path, other)
    assert look(other) == before


def test_a_hostile_journal_in_a_file_is_refused(path):
    net = edited()
    ee.save(path, net)
    from safetensors.torch import load_file, save_file

    tensors, other = load_file(path), Net()
    before = look(other)
    for bad, message in (([3], "entry 0: entry: expected a dict, got 3"), ([add(operation="eval")], "operation: expected one of")):
        content = {"format": 1, "widths": {}, "switches": {}, "layout": "compact", "aliases": {}, "journal": bad}
        save_file(tensors, path, {checkpoint.ENTRY: json.dumps(content)})
        with pytest.raises(CheckpointError, match=rf"load: .*: journal: .*{message}"):
            ee.load(path, other)
        assert look(other) == before
