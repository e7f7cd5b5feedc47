"""Queries, keys and values are those that the kernel was given, behind norms and rotation."""

from __future__ import annotations

import weakref
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn

from dinov2_attn import AttentionMaps, record
from dinov2_attn.errors import InvalidInputError
from tests.maps.test_gradients import DINOV3, Explicit, of_dinov3, of_fork, of_upstream
from tests.support import dinov3
from tests.support.explicit import Eager
from tests.support.recordings import IMAGES, assert_nothing_on, build
from tests.support.strategies import noise
from tests.support.tolerances import are_close, assert_close, assert_same_bits
from tests.support.xformers_visibility import quiet

ALL = ("query", "key", "value")


def truth_of(model, images):
    with Eager() as eager, torch.no_grad():
        model(images)
    return {"query": eager.queries, "key": eager.keys, "value": eager.values}


@pytest.mark.parametrize("models", [of_fork, of_dinov3])
@torch.no_grad()
def test_they_are_what_the_kernel_was_given(models):
    model, images = models()
    plain, expected = model(images), truth_of(model, images)
    with record(model, facets=ALL, queries="cls", heads="mean") as maps:
        features = model(images)
    assert_same_bits(features, plain)
    for name in ALL:
        assert_close(maps.facets[name], expected[name])
        assert_close(maps.facet(name), expected[name])
    assert list(maps.facets) == list(ALL)
    assert_nothing_on(model)


@torch.no_grad()
def test_they_make_the_weights():
    model, images = of_dinov3()
    with record(model, facets=("key", "query")) as maps:
        model(images)
    for weights, query, key in zip(
        maps.weights, maps.facet("query"), maps.facet("key"), strict=True
    ):
        assert_close((query @ key.mT / query.shape[-1] ** 0.5).softmax(-1), weights)


@torch.no_grad()
def test_heads_are_joined_in_the_order_of_channels():
    """Joined values are the last third of what the projection returns."""
    model, images = of_fork()
    seen = []
    hook = model.blocks[1].attn.qkv.register_forward_hook(lambda _, __, out: seen.append(out))
    with record(model, [1], facets="value") as maps:
        model(images)
    hook.remove()
    assert_close(maps.facet("value", joined=True)[0], seen[0].chunk(3, -1)[2])


@torch.no_grad()
def test_the_grid_is_that_of_the_patches():
    model, images = of_dinov3()
    with record(model, facets=("key",)) as maps:
        model(images)
    (height, width), prefix = maps.grid, maps.prefix
    by_heads = maps.facet("key")[0]
    batch, heads, _, channels = by_heads.shape
    joined, split = maps.facet_maps("key")[0], maps.facet_maps("key", joined=False)[0]
    assert joined.shape == (batch, heads * channels, height, width)
    assert split.shape == (batch, heads, channels, height, width)
    token = prefix + 1 * width + 2
    assert_same_bits(split[..., 1, 2], by_heads[:, :, token])
    assert_same_bits(joined[..., 1, 2], by_heads[:, :, token].flatten(1))


def projected(model, tokens):
    return model[0].qkv(tokens).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)


@pytest.mark.parametrize("way", ["plain", "batched", "einsum", "dropout"])
def test_explicit_code_has_what_its_products_were_given(way):
    model, tokens = nn.Sequential(Explicit(way)), noise(2, 5, 8, seed=0)
    with record(model, facets=ALL) as maps:
        model(tokens)
    for name, expected in zip(ALL, projected(model, tokens), strict=True):
        assert_same_bits(maps.facet(name)[0], expected)


class Scored(nn.Module):
    """Explicit code whose scores are made in several ways."""

    num_heads = 2

    def __init__(self, way):
        super().__init__()
        self.qkv, self.proj, self.way = nn.Linear(8, 24), nn.Linear(8, 8), way

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
        if self.way == "einsum":
            by_token = (tensor.transpose(1, 2) for tensor in (q, k))
            scores = torch.einsum("bqhd,bkhd->bhqk", *by_token)
        elif self.way == "reversed":
            scores = torch.einsum("bhkd, bhqd -> bhqk", k, q)
        elif self.way == "baddbmm":
            bias = x.new_zeros(4, 5, 5)
            scores = torch.baddbmm(bias, q.flatten(0, 1), k.flatten(0, 1).mT).unflatten(0, (2, 2))
        elif self.way == "norm":  # something that no product makes
            scores = -torch.cdist(q, k)
        else:
            scores = torch.matmul(q, k.transpose(-2, -1))
        scores = (scores * 0.5 + 1).float().masked_fill(scores > 99, -torch.inf)
        scores += 0.25
        return self.proj((scores.softmax(-1).to(x.dtype) @ v).transpose(1, 2).flatten(2))


@pytest.mark.parametrize("way", ["matmul", "einsum", "reversed", "baddbmm"])
def test_scores_are_followed_to_their_factors(way):
    model, tokens = nn.Sequential(Scored(way)), noise(2, 5, 8, seed=0)
    with record(model, facets=ALL) as maps:
        model(tokens)
    for name, expected in zip(ALL, projected(model, tokens), strict=True):
        assert_same_bits(maps.facet(name)[0], expected)


def test_scores_that_no_product_made_have_values_only():
    model, tokens = nn.Sequential(Scored("norm")), noise(2, 5, 8, seed=0)
    with record(model, facets="value") as maps:
        model(tokens)
    assert_same_bits(maps.facet("value")[0], projected(model, tokens)[2])
    with pytest.raises(InvalidInputError, match="fused"), record(model, facets=["key"]):
        model(tokens)
    assert_nothing_on(model)


def test_upstreams_own_code_gives_thirds_of_its_projection():
    model, images = of_upstream()
    seen = []
    hook = model.blocks[1].attn.qkv.register_forward_hook(lambda _, __, out: seen.append(out))
    with record(model, [1], facets=ALL) as maps:
        model(images)
    hook.remove()
    for name, part in zip(ALL, seen[0].chunk(3, -1), strict=True):
        found = maps.facet(name, joined=True)[0]
        # Older code scales its queries before the product.
        assert are_close(found, part) or (name == "query" and are_close(found, part * 4**-0.5))


def test_no_matrix_lives_longer_for_it():
    alive = []

    class Watching(Scored):
        def forward(self, x):
            q, k, v = self.qkv(x).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
            scores = q @ k.transpose(-2, -1)
            before = weakref.ref(scores)
            scores = scores * 0.5
            alive.append(before())
            return self.proj((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))

    model = nn.Sequential(Watching(""))
    with torch.no_grad(), record(model, facets=ALL):
        model(noise(2, 5, 8, seed=0))
    assert alive == [None]


@quiet
@torch.no_grad()
def test_a_nested_list_has_those_of_each_batch(nested):
    if nested.name == "moge":
        pytest.skip("its forward_features takes no lists; upstream's does")
    attention = nested.cls("MemEffAttention")
    model = build(nested, block_fn=partial(nested.cls("NestedTensorBlock"), attn_class=attention))
    batches = [IMAGES, IMAGES[:1, :, :2, :4] * 2]
    with record(model, facets=ALL) as maps:
        model.forward_features(batches, [None, None])
    for images, ours in zip(batches, maps, strict=True):
        with record(model, facets=ALL) as alone:
            model.forward_features(images)
        for name in ALL:
            assert_close(ours.facet(name), alone.facet(name))


@torch.no_grad()
def test_a_list_of_dinov3_has_those_of_each_batch():
    model, images = of_dinov3()
    crops = dinov3.CROPS.double()
    with record(model, facets="key") as maps:
        model.forward_features([images, crops], [None, None])
    for one, own in zip((images, crops), maps, strict=True):
        assert_close(own.facet("key"), truth_of(model, one)["key"])


@torch.no_grad()
def test_under_autocast_they_have_the_dtype_of_the_kernel():
    model, images = DINOV3.load().build(), dinov3.IMAGES
    with torch.autocast("cpu", torch.bfloat16), record(model, facets=ALL) as maps:
        model(images)
    assert {one.dtype for name in ALL for one in maps.facet(name)} == {torch.bfloat16}


def test_they_are_copies_in_the_graph_or_outside_of_it():
    model, images = of_fork()
    with record(model, facets=("key",)) as maps:
        model(images)
    assert all(one.requires_grad and one.is_contiguous() for one in maps.facet("key"))
    with record(model, facets=("key",), gradients=True) as maps:
        model(images)
    assert not any(one.requires_grad for one in maps.facet("key"))


@torch.no_grad()
def test_copies_and_files_hold_them(tmp_path):
    pytest.importorskip("safetensors")
    model, images = of_fork()
    with record(model, facets=("value", "key")) as maps:
        model(images)
    maps.save(tmp_path / "maps.safetensors")
    read = AttentionMaps.load(tmp_path / "maps.safetensors")
    for name in ("key", "value"):
        assert_same_bits(read.facet(name), maps.facet(name))
        array = maps.numpy().facet_maps(name)[0]
        assert isinstance(array, np.ndarray)
        assert_same_bits(array, maps.facet_maps(name)[0].numpy())
    assert "facets=value, key" in repr(maps)


@pytest.mark.parametrize("facets", ["keys", ("key", "key"), 3, ("key", 1), [["key"]]])
def test_other_names_are_an_error_before_the_pass(facets):
    model, _ = of_upstream()
    with (
        pytest.raises(InvalidInputError, match="'query', 'key', 'value'"),
        record(model, facets=facets),
    ):
        pass
    assert_nothing_on(model)


@torch.no_grad()
def test_reading_what_was_not_recorded_names_the_way():
    model, images = of_fork()
    with record(model, facets=("key",)) as maps:
        model(images)
    with pytest.raises(InvalidInputError, match="facets="):
        maps.facet("value")
    with pytest.raises(InvalidInputError, match="facets="):
        maps.facet_maps("keys")
