"""A trained network on photographs: what it recognises."""

import pytest
import torch
from pretrained import efficientnet_lite0, photographs, top_five

# bell cote, palace, castle, church, dome
BUILDINGS = {442, 698, 483, 497, 538}
DAISY = 985

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


@pytest.fixture(scope="module")
def model():
    return efficientnet_lite0()


@pytest.fixture(scope="module")
def pictures():
    return photographs()


def test_trained_network_recognises_photographs(model, pictures):
    china, flower = top_five(model, pictures)
    assert set(china) == BUILDINGS
    assert flower[0] == DAISY


def test_untrained_network_does_not(model, pictures):
    torch.manual_seed(0)
    untrained = type(model).from_name("efficientnet-lite0").eval()
    china, flower = top_five(untrained, pictures)
    assert not set(china) & BUILDINGS
    assert DAISY not in flower
