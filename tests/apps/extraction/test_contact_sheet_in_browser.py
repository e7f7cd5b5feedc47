"""The contact sheet in a browser: nothing runs, nothing is fetched, and all of it is in view."""

from __future__ import annotations

import pytest

from dinov2_attn import extract
from tests.apps.extraction.test_contact_sheet import HOSTILE, copied, plant
from tests.support import browser
from tests.support.extraction import build, draw, photographs

pytestmark = pytest.mark.skipif(bool(browser.lacking()), reason=f"needs {browser.lacking()}")


@pytest.fixture(scope="module")
def page(grafted, tmp_path_factory):
    folder = tmp_path_factory.mktemp("sheet")
    photographs(folder / "in", 9)
    draw(folder / "in" / HOSTILE, (8, 6), 99)
    draw(folder / "in" / ("x" * 200 + ".png"), (6, 60), 98)
    extract(build(grafted), folder / "in", folder / "out", artifacts=True)
    dataset = copied(
        folder / "out",
        folder,
        lambda _, entry: plant(entry, (entry["grid"][0] - 1, entry["grid"][1] - 1)),
    )
    dataset.sheet(images=folder / "in").save(folder / "sheet.html")
    return folder / "sheet.html"


@pytest.fixture(scope="module")
def chromium():
    with browser.chromium() as running:
        yield running


@pytest.mark.parametrize("size", [(1280, 720), (390, 844)], ids=str)
def test_it_fits_the_screen_and_complains_of_nothing(chromium, page, size):
    chromium.open(page, *size)
    assert chromium.complaints() == []
    width, scripts, figures, broken = chromium.run(
        "const images = [...document.images];"
        "return [document.documentElement.scrollWidth, document.scripts.length,"
        " document.querySelectorAll('figure').length,"
        " images.filter(one => !one.naturalWidth).length];"
    )
    assert (width, scripts, figures, broken) == (size[0], 0, 11, 0)


def test_a_frame_lies_on_its_patch(chromium, page):
    """The frames scale with the map, whatever the shape of its image."""
    chromium.open(page, 1280, 720)
    boxes = chromium.run(
        "return [...document.querySelectorAll('.map')].map(map => {"
        " const image = map.querySelector('img'), frame = map.querySelector('rect.above');"
        " if (!frame) return null;"
        " const box = one => { const b = one.getBoundingClientRect();"
        "  return [b.x, b.y, b.width, b.height]; };"
        " return {image: box(image), frame: box(frame), size: [image.naturalWidth,"
        "  image.naturalHeight], at: [+frame.getAttribute('x'), +frame.getAttribute('y')]};"
        "}).filter(Boolean);"
    )
    assert len(boxes) == 11
    for one in boxes:
        x, y, width, height = one["image"]
        cell = min(width / one["size"][0], height / one["size"][1])
        left = x + (width - cell * one["size"][0]) / 2 + cell * one["at"][0]
        top = y + (height - cell * one["size"][1]) / 2 + cell * one["at"][1]
        assert one["frame"][:2] == pytest.approx([left, top], abs=3)
        assert one["frame"][2:] == pytest.approx([cell, cell], abs=6)
