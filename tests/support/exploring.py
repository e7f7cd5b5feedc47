"""What is asked of a page that is open in a real Chromium."""

from __future__ import annotations

import time

import matplotlib
import numpy as np
import pytest

from dinov2_attn.apps.viz.limits import scale
from dinov2_attn.apps.viz.style import Style
from dinov2_attn.math.selection import name_token
from tests.support import browser

NEEDS_CHROMIUM = pytest.mark.skipif(
    bool(browser.lacking()),
    reason=f"missing here: {browser.lacking()}; test_page.py decodes the page in Python and "
    "checks every number",
)

GRID, PREFIX, HEADS, LAYERS = (3, 5), 3, 3, (0, 1, 3)
N = PREFIX + 15
CORNERS = [(0, 0), (0, 4), (2, 0), (2, 4)]
PICTURE = np.random.default_rng(0).integers(0, 255, (42, 70, 3), np.uint8)
OUTLIER = (1, 3)
HOSTILE = "</title></script><script>hacked = 1</script>'\"&<img src=x onerror=hacked=1> 猫.jpg"
VIRIDIS = matplotlib.colormaps["viridis"](np.arange(256), bytes=True)


def position(patch):
    return PREFIX + patch[0] * GRID[1] + patch[1]


def weights(exact, layer=3, head=None):
    matrix = exact.weights[LAYERS.index(layer)][0]
    return (matrix.mean(0) if head is None else matrix[head]).numpy()


def photo(page, patch):
    return page.middle("#photo", *patch, GRID)


def over(page, patch):
    return page.middle("#map", *patch, GRID)


def choose(page, patch):
    page.click(photo(page, patch))


def click(page, selector):
    page.click(page.middle(selector))


def option(name, on):
    value = on if isinstance(on, str) else "yes" if on else "no"
    return f'label:has([name={name}][value="{value}"])'


def assert_reads(page, query, key, expected):
    """The readout names both tokens; the number is the tensor's, within what the page states."""
    column = page.text("direction") == "Who looks at it"
    tokens = (key, query) if column else (query, key)
    named = [name_token(token, PREFIX, GRID) for token in tokens]
    shown = [page.text("token"), page.text("cursor")]
    assert [text.removesuffix(", outlier") for text in shown] == named
    off = abs(page.value("weight") - expected[query, key])
    assert off <= page.value("doubt")
    assert off <= float(page.text("worst"))
    assert float(page.text("weight")) == pytest.approx(page.value("weight"), rel=6e-4)
    assert page.value("times") == pytest.approx(N * page.value("weight"), rel=1e-9)
    assert float(page.text("times").removesuffix(" ×")) == pytest.approx(
        page.value("times"), rel=6e-3
    )


def assert_colours(page, line, *, log=False, limits=None):
    """The canvas is viridis of the line that is shown, by default with robust limits."""
    pixels = np.array(page.run(PIXELS)).reshape(*GRID, 4)
    low, high = limits or limits_of(line, log=log)
    assert page.value("low") == pytest.approx(low, rel=1e-9, abs=1e-15)
    assert page.value("high") == pytest.approx(high, rel=1e-9)
    share = (line[PREFIX:] - low) / (high - low)
    if log:
        share = np.log(line[PREFIX:] / low) / np.log(high / low)
    colours = VIRIDIS[np.clip(share * 256, 0, 255).astype(int).reshape(GRID)].astype(int)
    assert np.abs(pixels - colours).max() <= 6  # the next colour: a rounding at a border
    assert len(np.unique(colours.reshape(-1, 4), axis=0)) > 5


def limits_of(lines, limits="robust", *, log=False):
    """The limits that pictures give the maps of these lines, the outlier being marked."""
    mask = np.zeros(GRID, bool)
    mask[OUTLIER] = True
    maps = N * lines[..., PREFIX:].reshape(-1, *GRID)
    norm = scale(maps, Style(limits=limits, log=log), mask)
    return norm.vmin / N, norm.vmax / N


def wait_for(page, script, *arguments):
    end = time.monotonic() + 20
    while not page.run(script, *arguments):
        assert time.monotonic() < end, script
        time.sleep(0.05)


PIXELS = """
const c = document.querySelector("#map canvas");
return [...c.getContext("2d").getImageData(0, 0, c.width, c.height).data];
"""
