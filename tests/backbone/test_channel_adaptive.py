"""Channel-adaptive models: every channel is an image of its own, and has the maps it has alone.

The copies on PyPI are older than upstream's own such models, which the conformance suite
proves. Here any copy runs them, by a method that moves the channels as upstream's does.
"""

from __future__ import annotations

from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import dinov2_attn
from dinov2_attn import artifact_tokens, attention_maps, record, rollout
from dinov2_attn.errors import InvalidInputError
from tests.support.recordings import assert_all_close
from tests.support.strategies import noise, randomise
from tests.support.tolerances import assert_close

GRID, PATCH = (2, 3), 2


def build(upstream, *, in_chans=1, adaptive=True):
    base = upstream.cls("DinoVisionTransformer")

    class Adaptive(base):
        bag_of_channels = adaptive

        def of_channels(self, images):
            return self.forward_features(images.flatten(0, 1)[:, None])

    model = Adaptive(
        img_size=4 * PATCH, patch_size=PATCH, in_chans=in_chans, embed_dim=8, depth=2, num_heads=2,
        block_chunks=0, block_fn=partial(
            upstream.cls("NestedTensorBlock"), attn_class=upstream.cls("MemEffAttention")
        ),
    )  # fmt: skip
    for parameter in model.parameters():
        parameter.requires_grad_()
    return randomise(model.double(), 3)


def draw(batch, channels, seed=0, grid=GRID):
    shape = (batch, channels, grid[0] * PATCH, grid[1] * PATCH)
    return noise(*shape, seed=seed, dtype=torch.float64)


def one_by_one(images):
    """Each channel of each image as a batch of one."""
    return [images[b, c][None, None] for b in range(len(images)) for c in range(images.shape[1])]


@given(
    batch=st.integers(1, 3),
    channels=st.integers(1, 5),
    grid=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    seed=st.integers(0, 2**16),
)
def test_each_channel_is_seen_alone(models, batch, channels, grid, seed):
    model, images = build(models), draw(batch, channels, seed, grid)
    maps = attention_maps(model, images)
    assert maps.grid == grid
    assert maps.patch_maps()[-1].shape == (batch * channels, 2, maps.weights[-1].shape[2], *grid)
    for i, alone in enumerate(one_by_one(images)):
        one = attention_maps(model, alone)
        assert_all_close([w[i, None] for w in maps.weights], one.weights)
        assert_all_close([m[i, None] for m in maps.patch_maps()], one.patch_maps())


@pytest.mark.parametrize("channels", [1, 2, 5])
def test_every_way_of_asking_is_what_the_model_itself_runs(models, channels):
    model, images = build(models), draw(2, channels)
    with record(model) as recorded:
        features = model.of_channels(images)
    expected = recorded.weights
    assert recorded.grid == GRID
    assert expected[0].shape[0] == 2 * channels
    assert_all_close(model.get_self_attention(images), expected)
    assert_close(model.get_last_self_attention(images), expected[-1])
    asked = model.forward_features(images, return_attention=True)
    assert_all_close(asked["attentions"], expected)
    assert_close(asked["x_norm_clstoken"], features["x_norm_clstoken"])
    output, attentions = model(images, return_attention=True)
    assert_close(output, features["x_norm_clstoken"])
    assert_all_close(attentions, expected)


def test_a_list_of_batches_with_channels_of_their_own(models):
    model = build(models)
    images = [draw(2, 3), draw(1, 5, seed=1, grid=(3, 1))]
    masks = [noise(2, 6, seed=2) > 0, None]
    answers = model.get_last_self_attention(images, masks)
    for answer, one, mask in zip(answers, images, masks, strict=True):
        assert_close(answer, model.get_last_self_attention(one, mask))
    both = model.forward_features(images, masks, return_attention=True)
    assert_all_close([one["attentions"][-1] for one in both], answers)


def test_the_channels_of_an_image_are_masked_alike(models):
    model, images = build(models), draw(2, 3)
    masks = noise(2, 6, seed=2) > 0
    together = model.get_last_self_attention(images, masks)
    for i, alone in enumerate(one_by_one(images)):
        one = model.get_last_self_attention(alone, masks[i // 3][None])
        assert_close(together[i, None], one)


def test_rollout_and_artifacts_are_those_of_each_channel(models):
    model, images = build(models), draw(2, 3)
    rolled, found = rollout(model, images), artifact_tokens(model, images)
    assert rolled.grid == GRID
    for i, alone in enumerate(one_by_one(images)):
        assert_close(rolled.weights[i, None], rollout(model, alone).weights)
        assert_close(found.norms[i, None], artifact_tokens(model, alone).norms)


def test_gradients_reach_every_channel(models):
    model, images = build(models), draw(2, 3).requires_grad_()
    model.get_last_self_attention(images).square().sum().backward()
    assert (images.grad.abs().amax((2, 3)) > 0).all()


def test_an_ordinary_model_of_one_channel_takes_one(models):
    model = build(models, adaptive=False)
    with pytest.raises(InvalidInputError, match=r"(?s)with 1 channel in .*images\.mean\(1, "):
        model.get_last_self_attention(draw(2, 3))
    assert model.get_last_self_attention(draw(2, 3).mean(1, keepdim=True)).shape[0] == 2


def test_a_model_of_three_channels_that_calls_itself_adaptive_sees_them_together(models):
    """Upstream builds one by default, and runs its forward."""
    model, images = build(models, in_chans=3), draw(2, 3)
    with record(model) as recorded:
        model(images)
    assert_all_close(model.get_self_attention(images), recorded.weights)


def test_photographs_are_not_extracted_by_channel(grafted, tmp_path):
    with pytest.raises(InvalidInputError, match=r"(?s)channel-adaptive.*attention_maps\(model"):
        dinov2_attn.extract(build(grafted), tmp_path, tmp_path / "out")
    assert not (tmp_path / "out").exists()
