"""``ee.export`` of converted models: what others make of the result: state dicts, safetensors, pickle, deepcopy, torch.export, ONNX."""

import copy
import functools
import pickle

import pytest
import torch
from converting import assert_close, built, inputs_of, random_widths
from torch import Tensor, nn
from zoo import AWKWARD, MODELS, Case, Inputs, call

import esper_elastic as ee
from esper_elastic.layers import ElasticLayer

pytestmark = pytest.mark.wide

NAMES = ("resnet_basic", "efficientnet", "unet", "vit", "gpt2", "llama")


@functools.cache
def exported(name: str, dtype: torch.dtype = torch.float32) -> tuple[Case, Inputs, nn.Module, nn.Module, nn.Module]:
    """A case with its inputs, the original model, the elastic one at random widths, and what that is exported as."""
    case = (MODELS | AWKWARD)[name]
    inputs, elastic = inputs_of(case, dtype), built(case, dtype).eval()
    ee.elasticize(elastic, inputs, capacity=1.5)
    ee.resize(elastic, random_widths(elastic, 4))
    return case, inputs, built(case, dtype).eval(), elastic, ee.export(elastic)


def outputs(case: Case, model: nn.Module, inputs: Inputs) -> list[Tensor]:
    with torch.no_grad():
        return case.outputs(call(model, inputs))


def arguments(inputs: Inputs) -> tuple[tuple[object, ...], dict[str, object]]:
    return ((), inputs) if isinstance(inputs, dict) else (inputs if isinstance(inputs, tuple) else (inputs,), {})


@pytest.mark.parametrize("name", NAMES)
def test_what_is_exported_is_plain_and_travels(name, tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    case, inputs, original, elastic, plain = exported(name)
    shown = outputs(case, plain, inputs)
    for got, expected in zip(shown, outputs(case, elastic, inputs), strict=True):
        assert_close(got, expected, "output", 1e-5)

    assert [type(module) for module in plain.modules()] == [type(module) for module in original.modules()]
    assert list(plain.state_dict()) == list(original.state_dict())
    assert b"esper_elastic" not in pickle.dumps(plain)
    assert all(p.is_leaf and p.is_contiguous() for p in plain.parameters())
    assert all(t.untyped_storage().nbytes() == t.numel() * t.element_size() for t in plain.state_dict().values())

    for twin in (copy.deepcopy(plain), pickle.loads(pickle.dumps(plain))):
        assert all(torch.equal(one, other) for one, other in zip(outputs(case, twin, inputs), shown, strict=True))

    blank = copy.deepcopy(plain)
    with torch.no_grad():
        for tensor in (*blank.parameters(), *(buffer for buffer in blank.buffers() if buffer.is_floating_point())):
            tensor.zero_()
    safetensors.save_model(plain, str(tmp_path / "model.safetensors"))  # knows tied weights
    assert safetensors.load_model(blank, str(tmp_path / "model.safetensors")) == (set(), [])
    blank.load_state_dict(plain.state_dict())  # buffers that are not persistent are in neither
    for own, other in zip(blank.buffers(), plain.buffers(), strict=True):
        own.copy_(other)
    assert all(torch.equal(one, other) for one, other in zip(outputs(case, blank, inputs), shown, strict=True))
    untied = {key: tensor.clone() for key, tensor in plain.state_dict().items()}
    safetensors.save_file(untied, str(tmp_path / "tensors.safetensors"))
    assert all(torch.equal(tensor, untied[key]) for key, tensor in safetensors.load_file(str(tmp_path / "tensors.safetensors")).items())


@pytest.mark.parametrize("name", NAMES)
def test_sizes_that_modules_keep_are_those_of_the_active_slice(name):
    _, _, _, elastic, plain = exported(name)
    changed = 0
    kept = {
        nn.Linear: lambda m: (m.out_features, m.in_features) == tuple(m.weight.shape),
        nn.Conv2d: lambda m: (m.out_channels, m.in_channels // m.groups) == tuple(m.weight.shape[:2]) and m.out_channels % m.groups == 0,
        nn.ConvTranspose2d: lambda m: (m.in_channels, m.out_channels // m.groups) == tuple(m.weight.shape[:2]),
        nn.BatchNorm2d: lambda m: m.num_features == len(m.weight) == len(m.running_mean),
        nn.LayerNorm: lambda m: tuple(m.normalized_shape) == tuple(m.weight.shape),
        nn.Embedding: lambda m: (m.num_embeddings, m.embedding_dim) == tuple(m.weight.shape),
    }
    for (path, module), own in zip(plain.named_modules(), elastic.modules(), strict=True):
        if type(module) in kept:
            assert kept[type(module)](module), f"{path}: {module}"
            changed += isinstance(own, ElasticLayer) and own.weight.shape != module.weight.shape
    assert changed


def test_heads_and_groups_of_the_export_are_those_that_are_active():
    _, _, _, elastic, plain = exported("vit_multihead")
    for own, module in zip(elastic.modules(), plain.modules(), strict=True):
        if isinstance(module, nn.MultiheadAttention):
            assert module.num_heads * module.head_dim == module.embed_dim == module.out_proj.in_features == len(module.in_proj_weight) // 3
            assert module.embed_dim < own.storage("in_proj_weight").shape[1]
    _, _, _, _, plain = exported("mobilenet_v2")
    depthwise = [module for module in plain.modules() if isinstance(module, nn.Conv2d) and module.groups > 1]
    assert depthwise
    assert all(module.groups == module.in_channels == module.out_channels == len(module.weight) for module in depthwise)


def test_tied_weights_stay_tied():
    case, inputs, _, elastic, plain = exported("tied_weights")
    assert plain.decoder.weight is plain.embedding.weight
    for got, expected in zip(outputs(case, plain, inputs), outputs(case, elastic, inputs), strict=True):
        assert_close(got, expected, "output", 1e-5)


@pytest.mark.parametrize("capacity", [1.0, 1.5])
@pytest.mark.parametrize("name", ["scripted_part", "frozen_part", "weight_norm_hook", "weight_norm_parametrization", "spectral_norm"])
@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")
def test_what_is_exported_learns_as_the_original_does(name, capacity):
    """With autograd on; parameters of scripted parts came out frozen, what the old weight norm computes could not be copied."""
    case = AWKWARD[name]
    original, elastic, inputs = built(case), built(case), inputs_of(case)
    ee.elasticize(elastic, inputs, capacity=capacity)
    plain = ee.export(elastic)
    for model in (original, plain):
        sum(output.square().sum() for output in case.outputs(call(model.train(), inputs))).backward()
    for (key, own), (other, expected) in zip(plain.named_parameters(), original.named_parameters(), strict=True):
        assert (key, own.requires_grad, own.is_leaf) == (other, expected.requires_grad, True)
        assert (own.grad is None) == (expected.grad is None), key
        if own.grad is not None:
            assert_close(own.grad, expected.grad, key)


@pytest.mark.parametrize("name", NAMES[1:])
def test_torch_export_takes_it(name):
    case, inputs, _, _, plain = exported(name)
    args, kwargs = arguments(inputs)
    program = torch.export.export(plain, args, kwargs, strict=False)
    for got, expected in zip(outputs(case, program.module(), inputs), outputs(case, plain, inputs), strict=True):
        assert_close(got, expected, "output", 1e-5)


SLOW = ("efficientnet", "unet", "gpt2", "llama")


@pytest.mark.filterwarnings("ignore")  # of torch's exporter
@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in NAMES])
def test_onnx_takes_it(name):
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    reference = pytest.importorskip("onnx.reference")
    case, inputs, _, _, plain = exported(name)
    args, kwargs = arguments(inputs)
    proto = torch.onnx.export(plain, args, kwargs=kwargs, dynamo=True, verbose=False).model_proto
    onnx.checker.check_model(proto)
    feeds = {entry.name: tensor.numpy() for entry, tensor in zip(proto.graph.input, (*args, *kwargs.values()), strict=True)}
    got = reference.ReferenceEvaluator(proto).run(None, feeds)
    expected = outputs(case, plain, inputs)
    for one, other in zip(got, expected, strict=False):
        assert_close(torch.as_tensor(one), other, "output", 1e-5)
