"""Pages of models that are no grafted DINOv2: DINOv3, timm, transformers, kernels of their own."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import dinov2_attn
from dinov2_attn import attention_maps, viz
from dinov2_attn.apps.explorer.explore import explore
from dinov2_attn.apps.viz.images import LoadedImage
from dinov2_attn.errors import InvalidInputError
from tests.support import dinov3, layouts, models_at_kernel, upstreams
from tests.support.pages import Page
from tests.support.strategies import noise, randomise


def image_of(height, width, patch):
    picture = np.random.default_rng(0).integers(0, 255, (height, width, 3), np.uint8)
    return LoadedImage(noise(3, height, width, seed=3), picture)


def written(model, image, path, layers=None, **options):
    """Return the page of a model, whose numbers are checked, and its maps."""
    explore(model, image, path, layers, **options)
    page = Page(path)
    with torch.inference_mode():
        maps = attention_maps(model, image.tensor[None], layers)
    assert page.about["grid"] == list(maps.grid)
    assert page.about["prefix"] == maps.prefix
    for one, weights in zip(page.about["layers"], maps.weights, strict=True):
        found = page.layer(one["layer"])["each"]
        assert len(found) == weights[0, :, :, 0].numel()
        for (head, query), row in found.items():
            assert np.abs(row - weights[0, head, query].double().numpy()).max() <= page.error
    return page, maps


def ways(page):
    """Return for each layer whether it is kept as queries and keys."""
    return [one["coded"] is not None for one in page.about["layers"]]


def test_dinov3_is_kept_as_queries_and_keys(tmp_path):
    model = dinov3.LIGHTLY.load().build()
    page, _ = written(model, image_of(160, 128, 16), tmp_path / "page.html")
    assert ways(page) == [True] * 3
    assert [one["layer"] for one in page.about["layers"]] == [0, 1, 2]
    assert page.about["prefix"] == dinov3.PREFIX


@pytest.mark.parametrize("installed", [True, False])
def test_a_dinov2_needs_no_install(tmp_path, installed):
    upstream = upstreams.DEPTH_ANYTHING
    model = layouts.build(upstream, registers=2, depth=3)
    image = image_of(36, 28, 2)
    if installed:
        with dinov2_attn.install(upstream.package):
            page, _ = written(model, image, tmp_path / "page.html")
    else:
        page, _ = written(model, image, tmp_path / "page.html")
    assert ways(page) == [True] * 3


@pytest.mark.parametrize(
    ("options", "coded"), [({}, True), ({"bias": True}, False), ({"causal": True}, False)]
)
def test_models_that_go_by_their_kernel(tmp_path, options, coded):
    """Where a bias or a mask decides too, weights are kept."""
    model = models_at_kernel.build(upstreams.DEPTH_ANYTHING, torch.float32, **options)
    page, _ = written(model, image_of(20, 28, 2), tmp_path / "page.html")
    assert ways(page) == [coded] * 3


def test_layers_of_both_kinds(tmp_path):
    upstream = upstreams.DEPTH_ANYTHING
    model = models_at_kernel.build(upstream, torch.float32)
    other = models_at_kernel.build(upstream, torch.float32, bias=True)
    model.blocks[1] = other.blocks[1]
    page, _ = written(model, image_of(20, 28, 2), tmp_path / "page.html")
    assert ways(page) == [True, False, True]


def vit(**options):
    timm = pytest.importorskip("timm")
    sizes = {"img_size": (160, 128), "patch_size": 16, "embed_dim": 24, "depth": 4, "num_heads": 3}
    return randomise(timm.models.VisionTransformer(**sizes | options).eval(), 1)


def test_a_model_of_timm(tmp_path):
    model, image = vit(reg_tokens=4), image_of(160, 128, 16)
    page, maps = written(model, image, tmp_path / "page.html")
    assert ways(page) == [True] * 4
    assert maps.prefix == 5
    page, maps = written(model, image, tmp_path / "page.html", [-1, 1])
    assert maps.layers == ("blocks.1.attn", "blocks.3.attn")
    assert [one["layer"] for one in page.about["layers"]] == [1, 3]


def test_explicit_code_is_kept_as_weights(tmp_path):
    model = vit()
    for block in model.blocks:
        block.attn.fused_attn = False
    page, _ = written(model, image_of(160, 128, 16), tmp_path / "page.html")
    assert ways(page) == [False] * 4


def test_a_model_without_cls(tmp_path):
    model = vit(class_token=False, global_pool="avg")
    page, maps = written(model, image_of(160, 128, 16), tmp_path / "page.html")
    assert maps.prefix == 0
    assert "80 tokens: 10 × 8 patches" in (tmp_path / "page.html").read_text("utf-8")
    assert page.about["outliers"] == []


def test_a_model_of_transformers(tmp_path):
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 3}
    config = transformers.Dinov2WithRegistersConfig(**sizes, image_size=112, patch_size=14)
    model = randomise(transformers.Dinov2WithRegistersModel(config).eval(), 1)
    page, maps = written(model, image_of(140, 112, 14), tmp_path / "page.html", heads=None)
    assert maps.prefix == 5
    assert ways(page) == [True] * 3
    mean = explore(model, image_of(140, 112, 14), heads="mean")
    assert mean.kept == "layers 0–2: all rows of the head mean"


def test_tokens_that_a_page_cannot_show_are_refused(tmp_path):
    behind = layouts.registers_behind(upstreams.DEPTH_ANYTHING, 2)
    several = layouts.several_per_cell(upstreams.DEPTH_ANYTHING, 2, planes=False, prefix=1)
    for base, found in ((behind, "2 tokens behind the patches"), (several, "2 tokens for each")):
        model = layouts.build(upstreams.DEPTH_ANYTHING, base)
        with pytest.raises(InvalidInputError, match=found):
            explore(model, image_of(12, 16, 2), tmp_path / "page.html")
    assert list(tmp_path.iterdir()) == []


# The forms of an image


@pytest.fixture
def model():
    return layouts.build(upstreams.DEPTH_ANYTHING, depth=2)


def picture_on(page):
    import base64
    import io

    from PIL import Image

    (url,) = [one["src"] for one in page.all("img", draggable="false") if one.get("src")]
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))))


def test_an_image_may_be_a_file_a_picture_or_the_input(model, tmp_path):
    from PIL import Image

    soft = np.stack(np.meshgrid(np.linspace(0, 255, 25), np.linspace(0, 255, 17)), -1)
    whole = np.concatenate([soft, 255 - soft[..., :1]], -1).astype(np.uint8)
    Image.fromarray(whole).save(tmp_path / "image.png")
    loaded = viz.load_image(tmp_path / "image.png", model)
    forms = [
        loaded,
        tmp_path / "image.png",
        Image.open(tmp_path / "image.png"),
        whole,
        loaded.tensor,
        loaded.tensor[None],
    ]
    contents = set()
    for form in forms:
        page = explore(model, form)
        page.save(tmp_path / "page.html")
        contents.add(Page(tmp_path / "page.html").one("script", id="about")["text"])
        shown = picture_on(Page(tmp_path / "page.html")).astype(int)
        assert shown.shape == (16, 24, 3)
        assert np.abs(shown - whole[:16, :24]).max() < 40  # JPEG
    assert len(contents) == 1
