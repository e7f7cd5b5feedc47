"""The gallery: its pictures are those that the code below them draws."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import dinov2_attn

pytest.importorskip("matplotlib")
ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "gallery.md").read_text("utf-8")
PICTURES = ROOT / "docs" / "img" / "gallery"
NAMES = re.findall(r"^!\[[^\]]+\]\(img/gallery/(\w+\.png)\)$", PAGE, re.M)
LARGEST = 150_000  # bytes
# Other processors round otherwise, and other versions of matplotlib set letters otherwise.
SHRUNK = 8
MEAN, WORST = 2.0, 40.0


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    from tests.support.upstreams import FIRST

    FIRST.load()
    folder = tmp_path_factory.mktemp("gallery")
    runpy.run_path(str(ROOT / "tools" / "gallery"))["draw"](folder)
    yield folder
    dinov2_attn.uninstall()


def small(path):
    """Return the picture in blocks of 8 × 8 pixels, in which letters are grey."""
    image = Image.open(path).convert("RGB")
    size = (image.width // SHRUNK, image.height // SHRUNK)
    return np.asarray(image.resize(size, Image.Resampling.BOX)).astype(float)


def differ(one, other):
    """Return why two pictures are not the same to the eye; ``None`` if they are."""
    if one.shape != other.shape:
        return f"{one.shape} and {other.shape}"
    apart = np.abs(one - other)
    if apart.mean() > MEAN or apart.max() > WORST:
        return f"apart by {apart.mean():.2f} in the mean and {apart.max():.0f} at most, of 255"
    return None


@pytest.mark.parametrize("name", NAMES)
def test_the_picture_is_what_the_code_below_it_draws(drawn, name):
    found = differ(small(PICTURES / name), small(drawn / name))
    assert found is None, f"{found}. If that is meant: tools/gallery"


def test_every_picture_is_on_the_page_and_small(drawn):
    assert {path.name for path in PICTURES.iterdir()} == set(NAMES)
    assert {path.name for path in drawn.iterdir()} == set(NAMES)
    assert all((PICTURES / name).stat().st_size <= LARGEST for name in NAMES)


def test_each_picture_stands_above_the_code_that_writes_it():
    for name in NAMES:
        below = PAGE.partition(f"(img/gallery/{name})")[2].split("\n## ")[0]
        assert f'"{name}"' in below, name


def test_another_map_is_seen():
    name = "heads.png"
    other = np.array(Image.open(PICTURES / name).convert("RGB"))
    other[150:, :300] = np.fliplr(other[150:, :300])
    shrunk = np.asarray(
        Image.fromarray(other).resize(small(PICTURES / name).shape[1::-1], Image.Resampling.BOX)
    ).astype(float)
    assert differ(small(PICTURES / name), shrunk) is not None
