"""The table of the model card: how faithful maps are when patches are removed and inserted."""

from __future__ import annotations

import re
from importlib import resources

import pytest
import torch

import dinov2_attn
from dinov2_attn.apps.demo import faithfulness
from dinov2_attn.apps.demo.faithfulness import METHODS, areas, shown
from dinov2_attn.apps.demo.game import to_tensor
from dinov2_attn.apps.demo.load import load_demo_model
from tests.support.tolerances import assert_close

CARD = (resources.files("dinov2_attn.apps.demo") / "MODEL_CARD.md").read_text("utf-8")


@pytest.fixture(scope="module")
def classifier():
    pytest.importorskip("safetensors")
    from tests.support import upstreams

    module = upstreams.FIRST.module(upstreams.FIRST.model)
    with dinov2_attn.install(upstreams.FIRST.package):
        yield faithfulness.classifier_on(load_demo_model(module))


def row_of(method):
    cells = next(line for line in CARD.splitlines() if line.startswith(f"| {method} |")).split("|")
    return [float(number) for number in re.findall(r"\d\.\d+", cells[4])]


@pytest.mark.parametrize("method", ["attention of CLS, last layer", "chefer", "random order"])
def test_the_first_scenes_give_the_numbers_of_the_card(classifier, method):
    found = areas(classifier, METHODS[method], shown(faithfulness.FIRST)).mean(0)
    assert_close(found, torch.tensor(row_of(method), dtype=torch.float64), within=0.004)


def test_the_classifier_is_as_good_as_the_card_says(classifier):
    assert f"It is right on {faithfulness.accuracy(classifier):.1%} of 200 other scenes" in CARD


def test_the_card_has_every_method():
    assert all(f"| {method} |" in CARD for method in METHODS)
    assert f"The\ntable is of {faithfulness.SCENES} scenes" in CARD


def test_the_best_order_has_the_smallest_and_the_largest_area(classifier):
    """An area is that of the curve: of the target's patch first, and of it last."""
    scenes = shown(4)
    inside = torch.stack([torch.from_numpy(scene.mask) for scene in scenes]).float()
    covered = torch.nn.functional.avg_pool2d(inside, 14)
    first = areas(classifier, lambda *_: covered, scenes)
    last = areas(classifier, lambda *_: -covered, scenes)
    assert (first[:, 0] < last[:, 0]).all()
    assert (first[:, 1] > last[:, 1]).all()
    assert ((first >= 0) & (first <= 1)).all()


def test_both_curves_end_where_the_other_begins(classifier):
    """Of two patches, removing none is the scene itself, and inserting none the mean colour."""
    (scene,) = shown(1)
    image = to_tensor([scene])[0]
    count = faithfulness.GRID[0] * faithfulness.GRID[1]
    plain = image.mean((1, 2), keepdim=True).expand_as(image)
    ends = classifier(torch.stack([image, plain]))[:, 0].double().sigmoid()
    order = torch.arange(count)
    forth = torch.tensor(faithfulness._areas_of_one(classifier, image, order))
    back = torch.tensor(faithfulness._areas_of_one(classifier, image, order.flip(0)))
    # Removing row by row and inserting from the end go through the same pictures.
    assert_close(forth[0], back[1], within=1e-6)
    assert_close(forth[1], back[0], within=1e-6)
    assert ends[0] > ends[1]
