"""Edits of compiled models: each takes effect at the next call, equals eager, and the model goes on being compiled."""

import copy
from collections.abc import Callable, Iterator

import pytest
import torch
from contract import needs_library
from surgery_net import Net, images, net
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

import esper_elastic as ee
from esper_elastic.errors import TopologyError
from esper_elastic.surgery import compiled

pytestmark = pytest.mark.wide

Model = Callable[[Tensor], Tensor]


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch._dynamo.reset()
    torch.manual_seed(0)
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        yield
    torch._dynamo.reset()


class Broken(Net):
    """The network, with breaks in its graph."""

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.bn1(self.conv1(x)))
        torch._dynamo.graph_break()
        x = self.blocks(torch.relu(self.bn2(self.conv2(x))))
        torch._dynamo.graph_break()
        for stage in self.stages:
            x = stage(x)
        return self.fc2(self.fc1(self.dropout(x.mean((2, 3)))))


def whole(model: nn.Module, counter: CompileCounterWithBackend) -> nn.Module:
    return torch.compile(model, backend=counter, fullgraph=True)


def in_place(model: nn.Module, counter: CompileCounterWithBackend) -> nn.Module:
    model.compile(backend=counter)
    return model


def hooked(model: nn.Module, counter: CompileCounterWithBackend) -> nn.Module:
    for module in model.modules():
        module.register_forward_hook(lambda module, args, result: result + 0)
    return torch.compile(model, backend=counter)


def broken(model: nn.Module, counter: CompileCounterWithBackend) -> nn.Module:
    model.__class__ = Broken
    return torch.compile(model, backend=counter)


def part_wrapped(model: nn.Module, counter: CompileCounterWithBackend) -> nn.Module:
    model.blocks = torch.compile(model.blocks, backend=counter)
    return model


def part_in_place(model: nn.Module, counter: CompileCounterWithBackend) -> nn.Module:
    model.blocks.compile(backend=counter)
    return model


def parts_in_place(model: nn.Module, counter: CompileCounterWithBackend) -> nn.Module:
    for block in model.blocks:
        block.compile(backend=counter)
    return model


#: How a model is compiled, and whether that is all of it.
WAYS = {
    "wrapped": (whole, True),
    "in place": (in_place, True),
    "with hooks": (hooked, True),
    "with breaks in the graph": (broken, True),
    "a part wrapped": (part_wrapped, False),
    "a part in place": (part_in_place, False),
    "parts in place": (parts_in_place, False),
}

#: Ten edits and whether each changes what runs in the blocks.
EDITS: list[tuple[bool, Callable[[ee.ModelSurgeon, nn.Module], ee.SurgeryResult]]] = [
    (True, lambda hand, model: hand.add_layer(model, "after_conv2", nn.Conv2d(12, 20, 3, padding=1), preserve=False)),
    (True, lambda hand, model: hand.modify_layer(model, "blocks.0.conv1", {"out_channels": 20})),
    (True, lambda hand, model: hand.add_skip_connection(model, "conv1", "blocks.1", preserve=False)),
    (False, lambda hand, model: hand.modify_layer(model, "bn1", {"eps": 0.5})),
    (True, lambda hand, model: hand.add_layer(model, "before_blocks.1", nn.Tanh(), preserve=False)),
    (False, lambda hand, model: hand.modify_layer(model, "conv1", {"kernel_size": 1})),
    (False, lambda hand, model: hand.remove_layer(model, "stages.0")),
    (False, lambda hand, model: hand.modify_layer(model, "fc1", {"out_features": 7})),
    (True, lambda hand, model: hand.modify_layer(model, "blocks.1.relu", {"activation": "gelu"})),
    (True, lambda hand, model: hand.remove_skip_connection(model, "blocks.1.edits.skip_0")),
]


def eager(model: nn.Module, x: Tensor) -> Tensor:
    with torch.compiler.set_stance("force_eager"):
        result: Tensor = model(x)
    return result


def check_ten_edits(runs: nn.Module, given: nn.Module, counter: CompileCounterWithBackend, whole: bool, tolerance: float) -> None:
    hand, x = ee.ModelSurgeon(images()), images(2)
    before = runs(x)
    for inside, edit in EDITS:
        result = edit(hand, given)
        assert result, result
        expected, count = eager(runs, x), counter.frame_count
        assert not torch.equal(expected, before), "the edit would not be seen"
        before = expected
        torch.testing.assert_close(runs(x), expected, rtol=tolerance, atol=tolerance)
        assert counter.frame_count > count or not (whole or inside), f"{result.operation}: not compiled any more"
        count = counter.frame_count
        torch.testing.assert_close(runs(x), expected, rtol=tolerance, atol=tolerance)
        assert counter.frame_count == count, f"{result.operation}: compiled at each call"


@pytest.mark.parametrize("way", WAYS)
def test_ten_edits_of_a_compiled_model_take_effect(way: str) -> None:
    model, counter = net(), CompileCounterWithBackend("eager")
    compile, whole = WAYS[way]
    check_ten_edits(compile(model, counter), model, counter, whole, 1e-12)


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_ten_edits_are_given_to_the_wrapper(backend: str) -> None:
    model, counter = net(), CompileCounterWithBackend(backend)
    runs = whole(model, counter)
    check_ten_edits(runs, runs, counter, True, 1e-10)


def test_a_compiled_model_trains_on_after_an_edit() -> None:
    model, x = net().train(), images(2)
    model.dropout.p = 0.0
    runs, hand = whole(model, CompileCounterWithBackend("aot_eager")), ee.ModelSurgeon(images())
    optimizer = torch.optim.SGD(model.parameters(), 1e-2)
    for step in range(3):
        optimizer.zero_grad()
        runs(x).square().mean().backward()
        got = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
        optimizer.zero_grad()
        eager(runs, x).square().mean().backward()
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(got[name], parameter.grad, rtol=1e-8, atol=1e-10, msg=lambda m, name=name: f"{name}: {m}")
        optimizer.step()
        assert hand.modify_layer(runs, "blocks.0.conv1", {"out_channels": 26 + step})
        assert hand.add_skip_connection(runs, "conv1", "blocks.1")


@pytest.mark.parametrize("compile", [whole, in_place], ids=["wrapped", "in place"])
def test_a_rolled_back_edit_leaves_a_compiled_model_as_it_was(compile: Callable[..., nn.Module]) -> None:
    model, counter, x = net(), CompileCounterWithBackend("eager"), images(2)
    runs, hand = compile(model, counter), ee.ModelSurgeon(images())
    before, count = runs(x), counter.frame_count
    assert not hand.add_layer(model, "after_conv1", nn.Flatten(), preserve=False)
    assert torch.equal(runs(x), before) and counter.frame_count == count
    with pytest.raises(KeyboardInterrupt), ee.transaction(model):
        assert hand.modify_layer(model, "conv1", {"out_channels": 6})
        assert hand.add_skip_connection(model, "conv1", "stages.0", preserve=False)
        assert not torch.equal(runs(x), before)
        raise KeyboardInterrupt
    for _ in range(2):
        assert torch.equal(runs(x), before)
    count = counter.frame_count
    assert torch.equal(runs(x), before) and counter.frame_count == count


# Skips


class Half(nn.Module):
    """A layer in code that is no library's, so that torch compiles it."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.layer(x))


class Halves(nn.Module):
    """Two parts, and what comes between them."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Half(), Half()

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        self.between()
        return self.second(x)

    def between(self) -> None:
        """Nothing."""


class Parted(Halves):
    def between(self) -> None:
        torch._dynamo.graph_break()


@pytest.mark.parametrize(
    ("kind", "regions", "frames"),
    [
        (Halves, [""], 1),
        (Parted, [""], 2),
        (Halves, ["first", "second"], 2),
        (Halves, ["first"], 1),
        (Halves, ["second"], 1),
    ],
    ids=["one graph", "across a break", "in two regions", "from a region", "into a region"],
)
def test_a_skip_between_what_is_compiled(kind: type[nn.Module], regions: list[str], frames: int) -> None:
    model, counter = kind(), CompileCounterWithBackend("aot_eager")
    assert ee.ModelSurgeon(torch.randn(2, 4)).add_skip_connection(model, "first", "second", preserve=False)
    plain = copy.deepcopy(model)
    for path in regions:
        model.get_submodule(path).compile(backend=counter, fullgraph=kind is Halves)
    for seed in range(4):
        x = torch.randn(2, 4, generator=torch.Generator().manual_seed(seed))
        expected, got = plain(x), model(x)
        torch.testing.assert_close(got, expected)
        for result in (expected, got):
            result.sum().backward()
        for one, other in zip(model.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(one.grad, other.grad)
    assert counter.frame_count == frames


def test_a_compiled_skip_without_its_source_says_so() -> None:
    model = Halves()
    assert ee.ModelSurgeon(torch.randn(2, 4)).add_skip_connection(model, "first", "second", preserve=False)
    second = torch.compile(model.second, backend="eager")
    with pytest.raises(TopologyError, match="its source has not run before its target"):
        second(torch.randn(2, 4))


# Many edits, and models that have nothing to do with them


def test_more_modules_of_many_classes_may_be_edited_than_torch_compiles_one_function_for() -> None:
    """In a part that torch does not compile itself, as a sequence is, each edited module is a frame of its own."""
    kinds = [nn.ReLU, nn.Tanh, nn.Sigmoid, nn.GELU, nn.SiLU, nn.ELU, nn.CELU, nn.SELU, nn.Softplus, nn.Mish]
    model, x = nn.Sequential(*(kind() for kind in kinds)), torch.randn(2, 4)
    hand = ee.ModelSurgeon(x)
    for index in range(len(kinds)):
        assert hand.add_layer(model, f"after_{index}", nn.PReLU(), preserve=False)
    counter = CompileCounterWithBackend("eager")
    model.compile(backend=counter)
    torch.testing.assert_close(model(x), eager(model, x))
    assert counter.frame_count == len(kinds)


def test_what_runs_after_a_break_in_the_graph_is_edited_more_often_than_torch_compiles_one_function_for() -> None:
    model, counter, x = net(), CompileCounterWithBackend("eager"), images(2)
    runs, hand = broken(model, counter), ee.ModelSurgeon(images())
    runs(x)
    for size in range(3, 23, 2):
        assert hand.modify_layer(model, "fc1", {"out_features": size})
        count = counter.frame_count
        torch.testing.assert_close(runs(x), eager(runs, x))
        assert counter.frame_count > count


def test_a_trial_does_not_run_what_is_compiled() -> None:
    """Torch would mark it as code that cannot be compiled, since it does not compile on fake tensors."""
    model, counter, x = net(), CompileCounterWithBackend("eager"), images(2)
    model.blocks = whole(model.blocks, counter)
    model(x)
    for size in (14, 16):
        assert ee.ModelSurgeon(images()).modify_layer(model, "conv2", {"out_channels": size})
        code = torch._dynamo.external_utils.wrap_inline(model).__code__
        before = len(torch._dynamo.eval_frame._debug_get_cache_entry_list(code))
        torch.testing.assert_close(model(x), eager(model, x))
        assert len(torch._dynamo.eval_frame._debug_get_cache_entry_list(code)) == before + 1


def test_another_model_is_not_compiled_anew() -> None:
    class Other(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x)

    other, wrapped = CompileCounterWithBackend("eager"), nn.Sequential(nn.Linear(4, 4))
    models = [torch.compile(Other(), backend=other), torch.compile(wrapped, backend=other)]
    model, x = net(), torch.randn(2, 4)
    runs, hand = whole(model, CompileCounterWithBackend("eager")), ee.ModelSurgeon(images())
    for each in models:
        each(x)
    assert other.frame_count == 2
    for kernel in (5, 7, 3):
        assert hand.modify_layer(model, "conv1", {"kernel_size": kernel})
        runs(images(2))
        for each in models:
            each(x)
    assert other.frame_count == 2


def test_paths_are_understood_with_and_without_wrappers() -> None:
    model, x = net(), images(2)
    model.blocks = torch.compile(model.blocks, backend="eager")
    hand = ee.ModelSurgeon(images())
    first = hand.add_layer(model, "after_blocks.0", nn.ReLU(), preserve=False)
    second = hand.add_layer(model, "before_blocks._orig_mod.1.conv1", nn.Tanh(), preserve=False)
    skip = hand.add_skip_connection(model, "blocks.0.conv2", "stages.0", preserve=False)
    assert first.details["name"] == "blocks._orig_mod.0.edits.after_0" and second and skip
    names = [entry["name"] for entry in ee.journal(model)]
    assert names == ["blocks.0.edits.after_0", "blocks.1.conv1.edits.before_0", "stages.0.edits.skip_0"]
    fresh = ee.replay(ee.journal(model), net())
    fresh.load_state_dict({compiled.plain_path(key): value for key, value in model.state_dict().items()})
    assert torch.equal(eager(fresh, x), eager(model, x))
    assert hand.remove_layer(model, "blocks.0.edits.after_0") and hand.remove_skip_connection(model, "stages.0.edits.skip_0")


# Elastic models


@needs_library
def test_edits_of_a_compiled_elastic_model_take_effect() -> None:
    model = ee.elasticize(net(), images(), capacity=1.5)
    ee.set_layout(model, "static")
    counter, hand, x = CompileCounterWithBackend("aot_eager"), ee.ModelSurgeon(images()), images(2)
    runs = whole(model, counter)
    before = runs(x)
    edits = [
        lambda: hand.add_layer(model, "after_conv2", nn.Conv2d(12, 12, 3, padding=1), preserve=False),
        lambda: hand.modify_layer(model, "conv1", {"kernel_size": 5}),
        lambda: hand.add_skip_connection(model, "conv1", "blocks.1", preserve=False),
        lambda: hand.add_layer(model, "before_blocks.1", nn.Tanh(), preserve=False),
        lambda: hand.modify_layer(model, "blocks.0.conv1", {"out_channels": 40}, preserve=False),
        lambda: hand.remove_layer(model, "bn1"),
        lambda: hand.remove_layer(model, "stages.0"),
        lambda: hand.add_layer(model, "after_fc1", nn.ReLU(), preserve=False),
        lambda: hand.remove_skip_connection(model, "blocks.1.edits.skip_0"),
        lambda: hand.modify_layer(model, "blocks.1.relu", {"activation": "gelu"}),
    ]
    for edit in edits:
        result = edit()
        assert result, result
        expected, count = eager(runs, x), counter.frame_count
        torch.testing.assert_close(runs(x), expected, rtol=1e-10, atol=1e-10)
        assert counter.frame_count > count
        count = counter.frame_count
        ee.resize(model, {key: max(dim.minimum, dim.active - dim.multiple_of) for key, dim in ee.dims(model).items()})
        expected = eager(runs, x)
        torch.testing.assert_close(runs(x), expected, rtol=1e-10, atol=1e-10)
        assert counter.frame_count == count, f"{result.operation}: a width compiles anew"
        assert not torch.equal(expected, before)
        before = expected
