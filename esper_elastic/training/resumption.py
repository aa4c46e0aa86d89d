"""What of a trainer goes into a checkpoint, and how another one takes it up."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from ..checkpoint import load
from ..errors import CheckpointError
from ..surgery.transaction import transaction
from ..surgery.trial.twins import unwrapped
from . import checkpoints
from .decisions import name_of

if TYPE_CHECKING:
    from .trainer import Trainer

_AVERAGE, _RANDOM = "ema:", "random:"


def content_of(trainer: Trainer) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """JSON-able data, and tensors by name: all but the model and the optimizer."""
    content: dict[str, Any] = {"run": _kind_of(trainer), **{name: part.state_dict() for name, part in trainer.parts().items()}}
    tensors = {f"{_AVERAGE}{name}": tensor for name, tensor in checkpoints.average_tensors(trainer.ema).items()}
    return content, tensors | {f"{_RANDOM}{name}": tensor for name, tensor in trainer.parts()["epochs"].tensors().items()}


def resume(trainer: Trainer, path: Path, modules: Mapping[str, nn.Module] | None) -> None:
    """Bring a trainer to what the checkpoint at ``path`` was written from.

    Effects: the events after that checkpoint leave the record.

    Raises:
        CheckpointError: it is of another kind of run, or damaged.
    """
    content, tensors = checkpoints.read(path)
    parts = trainer.parts()
    if content.get("run") != _kind_of(trainer) or not set(parts) <= set(content):
        raise CheckpointError(f"resume: {path}: expected a run with {_kind_of(trainer)}, got one with {content.get('run')}.")
    with transaction(
        unwrapped(trainer.model), trainer.optimizer or (), ema=trainer.ema, validate=False
    ):  # the average has the edits as well
        load(path / "model.safetensors", trainer.model, trainer.optimizer, modules=modules)
    checkpoints.load_average(trainer.ema, {name.removeprefix(_AVERAGE): t for name, t in tensors.items() if name.startswith(_AVERAGE)})
    parts["epochs"].load_tensors({name.removeprefix(_RANDOM): t for name, t in tensors.items() if name.startswith(_RANDOM)})
    for name, part in parts.items():
        part.load_state_dict(content[name])
    trainer.monitor.rewind(trainer.state.step)


def _kind_of(trainer: Trainer) -> dict[str, Any]:
    """What a checkpoint has to fit."""
    return {
        "schedulers": [type(scheduler).__name__ for scheduler in trainer.schedulers],
        "sources": [name_of(source) for source in trainer.sources],
        "scaler": trainer.scaler is not None,
        "ema": trainer.ema is not None,
        "governor": "governor" in trainer.parts(),
    }
