"""Queries and keys in place of weights: every weight within the stated error, and the size."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch

import dinov2_attn
from dinov2_attn import attention_maps
from dinov2_attn.apps.explorer.coded import encode, layer_factors
from dinov2_attn.apps.explorer.explore import explore
from dinov2_attn.apps.explorer.factors import QueriesKeys
from dinov2_attn.apps.explorer.quantise import LEVELS, quantise
from dinov2_attn.apps.viz.images import LoadedImage
from dinov2_attn.errors import InvalidInputError
from tests.support import upstreams
from tests.support.pages import Page, decoded
from tests.support.strategies import noise, randomise
from tests.support.tolerances import assert_close

BYTES = "application/octet-stream"
HEADS, TOKENS, DIMENSIONS = 3, 61, 8


def layer_of(spread, seed=0, tokens=TOKENS):
    """Queries and keys whose components fall off, with something that all keys share."""
    falling = 0.8 ** torch.arange(DIMENSIONS)
    query, key = (
        noise(HEADS, tokens, DIMENSIONS, seed=seed + i, dtype=torch.float32) * falling
        for i in range(2)
    )
    return QueriesKeys(0, query * spread, key + 5, 0.5)


def exact(layer):
    rows = slice(None)
    return torch.stack([layer.weights(head, rows) for head in range(layer.heads)])


def encoded(layer, coarseness=1.0):
    return encode(layer, layer_factors(layer), coarseness)


# Numbers


@pytest.mark.parametrize("spread", [0.0, 0.01, 1.0, 4.0, 40.0])
@pytest.mark.parametrize("coarseness", [1.0, 4.0])
def test_every_weight_is_within_the_stated_errors(spread, coarseness):
    layer = layer_of(spread)
    coded = encoded(layer, coarseness)
    about = coded.description()
    shown = decoded(coded.content(), about, TOKENS)
    for head, weights in enumerate(exact(layer).double().numpy()):
        off = np.abs(shown[head] - weights)
        assert off.max() <= about["error"][head]
        assert (off <= about["relative"][head] * shown[head] + 1e-9).all()
        assert about["error"][head] <= coarseness * 0.0016 * weights.max()
    assert coded.error == max(about["error"])


@pytest.mark.parametrize("spread", [0.5, 2.0, 4.0])
def test_errors_are_no_worse_than_those_of_8_bits(spread):
    layer = layer_of(spread)
    weights = exact(layer)
    assert encoded(layer, 1.0).error <= quantise(weights, tuple(range(TOKENS))).error
    widest = (weights.amax(-1) - weights.amin(-1)).max()
    half_a_step = float(widest) * (LEVELS[255] - LEVELS[254]) / 2
    assert encoded(layer, 4.0).error <= 1.1 * half_a_step


def test_the_largest_errors_are_corrected():
    layer = layer_of(4.0)
    coded = encoded(layer, 4.0)
    assert 0 < sum(len(one.places) for one in coded.corrections) < HEADS * TOKENS**2 / 4


def test_coarser_numbers_take_fewer_bytes():
    layer = layer_of(1.0, tokens=400)
    fine, coarse = (len(encoded(layer, coarseness).content()) for coarseness in (1, 4))
    bits_saved = 8 * (fine - coarse) / (2 * HEADS * 400 * DIMENSIONS)
    assert 1.5 < bits_saved < 3


def test_factors_have_the_products_of_queries_and_keys():
    """Up to what all keys share, which the softmax cancels."""
    layer = layer_of(1.0)
    for head, found in enumerate(layer_factors(layer)):
        query, key = layer.query[head].double(), layer.key[head].double()
        products = query @ (key - key.mean(0)).T * layer.scale
        assert_close(found.left / found.size @ found.right.T, products, within=1e-10)
        assert_close(torch.tensor(found.spread), products.pow(2).mean().sqrt(), within=1e-6)


# Pages


def model_of(grid, **options):
    sizes = {"img_size": 8, "patch_size": 2, "embed_dim": 12, "num_heads": 3, "depth": 4}
    upstream = upstreams.DEPTH_ANYTHING
    built = upstream.cls("DinoVisionTransformer")(**sizes | options, block_chunks=0)
    height, width = (2 * side for side in grid)
    picture = np.random.default_rng(0).integers(0, 255, (height, width, 3), np.uint8)
    image = LoadedImage(noise(3, height, width, seed=3), picture)
    return randomise(built, 1), image


@pytest.fixture(scope="module", autouse=True)
def installed():
    with dinov2_attn.install(upstreams.DEPTH_ANYTHING.package):
        yield


def assert_every_number(page, maps):
    for layer, weights in zip(maps.layers, maps.weights, strict=True):
        found = page.layer(layer)
        for (head, query), row in found.get("each", {}).items():
            assert np.abs(row - weights[0, head, query].double().numpy()).max() <= page.error
        for (_, query), row in found.get("mean", {}).items():
            assert np.abs(row - weights[0, :, query].double().mean(0).numpy()).max() <= page.error


def test_what_is_smaller_is_stored(tmp_path):
    """With few tokens for each dimension, weights are smaller."""
    for grid, coded in (((2, 2), False), ((12, 9), True)):
        model, image = model_of(grid)
        said = explore(model, image, tmp_path / "page.html")
        page = Page(tmp_path / "page.html")
        assert {bool(one["coded"]) for one in page.about["layers"]} == {coded}
        assert said.kept == "layers 0–3: all rows of each head"
        assert ("computes every weight" in said.content.decode()) == coded


def test_layers_without_room_keep_the_rows_of_cls(tmp_path):
    model, image = model_of((18, 20))
    path = tmp_path / "page.html"
    whole = explore(model, image, path)
    tables = sum(len(one["text"]) for one in Page(path).all("script", type=BYTES))
    with torch.inference_mode():
        maps = attention_maps(model, image.tensor[None])
    assert_every_number(Page(path), maps)
    seen = set()
    for share in (0.95, 0.65, 0.5, 0.35):
        limit = (whole.size - tables + 3000 + share * tables) / 1e6
        said = explore(model, image, path, max_mb=limit)
        page = Page(path)
        assert page.size <= limit * 1e6
        assert_every_number(page, maps)
        kept = [one["layer"] for one in page.about["layers"] if one["coded"]]
        assert kept == list(range(4 - len(kept), 4))  # the last ones
        assert bool(said.left_out) == (len(kept) < 4)
        seen.add(len(kept))
        if said.left_out:
            enough = float(re.search(r"--max-mb (\d+) keeps everything", said.left_out)[1])
            assert explore(model, image, path, max_mb=enough).left_out == ""
    assert len(seen) > 2


def test_one_layer_of_vit_base_at_518_pixels_takes_its_share_of_25_mb(tmp_path):
    sizes = {"img_size": 518, "patch_size": 14, "embed_dim": 768, "num_heads": 12, "depth": 1}
    model, image = model_of((37, 37), **sizes)
    smooth = torch.nn.functional.interpolate(image.tensor[None], size=(518, 518), mode="bicubic")[0]
    picture = image.picture.repeat(7, 0).repeat(7, 1)
    said = explore(model, LoadedImage(smooth, picture), tmp_path / "page.html")
    page = Page(tmp_path / "page.html")
    assert said.left_out == ""
    table = len(page.one("script", id="coded-0")["text"])
    assert 12 * table < 24_000_000


def test_hidden_keys_are_kept_as_weights(tmp_path):
    model, image = model_of((12, 9))
    model.blocks[1].is_causal = True
    explore(model, image, tmp_path / "page.html")
    assert not any(one["coded"] for one in Page(tmp_path / "page.html").about["layers"])


def test_queries_that_are_no_numbers_are_refused(tmp_path):
    model, image = model_of((12, 9))
    with torch.no_grad():
        model.blocks[2].attn.qkv.weight[0, 0] = torch.nan
    with pytest.raises(InvalidInputError, match="NaN or infinity"):
        explore(model, image, tmp_path / "page.html")
    assert list(tmp_path.iterdir()) == []
