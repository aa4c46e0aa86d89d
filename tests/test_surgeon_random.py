"""Random edits of every architecture: what says that it kept the function has, what was refused changed nothing, and the model goes on."""

import random
import warnings
from typing import Any

import pytest
import torch
from converting import built, inputs_of
from torch import Tensor, nn
from zoo import AWKWARD, MODELS, call, floating_leaves

import esper_elastic as ee

pytestmark = pytest.mark.wide

EXACT = 1e-12
CASES = MODELS | AWKWARD
OPERATIONS = ("add", "widen", "skip", "remove", "units", "kernel", "bias")


def units(module: nn.Module) -> int:
    """How many channels or features a module seems to give."""
    for part in reversed(list(module.modules())):
        for name in ("out_channels", "out_features", "num_features"):
            if isinstance(getattr(part, name, None), int):
                return int(getattr(part, name))
    return 4


def random_edit(model: nn.Module, surgeon: ee.ModelSurgeon, chance: random.Random) -> tuple[str, ee.SurgeryResult]:
    """An edit that may make sense."""
    modules = {path: m for path, m in model.named_modules() if path and not path.endswith("edits")}
    operation = chance.choice(OPERATIONS)
    fitting = {
        "kernel": [path for path, m in modules.items() if isinstance(m, nn.Conv2d)],
        "units": [path for path, m in modules.items() if isinstance(m, nn.Linear | nn.Conv2d)],
        "bias": [path for path, m in modules.items() if isinstance(m, nn.Linear | nn.Conv2d)],
    }.get(operation) or list(modules)
    path = chance.choice(fitting)
    module, width = modules[path], units(modules[path])
    if operation == "add":
        made = chance.choice([nn.Linear(width, width), nn.Conv2d(width, width, 3, padding=1), nn.ReLU(), nn.LayerNorm(width)])
        return f"add {path}", surgeon.add_layer(model, chance.choice(["after_", "before_"]) + path, made)
    if operation == "widen":
        made = chance.choice([nn.Linear(width, width + 4), nn.Conv2d(width, width + 4, 1)])
        return f"widen {path}", surgeon.add_layer(model, f"after_{path}", made)
    if operation == "skip":
        return f"skip {path}", surgeon.add_skip_connection(model, path, chance.choice(list(modules)))
    if operation == "remove":
        return f"remove {path}", surgeon.remove_layer(model, path)
    config: dict[str, Any] = {"bias": True}
    if operation == "kernel" and isinstance(module, nn.Conv2d):
        config = {"kernel_size": tuple(size + 2 for size in module.kernel_size)}
    elif operation == "units":
        config = {"out_channels" if hasattr(module, "out_channels") else "out_features": 2 * width}
    return f"{operation} {path}", surgeon.modify_layer(model, path, config)


def edit_at_random(name: str, edits: int, seed: int) -> int:
    """Edits a model so many times; returns how many of them were made."""
    case = CASES[name]
    torch.manual_seed(seed)
    model, inputs = built(case).eval(), inputs_of(case)
    surgeon, chance = ee.ModelSurgeon(inputs), random.Random(seed)

    def outputs() -> list[Tensor]:
        torch.manual_seed(0)
        with torch.no_grad():
            return list(floating_leaves(call(model, inputs)))

    made = 0
    before = outputs()
    for _ in range(edits):
        what, result = random_edit(model, surgeon, chance)
        if not result:
            assert isinstance(result.error, ee.ElasticError) and len(str(result.error)) > 20
        if result and any("not tried" in warning for warning in result.details["warnings"]):
            break  # whether it runs on is not known
        after = outputs()
        scale = max((float(t.abs().max()) for t in before), default=1.0)
        if not result:
            assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True)), what
        elif result.details["function_kept"]:
            far = max((float((a - b).abs().max()) for a, b in zip(before, after, strict=True)), default=0.0)
            exact = what.startswith(("skip", "bias"))
            assert far <= (0 if exact else EXACT * max(1.0, scale)), (what, far, result)
        made += bool(result)
        before = after
    return made


@pytest.fixture(autouse=True)
def quiet():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@pytest.mark.parametrize("name", CASES)
def test_random_edits(name: str) -> None:
    edit_at_random(name, 3, 0)


@pytest.mark.slow
def test_a_thousand_random_edits_that_are_made() -> None:
    made = seed = 0
    while made < 1000:
        seed += 1
        for name in CASES:
            made += edit_at_random(name, 10, seed)
