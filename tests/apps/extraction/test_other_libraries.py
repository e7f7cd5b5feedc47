"""Images, pictures and extraction for models of transformers and timm, without install."""

from __future__ import annotations

import pytest
import torch

from dinov2_attn import artifact_tokens, attention_maps, extract, rollout, viz
from dinov2_attn.apps.viz.images import load_image
from tests.maps.test_record_any_model import of_transformers, sharp
from tests.support.extraction import draw, stored
from tests.support.tolerances import assert_close

MODELS = ["Dinov2WithRegistersModel", "vit_small_patch14_reg4_dinov2", "vit_small_patch16_dinov3"]


def build(name):
    if name.endswith("Model"):
        return of_transformers(name, "sdpa")
    timm = pytest.importorskip("timm", reason="the models of transformers run")
    return sharp(timm.create_model(name, img_size=64, depth=2, dynamic_img_size=True))


@pytest.fixture
def photographs(tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    for i, size in enumerate(((70, 84), (84, 70), (70, 84))):
        draw(folder / f"{i}.png", size, seed=i)
    return folder


@pytest.mark.filterwarnings("ignore:more than 10%")
@pytest.mark.parametrize("name", MODELS)
def test_what_is_stored_is_what_attention_maps_returns(name, photographs, tmp_path):
    model = build(name)
    extract(model, photographs, tmp_path / "out", layers=2, queries=["cls", "0,1"], artifacts=True)
    found = list(stored(tmp_path / "out"))
    assert len(found) == 3
    for entry, own, prefix in found:
        image = load_image(photographs / entry["path"], model).tensor[None]
        with torch.no_grad():
            maps = attention_maps(model, image, 2)
            rows = [0, maps.prefix + 1]
            shown = torch.stack(maps.patch_maps(), 1)[0][:, :, rows]
            assert_close(own, shown)
            assert_close(prefix, torch.stack(maps.weights, 1)[0][:, :, rows, : maps.prefix])


@pytest.mark.filterwarnings("ignore:more than 10%")
@pytest.mark.parametrize("name", MODELS)
def test_pictures_of_other_libraries(name, photographs):
    model = build(name)
    image = viz.load_image(photographs / "0.png", model)
    maps = attention_maps(model, image.tensor[None], queries="cls")
    assert viz.plot(maps, image=image, layer=maps.layers[-1], head=0).images
    assert viz.plot_heads(maps, image=image)
    for result in (maps, rollout(model, image.tensor[None])):
        picture = result._repr_png_()
        assert picture is not None
        assert picture.startswith(b"\x89PNG")
    found = artifact_tokens(model, image.tensor[None])
    assert found.mask.shape[1:] == maps.grid
