"""The relevance for a target on the page: one more map to choose, with its own unit and words."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
import torch

from dinov2_attn import viz
from dinov2_attn.apps.explorer.explore import explore
from dinov2_attn.errors import InvalidInputError
from dinov2_attn.maps.relevance import Relevance
from tests.support.exploring import (
    GRID,
    NEEDS_CHROMIUM,
    PICTURE,
    PREFIX,
    N,
    assert_reads,
    click,
    option,
    over,
    weights,
)
from tests.support.strategies import noise
from tests.support.tolerances import assert_close

pytest_plugins = ["tests.support.open_pages"]  # fixtures: exact, shown, pages, chromium, page

VALUES = noise(2, 1, N, seed=3).abs()
HOSTILE = "</script><b>class"


def found_for(**options):
    options = {"queries": (0,), "target": (HOSTILE, "class 7"), **options}
    return Relevance(VALUES, GRID, PREFIX, **options)


def data_of(content):
    return json.loads(re.search(r'id="about">(.*?)</script>', content.decode())[1])


def test_maps_take_what_relevance_returned(exact):
    shown = data_of(explore(exact, PICTURE, target=found_for()).content)["relevance"]
    assert_close(torch.tensor(shown["values"]), VALUES[0, 0], within=1e-5)
    assert shown["target"] == HOSTILE
    with pytest.raises(InvalidInputError, match="together with a model"):
        explore(exact, PICTURE, target=3)
    other = Relevance(VALUES[..., :-1], (2, 7), PREFIX, (0,))
    with pytest.raises(InvalidInputError, match="for the same image"):
        explore(exact, PICTURE, target=other)


def test_a_page_without_a_target_says_nothing_of_it(exact):
    content = viz.explore(exact, PICTURE).content
    assert data_of(content)["relevance"] is None
    assert b'value="relevance"' not in content
    assert b"<kbd>T</kbd>" not in content


@pytest.fixture
def relevant(chromium, exact, tmp_path):
    """A page with a relevance, just opened; nothing complains while a test uses it."""
    explore(exact, PICTURE, tmp_path / "page.html", target=found_for())
    chromium.open(tmp_path / "page.html")
    yield chromium
    assert chromium.complaints() == []


@NEEDS_CHROMIUM
def test_it_is_chosen_like_a_direction(relevant, exact):
    click(relevant, option("column", "relevance"))
    assert relevant.text("direction") == "Relevance"
    assert relevant.text("caption") == f"for {HOSTILE}, by chefer (row of CLS; all layers)"
    values = VALUES[0, 0].double()
    patches = values[PREFIX:].reshape(GRID)
    for patch in ((0, 0), (2, 4), (1, 2)):
        relevant.hover(over(relevant, patch))
        assert relevant.value("times") == pytest.approx(patches[patch].item(), rel=1e-5)
        assert relevant.text("cursor").removesuffix(", outlier") == f"patch {patch}"
    top = np.unravel_index(int(patches.argmax()), GRID)
    assert f"highest at patch ({top[0]}, {top[1]})" in relevant.text("sentence")
    assert relevant.text("unit") == "relevance"
    assert relevant.value("high") == pytest.approx(patches.max().item(), rel=1e-5)
    assert relevant.run("return document.getElementById('pin').disabled")
    click(relevant, option("column", "no"))
    relevant.hover(over(relevant, (1, 2)))
    assert_reads(relevant, 0, PREFIX + 7, weights(exact))
    assert relevant.text("unit") == "× uniform"
    assert not relevant.run("return document.getElementById('pin').disabled")


@NEEDS_CHROMIUM
def test_the_key_the_address_and_a_head(relevant):
    relevant.press("t")
    assert relevant.text("direction") == "Relevance"
    relevant.run("return new Promise((then) => setTimeout(then, 300))")
    assert "direction=relevance" in relevant.run("return location.hash")
    relevant.press("t")
    assert relevant.text("direction") == "Where it looks"
    relevant.press("t", "r")
    assert relevant.text("direction") == "Who looks at it"
    relevant.press("t")
    relevant.run("document.querySelectorAll('#heads button')[1].click()")
    assert relevant.text("direction") == "Where it looks"
    assert relevant.text("head-value") == "0"
    relevant.run("location.hash = '#direction=relevance'")
    relevant.run("return new Promise((then) => setTimeout(then, 300))")
    assert relevant.text("direction") == "Relevance"


@NEEDS_CHROMIUM
def test_a_page_without_one_ignores_key_and_address(page):
    page.press("t")
    page.run("location.hash = '#direction=relevance'")
    page.run("return new Promise((then) => setTimeout(then, 300))")
    assert page.text("direction") == "Where it looks"
