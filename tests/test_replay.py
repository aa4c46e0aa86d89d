"""A journal carries a model's edits to a fresh one: the same structure, then the weights load."""

import json

import pytest
import torch
from surgery_net import gives, images, net, surgeon
from torch import nn

import esper_elastic as ee
from esper_elastic.surgery.journal import journal


def _words(item: tuple[str, nn.Module]) -> tuple[str, str]:
    return item[0], type(item[1]).__name__


def edited() -> nn.Module:
    """A network after one edit of each kind."""
    model, hand = net(), surgeon()
    skip = hand.add_skip_connection(model, "conv2", "fc1")
    for result in (
        hand.add_layer(model, "after_conv2", nn.Conv2d(12, 20, 3, padding=1)),
        hand.add_layer(model, "before_blocks.1", ee.LayerSpec("BatchNorm2d", {"num_features": 20})),
        hand.remove_layer(model, "bn1"),
        hand.remove_layer(model, "stages.1"),
        hand.modify_layer(model, "blocks.0.conv1", {"out_channels": 30, "kernel_size": 5, "bias": True}),
        skip,
        hand.add_skip_connection(model, "conv1", "blocks.0"),
        hand.remove_skip_connection(model, skip.details["name"]),
    ):
        assert result, result
    return model


def test_a_replayed_journal_gives_the_same_structure() -> None:
    model, x = edited(), images(3)
    entries = json.loads(json.dumps(journal(model)))
    assert [entry["operation"] for entry in entries].count("add_layer") == 2
    fresh = ee.replay(entries, net(seed=5))
    assert [_words(item) for item in fresh.named_modules()] == [_words(item) for item in model.named_modules()]
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(gives(fresh, x), gives(model, x))
    assert journal(fresh) == journal(model)


def test_a_checkpoint_replays_its_journal(tmp_path) -> None:
    model, x = edited(), images(3)
    ee.save(tmp_path / "model.safetensors", model)
    fresh = net(seed=5)
    ee.load(tmp_path / "model.safetensors", fresh)
    assert torch.equal(gives(fresh, x), gives(model, x))


def test_a_module_that_is_no_data_has_to_be_given() -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(8, 1, 1, dtype=torch.float64))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * self.weight

    model, x = net(), images(3)
    result = surgeon().add_layer(model, "after_conv1", Own(), preserve=False)
    assert result
    with pytest.raises(ee.SurgeryError, match="expected a .*Own for 'conv1.edits.after_0', got nothing"):
        ee.replay(journal(model), net())
    fresh = ee.replay(journal(model), net(seed=5), modules={"conv1.edits.after_0": Own()})
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(gives(fresh, x), gives(model, x))
