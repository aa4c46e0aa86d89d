"""Events in words: one line each, for people who read a log.

Owns the wording. Texts that came from outside are shortened, and lose what could break a line or steer a terminal.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .events import (
    Applied,
    Effect,
    Evaluated,
    Event,
    Progress,
    Refused,
    Requested,
    Restored,
    Resumed,
    RolledBack,
    RunEnded,
    RunStarted,
    Saved,
    SnapshotTaken,
)

_LENGTH = 300


def describe(event: Event) -> str:
    """The event in one line."""
    return f"step {event.step}: {_WORDS[type(event)](event)}"


def one_line(text: object, length: int = _LENGTH) -> str:
    """``text`` without line breaks and control characters, at most ``length`` long."""
    plain = " ".join("".join(letter if letter.isprintable() else " " for letter in str(text)).split())
    return plain if len(plain) <= length else f"{plain[: length - 1]}…"


def duration(milliseconds: float) -> str:
    """A duration with three digits and the unit that suits it."""
    if milliseconds < 0.9995:
        return f"{milliseconds * 1e3:.3g} us"
    if milliseconds < 999.5:
        return f"{milliseconds:.3g} ms"
    seconds = milliseconds / 1e3
    if seconds < 99.95:
        return f"{seconds:.3g} s"
    if seconds < 3600:
        return f"{seconds // 60:.0f} min {seconds % 60:.0f} s"
    return f"{seconds // 3600:,.0f} h {seconds % 3600 // 60:.0f} min"


def subject(event: Applied | Refused | RolledBack) -> str:
    """Type and layer of a decision."""
    layer = "" if event.layer_name is None else f" of {one_line(event.layer_name, 120)}"
    return f"{one_line(event.adaptation_type, 60)}{layer}"


def _metrics(event: Evaluated) -> str:
    return ", ".join(f"{one_line(name, 60)} {value:.5g}" for name, value in event.metrics.items()) or "no metrics"


def _requested(event: Requested) -> str:
    kind, layer = (event.decision.get(name) for name in ("adaptation_type", "layer_name"))
    return (
        f"request {event.request}: {one_line(kind, 60)}"
        f"{'' if layer is None else f' of {one_line(layer, 120)}'} asked for by {one_line(event.source, 60)}"
    )


_WORDS: dict[type[Event], Callable[[Any], str]] = {
    RunStarted: lambda e: f"run of {one_line(e.model, 120)} started, {e.parameters:,} active parameters",
    Resumed: lambda e: f"resumed from {one_line(e.checkpoint)}",
    Progress: lambda e: f"loss {e.loss:.5g}, {duration(e.step_ms)} a step, learning rate {e.learning_rate:.3g}",
    Evaluated: lambda e: f"evaluated: {_metrics(e)}",
    Requested: _requested,
    Refused: lambda e: f"request {e.request}: {subject(e)} refused by {one_line(e.by, 60)}: {one_line(e.reason)}",
    Applied: lambda e: (
        f"request {e.request}: {subject(e)} applied by {e.mechanism} in {duration(e.milliseconds)}, {e.parameters:,} parameters"
    ),
    RolledBack: lambda e: f"request {e.request}: {subject(e)} rolled back in {duration(e.milliseconds)}: {one_line(e.error)}",
    Effect: lambda e: (
        f"request {e.request}: loss {e.loss_before:.5g} -> {e.loss_after:.5g}, "
        f"step {duration(e.step_ms_before)} -> {duration(e.step_ms_after)}"
    ),
    SnapshotTaken: lambda e: f"snapshot of {e.bytes:,} bytes in {duration(e.milliseconds)}",
    Restored: lambda e: (
        f"{'' if e.request is None else f'request {e.request}: '}state of step {e.snapshot_step} restored "
        f"in {duration(e.milliseconds)}: {one_line(e.reason)}"
    ),
    Saved: lambda e: f"saved {one_line(e.checkpoint)} in {duration(e.milliseconds)}",
    RunEnded: lambda e: f"run ended: {one_line(e.reason)}",
}
