"""The examples run from start to end, on a small synthetic set, and leave their picture, numbers and events."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path

import pytest
import torch

from esper_elastic import datasets
from esper_elastic.training.events import Applied
from esper_elastic.training.lines import FILE_NAME, read

pytest.importorskip("matplotlib", reason="needs matplotlib")
EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.fixture
def stripes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten classes of noisy stripes in the place of Fashion-MNIST."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(900) % 10
    waves = torch.sin(torch.arange(28) * (labels[:, None] + 1) * 0.2)[:, None, None, :].expand(-1, 1, 28, -1)
    images = (128 + 60 * waves + 20 * torch.randn(900, 1, 28, 28, generator=generator)).clamp(0, 255).byte()
    found = datasets.ImageData("stripes", "made here", images[:700], labels[:700], images[700:], labels[700:])
    monkeypatch.setattr(datasets, "load", lambda: found)


@pytest.mark.parametrize(
    ("name", "steps", "kinds"),
    [("grow", 40, {"grow"}), ("prune", 24, {"prune"}), ("skips", 60, {"add_skip_connection"})],
)
def test_an_example_runs(name: str, steps: int, kinds: set[str], stripes: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [str(EXAMPLES), *sys.path])
    monkeypatch.setattr(sys, "argv", [name, "--steps", str(steps), "--out", str(tmp_path / "run")])
    for module in ("common", "networks"):
        monkeypatch.delitem(sys.modules, module, raising=False)
    runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    assert {event.adaptation_type for event in read(tmp_path / "run" / FILE_NAME) if isinstance(event, Applied)} == kinds
    numbers = json.loads((tmp_path / "run" / "numbers.json").read_text())
    assert all(len(value) == 1 for value in numbers.values() if isinstance(value, list))
    assert (tmp_path / "run" / "picture.png").stat().st_size > 10_000
