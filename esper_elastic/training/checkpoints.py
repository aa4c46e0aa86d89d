"""Checkpoints of a run: a folder each, complete or absent, from which training goes on bit for bit.

Each holds ``model.safetensors`` (:func:`esper_elastic.save`: weights, widths, journal, optimizer), ``run.safetensors`` (states of random
generators, averages) and ``run.json`` (all the rest). Nothing is pickled. A folder gets its name when everything in it is on the disk.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import checkpoint
from ..errors import CheckpointError

FORMAT = 1
_NAME = re.compile(r"checkpoint-(\d{9})")


def name_of(step: int) -> str:
    """The name of the checkpoint of a step."""
    return f"checkpoint-{step:09d}"


def latest(directory: str | os.PathLike[str]) -> Path | None:
    """The newest complete checkpoint in the folder of a run."""
    folder = Path(directory)
    if not folder.is_dir():
        return None
    return max((path for path in folder.iterdir() if _NAME.fullmatch(path.name)), default=None, key=lambda path: path.name)


def write(directory: Path, step: int, parts: dict[str, Any], content: dict[str, Any], tensors: dict[str, Tensor], keep: int) -> Path:
    """Write a checkpoint, and remove those older than the last ``keep``.

    Args:
        directory: of the run.
        step: that it is of.
        parts: ``model`` and ``optimizer``.
        content: JSON-able data.
        tensors: by name.
        keep: how many stay.

    Raises:
        CheckpointError: it could not be written; those before it are as they were.
    """
    import safetensors.torch

    target = directory / name_of(step)
    partial = directory / f".{target.name}.{os.urandom(6).hex()}.partial"
    try:
        partial.mkdir(parents=True)
        checkpoint.save(partial / "model.safetensors", parts["model"], parts["optimizer"])
        ready = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
        safetensors.torch.save_file(ready, partial / "run.safetensors")
        (partial / "run.json").write_text(json.dumps({"format": FORMAT, **content}))
        for path in (partial / "run.safetensors", partial / "run.json", partial):
            _flush(path)
        if target.exists():
            shutil.rmtree(target)
        os.replace(partial, target)
        _flush(directory)
    except (OSError, TypeError, ValueError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise CheckpointError(f"checkpoint of step {step}: could not be written to {directory}: {error}") from error
    known = sorted(path for path in directory.iterdir() if _NAME.fullmatch(path.name))
    for old in known[: max(0, len(known) - keep)]:
        shutil.rmtree(old, ignore_errors=True)
    for left in directory.glob(".checkpoint-*.partial"):  # by a process that was killed
        shutil.rmtree(left, ignore_errors=True)
    return target


def read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The data and tensors of a checkpoint.

    Raises:
        CheckpointError: it is none, or damaged.
    """
    import safetensors.torch

    try:
        content = json.loads((path / "run.json").read_text())
        tensors = safetensors.torch.load_file(path / "run.safetensors")
    except (OSError, ValueError, safetensors.SafetensorError) as error:
        raise CheckpointError(f"resume: {path}: expected a checkpoint of a run, got {error}.") from error
    if content.get("format") != FORMAT:
        raise CheckpointError(f"resume: {path}: format: expected {FORMAT}, got {content.get('format')!r}. Use the version that wrote it.")
    return content, tensors


def _flush(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    opened = os.open(path, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


# Random generators


def random_state(generators: dict[str, torch.Generator]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The states of the generators of Python, NumPy and torch, and of those given by name."""
    version, numbers, gauss = random.getstate()
    content: dict[str, Any] = {"python": [version, list(numbers), gauss]}
    tensors = {"torch": torch.get_rng_state()}
    numpy = sys.modules.get("numpy")
    if numpy is not None:
        kind, keys, position, has_gauss, cached = numpy.random.get_state()
        content["numpy"] = [kind, [int(key) for key in keys], position, has_gauss, cached]
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        tensors |= {f"cuda:{index}": state for index, state in enumerate(torch.cuda.get_rng_state_all())}
    tensors |= {f"given:{name}": generator.get_state() for name, generator in generators.items()}
    return content, tensors


def set_random_state(content: dict[str, Any], tensors: dict[str, Tensor], generators: dict[str, torch.Generator]) -> None:
    """Bring the generators to what :func:`random_state` gave."""
    version, numbers, gauss = content["python"]
    random.setstate((version, tuple(numbers), gauss))
    numpy = sys.modules.get("numpy")
    if numpy is not None and "numpy" in content:
        kind, keys, position, has_gauss, cached = content["numpy"]
        numpy.random.set_state((kind, numpy.array(keys, dtype="uint32"), position, has_gauss, cached))
    torch.set_rng_state(tensors["torch"])
    for name, state in tensors.items():
        if name.startswith("cuda:"):
            with contextlib.suppress(RuntimeError, AssertionError):  # the run goes on without that device
                torch.cuda.set_rng_state(state, name)
        elif name.startswith("given:") and name.removeprefix("given:") in generators:
            generators[name.removeprefix("given:")].set_state(state)


# Averages


def average_tensors(ema: Any) -> dict[str, Tensor]:
    """What an average of the weights consists of, by name."""
    if ema is None:
        return {}
    if isinstance(ema, nn.Module):
        return dict((*ema.named_parameters(), *ema.named_buffers()))
    held = ema if isinstance(ema, dict) else vars(ema)
    return dict(_named("", held))


def _named(prefix: str, held: Any) -> list[tuple[str, Tensor]]:
    found: list[tuple[str, Tensor]] = []
    for name, value in held.items():
        if isinstance(value, Tensor):
            found.append((f"{prefix}{name}", value))
        elif isinstance(value, nn.Module):
            found += [(f"{prefix}{name}.{key}", tensor) for key, tensor in average_tensors(value).items()]
        elif isinstance(value, dict):
            found += _named(f"{prefix}{name}.", value)
    return found


@torch.no_grad()
def load_average(ema: Any, tensors: dict[str, Tensor]) -> None:
    """Bring an average, which has had the edits, to what it was.

    Raises:
        CheckpointError: it has other tensors.
    """
    if ema is None:
        return
    live = average_tensors(ema)
    if isinstance(ema, dict):
        for name, tensor in tensors.items():
            if name in live and live[name].shape == tensor.shape:
                live[name].copy_(tensor)
            else:
                ema[name] = tensor.clone()
        for name in set(live) - set(tensors):
            del ema[name]
        return
    if live.keys() != tensors.keys() or any(live[name].shape != tensor.shape for name, tensor in tensors.items()):
        raise CheckpointError("resume: ema: expected the average of the weights that the run had, got one of other tensors.")
    for name, tensor in tensors.items():
        live[name].copy_(tensor)
