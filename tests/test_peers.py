"""What we ask of Torch-Pruning: its groups are read as they are meant, and the model that it is shown stays as it was."""

import pytest
import torch
from peers import pruned_by_torch_pruning
from torch import nn
from zoo import MODELS, call


def built(name: str) -> nn.Module:
    torch.manual_seed(0)
    return MODELS[name].build()


def test_group_of_a_residual_stage():
    case, model = MODELS["resnet_basic"], built("resnet_basic")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    pruned, group = pruned_by_torch_pruning(model, case.inputs(), "layer4.0.conv2", [7, 3])
    produced = ["layer4.0.bn2", "layer4.0.conv2", "layer4.0.downsample.0", "layer4.0.downsample.1", "layer4.1.bn2", "layer4.1.conv2"]
    consumed = ["fc", "layer4.1.conv1"]
    assert group == sorted([*((path, "out", [3, 7]) for path in produced), *((path, "in", [3, 7]) for path in consumed)])
    assert pruned.training
    assert pruned.fc.weight.shape == (10, 94)
    assert call(pruned.eval(), case.inputs()).shape == (2, 10)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_group_through_concatenation_and_flatten():
    unet, vgg = MODELS["unet"], MODELS["vgg"]
    _, group = pruned_by_torch_pruning(built("unet"), unet.inputs(), "up3.up", [1])
    assert group == [("up3.conv.double_conv.0", "in", [9]), ("up3.up", "out", [1])]
    _, group = pruned_by_torch_pruning(built("vgg"), vgg.inputs(), "features.13", [1])
    assert group == [("classifier.0", "in", list(range(49, 98))), ("features.13", "out", [1])]


def test_last_unit_is_not_pruned():
    case = MODELS["vgg"]
    with pytest.raises(ValueError, match=r"features\.0: Torch-Pruning would leave no unit"):
        pruned_by_torch_pruning(built("vgg"), case.inputs(), "features.0", list(range(12)))
