"""Fixtures: pages of one real model, and a Chromium that has one open."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from dinov2_attn import attention_maps, install
from dinov2_attn.apps.explorer.write import write_page
from dinov2_attn.apps.viz.text import NO_MEANING
from tests.support import browser, upstreams
from tests.support.exploring import GRID, HEADS, HOSTILE, LAYERS, OUTLIER, PICTURE, N
from tests.support.pages import Page
from tests.support.strategies import noise, randomise


@pytest.fixture(scope="module")
def exact():
    """The weights of a real model with two registers, ``(layers, heads, N, N)``, by layer."""
    upstream = upstreams.DEPTH_ANYTHING
    with install(upstream.package), torch.inference_mode():
        model = upstream.cls("DinoVisionTransformer")(
            img_size=8,
            patch_size=2,
            embed_dim=12,
            num_heads=HEADS,
            depth=4,
            block_chunks=0,
            num_register_tokens=2,
        )
        model = randomise(model.double(), 1)
        for block in model.blocks:
            block.attn.qkv.weight *= 3  # uneven attention, as that of trained models
        yield attention_maps(model, noise(1, 3, 6, 10, seed=2, dtype=torch.float64), LAYERS)


@pytest.fixture(scope="module")
def pages(exact, tmp_path_factory):
    """A whole page, one that had to leave out much, and one of random weights."""
    folder = tmp_path_factory.mktemp("pages")
    mask = torch.zeros(1, *GRID, dtype=torch.bool)
    mask[0][OUTLIER] = True
    found = SimpleNamespace(mask=mask, threshold=torch.tensor([151.25]), layer=torch.tensor([2]))
    write_page(folder / "whole.html", PICTURE, exact, title=HOSTILE, outliers=found)
    size = (folder / "whole.html").stat().st_size
    tries = (
        write_page(folder / "some.html", PICTURE, exact, max_mb=max_mb / 1e6)
        for max_mb in range(size + 2000, size - 2000, -200)
    )
    assert any("single heads" in some.left_out for some in tries)
    write_page(folder / "random.html", PICTURE, exact, warning=NO_MEANING)
    return folder


@pytest.fixture(scope="module")
def chromium():
    with browser.chromium() as started:
        yield started


@pytest.fixture
def page(chromium, pages):
    """The whole page, just opened; nothing complains while a test uses it."""
    chromium.open(pages / "whole.html")
    yield chromium
    assert chromium.complaints() == []


@pytest.fixture(scope="module")
def shown(pages):
    """The weights that the whole page holds, as ``exact``."""
    read = Page(pages / "whole.html")
    rows = [np.stack(list(read.layer(layer)["each"].values())) for layer in LAYERS]
    matrices = [torch.from_numpy(one.reshape(1, HEADS, N, N)) for one in rows]
    return SimpleNamespace(weights=matrices)
