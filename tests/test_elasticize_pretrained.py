"""A trained network made elastic: it recognises what it did, and still does where a tenth of its hidden channels is gone."""

import copy

import pytest
import torch
import torch.nn.functional as F
from pretrained import efficientnet_lite0, photographs, top_five
from test_pretrained import BUILDINGS, DAISY
from torch import Tensor, nn

import esper_elastic as ee

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


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


def crops(pictures: Tensor) -> list[Tensor]:
    """Parts of the pictures and their mirror images, a batch for each place."""
    found = []
    for top, left in ((0, 0), (0, 24), (24, 0), (24, 24)):
        part = F.interpolate(pictures[:, :, top : top + 200, left : left + 200], (224, 224), mode="bilinear", align_corners=False)
        found += [part, part.flip(-1)]
    return found


def hidden_dims(model: nn.Module) -> dict[str, ee.ElasticDim]:
    """Those of the expansions in the blocks. The rest are the streams between blocks, which hold what the network knows so far."""
    return {name: dim for name, dim in ee.dims(model).items() if name.endswith("_expand_conv")}


def test_a_tenth_of_the_hidden_channels_can_go(plain, elastic, pictures):
    """Chosen by first-order importance for the network's own answers, they take no recognition along; the last tenth of them does."""
    scored, kept, cut = (copy.deepcopy(elastic) for _ in range(3))
    scores: dict[str, Tensor] = {}
    for batch in crops(pictures):
        with torch.no_grad():
            answers = plain(batch).softmax(1)
        scored.zero_grad()
        F.cross_entropy(scored(batch), answers).backward()
        for name, dim in hidden_dims(scored).items():
            scores[name] = scores.get(name, 0) + ee.importance.taylor(dim)
    for name, dim in hidden_dims(kept).items():
        width = round(0.9 * dim.active / dim.multiple_of) * dim.multiple_of
        dim.keep(ee.importance.top(scores[name], width))
        ee.dims(cut)[name].resize(width)
    china, flower = top_five(kept, pictures)
    assert len(set(china) & BUILDINGS) >= 3
    assert DAISY in flower
    assert top_five(ee.export(kept), pictures) == [china, flower]
    assert not set(top_five(cut, pictures)[0]) & BUILDINGS


def test_recalibration_is_that_of_the_exported_network(elastic, pictures):
    """At 90 % of every dim. Two photographs are no sample of what the network was trained on: measured anew on them alone, statistics
    make it forget at full width too, so that nothing is said of predictions here."""
    model = copy.deepcopy(elastic)
    ee.resize(model, {name: round(0.9 * dim.active) for name, dim in ee.dims(model).items()})
    exported = ee.export(model)
    for each in (model, exported):
        ee.recalibrate(each, crops(pictures)[:2])
    with torch.no_grad():
        got, expected = model(pictures), exported(pictures)
    assert (got - expected).abs().max() <= 1e-4 * expected.abs().max()
    assert top_five(model, pictures) == top_five(exported, pictures)
