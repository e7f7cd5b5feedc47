"""Maps and rollouts of models of other libraries: against recordings of their passes."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from dinov2_attn import attention_maps, record
from dinov2_attn.errors import InvalidInputError, OutOfRangeError
from tests.maps.test_record_any_model import (
    IMAGES,
    TRANSFORMERS,
    Aggregator,
    of_transformers,
    sharp,
)
from tests.support.strategies import noise
from tests.support.tolerances import assert_close, assert_same_bits

TIMM = ["vit_tiny_patch16_224", "vit_small_patch14_reg4_dinov2", "vit_small_patch16_dinov3"]
MODELS = [*TRANSFORMERS, *TIMM]


def build(name, attention="sdpa", dtype=torch.float32):
    """A small model and images for it."""
    if name in TRANSFORMERS:
        return of_transformers(name, attention).to(dtype), IMAGES.to(dtype)
    timm = pytest.importorskip("timm", reason="the models of transformers run")
    size = 56 if "14" in name else 64
    model = sharp(timm.create_model(name, img_size=size, depth=3)).to(dtype)
    return model, noise(2, 3, size, size, seed=0).to(dtype)


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_maps_are_those_of_a_recorded_pass(name):
    model, images = build(name)
    with record(model) as recorded:
        model(images)
    expected = recorded.passes[0]
    for layers in (None, 1, [0, 2], expected.layers[1:2]):
        for _ in range(2):  # the second pass may end early
            found = attention_maps(model, images, layers, queries="cls")
            assert (found.grid, found.prefix) == (expected.grid, expected.prefix)
            assert found.grid in ((4, 4), (3, 4))
            assert found.sources == ("kernel",) * len(found.layers)
            for layer, weights in zip(found.layers, found.weights, strict=True):
                theirs = expected.weights[expected.layers.index(layer)]
                assert_close(weights, theirs[:, :, :1])
    several = attention_maps(model, [images, images[:1]], 1)
    assert_same_bits(several[1].weights[0], attention_maps(model, images[:1], 1).weights[0])


class Counted(nn.Module):
    """Counts the calls of the layer that it wraps."""

    def __init__(self, inner):
        super().__init__()
        self.inner, self.calls = inner, 0

    def forward(self, *args, **kwargs):
        self.calls += 1
        return self.inner(*args, **kwargs)


@pytest.mark.parametrize("name", [TRANSFORMERS[0], TIMM[1]])
@torch.no_grad()
def test_a_pass_ends_with_the_last_layer_that_is_needed(name):
    model, images = build(name)
    last = Counted(model.layernorm if name in TRANSFORMERS else model.norm)
    setattr(model, "layernorm" if name in TRANSFORMERS else "norm", last)
    attention_maps(model, images, [0])
    before = last.calls
    found = attention_maps(model, images, [0])
    assert last.calls == before
    with record(model, [0]) as recorded:
        model(images)
    assert_close(found.weights[0], recorded.weights[0])


@torch.no_grad()
def test_masks_go_by_the_name_that_the_model_has_for_them():
    model, images = build("Dinov2Model")
    masks = torch.arange(16)[None].expand(2, -1) > 7
    found = attention_maps(model, images, masks=masks)
    with record(model) as recorded:
        model(images, bool_masked_pos=masks)
    for ours, theirs in zip(found.weights, recorded.weights, strict=True):
        assert_close(ours, theirs)
    timm, images = build(TIMM[0])
    with pytest.raises(InvalidInputError, match="Leave masks out"):
        attention_maps(timm, images, masks=masks)


@torch.no_grad()
def test_several_kinds_of_attention_are_an_error_until_one_is_named():
    model, x = Aggregator(), noise(2, 3, 5, 8, seed=0).float()
    with pytest.raises(InvalidInputError, match=r"(?s)2 of frame_blocks.*, global_blocks"):
        attention_maps(model, x)
    found = attention_maps(model, x, ["global_blocks.0", "global_blocks.1"])
    assert found.weights[0].shape == (2, 2, 15, 15)
    with pytest.raises(OutOfRangeError):
        attention_maps(model, x, "global_blocks.7")
