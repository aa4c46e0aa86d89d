"""Small models of each family in training, with all that hangs on them, and five edits of each that surgery makes one after the other."""

from __future__ import annotations

import copy
import functools
import random
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy
import torch
from converting import built, inputs_of
from fingerprint import Print, digest, fingerprint
from torch import Tensor, nn
from zoo import MODELS, Case, Inputs, call, floating_leaves
from zoo.case import by_name, images
from zoo.convolutional import UNet
from zoo.mobile import MobileNetV2
from zoo.residual import BasicBlock, DenseNet, ResNet
from zoo.vision import VisionTransformer

import esper_elastic as ee
from esper_elastic.surgery.journal import journal


class Tiny(nn.Module):
    """The least that every edit has something to do in."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 4, 3, padding=1)
        self.relu = nn.ReLU()
        self.conv2 = nn.Conv2d(4, 4, 1)
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.conv2(self.relu(self.conv1(x))).mean((2, 3)))


CASES = by_name(
    Case("resnet", lambda: ResNet(BasicBlock, (1, 2, 1, 1), width=6, num_classes=10), lambda: images(33, 33)),
    Case("densenet", lambda: DenseNet(growth_rate=4, block_layers=(2, 2), stem=8, bottleneck=2, num_classes=10), lambda: images(40, 40)),
    Case("mobilenet", lambda: MobileNetV2(((1, 6, 1, 1), (2, 8, 2, 2)), stem=8, last=16, num_classes=10), lambda: images(24, 24)),
    Case("unet", lambda: UNet(width=4, num_classes=5), lambda: images(18, 26)),
    Case("vit", lambda: VisionTransformer(12, 2, 20, 3, num_patches=4, num_classes=10, fused=False, rich=False), lambda: images(16, 16)),
    Case("tiny", lambda: Tiny(), lambda: images(5, 5)),
    *(MODELS[name] for name in ("gpt2", "llama", "bert")),
)


class Edit(NamedTuple):
    """An edit that a surgeon is asked for.

    Attributes:
        operation: the surgeon's method.
        arguments: that follow the model; a module among them is made by calling.
    """

    operation: str
    arguments: tuple[Any, ...]

    def make(self, surgeon: ee.ModelSurgeon, model: nn.Module, given: tuple[Any, ...]) -> Any:
        """Ask ``surgeon`` for it, with what :meth:`fresh` has made."""
        return getattr(surgeon, self.operation)(model, *given)

    def fresh(self) -> tuple[Any, ...]:
        """The arguments, modules new and the same at each call."""
        torch.manual_seed(5)
        return tuple(argument() if callable(argument) else argument for argument in self.arguments)


def _edits(add: tuple[str, Callable[[], nn.Module]], remove: str, modify: tuple[str, dict[str, Any]], skip: tuple[str, str]) -> list[Edit]:
    return [
        Edit("add_layer", add),
        Edit("modify_layer", modify),
        Edit("add_skip_connection", skip),
        Edit("remove_layer", (remove,)),
        Edit("remove_skip_connection", (f"{skip[1]}.edits.skip_0",)),
    ]


EDITS: dict[str, list[Edit]] = {
    "resnet": _edits(
        ("after_layer2.0.conv1", lambda: nn.Conv2d(12, 16, 3, padding=1)),
        "layer2.1",
        ("layer3.0.conv1", {"out_channels": 30}),
        ("layer1", "layer3"),
    ),
    "densenet": _edits(
        ("after_features.denseblock1.denselayer1.conv1", lambda: nn.Conv2d(8, 10, 1)),
        "features.denseblock2.denselayer1.relu2",
        ("features.denseblock1.denselayer2.conv1", {"out_channels": 12}),
        ("features.conv0", "features.transition1"),
    ),
    "mobilenet": _edits(
        ("before_features.2.conv.2", lambda: nn.Conv2d(12, 16, 1)),
        "features.3",
        ("features.2.conv.1.0", {"kernel_size": 5}),
        ("features.1", "features.2"),
    ),
    "unet": _edits(
        ("after_down1.1.double_conv.0", lambda: nn.Conv2d(8, 12, 3, padding=1)),
        "down2.1.double_conv.2",
        ("down1.1.double_conv.3", {"out_channels": 12}),
        ("inc", "up3"),
    ),
    "vit": _edits(
        ("after_blocks.1.mlp.fc1", lambda: nn.Linear(20, 24)),
        "blocks.1",
        ("blocks.0.mlp.fc1", {"out_features": 24}),
        ("blocks.0", "blocks.2"),
    ),
    "gpt2": _edits(
        ("after_transformer.h.0.mlp", lambda: nn.Linear(24, 24)),
        "transformer.h.0.mlp.act",
        ("transformer.h.1.mlp.dropout", {"p": 0.2}),
        ("transformer.h.0.mlp", "transformer.h.1.mlp"),
    ),
    "llama": _edits(
        ("after_model.layers.0.mlp", lambda: nn.Linear(32, 32)),
        "model.layers.0.mlp.act_fn",
        ("model.layers.0.mlp.up_proj", {"out_features": 48}),
        ("model.layers.0.mlp", "model.layers.1.mlp"),
    ),
    "bert": _edits(
        ("after_bert.encoder.layer.0.intermediate.dense", lambda: nn.Linear(40, 44)),
        "bert.pooler.activation",
        ("bert.encoder.layer.1.intermediate.dense", {"out_features": 44}),
        ("bert.encoder.layer.0.output", "bert.encoder.layer.1.output"),
    ),
}
EDITS["tiny"] = _edits(
    ("after_conv1", lambda: nn.Conv2d(4, 5, 3, padding=1)), "conv1.edits.after_0", ("conv2", {"kernel_size": 3}), ("conv1", "conv2")
)
EDITS["elastic_resnet"] = _edits(
    ("after_layer2.0.conv1", lambda: nn.Conv2d(12, 12, 3, padding=1)),
    "layer2.1",
    ("layer3.0.relu", {"activation": "gelu"}),
    ("layer1", "layer3"),
)
EDITS["elastic_vit"] = _edits(
    ("after_blocks.1.mlp.fc1", lambda: nn.Linear(20, 20)),
    "blocks.1",
    ("blocks.0.mlp.act", {"activation": "relu"}),
    ("blocks.0", "blocks.2"),
)
EDITS["elastic_llama"] = _edits(
    ("after_model.layers.0.mlp", lambda: nn.Linear(32, 32)),
    "model.layers.0.mlp.act_fn",
    ("model.layers.1.mlp.up_proj", {"bias": True}),
    ("model.layers.0.mlp", "model.layers.1.mlp"),
)

#: What is edited by the surgeon alone, which finds the optimizer by itself, and no average.
ALONE = ("unet", "gpt2", "elastic_llama")

#: Whose average of the weights is a module; others are kept by name.
AVERAGED = ("resnet", "elastic_vit")


class Scene:
    """A model after its first step, the same at each call.

    Args:
        name: of the model.
        alone: whether it has no average, which a surgeon by itself could not find.
    """

    def __init__(self, name: str, alone: bool = False) -> None:
        case = CASES[name.removeprefix("elastic_")]
        is_elastic = name.startswith("elastic_")
        self.inputs: Inputs = inputs_of(case, torch.float32)
        self.model = copy.deepcopy(_elastic(case)) if is_elastic else built(case, torch.float32)
        modules = [module for module in self.model.modules() if module is not self.model]
        modules[1].register_forward_hook(_pass)
        modules[-1].register_forward_pre_hook(_look)
        parameters = list(self.model.parameters())
        parameters[1].register_hook(lambda grad: grad)
        parameters[-1].register_post_accumulate_grad_hook(lambda parameter: None)
        parameters[2].requires_grad_(False)
        groups = [{"params": parameters[:3], "weight_decay": 0.0}, {"params": parameters[3:]}]
        self.optimizer: torch.optim.Optimizer = (ee.optim if is_elastic else torch.optim).AdamW(groups, lr=1e-3)
        self.scheduler = torch.optim.lr_scheduler.OneCycleLR(self.optimizer, max_lr=1e-2, total_steps=50)
        self.scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=2)
        self.ema: Any = None
        if name in AVERAGED:
            self.ema = torch.optim.swa_utils.AveragedModel(self.model)
        elif not alone:
            self.ema = {name: tensor.detach().clone() for name, tensor in self.model.named_parameters()}
        self.step()
        random.seed(3)
        numpy.random.seed(3)

    def step(self) -> float:
        """Train on the inputs once; gradients stay."""
        self.optimizer.zero_grad()
        results = [leaf for leaf in floating_leaves(call(self.model, self.inputs)) if leaf.requires_grad]
        loss = torch.stack([result.square().mean() for result in results]).sum()
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.scheduler.step()
        if isinstance(self.ema, nn.Module):
            self.ema.update_parameters(self.model)
        elif self.ema is not None:
            for name, parameter in self.model.named_parameters():
                self.ema[name].lerp_(parameter.detach(), 0.1)
        return float(loss.detach())

    def followers(self) -> dict[str, Any]:
        """The keyword arguments of a transaction."""
        return {"optimizer": self.optimizer, "schedulers": [self.scheduler], "scaler": self.scaler, "ema": self.ema}

    def print(self, *more: Any) -> Print:
        """Everything there is, by identity; ``more`` are modules that are to be part of it."""
        own = fingerprint(self.model, self.optimizer, self.scheduler, self.scaler, self.ema)
        return [*own, *(entry for each in more for entry in fingerprint(each) if isinstance(each, nn.Module))]

    def facts(self) -> dict[str, Any]:
        """Everything that a twin has as well: the structure and all values by name."""
        names = {parameter: name for name, parameter in self.model.named_parameters()}
        found: dict[str, Any] = {
            "modules": [(path, type(module), module.training, module.extra_repr()) for path, module in self.model.named_modules()],
            "hooks": [(path, len(m._forward_hooks), len(m._forward_pre_hooks)) for path, m in self.model.named_modules()],
            "journal": journal(self.model),
            "model": _digests(self.model.state_dict(keep_vars=True)),
            "grads": {name: None if p.grad is None else digest(p.grad) for p, name in names.items()},
            "trainable": [name for p, name in names.items() if p.requires_grad],
            "groups": [[names.get(p) for p in group["params"]] for group in self.optimizer.param_groups],
            "state": {name: _digests(self.optimizer.state[p]) for p, name in names.items() if p in self.optimizer.state},
            "scheduler": {name: value for name, value in vars(self.scheduler).items() if isinstance(value, int | float | list)},
            "scaler": self.scaler.state_dict(),
            "random": digest(torch.get_rng_state()),
        }
        if self.ema is not None:
            found["ema"] = _digests(self.ema.state_dict() if isinstance(self.ema, nn.Module) else self.ema)
        return found


def _digests(values: Any) -> dict[str, Any]:
    return {name: (value.shape, digest(value)) if isinstance(value, Tensor) else value for name, value in values.items()}


@functools.cache
def _elastic(case: Case) -> nn.Module:
    return ee.elasticize(built(case, torch.float32), inputs_of(case, torch.float32), capacity=1.25)


def _pass(module: nn.Module, args: Any, output: Any) -> None: ...


def _look(module: nn.Module, args: Any) -> None: ...
