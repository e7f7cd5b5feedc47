"""A page of two models: B beside A, on one scale, for every token, layer and head."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from dinov2_attn import attention_maps, viz
from dinov2_attn.errors import InvalidInputError
from tests.support import upstreams
from tests.support.exploring import CORNERS, NEEDS_CHROMIUM, VIRIDIS, photo, wait_for
from tests.support.strategies import randomise

pytest_plugins = ["tests.support.open_pages"]  # the fixture chromium

GRID = (3, 5)
pytest.importorskip("matplotlib")


def build(registers, depth, heads=3, seed=1, patch_size=2):
    model = upstreams.DEPTH_ANYTHING.cls("DinoVisionTransformer")(
        img_size=8,
        patch_size=patch_size,
        embed_dim=12,
        num_heads=heads,
        depth=depth,
        block_chunks=0,
        num_register_tokens=registers,
    )
    model = randomise(model, seed)
    with torch.no_grad():
        for block in model.blocks:
            block.attn.qkv.weight *= 3
    return model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A page of a model with registers and one without, which is half as deep."""
    folder = tmp_path_factory.mktemp("two")
    pixels = np.random.default_rng(0).integers(0, 255, (6, 10, 3), np.uint8)
    Image.fromarray(pixels).save(folder / "photo.png")
    return folder


@pytest.fixture(scope="module")
def models():
    return build(2, 4), build(0, 2, seed=2)


@pytest.fixture(scope="module")
def two(folder, models):
    image = viz.load_image(folder / "photo.png", models[0])
    page = viz.explore(models[0], image, name="one", other=models[1], other_name="two")
    page.save(folder / "two.html")
    return image


def test_the_page_names_both_and_keeps_both(folder, models):
    page = viz.explore(models[0], folder / "photo.png", other=models[1], name="one <", max_mb=1)
    assert page.kept == "A: layers 0–3: all rows of each head; B: layers 0–1: all rows of each head"
    assert b"A: one &lt; \xc2\xb7 18 tokens" in page.content
    assert b"B: 16 tokens" in page.content


def test_a_file_is_resized_so_that_grids_agree(folder, models):
    page = viz.explore(models[0], folder / "photo.png", other=build(0, 2, patch_size=1))
    assert page.content.count(b"3 \xc3\x97 5 patches") >= 2


def test_half_of_the_room_is_for_each(folder, models):
    whole = viz.explore(models[0], folder / "photo.png", other=models[1])
    small = viz.explore(models[0], folder / "photo.png", other=models[1], max_mb=0.22)
    assert small.size <= 220_000 or not small.left_out
    assert small.size <= whole.size


def test_other_grids_and_maps_are_refused(folder, models):
    finer, image = build(0, 2, patch_size=1), viz.load_image(folder / "photo.png", 2)
    with pytest.raises(InvalidInputError, match="the same grid of patches"):
        viz.explore(models[0], image, other=finer)
    maps = attention_maps(models[0], viz.load_image(folder / "photo.png", 2).tensor[None])
    with pytest.raises(InvalidInputError, match="two models"):
        viz.explore(maps, folder / "photo.png", other=models[1])


@pytest.fixture(scope="module")
def weights(two, models):
    with torch.inference_mode():
        return [attention_maps(model, two.tensor[None]) for model in models]


@pytest.fixture
def page(folder, two, chromium):
    chromium.open(folder / "two.html")
    wait_for(chromium, "return performance.getEntriesByName('shown').length")
    wait_for(chromium, "return document.getElementById('pinned-name').textContent")
    chromium.run("document.querySelector('[name=limits][value=each]').click()")
    return chromium


def painted(page, canvas):
    """Return the colours of a canvas, ``(patches, 3)``."""
    script = (
        "const c = document.getElementById(arguments[0]);"
        "return [...c.getContext('2d').getImageData(0, 0, c.width, c.height).data]"
    )
    wait_for(page, f"{script.replace('arguments[0]', repr(canvas))}.some((one) => one)")
    return np.array(page.run(script, canvas)).reshape(-1, 4)[:, :3]


def turn(page, layer):
    page.run(
        "const it = document.getElementById('layer'); it.value = arguments[0];"
        "it.dispatchEvent(new Event('input'))",
        layer,
    )


def expected(weights, layer, theirs, row):
    """Return the maps of a patch in A and in B, in the unit of A: a share of its 18 tokens."""
    a = weights[0][layer][0].mean(0)[3 + row, 3:]
    b = weights[1][theirs][0].mean(0)[1 + row, 1:] * (16 / 18)
    return a.double().numpy(), b.double().numpy()


@NEEDS_CHROMIUM
@pytest.mark.parametrize("layer", range(4))
def test_b_has_the_same_token_and_the_layer_as_deep(page, weights, layer):
    turn(page, layer)
    theirs = round(layer / 3)
    for patch in CORNERS:
        page.click(photo(page, patch))
        wait_for(
            page,
            "return document.getElementById('pinned-name').textContent === arguments[0]",
            f"B: layer {theirs}, mean of heads",
        )
        a, b = expected(weights, layer, theirs, patch[0] * GRID[1] + patch[1])
        high = max(a.max(), b.max())
        shades = np.clip(b / high * 256, 0, 255)
        found = np.abs(painted(page, "pinned")[:, None] - VIRIDIS[:, :3]).sum(2).argmin(1)
        assert np.abs(found - shades).max() < 4
        assert page.value("high") == pytest.approx(high, rel=0.01)
        difference = b - a
        most = np.abs(difference).max()
        assert page.value("difference-high") == pytest.approx(most, rel=0.02)
        colours = painted(page, "difference")
        reddest, bluest = (colours[:, 0] - colours[:, 2]).argmax(), difference.argmin()
        assert reddest == difference.argmax()
        assert colours[bluest, 2] >= colours[bluest, 0]


@NEEDS_CHROMIUM
def test_it_is_said_which_map_is_which(page):
    assert page.text("difference-caption") == "B − A"
    assert page.text("pinned-caption") == "B"
    assert page.text("caption").startswith("A · CLS")
    assert "Most above A: " in page.text("difference-sentence")
    assert page.complaints() == []


@NEEDS_CHROMIUM
def test_b_is_removed_and_a_pin_takes_its_place(page):
    page.press("p")
    assert page.text("difference-caption") == "this map − pinned"
    page.run("document.getElementById('model-b').click()")
    assert page.text("difference-caption") == "B − A"
    page.run("document.getElementById('model-b').click()")
    assert page.run("return document.getElementById('compare').hidden")


@NEEDS_CHROMIUM
def test_a_register_that_b_has_not_is_said_to_be_absent(page):
    page.press("2")
    assert page.text("difference-sentence") == "Not kept on this page."


@NEEDS_CHROMIUM
@pytest.mark.parametrize("width", [380, 1280])
def test_no_width_scrolls_sideways(page, width):
    page.screen(width, 800)
    assert page.run("return document.body.scrollWidth <= innerWidth")
