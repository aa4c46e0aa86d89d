"""The undo log: whatever it notes comes back, object for object, and each of its notes is needed for that."""

import collections
import importlib
import random
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy
import pytest
import torch
from editing import Edited, Scene, elastic, plain
from fingerprint import Print, assert_same, fingerprint
from torch import nn

import esper_elastic as ee
from esper_elastic import followers
from esper_elastic.errors import TransactionError, UnknownDimError
from esper_elastic.layers import registry
from esper_elastic.surgery import transaction, undo
from esper_elastic.surgery.undo import UndoLog, save_values

transaction_module = importlib.import_module("esper_elastic.surgery.transaction")  # the package has a function of that name


class Interrupt(BaseException):
    """As KeyboardInterrupt, that no one else raises."""


class Slotted(nn.Module):
    """Keeps attributes outside its ``__dict__``."""

    __slots__ = ("kept", "unset")

    def __init__(self) -> None:
        super().__init__()
        object.__setattr__(self, "kept", [1])


class OtherAdamW(torch.optim.AdamW):
    """A class for an optimizer to become."""


def rich() -> Scene:
    """A plain model with attributes of every kind that is followed."""
    scene = plain()
    model = scene.model
    model.slotted = Slotted()
    model.scripted = torch.jit.script(nn.BatchNorm1d(2))
    model.names = {"a", "b"}
    model.recent = collections.deque([1, [2]], maxlen=4)
    model.generator = torch.Generator().manual_seed(1)
    model.beside = [nn.Linear(2, 2)]
    model.pair = (torch.zeros(2), {"one": 1})
    model.conv1.weight.register_post_accumulate_grad_hook(lambda tensor: None)
    for parameter in model.head.parameters():
        parameter.grad = torch.ones_like(parameter)
    return scene


def reorder(scene: Scene) -> None:
    scene.model._modules["conv1"] = scene.model._modules.pop("conv1")


def swap_storage(scene: Scene) -> None:
    weight = scene.model.head.weight
    grad, weight.grad = weight.grad, None
    weight.data = torch.zeros(9, 9)
    grad.data = torch.zeros(9, 9)
    weight.grad = grad


def drop_hooks(scene: Scene) -> None:
    scene.model.conv1.weight._backward_hooks = None


def set_slots(scene: Scene) -> None:
    scene.model.slotted.kept = None
    scene.model.slotted.unset = 3


def ordered(scene: Scene) -> None:
    scene.model.conv1._forward_hooks.popitem()
    scene.model.bn1._forward_hooks[1] = print


def write_slice(scene: Scene) -> None:
    save_values(scene.model.head.weight[1:3])
    scene.model.head.weight.data[1:3] = 7.0
    save_values(scene.model.head.weight[2:4])
    with torch.no_grad():
        scene.model.head.weight[2:4] = 8.0


def write_counted(scene: Scene) -> None:
    save_values(scene.model.head.weight)
    with torch.no_grad():
        scene.model.head.weight.mul_(1)


#: What is done to a model in training, each a kind that some note undoes.
PLAIN: dict[str, Callable[[Scene], Any]] = {
    "class": lambda s: setattr(s.model.conv1, "__class__", Edited),
    "attribute": lambda s: setattr(s.model.conv1, "stride", (2, 2)),
    "new attribute": lambda s: setattr(s.model, "edits", []),
    "deleted attribute": lambda s: delattr(s.model.conv1, "padding"),
    "mode": lambda s: s.model.eval(),
    "order of modules": reorder,
    "new module": lambda s: s.model.body.append(nn.Identity()),
    "new parameter": lambda s: s.model.head.register_parameter("bias", nn.Parameter(torch.zeros(4))),
    "buffer": lambda s: s.model.bn1.register_buffer("running_mean", torch.zeros(1)),
    "storage, with a gradient": swap_storage,
    "strides": lambda s: setattr(s.model.conv1.weight, "data", s.model.conv1.weight.data.to(memory_format=torch.channels_last)),
    "gradient": lambda s: setattr(s.model.head.weight, "grad", None),
    "requires_grad": lambda s: s.model.requires_grad_(False),
    "hook of a tensor": lambda s: s.model.head.weight.register_hook(print),
    "hooks of a tensor": drop_hooks,
    "further hook of a tensor": lambda s: s.model.conv1.weight.register_hook(print),
    "hook after accumulation": lambda s: s.model.head.weight.register_post_accumulate_grad_hook(print),
    "further hook after accumulation": lambda s: s.model.conv1.weight.register_post_accumulate_grad_hook(print),
    "attribute of a tensor": lambda s: setattr(s.model.head.weight, "note", 1),
    "hooks of a module": ordered,
    "list": lambda s: s.model.sizes.append(3),
    "dict in a list": lambda s: s.model.sizes[1].update(head=5),
    "list in a deque": lambda s: s.model.recent[1].append(3),
    "dict in a tuple": lambda s: s.model.pair[1].clear(),
    "set": lambda s: s.model.names.clear(),
    "deque": lambda s: s.model.recent.appendleft(3),
    "slots": set_slots,
    "list in a slot": lambda s: s.model.slotted.kept.append(2),
    "tensor in an attribute": lambda s: setattr(s.model.offset, "data", torch.zeros(9)),
    "module in a list": lambda s: setattr(s.model.beside[0].weight, "data", torch.zeros(9)),
    "generator": lambda s: s.model.generator.manual_seed(5),
    "scripted module": lambda s: s.model.scripted.eval(),
    "tensor of a scripted module": lambda s: setattr(s.model.scripted.running_mean, "data", torch.zeros(9)),
    "values": write_slice,
    "version": write_counted,
    "class of an optimizer": lambda s: setattr(s.optimizer, "__class__", OtherAdamW),
    "guard": lambda s: ee.optim.guard(s.optimizer, s.model),
    "option of a group": lambda s: s.optimizer.param_groups[0].update(weight_decay=0.5),
    "learning rate": lambda s: s.optimizer.param_groups[0]["lr"].fill_(5.0),
    "parameters of a group": lambda s: s.optimizer.param_groups[0]["params"].pop(),
    "new group": lambda s: s.optimizer.add_param_group({"params": [torch.zeros(1)]}),
    "state": lambda s: s.optimizer.state.popitem(),
    "reading state": lambda s: s.optimizer.state[torch.zeros(1)],
    "state of a parameter": lambda s: s.optimizer.state[s.model.head.weight].pop("exp_avg"),
    "storage of state": lambda s: setattr(s.optimizer.state[s.model.head.weight]["exp_avg"], "data", torch.zeros(9)),
    "step of an optimizer": lambda s: torch.optim.lr_scheduler.StepLR(s.optimizer, 1),
    "scheduler": lambda s: setattr(s.scheduler, "last_epoch", 40),
    "scaler": lambda s: s.scaler.update(3.0),
    "state of a scaler": lambda s: s.scaler._per_optimizer_states[7],
    "ema": lambda s: setattr(s.ema.module.head, "bias", None),
    "random": lambda s: random.random(),
    "numpy.random": lambda s: numpy.random.rand(),
    "torch.random": lambda s: torch.rand(1),
}

ELASTIC: dict[str, Callable[[Scene], Any]] = {
    "width": lambda s: s.model[0].out_dim.resize(3),
    "units": lambda s: s.model[0].out_dim.grow(9),
    "axes": lambda s: registry.forget(s.model[0].weight),
    "layout": lambda s: ee.set_layout(s.model, "static"),
    "dim": lambda s: setattr(s.model[0].out_dim, "rigid", "today"),
    "axis of a layer": lambda s: setattr(s.model[0]._widths, "label", "another"),
    "user of a dim": lambda s: ee.ElasticLinear(7, 2, in_dim=s.model[0].out_dim),
    "another vector": lambda s: s.model[0].out_dim.block._reallocate(),
    "plans": lambda s: s.optimizer._forget(),
}


class Beside(NamedTuple):
    """A scene whose control block another model uses."""

    model: Any
    other: Any

    def followers(self) -> dict[str, Any]:
        return {}

    def print(self) -> Print:
        return [*fingerprint(self.model), *fingerprint(self.other)]


def beside() -> Beside:
    dim = ee.ElasticDim(4, 6)
    return Beside(ee.ElasticLinear(3, 4, out_dim=dim), ee.ElasticLinear(4, 3, in_dim=dim))


def derived() -> Beside:
    """All that the model knows of the dim is an axis made of it."""
    return Beside(ee.ElasticLayerNorm(8, dim=ee.ElasticDim(4, 6) * 2), nn.Linear(1, 1))


def switched() -> Beside:
    return Beside(nn.Sequential(ee.ElasticBlock(nn.Linear(2, 2))), nn.Linear(1, 1))


class Structured(Beside):
    """A model, and whether it has a second layer to resize."""

    def print(self) -> Print:
        try:
            ee.resize(self.model, {"1": 4})
        except UnknownDimError:
            return fingerprint(self.model)
        return [*fingerprint(self.model), ("resized", "1")]


def structured() -> Beside:
    model = nn.Sequential(ee.ElasticLinear(3, 4))
    ee.dims(model)
    return Structured(model, None)


def append_and_look(scene: Beside) -> None:
    scene.model._modules["1"] = ee.ElasticLinear(4, 4)
    ee.dims(scene.model)


def in_sequence() -> Scene:
    scene = rich()
    schedulers = [torch.optim.lr_scheduler.ConstantLR(scene.optimizer), torch.optim.lr_scheduler.ConstantLR(scene.optimizer)]
    return scene._replace(scheduler=torch.optim.lr_scheduler.SequentialLR(scene.optimizer, schedulers, milestones=[5]))


CHANGES = {
    **{name: (rich, change) for name, change in PLAIN.items()},
    **{f"elastic: {name}": (elastic, change) for name, change in ELASTIC.items()},
    "elastic: switch": (switched, lambda s: s.model[0].switch.set(False)),
    "user elsewhere": (beside, lambda s: s.model.out_dim.block._reallocate()),
    "elastic: structure": (structured, append_and_look),
    "derived: width": (derived, lambda s: s.model.dim.dims[0].resize(3)),
    "scheduler in a list": (in_sequence, lambda s: setattr(s.scheduler._schedulers[0], "last_epoch", 40)),
}


def rolled_back(name: str) -> tuple[Print, Print]:
    """The fingerprints after a rollback of one change, and before."""
    build, change = CHANGES[name]
    scene = build()
    untouched = scene.print()
    with pytest.raises(Interrupt), transaction(scene.model, **scene.followers()):
        if name == "elastic: units":  # `grow` does not report what it writes
            save_values(*scene.model.parameters(), *(p.grad for p in scene.model.parameters()))
            save_values(*(t for kept in scene.optimizer.state.values() for t in kept.values()))
        change(scene)
        assert scene.print() != untouched, "nothing was changed"
        raise Interrupt
    return scene.print(), untouched


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_is_undone(name):
    assert_same(*rolled_back(name))


def no_calls(*args: Any) -> list[Any]:
    return []


def no_call(*args: Any) -> Callable[[], None]:
    return lambda: None


def without_column(index: int) -> Any:
    real = undo._Notes.iterators

    def iterators(self: Any) -> list[Any]:
        found = real(self)
        del found[index]
        return found

    return undo._Notes, "iterators", iterators


def without_rule(name: str) -> Any:
    rules = tuple(pair for pair in undo._RULES if pair[0].__name__ != name)
    assert len(rules) + 1 == len(undo._RULES)
    return undo, "_RULES", rules


#: Each part of the log, as what stands in for it when it is left out; and a change that it is needed for.
PARTS: dict[str, tuple[Any, str]] = {
    "other calls": (without_column(0), "list"),
    "gradients": (without_column(1), "gradient"),
    "requires_grad": (without_column(2), "requires_grad"),
    "storage": (without_column(3), "strides"),
    "classes": (without_column(4), "class"),
    "contents of ordered dicts": (without_column(5), "hooks of a module"),
    "ordered dicts": (without_column(6), "hooks of a module"),
    "contents of dicts": (without_column(7), "attribute"),
    "dicts": (without_column(8), "new attribute"),
    "tensors": (without_rule("Tensor"), "gradient"),
    "scripted modules": (without_rule("ScriptModule"), "scripted module"),
    "modules": (without_rule("Module"), "attribute"),
    "rule of ordered dicts": (without_rule("OrderedDict"), "hooks of a module"),
    "rule of dicts": (without_rule("dict"), "state"),
    "lists": (without_rule("list"), "list"),
    "tuples": (without_rule("tuple"), "dict in a tuple"),
    "sets": (without_rule("set"), "set"),
    "deques": (without_rule("deque"), "deque"),
    "optimizers": (without_rule("Optimizer"), "guard"),
    "schedulers": (without_rule("LRScheduler"), "scheduler in a list"),
    "entries": (without_rule("Entry"), "elastic: switch"),
    "users of entries": (
        (undo, "_RULES", tuple((k, undo._note_object if r is undo._note_entry else r) for k, r in undo._RULES)),
        "user elsewhere",
    ),
    "control blocks": (without_rule("ControlBlock"), "elastic: width"),
    "axes": (without_rule("Axis"), "derived: width"),
    "what layers know": (without_rule("Widths"), "elastic: layout"),
    "generators": (without_rule("Generator"), "generator"),
    "values": ((UndoLog, "save_values", lambda *args: None), "values"),
    "random numbers": ((UndoLog, "record_random_numbers", lambda self: None), "torch.random"),
    "axes of parameters": ((registry, "remembered", no_call), "elastic: axes"),
    "who follows": ((followers, "remembered", no_calls), "guard"),
    "structure": ((transaction_module, "forgetting", no_calls), "elastic: structure"),
}


@pytest.mark.parametrize("part", PARTS)
def test_each_part_of_the_log_is_needed(part, monkeypatch):
    patch, name = PARTS[part]
    monkeypatch.setattr(*patch)
    with pytest.raises((AssertionError, AttributeError, KeyError, TransactionError)):  # what is not undone may stand in the way of what is
        assert_same(*rolled_back(name))


def test_every_rule_and_column_is_left_out_once():
    assert len(undo._Notes().iterators()) == 9
    assert len([part for part, (patch, _) in PARTS.items() if patch[1] == "_RULES"]) == len(undo._RULES) + 1
