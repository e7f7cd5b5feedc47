"""The recipes of docs/explaining.md find the target of the demo model's scenes from keys."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from dinov2_attn import record
from dinov2_attn.apps.demo.load import load_demo_model
from dinov2_attn.apps.demo.scenes import PATCH, draw
from dinov2_attn.apps.viz.images import normalise
from tests.support import upstreams

PAGE = Path(__file__).parents[3] / "docs" / "explaining.md"
GRID = (8, 10)
SCENES = range(40)


@pytest.fixture(scope="module")
def recipes():
    """The functions of the page, without the lines that call them."""
    (block,) = re.findall(
        r"^```python\n(def tokencut.*?)^keys = ", PAGE.read_text("utf-8"), re.S | re.M
    )
    names = {"torch": torch}
    exec(block, names)
    return names


@pytest.fixture(scope="module")
def model():
    return load_demo_model(upstreams.FIRST.module(upstreams.FIRST.model))


@torch.no_grad()
def keys_and_target(model, seed, layer):
    scene = draw(seed, GRID)
    pixels = torch.from_numpy(scene.picture)[None]
    with record(model, [layer], facets="key") as maps:
        model(normalise(pixels))
    assert maps.grid == GRID
    mask = torch.from_numpy(scene.mask)[None].float()
    target = torch.nn.functional.avg_pool2d(mask, PATCH).flatten().argmax()
    return maps.facet_maps("key")[0][0].flatten(1).T, target


def test_tokencut_finds_the_target(recipes, model):
    strongest, inside, share = [], [], []
    for seed in SCENES:
        keys, target = keys_and_target(model, seed, 2)
        foreground, strength = recipes["tokencut"](keys, tau=0.5)
        strongest.append(bool(strength.argmax() == target))
        inside.append(bool(foreground[target]))
        share.append(float(foreground.float().mean()))
    assert sum(strongest) >= 0.8 * len(SCENES)
    assert sum(inside) >= 0.8 * len(SCENES)
    assert sum(share) < 0.3 * len(SCENES)


def test_the_seed_of_lost_is_the_target(recipes, model):
    found = [
        bool(recipes["lost"](keys)[0] == target)
        for keys, target in (keys_and_target(model, seed, 1) for seed in SCENES)
    ]
    assert sum(found) >= 0.5 * len(SCENES)
