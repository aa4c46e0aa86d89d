"""One dim of a plain model at another size: what is found to be coupled, what growth and pruning leave of the function, and refusals.

Growth is held to the model before it: no difference in float64 where an added zero cannot change the order of a sum, 1e-12 where it can (a
matrix product may be blocked differently). Pruning is held to a network of the small sizes that is built anew and takes slices by hand.
"""

import copy
import gc
import math
import re
import weakref
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from converting import built, inputs_of
from torch import Tensor, nn
from torch.nn.utils import prune
from zoo import AWKWARD, MODELS, call

from esper_elastic.convert import lightest, trace, verify
from esper_elastic.errors import TopologyError
from esper_elastic.surgery import undo
from esper_elastic.surgery.widths import alone
from esper_elastic.surgery.widths.tensors import replace_storage
from esper_elastic.surgery.widths.widths import Coupled, find

ROUNDING = 1e-12

#: Model of the zoo, an axis of it, units to add, and the module that the dim does not leave.
GROWN = {
    "inside a basic block": ("resnet_basic", "layer2.0.conv1.weight", 0, "layer2.0"),
    "from the consumer's end": ("resnet_basic", "layer2.0.conv2.weight", 1, "layer2.0"),
    "residual width": ("resnet_bottleneck", "layer2.1.conv3.weight", 0, ""),
    "inside a bottleneck": ("resnet_bottleneck", "layer2.0.conv2.weight", 0, "layer2.0"),
    "before activation": ("resnet_preactivation", "blocks.1.conv1.weight", 0, "blocks.1"),
    "one part of many concatenations": ("densenet", "features.denseblock1.denselayer1.conv2.weight", 0, "features"),
    "the stem, first part of concatenations": ("densenet", "features.conv0.weight", 0, "features"),
    "convolution into a classifier": ("vgg", "features.13.weight", 0, ""),
    "concatenated skip path": ("unet", "inc.double_conv.3.weight", 0, ""),
    "upsampled path": ("unet", "up1.up.weight", 1, "up1"),
    "depthwise": ("mobilenet_v2", "features.3.conv.1.0.weight", 0, "features.3.conv"),
    "squeeze and excitation": ("mobilenet_v3", "features.1.block.1.fc1.weight", 0, "features.1.block.1"),
    "hidden units of a transformer": ("vit", "blocks.1.mlp.fc1.weight", 0, "blocks.1.mlp"),
    "hidden units of GPT-2": ("gpt2", "transformer.h.0.mlp.c_fc.weight", 1, "transformer.h.0.mlp"),
    "heads of GPT-2": ("gpt2", "transformer.h.0.attn.c_attn.weight", 1, "transformer.h.0.attn"),
    "gated hidden units of Llama": ("llama", "model.layers.0.mlp.gate_proj.weight", 0, "model.layers.0.mlp"),
    "grouped heads of Llama": ("llama", "model.layers.0.self_attn.q_proj.weight", 0, "model.layers.0.self_attn"),
    "convnext": ("convnext", "stages.1.0.pwconv1.weight", 0, "stages.1.0"),
}


def outputs(case: Any, model: nn.Module) -> list[Tensor]:
    with torch.no_grad():
        return case.outputs(call(model, inputs_of(case)))


def difference(one: list[Tensor], other: list[Tensor]) -> float:
    return max(float((a - b).abs().max()) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("name", GROWN)
def test_growth_keeps_the_function(name):
    zoo_name, tensor, axis, scope = GROWN[name]
    case = MODELS[zoo_name]
    model = built(case).eval()
    before, expected, names = dict(model.named_parameters()), outputs(case, model), list(model.state_dict())
    coupled = find(model, tensor, axis, inputs_of(case))
    assert coupled.scope == scope
    old = copy.deepcopy(model)
    coupled.resize(coupled.size + 2 * coupled.multiple_of)
    assert model.get_parameter(tensor).shape[axis] == old.get_parameter(tensor).shape[axis] + 2 * coupled.multiple_of
    assert all(parameter is before[key] for key, parameter in model.named_parameters())
    assert list(model.state_dict()) == names
    assert difference(outputs(case, model), expected) <= ROUNDING
    again = find(model, tensor, axis, inputs_of(case))
    assert [str(binding) for binding in again.bindings] == [str(binding) for binding in coupled.bindings]
    again.resize(again.size - 2 * again.multiple_of)
    assert repr(model) == repr(old)
    for key, value in old.state_dict().items():
        assert torch.equal(model.state_dict()[key], value), key


@pytest.mark.parametrize("name", GROWN)
def test_a_grown_model_trains(name):
    zoo_name, tensor, axis, _ = GROWN[name]
    case = MODELS[zoo_name]
    model = built(case).train()
    coupled = find(model, tensor, axis, inputs_of(case))
    coupled.resize(coupled.size + coupled.multiple_of)
    torch.stack([output.sum() for output in case.outputs(call(model, inputs_of(case)))]).sum().backward()
    for binding in coupled.bindings:
        grown = dict(model.get_submodule(binding.path).named_parameters(recurse=False)).get(binding.tensor)
        assert grown is None or grown.grad is None or grown.grad.shape == grown.shape


class Net(nn.Module):
    """A convolution, its norm, a grouped convolution, and a classifier over what is flattened."""

    def __init__(self, width: int = 6, hidden: int = 10):
        super().__init__()
        self.conv = nn.Conv2d(3, width, 3, padding=1)
        self.norm = nn.BatchNorm2d(width)
        self.act = nn.PReLU(width)
        self.fc1 = nn.Linear(width * 16, hidden)
        self.fc2 = nn.Linear(hidden, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.norm(self.conv(x)))
        return self.fc2(torch.relu(self.fc1(torch.flatten(x, 1))))


def image() -> Tensor:
    return torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


def net(**sizes: int) -> Net:
    torch.manual_seed(0)
    return Net(**sizes).double().eval()


def test_pruning_gives_the_network_sliced_by_hand():
    model, keep = net(), [4, 0, 3]
    find(model, "conv.weight", 0, image()).resize(3, keep=keep)
    small, big = net(width=3), net()
    rows = torch.tensor(keep)
    sliced = big.state_dict()
    for key in ("conv.weight", "conv.bias", "norm.weight", "norm.bias", "norm.running_mean", "norm.running_var", "act.weight"):
        sliced[key] = sliced[key][rows]
    sliced["fc1.weight"] = sliced["fc1.weight"].view(10, 6, 16)[:, rows].reshape(10, 48)
    small.load_state_dict(sliced)
    assert repr(model) == repr(small)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), small.state_dict().values(), strict=True))
    assert torch.equal(model(image()), small(image()))


def test_without_a_choice_the_first_units_stay():
    model, other = net(), net()
    find(model, "conv.weight", 0, image()).resize(2)
    find(other, "conv.weight", 0, image()).resize(2, keep=[0, 1])
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize("size", [1, 3, 9])
def test_a_network_of_these_sizes_takes_the_state(size):
    model = net()
    find(model, "conv.weight", 0, image()).resize(size)
    rebuilt = net(width=size)
    rebuilt.load_state_dict(model.state_dict())
    assert repr(rebuilt) == repr(model)
    assert torch.equal(rebuilt(image()), model(image()))


def test_the_axis_of_a_flattened_consumer_counts_its_own_indices():
    coupled = find(net(), "fc1.weight", 1, image())
    assert (coupled.size, coupled.multiple_of, coupled.units, coupled.minimum) == (96, 16, 6, 16)
    assert {str(binding) for binding in coupled.bindings} >= {"conv.weight[0]", "act.weight[0]", "fc1.weight[1]"}


@pytest.mark.parametrize(("size", "nearest"), [(100, 96), (-5, 16), (0, 16)])
def test_a_size_between_units_is_refused(size, nearest):
    model = net()
    with pytest.raises(
        TopologyError, match=rf"fc1.weight\[1\]: size: expected at least 16, a multiple of 16, got {size}. The .* {nearest}"
    ):
        find(model, "fc1.weight", 1, image()).resize(size)


def test_newborn_units_begin_as_their_modules_do():
    model, width = net(width=64), 4096
    find(model, "conv.weight", 0, image()).resize(width)
    bound = 1 / math.sqrt(27)
    born = model.conv.weight[64:].detach()
    assert float(born.abs().max()) <= bound
    assert float(born.std()) == pytest.approx(bound / math.sqrt(3), rel=0.02)
    assert float(model.conv.bias[64:].detach().std()) == pytest.approx(bound / math.sqrt(3), rel=0.1)
    assert (model.norm.weight[64:] == 1).all()
    assert not model.norm.bias[64:].any()
    assert not model.norm.running_mean[64:].any()
    assert (model.norm.running_var[64:] == 1).all()
    assert (model.act.weight[64:] == 0.25).all()
    assert not model.fc1.weight[:, 64 * 16 :].any()


def test_a_generator_draws_the_same_twice_and_leaves_torch_alone():
    made = []
    for seed in (1, 2):
        model = net()
        torch.manual_seed(seed)
        state = torch.get_rng_state()
        find(model, "conv.weight", 0, image()).resize(9, generator=torch.Generator().manual_seed(5))
        assert torch.equal(torch.get_rng_state(), state)
        made.append(model.conv.weight)
    assert torch.equal(*made)


def test_gradients_hooks_and_frozen_parameters_follow():
    model = net()
    model.norm.requires_grad_(False)
    model(image()).sum().backward()
    grads = {key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None}
    seen = []
    model.conv.weight.register_hook(lambda grad: seen.append(tuple(grad.shape)))
    model.conv.weight.register_post_accumulate_grad_hook(lambda p: seen.append(tuple(p.grad.shape)))
    find(model, "conv.weight", 0, image()).resize(8)
    assert torch.equal(model.conv.weight.grad[:6], grads["conv.weight"])
    assert not model.conv.weight.grad[6:].any()
    assert torch.equal(model.fc1.weight.grad[:, :96], grads["fc1.weight"])
    assert model.norm.weight.grad is None
    assert not model.norm.weight.requires_grad
    model(image()).sum().backward()
    assert seen == [(8, 3, 3, 3)] * 2


def test_a_graph_from_before_raises_and_does_not_spoil_the_next():
    model = net()
    stale = model(image()).sum()
    find(model, "conv.weight", 0, image()).resize(8)
    model(image()).sum().backward()
    assert model.conv.weight.grad.shape == (8, 3, 3, 3)
    with pytest.raises(RuntimeError):
        stale.backward()


def test_channels_last_stays():
    model = net().to(memory_format=torch.channels_last)
    find(model, "conv.weight", 0, image()).resize(8)
    assert model.conv.weight.is_contiguous(memory_format=torch.channels_last)
    assert not model.conv.weight.is_contiguous()


@pytest.fixture
def reports(monkeypatch):
    """What is reported to undo."""
    found: dict[int, tuple[Tensor, tuple[int, ...], Any]] = {}
    monkeypatch.setattr(undo, "moved", lambda parameter, shape, write: found.update({id(parameter): (parameter, shape, write)}))
    return found


@pytest.mark.parametrize(("size", "keep"), [(8, None), (3, None), (3, [5, 0, 2])])
def test_momentum_follows_its_units(reports, size, keep):
    model = net()
    old = {id(p): (tuple(p.shape), torch.randn_like(p)) for p in model.parameters()}
    find(model, "conv.weight", 0, image()).resize(size, keep=keep)
    for index, at in (("conv.weight", 0), ("norm.bias", 0), ("fc1.weight", 1)):
        parameter = model.get_parameter(index)
        tensor, shape, write = reports[id(parameter)]
        momentum = old[id(parameter)][1]
        assert tensor is parameter
        assert shape == old[id(parameter)][0]
        made = torch.zeros_like(parameter)
        write(made, momentum)
        per_unit = momentum.shape[at] // 6
        kept = torch.arange(min(size, 6)) if keep is None else torch.tensor(keep)
        rows = (kept[:, None] * per_unit + torch.arange(per_unit)).flatten()
        expected = momentum.index_select(at, rows)
        assert torch.equal(made.narrow(at, 0, len(rows)), expected), index
        assert not made.narrow(at, len(rows), made.shape[at] - len(rows)).any()
    assert {id(model.norm.running_mean), id(model.norm.running_var)} <= set(reports)
    assert id(model.fc2.weight) not in reports


def test_replacing_reports_the_old_shape(reports):
    parameter = nn.Parameter(torch.arange(6.0).view(2, 3))
    parameter.grad = torch.ones(2, 3)

    def write(made, old):
        made[:, :3] = old

    replace_storage(parameter, torch.zeros(2, 4), write)
    assert reports[id(parameter)] == (parameter, (2, 3), write)
    assert torch.equal(parameter.grad, torch.tensor([[1.0, 1, 1, 0]] * 2))


def test_no_gradient_is_ever_of_another_shape_than_its_tensor():
    parameter = nn.Parameter(torch.zeros(2, 3))
    parameter.grad = torch.ones(2, 3)

    def write(made, old):
        assert parameter.grad is None
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        replace_storage(parameter, torch.zeros(2, 4), write)


class Own(nn.Module):
    """Sizes kept as numbers: one that code reads, one for ``repr`` alone, and one that equals another size by chance."""

    def __init__(self):
        super().__init__()
        self.inner = 6
        self.hidden = 12
        self.steps = 4
        self.weight = nn.Parameter(torch.randn(12, 4))
        self.out = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(F.linear(x, self.weight).view(-1, 2, self.inner).sum(1))


def test_sizes_that_modules_keep_follow():
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(3, 4), Own()).double(), torch.randn(2, 3, dtype=torch.float64)
    expected = model(x)
    find(model, "1.out.weight", 1, x).resize(8)
    assert (model[1].inner, model[1].hidden, model[1].steps) == (8, 16, 4)
    assert model[1].out.in_features == 8
    assert float((model(x) - expected).detach().abs().max()) <= ROUNDING
    find(model, "0.weight", 0, x).resize(5)
    assert model[1].weight.shape == (16, 5)
    assert model[0].out_features == 5


class Tied(nn.Module):
    """An embedding whose weight is the last layer's too."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(7, 6)
        self.inner = nn.Linear(6, 6)
        self.head = nn.Linear(6, 7, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.inner(self.embedding(x))))


def test_a_tied_weight_changes_once_and_both_modules_know():
    torch.manual_seed(0)
    model, x = Tied().double(), torch.tensor([[1, 2, 3]])
    expected = model(x)
    find(model, "head.weight", 1, x).resize(9)
    assert model.head.weight is model.embedding.weight
    assert model.head.weight.shape == (7, 9)
    assert (model.embedding.embedding_dim, model.head.in_features) == (9, 9)
    assert float((model(x) - expected).detach().abs().max()) <= ROUNDING


class Attention(nn.Module):
    """Torch's attention between two layers, whose heads are tied to the embedding."""

    def __init__(self):
        super().__init__()
        self.first, self.attention, self.last = nn.Linear(3, 8), nn.MultiheadAttention(8, 2, batch_first=True), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        return self.last(self.attention(x, x, x, need_weights=False)[0])


def test_what_code_ties_changes_together():
    torch.manual_seed(0)
    model, x = Attention().double(), torch.randn(2, 5, 3, dtype=torch.float64)
    expected = model(x)
    coupled = find(model, "first.weight", 0, x)
    assert coupled.multiple_of == 4
    coupled.resize(12)
    assert (model.attention.embed_dim, model.attention.num_heads, model.attention.out_proj.in_features) == (12, 3, 12)
    assert model.attention.in_proj_weight.shape == (36, 12)
    assert float((model(x) - expected).detach().abs().max()) <= ROUNDING


class Heads(nn.Module):
    def __init__(self):
        super().__init__()
        self.heads, self.width = 2, 4
        self.query, self.key, self.value, self.out = nn.Linear(3, 8), nn.Linear(3, 8), nn.Linear(3, 8), nn.Linear(8, 3)
        self.norm = nn.LayerNorm(4)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (f(x).view(*x.shape[:2], self.heads, self.width).transpose(1, 2) for f in (self.query, self.key, self.value))
        x = F.scaled_dot_product_attention(self.norm(q), k, v)
        return self.out(x.transpose(1, 2).flatten(2))


def test_an_axis_inside_of_units_is_a_dim_where_it_is_asked_for():
    model, x = Heads(), torch.randn(2, 5, 3)
    heads, width = find(model, "query.weight", 0, x), find(model, "norm.weight", 0, x)
    assert (heads.size, heads.multiple_of, heads.mixed) == (8, 4, None)
    assert (width.size, width.multiple_of) == (4, 1)
    assert width.mixed is not None
    width.resize(6, preserve=False)
    assert (model.query.out_features, model.width, model.heads, model.out.in_features) == (12, 6, 2, 12)
    assert model(x).shape == x.shape


class Groups(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Conv1d(3, 12, 1)
        self.grouped = nn.Conv1d(12, 18, 3, groups=3)
        self.norm = nn.GroupNorm(3, 18)
        self.last = nn.Conv1d(18, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.norm(self.grouped(self.first(x))))


def test_groups_come_and_go_as_wholes():
    torch.manual_seed(0)
    model, x = Groups().double(), torch.randn(2, 3, 5, dtype=torch.float64)
    expected = model(x)
    coupled = find(model, "first.weight", 0, x)
    with pytest.raises(TopologyError, match=r"first.weight\[0\]: size: expected at least 4, a multiple of 4, got 14. The nearest is 16"):
        coupled.resize(14)
    with pytest.raises(TopologyError, match=r"last.weight\[1\]: size: expected at least 6, a multiple of 6, got 20. The nearest is 18"):
        find(model, "last.weight", 1, x, size=20).resize(20)
    coupled.resize(16)
    assert (model.grouped.groups, model.grouped.in_channels, model.grouped.out_channels) == (4, 16, 24)
    assert (model.norm.num_groups, model.norm.num_channels, model.last.in_channels) == (4, 24, 24)
    assert float((model(x) - expected).detach().abs().max()) <= ROUNDING


class Normed(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(3, 6)
        self.norm = nn.LayerNorm(6)
        self.last = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.norm(self.first(x)))


def test_a_norm_over_all_units_grows_on_demand_alone():
    model, x = Normed(), torch.randn(2, 3)
    coupled = find(model, "first.weight", 0, x)
    with pytest.raises(TopologyError, match=r"LayerNorm 'norm' runs over all of its units. Pass preserve=False to grow it"):
        coupled.resize(7)
    assert model.first.weight.shape == (6, 3)
    coupled.resize(7, preserve=False)
    assert model.norm.normalized_shape == (7,)
    assert model(x).shape == (2, 2)
    find(model, "first.weight", 0, x).resize(4)
    assert model.norm.normalized_shape == (4,)


class Mean(nn.Module):
    def __init__(self, factor: bool):
        super().__init__()
        self.first, self.last, self.factor = nn.Linear(3, 6), nn.Linear(6, 2), factor

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        return self.last(x / x.shape[1] if self.factor else x - x.mean(1, keepdim=True))


@pytest.mark.parametrize(("factor", "why"), [(True, "code computes a number from its size"), (False, "mean runs over it")])
def test_code_that_mixes_units_is_named(factor, why):
    coupled = find(Mean(factor), "first.weight", 0, torch.randn(2, 3))
    with pytest.raises(TopologyError, match=why):
        coupled.resize(7)


class Both(nn.Module):
    """Branches in training and evaluation that know different things."""

    def __init__(self):
        super().__init__()
        self.first, self.last, self.auxiliary = nn.Linear(3, 6), nn.Linear(6, 2), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        return self.last(x) + self.auxiliary(x) if self.training else self.last(x)


@pytest.mark.parametrize("training", [True, False])
def test_what_only_training_runs_is_coupled_too(training):
    model = Both().train(training)
    find(model, "first.weight", 0, torch.randn(2, 3)).resize(8)
    assert model.auxiliary.weight.shape == (2, 8)
    assert model.training is training


class Literal(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(3, 6), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.first(x).view(2, 2, 3).sum(1))


class Stash(nn.Module):
    """A module that hands something on by an attribute."""

    class Inside(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Linear(3, 6), nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            self.kept = self.first(x)
            return self.last(self.kept)

    def __init__(self):
        super().__init__()
        self.inside, self.other = self.Inside(), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.inside(x) + self.other(self.inside.kept)


def test_what_leaves_a_module_by_an_attribute_is_followed():
    model, x = Stash(), torch.randn(2, 3)
    coupled = find(model, "inside.first.weight", 0, x)
    assert coupled.scope == ""
    coupled.resize(8)
    assert model.other.weight.shape == (2, 8)
    assert model(x).shape == (2, 2)


class Penalised(nn.Module):
    """A weight that is read outside of its module, at a size that code knows."""

    def __init__(self):
        super().__init__()
        self.inside = nn.Sequential(nn.Linear(3, 6), nn.Linear(6, 2))
        self.table = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.inside(x) + self.table(self.inside[0].weight.t()).sum()


def test_a_weight_read_outside_of_its_module_is_followed():
    model, x = Penalised(), torch.randn(2, 3)
    coupled = find(model, "inside.0.weight", 0, x)
    assert coupled.scope == ""
    assert "table.weight[1]" in {str(binding) for binding in coupled.bindings}


class Spare(nn.Module):
    """A block whose weight another module has too, which does not run."""

    def __init__(self):
        super().__init__()
        self.block = nn.Sequential(nn.Linear(3, 6, bias=False), nn.ReLU(), nn.Linear(6, 3))
        self.spare = nn.Linear(3, 6, bias=False)
        self.spare.weight = self.block[0].weight

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x)


def test_a_tensor_that_another_module_has_too_is_followed_there():
    model, x = Spare(), torch.randn(2, 3)
    coupled = find(model, "block.0.weight", 0, x)
    assert coupled.scope == ""
    coupled.resize(9)
    assert model.spare.weight is model.block[0].weight
    assert model.spare.out_features == 9


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.rnn, self.last = nn.Linear(3, 6), nn.GRU(6, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.rnn(self.first(x))[0])


class Telling(nn.Module):
    """A block that returns its width, by which code around it divides."""

    class Inside(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Linear(3, 6), nn.Linear(6, 2)

        def forward(self, x: Tensor) -> tuple[Tensor, int]:
            x = self.first(x)
            return self.last(x), x.shape[1]

    def __init__(self):
        super().__init__()
        self.inside = self.Inside()

    def forward(self, x: Tensor) -> Tensor:
        x, width = self.inside(x)
        return x / width


def test_a_size_that_leaves_a_module_as_a_number_is_seen():
    coupled = find(Telling(), "inside.first.weight", 0, torch.randn(2, 3))
    assert coupled.scope == ""
    assert coupled.mixed.startswith("code computes a number from its size")


class Counter(nn.Module):
    """Code that writes to a tensor which is neither parameter nor buffer."""

    def __init__(self):
        super().__init__()
        self.first, self.last, self.seen = nn.Linear(3, 6), nn.Linear(6, 2), torch.zeros(4)

    def forward(self, x: Tensor) -> Tensor:
        self.seen.add_(1)
        return self.last(self.first(x))


def test_runs_write_to_no_tensor_that_a_module_keeps():
    model = Counter()
    find(model, "first.weight", 0, torch.randn(2, 3)).resize(8)
    assert not model.seen.any()
    assert model.first.out_features == 8


class Twice(nn.Module):
    """A block that runs twice."""

    def __init__(self):
        super().__init__()
        self.block = nn.Sequential(nn.Linear(3, 6), nn.ReLU(), nn.Linear(6, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.block(self.block(x))


def test_a_module_that_runs_twice_changes_once():
    torch.manual_seed(0)
    model, x = Twice().double(), torch.randn(2, 3, dtype=torch.float64)
    expected = model(x)
    find(model, "block.0.weight", 0, x).resize(9)
    assert model.block[0].weight.shape == (9, 3)
    assert float((model(x) - expected).detach().abs().max()) <= ROUNDING


REFUSED = {
    "input": (lambda: net(), "conv.weight", 1, image, r"it is given to the model \(input 0, axis 1\)"),
    "output": (lambda: net(), "fc2.weight", 0, image, r"it is returned by the model \(output 0, axis 1\)"),
    "kernel": (lambda: net(), "conv.weight", 2, image, r"a kernel slides along it"),
    "vocabulary": (Tied, "embedding.weight", 0, lambda: torch.tensor([[1, 2, 3]]), r"it is returned by the model \(output 0, axis 2\)"),
    "literal": (Literal, "first.weight", 0, lambda: torch.randn(2, 3), r"code keeps its size \(.*test_widths.py:\d+: .*\)"),
    "recurrent": (Recurrent, "first.weight", 0, lambda: torch.randn(5, 2, 3), "a recurrent layer keeps its weights packed"),
    "no such tensor": (
        lambda: net(),
        "conv1.weight",
        0,
        image,
        r"Net has no parameter or buffer 'conv1.weight'. The nearest: 'conv.weight'",
    ),
    "no such axis": (
        lambda: net(),
        "conv.weight",
        4,
        image,
        r"conv.weight: axis: expected one of 4 axes, got 4. Its shape is \(6, 3, 3, 3\)",
    ),
    "wrong inputs": (lambda: net(), "conv.weight", 0, lambda: torch.randn(2, 7), r"conv.weight: the model cannot be run on fake tensors: "),
}


def fingerprint(model: nn.Module) -> Any:
    tensors = [(id(t), t.data_ptr(), t._version, t.shape, id(t.grad)) for t in (*model.parameters(), *model.buffers())]
    return tensors, [(path, type(m), {k: repr(v) for k, v in vars(m).items() if k[0] != "_"}) for path, m in model.named_modules()]


@pytest.mark.parametrize("name", REFUSED)
def test_refusals_say_why_and_change_nothing(name):
    build, tensor, axis, inputs, message = REFUSED[name]
    model = build()
    before = fingerprint(model)
    with pytest.raises(TopologyError, match=message):
        find(model, tensor, axis, inputs())
    assert fingerprint(model) == before


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        ("weight_norm_parametrization", None, "its module is parametrized. Remove the parametrization first"),
        ("spectral_norm", None, "its module is parametrized. Remove the parametrization first"),
        ("weight_norm_hook", None, "WeightNorm, a hook, computes the weight. Remove it first"),
    ],
)
def test_computed_weights_are_refused_by_name(name, tensor, message):
    case = AWKWARD[name]
    model = built(case)
    before = fingerprint(model)
    errors = []
    for key, parameter in model.named_parameters():
        if parameter.dim() > 1:
            try:
                find(model, key, 0, inputs_of(case))
            except TopologyError as error:
                errors.append(str(error))
    assert any(message in error for error in errors), errors
    assert fingerprint(model) == before


def test_pruned_and_sparse_parameters_are_refused():
    model = nn.Sequential(nn.Linear(3, 6), nn.Linear(6, 2))
    prune.l1_unstructured(model[0], "weight", 0.5)
    with pytest.raises(TopologyError, match="L1Unstructured, a hook, computes the weight"):
        find(model, "0.weight_orig", 0, torch.randn(2, 3))
    embedding = nn.Sequential(nn.Embedding(5, 4, sparse=True), nn.Linear(4, 2))
    x = torch.tensor([1, 2])
    embedding(x).sum().backward()
    with pytest.raises(TopologyError, match="0.weight: its size cannot change: its gradient is sparse. Clear it first"):
        find(embedding, "1.weight", 1, x)
    embedding.zero_grad()
    find(embedding, "1.weight", 1, x).resize(6)


@pytest.mark.parametrize(
    ("size", "arguments", "message"),
    [
        (True, {}, r"conv.weight\[0\]: size: expected an integer, at least 1, got True"),
        (2.5, {}, r"conv.weight\[0\]: size: expected an integer, at least 1, got 2.5"),
        (0, {}, r"conv.weight\[0\]: size: expected at least 1, got 0"),
        (2, {"keep": [0, 0]}, r"conv.weight\[0\]: keep: expected 2 different units of 6, got \[0, 0\]"),
        (2, {"keep": [0, 6]}, r"keep: expected 2 different units of 6"),
        (9, {"keep": range(6)}, r"Growth keeps all, and takes no keep"),
    ],
)
def test_arguments_are_checked(size, arguments, message):
    model = net()
    before = fingerprint(model)
    with pytest.raises(TopologyError, match=message):
        find(model, "conv.weight", 0, image()).resize(size, **arguments)
    assert fingerprint(model) == before


def test_what_was_found_holds_until_the_model_changes():
    model = net()
    first, second = find(model, "conv.weight", 0, image()), find(model, "fc1.weight", 1, image())
    first.resize(8)
    for stale in (first, second):
        with pytest.raises(TopologyError, match=r"conv.weight\[0\]: expected 6 indices, got \(8, 3, 3, 3\): the model has changed. Find"):
            stale.resize(stale.size + stale.multiple_of)


class Picky(nn.Module):
    """Code that takes some sizes and not others."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(3, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        if x.shape[1] > 8:
            raise ValueError("too wide for me")
        return self.last(x)


def test_a_size_that_code_does_not_take_is_refused_before_anything_changes():
    model, x = Picky(), torch.randn(2, 3)
    coupled = find(model, "first.weight", 0, x)
    before = fingerprint(model)
    with pytest.raises(TopologyError, match=r"first.weight\[0\]: cannot have 9 indices: .*too wide for me.* Nothing has changed"):
        coupled.resize(9)
    assert fingerprint(model) == before
    find(model, "first.weight", 0, x).resize(8)


def ran(monkeypatch) -> list[str]:
    """Names of the classes of modules that are run, op by op, from here on; those of runs at another size in parentheses."""
    seen: list[str] = []

    def first(module, example, **given):
        seen.append(type(module).__name__)
        return trace.run(module, example, **given)

    def other(module, example, **given):
        seen.append(f"({type(module).__name__})")
        return trace.run(module, example, **given)

    monkeypatch.setattr(alone, "run", first)
    monkeypatch.setattr(lightest, "run", first)
    monkeypatch.setattr(verify, "run", other)
    return seen


def test_a_block_runs_alone_and_once_it_is_known_only_in_evaluation(monkeypatch):
    case = MODELS["resnet_bottleneck"]
    model = built(case)
    seen = ran(monkeypatch)
    find(model, "layer2.0.conv2.weight", 0, inputs_of(case), size=20).resize(20)
    assert seen == ["Bottleneck", "Bottleneck", "(Bottleneck)"]
    seen.clear()
    find(model, "layer2.0.conv1.weight", 0, inputs_of(case), size=20).resize(20)
    assert seen == ["Bottleneck", "(Bottleneck)"]
    seen.clear()
    find(model, "layer2.0.conv3.weight", 0, inputs_of(case), size=72)
    assert seen == ["Bottleneck", "Sequential", "ResNet", "ResNet", "(ResNet)"]


def test_other_settings_of_a_module_are_seen_in_training_again(monkeypatch):
    model, x = nn.Sequential(nn.Linear(4, 6), nn.Dropout(0.0), nn.Linear(6, 2)), torch.randn(3, 4)
    seen = ran(monkeypatch)
    for rate, runs in ((0.0, 2), (0.0, 1), (0.5, 2), (0.5, 2)):
        model[1].p = rate
        seen.clear()
        find(model, "0.weight", 0, x)
        assert seen.count("Sequential") == runs


def test_what_is_known_keeps_no_model_alive():
    model = net()
    model.own = (model.fc1,)
    for size in (8, 5):
        find(model, "conv.weight", 0, image()).resize(size)
    watch = [weakref.ref(model), weakref.ref(model.conv), weakref.ref(model.conv.weight)]
    del model
    gc.collect()
    assert [each() for each in watch] == [None] * 3


def test_one_edit_after_another_is_found_as_on_a_fresh_model():
    """What is kept of an edit serves the next one, wherever that is."""
    case = MODELS["resnet_bottleneck"]
    model = built(case).eval()
    expected = outputs(case, model)
    places = ["layer2.1.conv3.weight", "layer2.0.conv1.weight", "layer2.1.conv3.weight", "conv1.weight", "layer2.0.conv1.weight"]
    for index, tensor in enumerate(places):
        kept = find(model, tensor, 0, inputs_of(case))
        fresh = find(copy.deepcopy(model), tensor, 0, inputs_of(case))
        assert (kept.size, kept.bindings, kept.attributes, kept.scope) == (fresh.size, fresh.bindings, fresh.attributes, fresh.scope)
        kept.resize(kept.size + 2 + index)
    assert difference(outputs(case, model), expected) <= ROUNDING


def test_a_description_names_everything():
    coupled = find(net(), "fc2.weight", 1, image())
    assert isinstance(coupled, Coupled)
    assert {str(binding) for binding in coupled.bindings} == {"fc1.weight[0]", "fc1.bias[0]", "fc2.weight[1]"}
    assert {(a.path, a.name) for a in coupled.attributes} == {("fc1", "out_features"), ("fc2", "in_features")}
    assert coupled.mixed is None
    assert not re.search("object at", repr(coupled))
