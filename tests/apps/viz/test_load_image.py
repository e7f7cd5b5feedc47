"""``viz.load_image`` and ``viz.explore``, the public names: what a user types first."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

import dinov2_attn
from dinov2_attn import viz
from dinov2_attn.apps.viz.pixels import as_pixels
from dinov2_attn.errors import InvalidInputError
from tests.support.extraction import build, draw
from tests.support.figure_probes import maps_on
from tests.support.subprocesses import python
from tests.support.tolerances import assert_close


@pytest.fixture
def path(tmp_path):
    return draw(tmp_path / "image.png", (29, 43), 0)


class Around(nn.Module):
    """A model that contains the transformer."""

    def __init__(self, backbone):
        super().__init__()
        self.backbone = backbone


@pytest.mark.parametrize("wrap", [lambda model: model, Around], ids=["itself", "inside"])
def test_a_model_gives_its_patch_size_and_channels(first, path, wrap):
    model = build(first)
    image = viz.load_image(path, wrap(model))
    assert image.tensor.shape == (3, 28, 42)
    assert_close(image.tensor, viz.load_image(str(path), model.patch_size).tensor, within=0)


def test_a_model_of_one_channel_gets_grey(first, path):
    model = first.cls("DinoVisionTransformer")(
        img_size=28, patch_size=14, in_chans=1, embed_dim=12, num_heads=3, depth=1, block_chunks=0
    )
    assert viz.load_image(path, model).tensor.shape == (1, 28, 42)
    assert viz.load_image(path, model, channels=3).tensor.shape == (3, 28, 42)


def test_patches_need_not_be_square(path):
    assert viz.load_image(path, (4, 10)).tensor.shape == (3, 28, 40)
    assert viz.load_image(path, [10, 4]).tensor.shape == (3, 20, 40)
    assert viz.load_image(path, np.int64(7)).tensor.shape == (3, 28, 42)


@pytest.mark.parametrize(
    "size", [0, -14, True, 14.0, "14", None, (14,), (14, 0), (1, 2, 3), ("a", "b"), torch.ones(2)]
)
def test_what_is_no_patch_size_is_refused(path, size):
    with pytest.raises(InvalidInputError, match="a model, or a patch size"):
        viz.load_image(path, size)


def test_a_module_without_a_transformer_is_refused(path):
    with pytest.raises(InvalidInputError, match="one convolution inside"):
        viz.load_image(path, nn.Linear(2, 2))


def test_plots_take_what_load_image_returns(path):
    image = viz.load_image(path, 14)
    assert repr(image) == "LoadedImage(channels=3, height=28, width=42)"
    assert_close(as_pixels(image), image.picture, within=0)
    for plotted in (viz.plot(maps_on((2, 3)), image=image), viz.plot(maps_on((2, 3)))):
        assert len(plotted.images) in (1, 2)


def test_a_page_needs_no_path(first, path, tmp_path):
    model = build(first).eval()
    with dinov2_attn.install(first.package):
        image = viz.load_image(path, model)
        page = viz.explore(model, image)
        assert sorted(tmp_path.iterdir()) == [path]
        viz.explore(model, image, tmp_path / "written.html")
    page.save(tmp_path / "new" / "saved.html")
    assert (tmp_path / "new" / "saved.html").read_bytes() == page.content
    assert (tmp_path / "written.html").read_bytes() == page.content
    assert page.size == len(page.content)
    assert len(repr(page)) < 500


MISSING = """
import sys
sys.modules[sys.argv[1]] = None
from dinov2_attn import viz
assert "load_image" in dir(viz)
try:
    viz.load_image
except Exception as error:
    print(error)
"""


@pytest.mark.parametrize("library", ["torchvision", "matplotlib", "PIL"])
def test_a_library_that_is_missing_is_named(library, tmp_path):
    result = python("-c", MISSING, library, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert f"no {library} in this environment" in result.stdout
    assert "pip install 'dinov2-attn[viz]'" in result.stdout
