"""A trained network made elastic: it recognises what it did, and still does where a tenth of its hidden channels is gone."""

import copy

import pytest
import torch
import torch.nn.functional as F
from pretrained import efficientnet_lite0, photographs, top_five
from test_pretrained import BUILDINGS, DAISY
from torch import Tensor, nn

import esper_elastic as ee

pytestmark = [pytest.mark.wide, pytest.mark.filterwarnings("ignore::DeprecationWarning")]


@pytest.fixture(scope="module")
def plain() -> nn.Module:
    return efficientnet_lite0()


@pytest.fixture(scope="module")
def pictures() -> Tensor:
    return photographs()


@pytest.fixture(scope="module")
def elastic(plain: nn.Module, pictures: Tensor) -> nn.Module:
    return ee.elasticize(copy.deepcopy(plain), pictures)


@pytest.mark.parametrize("layout", ["compact", "static"])
def test_predictions_are_unchanged(plain, elastic, pictures, layout):
    model = copy.deepcopy(elastic)
    ee.set_layout(model, layout)
    assert top_five(model, pictures) == top_five(plain, pictures)
    with torch.no_grad():
        logits, expected = model(pictures), plain(pictures)
        assert (logits - expected).abs().max() <= 1e-5 * expected.abs().max()
        exported = ee.export(model)(pictures)
        assert (exported - expected).abs().max() <= 1e-5 * expected.abs().max()


def hidden_dims(model: nn.Module) -> dict[str, ee.ElasticDim]:
    """Those of the expansions in the blocks. The rest are the streams between blocks, which hold what the network knows so far."""
    return {name: dim for name, dim in ee.dims(model).items() if name.endswith("_expand_conv")}


@pytest.fixture(scope="module")
def parts(pictures: Tensor) -> list[Tensor]:
    """Corners of the two pictures and their mirror images."""
    found = []
    for top, left in ((0, 0), (0, 24), (24, 0), (24, 24)):
        part = F.interpolate(pictures[:, :, top : top + 200, left : left + 200], (224, 224), mode="bilinear", align_corners=False)
        found += [part, part.flip(-1)]
    return found


@pytest.fixture(scope="module")
def scores(plain: nn.Module, elastic: nn.Module, parts: list[Tensor]) -> dict[str, Tensor]:
    """First-order importance of every unit for the network's own answers."""
    scored = copy.deepcopy(elastic)
    found: dict[str, Tensor] = {}
    for batch in parts:
        with torch.no_grad():
            answers = plain(batch).softmax(1)
        scored.zero_grad()
        F.cross_entropy(scored(batch), answers).backward()
        for name, dim in ee.dims(scored).items():
            found[name] = found.get(name, 0) + ee.importance.taylor(dim)
    return found


def prune(dims: dict[str, ee.ElasticDim], scores: dict[str, Tensor]) -> None:
    for name, dim in dims.items():
        dim.keep(ee.importance.top(scores[name], nine_tenths(dim)))


def nine_tenths(dim: ee.ElasticDim) -> int:
    return round(0.9 * dim.active / dim.multiple_of) * dim.multiple_of


def test_a_tenth_of_the_hidden_channels_can_go(elastic, pictures, scores):
    """Chosen by importance, they take no recognition along; the last tenth of them does."""
    kept, cut = copy.deepcopy(elastic), copy.deepcopy(elastic)
    prune(hidden_dims(kept), scores)
    ee.resize(cut, {name: nine_tenths(dim) for name, dim in hidden_dims(cut).items()})
    china, flower = top_five(kept, pictures)
    assert len(set(china) & BUILDINGS) >= 3
    assert DAISY in flower
    assert top_five(ee.export(kept), pictures) == [china, flower]
    assert not set(top_five(cut, pictures)[0]) & BUILDINGS


def test_averaged_over_two_pictures_it_forgets(elastic, pictures, parts, scores):
    """At full width, where nothing needed to change, as at nine tenths of every dim."""
    full, narrow = copy.deepcopy(elastic), copy.deepcopy(elastic)
    prune(ee.dims(narrow), scores)
    for model in (full, narrow):
        ee.recalibrate(model, parts)
        assert DAISY not in top_five(model, pictures)[1]
    assert not set(top_five(full, pictures)[0]) & BUILDINGS


@pytest.mark.parametrize("choice", ["the most important", "the first"])
def test_recalibrated_at_nine_tenths_of_every_dim(elastic, pictures, parts, scores, choice):
    """Two pictures say enough of what the change of widths does, though they are no sample of what the network was trained on."""
    model = copy.deepcopy(elastic)
    trained = {name: dim.capacity for name, dim in ee.dims(model).items()}
    if choice == "the first":
        ee.resize(model, {name: nine_tenths(dim) for name, dim in ee.dims(model).items()})
        assert not set(top_five(model, pictures)[0]) & BUILDINGS
    else:
        prune(ee.dims(model), scores)
    assert DAISY not in top_five(model, pictures)[1]
    ee.recalibrate(model, parts, trained_at=trained)
    china, flower = top_five(model, pictures)
    assert len(set(china) & BUILDINGS) >= (3 if choice == "the most important" else 1)
    assert DAISY in flower
    assert top_five(ee.export(model), pictures) == [china, flower]
