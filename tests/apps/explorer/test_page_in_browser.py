"""The page in a real Chromium: every number under the cursor, with every control."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
import torch

from dinov2_attn import AttentionMaps, viz
from dinov2_attn.apps.explorer.write import write_page
from dinov2_attn.apps.viz.limits import scale
from tests.support.exploring import (
    CORNERS,
    GRID,
    HEADS,
    NEEDS_CHROMIUM,
    OUTLIER,
    PICTURE,
    PREFIX,
    assert_colours,
    assert_reads,
    choose,
    click,
    limits_of,
    option,
    over,
    photo,
    position,
    wait_for,
    weights,
)
from tests.support.figure_probes import artifacts_at, maps_on
from tests.support.pages import Page

pytest_plugins = ["tests.support.open_pages"]  # fixtures: exact, shown, pages, chromium, page
pytestmark = NEEDS_CHROMIUM

# The numbers under the cursor


def test_the_corners_of_an_image_that_is_not_square(page, exact):
    for query, key in product(CORNERS, CORNERS):
        choose(page, query)
        page.hover(over(page, key))
        assert_reads(page, position(query), position(key), weights(exact))


def test_hovering_previews_and_a_click_keeps(page, exact, shown):
    """On the way to the map the token stays the one that was chosen."""
    page.hover(photo(page, (1, 2)))
    assert page.text("token") == "patch (1, 2)"
    assert_colours(page, weights(shown)[position((1, 2))])
    assert page.run("return document.getElementById('hint').getBoundingClientRect().width") > 20
    page.hover(over(page, (1, 2)))
    assert page.text("token") == "CLS"
    assert_reads(page, 0, position((1, 2)), weights(exact))
    page.click(photo(page, (2, 1)))
    assert page.text("token") == "patch (2, 1)"
    page.hover(photo(page, (2, 4)))
    assert page.text("token") == "patch (2, 4)"
    page.hover(over(page, (0, 0)))
    assert page.text("token") == "patch (2, 1)"
    assert page.run("return document.getElementById('hint').hidden")
    assert_reads(page, position((2, 1)), position((0, 0)), weights(exact))


@pytest.mark.parametrize("token", range(PREFIX))
def test_cls_and_registers_are_chosen_and_read(page, exact, shown, token):
    click(page, f"#chips button:nth-child({token + 1})")
    page.hover(over(page, (2, 4)))
    assert_reads(page, token, position((2, 4)), weights(exact))
    assert_colours(page, weights(shown)[token])
    choose(page, (0, 4))
    for other in range(PREFIX):
        page.hover(page.middle(f"#cells button:nth-child({other + 1})"))
        assert_reads(page, position((0, 4)), other, weights(exact))


def test_the_whole_map_may_be_asked_from_the_cursor(page, exact):
    choose(page, (0, 1))
    page.click(over(page, (2, 3)), count=2)
    page.hover(over(page, (1, 1)))
    assert_reads(page, position((2, 3)), position((1, 1)), weights(exact))
    click(page, "#cells button:nth-child(2)")
    click(page, "#from-here")
    page.hover(over(page, (1, 1)))
    assert_reads(page, 1, position((1, 1)), weights(exact))


# Controls


def test_the_layer_slider(page, exact, shown):
    choose(page, (2, 0))
    page.run("document.getElementById('layer').focus()")
    for layer in (1, 0):
        page.press("ARROW_LEFT")
        assert page.text("layer-value") == str(layer)
        page.hover(over(page, (0, 4)))
        assert_reads(page, position((2, 0)), position((0, 4)), weights(exact, layer))
        assert_colours(page, weights(shown, layer)[position((2, 0))])
    assert page.text("token") == "patch (2, 0)"  # the arrows were the slider's


def test_the_head_slider_and_the_mean(page, exact, shown):
    choose(page, (1, 1))
    assert page.run("return document.getElementById('head').disabled")
    click(page, "label:has(#mean)")
    page.run("document.getElementById('head').focus()")
    for head in range(HEADS):
        if head:
            page.press("ARROW_RIGHT")
        page.hover(over(page, (0, 3)))
        assert page.text("head-value") == str(head)
        assert_reads(page, position((1, 1)), position((0, 3)), weights(exact, head=head))
        assert_colours(page, weights(shown, head=head)[position((1, 1))])
    click(page, "label:has(#mean)")
    page.hover(over(page, (0, 3)))
    assert page.text("head-value") == "mean is on"
    assert_reads(page, position((1, 1)), position((0, 3)), weights(exact))


def test_row_and_column(page, exact, shown):
    choose(page, (0, 2))
    click(page, option("column", on=True))
    page.hover(over(page, (2, 3)))
    assert page.text("token-role") == "Key"
    assert_reads(page, position((2, 3)), position((0, 2)), weights(exact))
    assert_colours(page, weights(shown)[:, position((0, 2))])
    page.hover(page.middle("#cells button:nth-child(3)"))
    assert_reads(page, 2, position((0, 2)), weights(exact))
    total = weights(exact)[:, position((0, 2))].sum()
    assert f"receives {total:.3g} in total" in page.text("sentence")
    click(page, option("column", on=False))
    page.hover(over(page, (2, 3)))
    assert page.text("token-role") == "Query"
    assert_reads(page, position((0, 2)), position((2, 3)), weights(exact))
    held = 100 * weights(shown)[position((0, 2)), :PREFIX].sum()
    assert f"CLS and registers hold {held:.1f} %" in page.text("sentence")


def test_linear_and_log(page, exact, shown):
    choose(page, (2, 2))
    line = weights(shown)[position((2, 2))]
    click(page, option("log", on=True))
    assert_colours(page, line, log=True)
    page.hover(over(page, (0, 0)))
    assert_reads(page, position((2, 2)), position((0, 0)), weights(exact))
    click(page, option("log", on=False))
    assert_colours(page, line)


def test_limits_are_those_of_pictures_by_name(page, shown):
    choose(page, (2, 2))
    line = weights(shown)[position((2, 2))]
    heads = np.stack([weights(shown, head=head)[position((2, 2))] for head in range(HEADS)])
    assert_colours(page, line)
    click(page, option("limits", on="each"))
    assert_colours(page, line, limits=limits_of(line, "each"))
    click(page, option("limits", on="shared"))
    assert_colours(page, line, limits=limits_of(heads, "shared"))
    click(page, "label:has(#mean)")
    assert_colours(page, heads[0], limits=limits_of(heads, "shared"))
    click(page, option("limits", on="robust"))
    assert_colours(page, heads[0])


# What stands out in a map: how many patches, how high, and whether the first is an artifact.
SPOTS = {
    "nothing": (0, 1, False),
    "three patches, far above": (3, 20, False),
    "three patches that hold most": (3, 2000, False),
    "three patches, not twice as high": (3, 1.9, False),
    "one more than may": (4, 20, False),
    "an artifact": (1, 20, True),
    "an artifact and three others": (4, 20, True),
}


@pytest.fixture(scope="module")
def spotted(tmp_path_factory):
    """A page with one layer for each of ``SPOTS``, and its stored weights by layer."""
    grid, random = (18, 16), np.random.default_rng(0)
    matrices = []
    for count, size, _ in SPOTS.values():
        row = random.uniform(0.5, 1, (1, 2, 1, 1 + 18 * 16))
        row[..., 1 : 1 + count] = size * random.uniform(1, 1.01, count)
        matrices.append(torch.from_numpy(row / row.sum(-1, keepdims=True)))
    path = tmp_path_factory.mktemp("spotted")
    maps = AttentionMaps(tuple(matrices), tuple(range(len(matrices))), grid, 1, (0,))
    picture = np.zeros((18, 16, 3), np.uint8)
    write_page(path / "plain.html", picture, maps)
    write_page(path / "marked.html", picture, maps, outliers=artifacts_at(grid, (0, 0)))
    return path


@pytest.mark.parametrize("limits", ["robust", "shared", "each"])
@pytest.mark.parametrize("log", [False, True])
@pytest.mark.parametrize("name", ["plain", "marked"])
def test_limits_are_the_numbers_of_pictures(chromium, spotted, name, limits, log):
    mask = np.zeros((18, 16), bool)
    mask[0, 0] = name == "marked"
    stored = Page(spotted / f"{name}.html")
    chromium.open(spotted / f"{name}.html")
    for layer in range(len(SPOTS)):
        heads = np.stack([stored.layer(layer)["each"][head, 0] for head in (0, 1)])
        maps = heads[:, 1:].reshape(2, 18, 16) * 289
        style = viz.Style(limits=limits, log=log)
        norm = scale(maps if limits == "shared" else maps[:1], style, mask)
        chromium.run(
            "location.hash = arguments[0]",
            f"layer={layer}&head=0&limits={limits}&scale={'log' if log else 'linear'}",
        )
        wait_for(
            chromium, f"return document.getElementById('layer-value').textContent === '{layer}'"
        )
        assert chromium.value("low") * 289 == pytest.approx(norm.vmin, rel=1e-9)
        assert chromium.value("high") * 289 == pytest.approx(norm.vmax, rel=1e-9)
        assert chromium.run("return document.getElementById('above').hidden") == (
            maps[0].max() <= norm.vmax * (1 + 1e-9)
        )


def test_words_and_signs_of_a_page_without_registers(chromium, tmp_path):
    write_page(tmp_path / "page.html", PICTURE, maps_on(GRID, queries=range(16)))
    chromium.open(tmp_path / "page.html")
    assert "; CLS holds " in chromium.text("sentence")
    chromium.press("r")
    assert "; CLS gives " in chromium.text("sentence")
    chromium.press("p", "[")
    said = chromium.text("difference-sentence")
    assert "Most below: " in said
    assert "(−" in said
    assert "-" not in said + chromium.text("difference-low")
    assert {"±", "▸"} <= set(chromium.text("keys"))


def test_outliers_are_marked_or_not(page):
    marks = "return [...document.querySelectorAll('.outlier')].map((mark) => [mark.x.baseVal.value,"
    marks += " mark.y.baseVal.value, mark.getBoundingClientRect().width > 0])"
    row, column = OUTLIER
    assert page.run(marks) == [[column, row, True]] * 2
    page.hover(over(page, OUTLIER))
    assert page.text("cursor") == "patch (1, 3), outlier"
    assert "norm above 151.2 after layer 2" in page.text("outliers-found")
    click(page, "label:has(#outliers)")
    assert page.run(marks) == [[column, row, False]] * 2


def test_the_map_fades(page):
    opacity = "return getComputedStyle(document.querySelector('#map canvas')).opacity"
    assert page.run(opacity) == "0.75"
    page.run("document.getElementById('opacity').focus()")
    page.press("HOME")
    assert page.run(opacity) == "0"
    assert page.text("opacity-value") == "0 %"


def test_a_notebook_shows_the_page_in_a_frame(chromium, tmp_path):
    """As the value of a cell: HTML that holds the whole page and runs it."""
    page = write_page(tmp_path / "page.html", PICTURE, maps_on(GRID, queries=range(16)))
    assert 'sandbox="allow-scripts allow-downloads allow-modals"' in page._repr_html_()
    cell = tmp_path / "cell.html"
    cell.write_text(f"<!doctype html><meta charset=utf-8>{page._repr_html_()}", "utf-8")
    chromium.open(cell)
    chromium.driver.switch_to.frame(0)
    assert chromium.text("token") == "CLS"
    assert "layer" in chromium.text("caption")
    chromium.driver.switch_to.default_content()
