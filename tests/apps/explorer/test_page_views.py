"""What is in view at each size, what the address and files hold, and comparing maps."""

from __future__ import annotations

import csv
import io

import numpy as np
import pytest
import torch

import dinov2_attn
from dinov2_attn import attention_maps
from dinov2_attn.apps.explorer.explore import explore
from dinov2_attn.apps.explorer.write import write_page
from dinov2_attn.apps.viz.images import LoadedImage
from dinov2_attn.apps.viz.limits import scale
from dinov2_attn.apps.viz.style import Style
from dinov2_attn.apps.viz.text import NO_MEANING
from dinov2_attn.maps.attention_maps import AttentionMaps
from dinov2_attn.math.selection import name_token
from tests.support import upstreams
from tests.support.exploring import NEEDS_CHROMIUM, wait_for
from tests.support.strategies import noise, randomise

pytest_plugins = ["tests.support.open_pages"]  # fixtures: exact, pages, chromium
pytestmark = NEEDS_CHROMIUM

GRID, PREFIX, HEADS, DEPTH = (12, 9), 3, 3, 4
N = PREFIX + 108


def image_of(seed, grid=GRID):
    height, width = 14 * grid[0], 14 * grid[1]
    picture = np.random.default_rng(seed).integers(0, 255, (height, width, 3), np.uint8)
    return LoadedImage(noise(3, 2 * grid[0], 2 * grid[1], seed=seed), picture)


@pytest.fixture(scope="module")
def coded(tmp_path_factory):
    """Pages of a model as queries and keys: of two images, and of one with another grid."""
    folder = tmp_path_factory.mktemp("coded")
    upstream = upstreams.DEPTH_ANYTHING
    with dinov2_attn.install(upstream.package), torch.inference_mode():
        model = upstream.cls("DinoVisionTransformer")(
            img_size=8,
            patch_size=2,
            embed_dim=12,
            num_heads=HEADS,
            depth=DEPTH,
            block_chunks=0,
            num_register_tokens=2,
        )
        model = randomise(model, 1)
        for block in model.blocks:
            block.attn.qkv.weight *= 3  # uneven attention, as that of trained models
        for name, image in (
            ("one", image_of(3)),
            ("two", image_of(4)),
            ("odd", image_of(3, (9, 9))),
        ):
            explore(
                model, image, folder / f"{name}.html", title=f"{name}.png", name="A small model"
            )
        maps = [attention_maps(model, image_of(seed).tensor[None]) for seed in (3, 4)]
        weights = [torch.stack(one.weights)[:, 0].numpy() for one in maps]
    return folder, weights


def open_at(page, path, fragment="", **options):
    page.driver.get("about:blank")
    page.open(path, **options)
    page.run("location.hash = arguments[0]", fragment)
    wait_for(page, "return document.getElementById('sentence').textContent !== ''")


def position(patch):
    return PREFIX + patch[0] * GRID[1] + patch[1]


# Numbers


@pytest.mark.parametrize("head", ["mean", "2"])
@pytest.mark.parametrize("direction", ["from", "to"])
def test_the_page_computes_the_weights_of_the_model(chromium, coded, head, direction):
    folder, (weights, _) = coded
    for layer, token, cursor in ((3, "cls", (11, 8)), (0, "r2", (0, 0)), (1, "4,7", (4, 7))):
        place = f"{cursor[0]},{cursor[1]}"
        address = f"layer={layer}&head={head}&token={token}&cursor={place}&direction={direction}"
        open_at(chromium, folder / "one.html", address)
        named = {"cls": 0, "r2": 2, "4,7": position((4, 7))}[token]
        assert chromium.text("token") == name_token(named, PREFIX, GRID)
        row, column = (position(cursor), named) if direction == "to" else (named, position(cursor))
        matrix = weights[layer].mean(0) if head == "mean" else weights[layer, int(head)]
        off = abs(chromium.value("weight") - matrix[row, column])
        assert off <= chromium.value("doubt") <= float(chromium.text("worst"))
        assert_low_and_high(chromium, matrix[:, named] if direction == "to" else matrix[named])
    assert chromium.complaints() == []


def assert_low_and_high(page, line):
    within = 2 * float(page.text("worst"))
    assert page.value("low") == 0
    marked = page.run("return JSON.parse(document.getElementById('about').textContent).outliers")
    mask = np.isin(np.arange(PREFIX, N), marked).reshape(GRID)
    norm = scale(line[PREFIX:].reshape(GRID), Style(), mask)
    assert page.value("high") == pytest.approx(norm.vmax, abs=within)


def test_the_map_is_said_in_one_sentence(chromium, coded):
    folder, (weights, _) = coded
    open_at(chromium, folder / "one.html", "layer=2&head=1&token=3,3")
    patches = weights[2, 1, position((3, 3)), PREFIX:]
    best = name_token(PREFIX + int(patches.argmax()), PREFIX, GRID)
    said = chromium.text("sentence")
    assert f"patch (3, 3), layer 2, head 1: highest at {best} ({N * patches.max():.3g}" in said
    five = 100 * np.sort(patches)[-5:].sum()
    assert f"the five highest patches hold {five:.1f} %" in said
    named = "document.querySelector('#map canvas').getAttribute('aria-labelledby')"
    assert chromium.run(f"return {named}") == "sentence"


def test_nothing_is_spoken_twice(chromium, coded):
    open_at(chromium, coded[0] / "one.html")
    spoken = "[aria-live], output, [role=status], [role=alert]"
    live = "return [...document.querySelectorAll(arguments[0])].map((it) => it.id)"
    assert chromium.run(live, spoken) == ["live"]


# What is in view

BOXES = """
return Object.fromEntries(arguments[0].map((it) => {
  const box = document.querySelector(it).getBoundingClientRect();
  return [it, [box.left, box.top, box.right, box.bottom]];
}));
"""


def boxes(page, *selectors):
    return page.run(BOXES, selectors)


def assert_in_view(found, width, height):
    for name, (left, top, right, bottom) in found.items():
        assert left >= 0, name
        assert top >= 0, name
        assert right <= width, name
        assert bottom <= height, name
        assert right - left > 10, name
        assert bottom - top > 4, name


@pytest.mark.parametrize("size", [(1280, 720), (1400, 1000), (1920, 1080)])
@pytest.mark.parametrize("pinned", [False, True])
def test_everything_is_in_one_view(chromium, coded, size, pinned):
    width, height = size
    open_at(chromium, coded[0] / "one.html", width=width, height=height)
    if pinned:
        chromium.press("p")
    parts = ["#controls", "#layer", "#head", "#photo", "#map", "#bar", "#chips", "#cells", "#tools"]
    parts += ["#readout", *(f"#heads button:nth-child({i})" for i in range(1, HEADS + 2))]
    found = boxes(chromium, *parts, *(["#difference"] if pinned else []))
    assert_in_view(found, width, height)
    assert found["#photo"][2] <= found["#map"][0]
    assert found["#map"][2] <= found["#heads button:nth-child(1)"][0]
    assert found["#photo"][1] == found["#map"][1]
    assert found["#photo"][3] - found["#photo"][1] >= 0.4 * height
    assert chromium.complaints() == []


SHAPES = {
    "vit-s": ((16, 16), 5, 6),
    "vit-b-wide": ((14, 28), 1, 12),
    "vit-l-tall": ((30, 16), 5, 16),
    "vit-g": ((16, 20), 1, 24),
    "column": ((60, 6), 5, 6),
    "panorama": ((6, 60), 5, 12),
}


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    """Pages of many heads and of images that are wide or tall, with a warning and long names."""
    folder = tmp_path_factory.mktemp("shapes")
    for name, (grid, prefix, heads) in SHAPES.items():
        height, width = grid
        count = prefix + height * width
        rows = [*range(prefix), count - 1]
        weights = noise(1, heads, len(rows), count, seed=1).mul(3).softmax(-1)
        picture = np.random.default_rng(0).integers(0, 255, (14 * height, 14 * width, 3), np.uint8)
        maps = AttentionMaps((weights, weights), (10, 11), grid, prefix, tuple(rows))
        page = folder / f"{name}.html"
        write_page(page, picture, maps, title=f"{name}.jpg", model=NAME, warning=NO_MEANING)
    return folder


NAME = "ViT/14 + 4 registers, random weights"


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("size", [(1280, 720), (1400, 1000)])
@pytest.mark.parametrize("pinned", [False, True])
def test_all_heads_of_any_model_are_in_one_view(chromium, shapes, name, size, pinned):
    """Also after the readout has become longer."""
    (height, width), _, heads = SHAPES[name]
    if pinned and name == "column":
        pytest.skip("three maps of an image ten times as high as wide do not fit with all heads")
    open_at(chromium, shapes / f"{name}.html", width=size[0], height=size[1])
    if pinned:
        chromium.press("p")
    for hovers in (False, True):
        if hovers:
            left, _, right, bottom = boxes(chromium, "#map")["#map"]
            chromium.hover({"x": right - (right - left) / 2 / width, "y": bottom - 1})
            assert chromium.text("cursor") == f"patch ({height - 1}, {width - 1})"
        tiles = [f"#heads button:nth-child({i})" for i in (1, 2, heads, heads + 1)]
        parts = ["#controls", "#photo", "#map", "#bar", "#chips", "#steps", "#cells", "#tools"]
        found = boxes(chromium, *parts, *tiles, "#readout")
        assert_in_view(found, *size)
        assert found["#photo"][1] == found["#map"][1]
        assert found["#map"][2] <= found[tiles[0]][0]
    assert chromium.complaints() == []


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("size", [(390, 844), (640, 360), (700, 500)])
def test_small_windows_show_both_pictures_and_reach_all_heads(chromium, shapes, name, size):
    open_at(chromium, shapes / f"{name}.html", width=size[0], height=size[1], touch=size[0] < 400)
    found = boxes(chromium, "#layer", "#head", "#photo", "#map", "#chips", "#bar")
    assert_in_view(found, *size)
    assert found["#photo"][2] <= found["#map"][0]
    assert found["#photo"][1] == found["#map"][1]
    assert chromium.run("return document.documentElement.scrollWidth") <= size[0]
    for i in (1, SHAPES[name][2] + 1):
        tile = f"#heads button:nth-child({i})"
        chromium.run(f"document.querySelector('{tile}').scrollIntoView({{block: 'center'}})")
        assert_in_view(boxes(chromium, tile), *size)


def test_a_phone_shows_both_pictures_side_by_side(chromium, coded):
    open_at(chromium, coded[0] / "one.html", width=390, height=844, touch=True)
    found = boxes(
        chromium, "#layer", "#head", "#photo", "#map", "#chips", "#steps", "#bar", "#cells"
    )
    assert_in_view(found, 390, 844)
    assert found["#photo"][2] <= found["#map"][0]
    assert found["#photo"][1] == found["#map"][1]


def test_a_window_at_200_percent_shows_both_pictures(chromium, coded):
    """1280 × 720 at 200 % is 640 × 360."""
    open_at(chromium, coded[0] / "one.html", width=640, height=360)
    found = boxes(chromium, "#layer", "#head", "#photo", "#map", "#chips", "#bar")
    assert_in_view(found, 640, 360)
    assert found["#photo"][2] <= found["#map"][0]
    assert chromium.run("return document.documentElement.scrollWidth") <= 640
    chromium.run("document.getElementById('keys-button').scrollIntoView()")
    assert_in_view(boxes(chromium, "#keys-button"), 640, 360)


def test_sliders_say_what_is_kept(chromium, pages, coded):
    open_at(chromium, coded[0] / "one.html")
    hidden = "return ['layers-kept', 'heads-kept'].map((it) => document.getElementById(it).hidden)"
    assert chromium.run(hidden) == [True, True]
    chromium.open(pages / "some.html")
    chromium.click(chromium.middle("#photo", 1, 1, (3, 5)))
    chromium.click(chromium.middle("label:has(#mean)"))
    strip = "return [...document.querySelectorAll('#layers-kept i')].map((it) => it.className)"
    layers = chromium.run("return JSON.parse(document.getElementById('about').textContent).layers")
    whole = [one["each"] is not None and one["each"]["queries"] is None for one in layers]
    assert chromium.run(strip) == ["there" if one else "" for one in whole]
    assert not all(whole)
    assert_in_view(boxes(chromium, "#layers-kept"), 1200, 900)


# Speed


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """The page of two layers of a ViT-B at 518 pixels, as queries and keys."""
    path = tmp_path_factory.mktemp("large") / "page.html"
    sizes = {"img_size": 518, "patch_size": 14, "embed_dim": 768, "num_heads": 12, "depth": 2}
    model = upstreams.DEPTH_ANYTHING.cls("DinoVisionTransformer")(**sizes, block_chunks=0)
    tensor = torch.nn.functional.interpolate(noise(1, 3, 37, 37, seed=3), (518, 518))[0]
    picture = np.random.default_rng(0).integers(0, 255, (37, 37, 3), np.uint8)
    image = LoadedImage(tensor, picture.repeat(14, 0).repeat(14, 1))
    with torch.no_grad():
        for block in model.blocks:
            block.attn.qkv.weight *= 3
    assert explore(model.eval(), image, path).left_out == ""
    return path


HOVER = """
const stage = document.getElementById("photo");
const box = stage.getBoundingClientRect();
const times = [];
for (let i = 0; i < 51; i++) {
  const [x, y] = [((i * 37) % 100) / 100, ((i * 53) % 100) / 100];
  const place = { clientX: box.x + x * box.width, clientY: box.y + y * box.height };
  const start = performance.now();
  stage.dispatchEvent(new PointerEvent("pointermove", { pointerType: "mouse", ...place }));
  document.body.offsetHeight;
  times.push(performance.now() - start);
}
return times.sort((a, b) => a - b)[25];
"""


def test_vit_base_at_518_pixels_follows_the_hand(chromium, large):
    """The best of some tries counts: other tests may run beside this one."""
    shown = []
    for _ in range(3):
        open_at(chromium, large, width=1280, height=720)
        shown.append(chromium.run("return performance.getEntriesByName('shown')[0].startTime"))
    assert min(shown) < 1000
    assert min(chromium.run(HOVER) for _ in range(8)) < 4
    assert chromium.complaints() == []


# Models without CLS


def test_a_model_without_cls(chromium, tmp_path):
    weights = noise(1, 2, 12, 12, seed=1).mul(3).softmax(-1)
    picture = np.random.default_rng(0).integers(0, 255, (42, 56, 3), np.uint8)
    path = tmp_path / "page.html"
    write_page(path, picture, AttentionMaps((weights,), (0,), (3, 4), 0))
    open_at(chromium, path)
    assert chromium.text("token") == "patch (0, 0)"
    assert "CLS" not in chromium.text("sentence")
    assert chromium.run("return document.querySelectorAll('#chips button').length") == 0
    chromium.press("c", "0", "ARROW_UP", "ARROW_DOWN", "ARROW_RIGHT")
    assert chromium.text("token") == "patch (1, 1)"
    chromium.hover(chromium.middle("#map", 2, 3, (3, 4)))
    off = abs(chromium.value("weight") - float(weights[0, :, 5, 11].mean()))
    assert off <= chromium.value("doubt")
    wait_for(chromium, "return location.hash.includes('token=1,1')")
    assert chromium.complaints() == []


# The address, keys and files


def test_the_address_holds_the_view(chromium, coded):
    path = coded[0] / "one.html"
    open_at(chromium, path)
    chromium.click(chromium.middle("#photo", 5, 2, GRID))
    chromium.press("[", "m", ".", "r", "l", "s")
    chromium.hover(chromium.middle("#map", 7, 1, GRID))
    texts = [
        "layer-value",
        "head-value",
        "token",
        "cursor",
        "weight",
        "high",
        "caption",
        "sentence",
    ]
    shown = [chromium.text(one) for one in texts]
    wait_for(chromium, "return location.hash.includes('cursor=7,1')")
    address = chromium.run("return location.hash")
    assert "layer=2&head=1&token=5,2&direction=to&scale=log&limits=shared" in address
    open_at(chromium, path, address)
    assert [chromium.text(one) for one in texts] == shown


@pytest.mark.parametrize("odd", ["layer=99&head=x&token=99,0", "token=r7&cursor=&pin=1;2", "=&&%"])
def test_an_address_that_does_not_fit_is_ignored(chromium, coded, odd):
    open_at(chromium, coded[0] / "one.html", odd)
    assert chromium.text("caption") == f"CLS · layer {DEPTH - 1}, mean of heads"
    assert chromium.complaints() == []


def test_a_question_mark_lists_all_keys(chromium, coded):
    open_at(chromium, coded[0] / "one.html")
    chromium.press("?")
    assert chromium.run("return document.getElementById('keys').open")
    listed = chromium.run(
        "return [...document.querySelectorAll('#keys kbd')].map((it) => it.textContent)"
    )
    assert {*"C0[],.MRLSOP?", "Enter", "Esc", "Shift"} <= set(listed)
    chromium.press("r")  # not while the list is open
    assert chromium.text("direction") == "Where it looks"
    chromium.press("ESCAPE")
    assert not chromium.run("return document.getElementById('keys').open")


FILES = """
const done = arguments[arguments.length - 1];
HTMLAnchorElement.prototype.click = function () { name = this.download; };
let name;
URL.createObjectURL = (blob) => {
  setTimeout(async () => {
    const bitmap = blob.type === "image/png" && (await createImageBitmap(blob));
    done([name, blob.type, bitmap ? [bitmap.width, bitmap.height] : await blob.text()]);
  });
  return "blob:x";
};
document.getElementById(arguments[0]).click();
"""


def test_numbers_are_saved(chromium, coded):
    folder, (weights, _) = coded
    open_at(chromium, folder / "one.html", "layer=1&head=2&token=0,3")
    name, kind, text = chromium.driver.execute_async_script(FILES, "csv")
    assert (name, kind) == ("one_layer1_head2_0-3.csv", "text/csv")
    rows = list(csv.DictReader(io.StringIO(text)))
    assert [int(row["position"]) for row in rows] == list(range(N))
    assert [rows[0]["token"], rows[2]["token"], rows[3]["token"]] == ["CLS", "register 2", "patch"]
    assert [int(rows[-1]["row"]), int(rows[-1]["column"])] == [11, 8]
    exact = weights[1, 2, position((0, 3))]
    for row, weight in zip(rows, exact, strict=True):
        assert abs(float(row["weight"]) - weight) <= float(row["error_bound"])
        assert float(row["times_uniform"]) == pytest.approx(N * float(row["weight"]))


def test_the_picture_is_saved(chromium, coded):
    open_at(chromium, coded[0] / "one.html")
    name, kind, (width, height) = chromium.driver.execute_async_script(FILES, "png")
    assert (name, kind) == ("one_layer3_mean_cls.png", "image/png")
    assert width > 600
    assert height > 400
    assert chromium.complaints() == []


# Comparing


def test_a_pinned_map_is_compared_with_others(chromium, coded):
    folder, (weights, _) = coded
    open_at(chromium, folder / "one.html", "layer=3&head=0&token=2,2")
    chromium.click(chromium.middle("#pin"))
    assert chromium.text("pinned-name") == "where it looks: patch (2, 2) · layer 3, head 0"
    assert chromium.value("difference-high") == 0
    first = weights[3, 0, position((2, 2))]
    others = {".": weights[3, 1, position((2, 2))], "[": weights[2, 1, position((2, 2))]}
    others["c"] = weights[2, 1, 0]
    for key, line in others.items():
        chromium.press(key)
        difference = (line - first)[PREFIX:]
        most = chromium.value("difference-high")
        assert most == pytest.approx(
            np.abs(difference).max(), abs=2 * float(chromium.text("worst"))
        )
        best = name_token(PREFIX + int(difference.argmax()), PREFIX, GRID)
        assert f"Most above the pinned map: {best}" in chromium.text("difference-sentence")
    wait_for(chromium, "return location.hash.includes('pin=3;0;2,2;from')")
    address = chromium.run("return location.hash")
    open_at(chromium, folder / "one.html", address)
    wait_for(chromium, "return !document.getElementById('compare').hidden")
    wait_for(chromium, f"return document.getElementById('difference-high').value === '{most}'")
    chromium.press("p")
    assert chromium.run("return document.getElementById('compare').hidden")
    assert chromium.complaints() == []


def test_another_image_is_compared(chromium, coded):
    """The same token, layer and head of the page of another image."""
    folder, (weights, other) = coded
    open_at(chromium, folder / "one.html", "layer=2&head=1&token=6,6")
    chromium.run("document.getElementById('file').hidden = false")
    file = chromium.driver.find_element("id", "file")
    file.send_keys(str(folder / "two.html"))
    wait_for(chromium, "return !document.getElementById('compare').hidden")
    assert chromium.text("pinned-name") == "the same token, layer and head of two.png"
    for key, layer in (("", 2), ("[", 1)):
        chromium.press(*key)
        wait_for(chromium, "return document.getElementById('difference-high').value > 0")
        difference = (weights - other)[layer, 1, position((6, 6)), PREFIX:]
        within = 2 * float(chromium.text("worst"))
        most = chromium.value("difference-high")
        assert most == pytest.approx(np.abs(difference).max(), abs=within)
    assert chromium.complaints() == []


def test_a_page_of_another_grid_is_refused(chromium, coded):
    open_at(chromium, coded[0] / "one.html")
    chromium.run(
        "document.getElementById('file').hidden = false; window.alert = (it) => (said = it)"
    )
    chromium.driver.find_element("id", "file").send_keys(str(coded[0] / "odd.html"))
    said = "its grid is 9 × 9, and this one's 12 × 9"
    wait_for(chromium, "return (window.said ?? '').includes(arguments[0])", said)
    assert chromium.run("return document.getElementById('compare').hidden")


def test_old_browsers_are_named(chromium, coded):
    old = {"source": "delete globalThis.DecompressionStream"}
    script = chromium.devtools("Page.addScriptToEvaluateOnNewDocument", **old)
    try:
        chromium.open(coded[0] / "one.html")
        wait_for(chromium, "return document.getElementById('missing').textContent !== ''")
        assert "needs a newer browser" in chromium.text("missing")
    finally:
        chromium.devtools("Page.removeScriptToEvaluateOnNewDocument", **script)
        chromium.complaints()
