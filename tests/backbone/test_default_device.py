"""A default device of the user's, such as ``meta``, is not that of the model at hand."""

from __future__ import annotations

import pytest
import torch

from dinov2_attn import record
from dinov2_attn.backbone.layout import Layout
from dinov2_attn.backbone.probe import Probed, probe
from tests.backbone.test_layout_probe import GRID, Patches, Stem, images_of
from tests.support import recordings, upstreams
from tests.support.layouts import Seen, attention_in, build, windowed
from tests.support.strategies import noise, randomise
from tests.support.tolerances import assert_close


def stem():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Seen(Stem())


KINDS = {
    "DINOv2": (lambda: build(upstreams.FIRST), images_of(), Probed(Layout(1, 0, GRID))),
    "windows": (
        lambda: build(upstreams.FIRST, windowed(upstreams.FIRST, (2, 1), GRID)),
        images_of((2 * GRID[0], GRID[1])),
        Probed(Layout(1, 0, GRID), sequences=2, windows=(2, 1)),
    ),
    "patches": (
        lambda: randomise(Seen(Patches(lambda tokens: tokens)), 0),
        images_of((5, 6)),
        Probed(Layout(0, 0, (5, 6))),
    ),
    "overlapping stem": (stem, images_of((5, 6), patch=8), Probed(Layout(0, 0, (5, 6)))),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_is_probed_where_it_is(kind):
    make, images, expected = KINDS[kind]
    model = make()
    attention = attention_in(model) if hasattr(model, "blocks") else model.attn
    with torch.device("meta"):
        found = probe(model, attention, images)
    assert found == expected


@torch.no_grad()
def test_weights_are_made_where_tokens_are(models):
    model, images = recordings.build(models), recordings.IMAGES
    expected = model.get_self_attention(images)
    for queries, rows in ((None, slice(None)), ("cls", [0]), ([0, -1], [0, -1])):
        with torch.device("meta"):
            found = model.get_self_attention(images, queries=queries)
        assert_close(list(found), [weights[:, :, rows] for weights in expected])
    with torch.device("meta"), record(model, queries="patches") as maps:
        model(images)
        grid = maps.grid
    assert grid == GRID
    assert_close(list(maps.weights), [weights[:, :, 1:] for weights in expected])


@torch.no_grad()
def test_causal_weights_are_made_where_tokens_are(layers):
    block = layers.module(layers.block)
    if not hasattr(block, "CausalAttentionBlock"):
        pytest.skip("older than causal blocks")
    module, tokens = block.CausalAttentionBlock(24, num_heads=2), noise(2, 9, 24, seed=0)
    expected = module(tokens, return_attention=True)
    with torch.device("meta"):
        whole = module(tokens, return_attention=True)
        found = module(tokens, return_attention=True, queries=[3, 1])
    assert_close(whole, expected)
    assert_close(found, expected[:, :, [3, 1]])
