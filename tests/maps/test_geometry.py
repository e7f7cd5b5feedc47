"""What is known of a model before its first image."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from dinov2_attn import record, rollout
from dinov2_attn.errors import InvalidInputError
from dinov2_attn.maps.geometry import Geometry, geometry_of, patches_of, size_of_images
from tests.maps.test_any_model import TIMM, build
from tests.maps.test_gradients import of_dinov3, of_fork, of_upstream
from tests.maps.test_record_any_model import TRANSFORMERS
from tests.support.strategies import noise, randomise
from tests.support.tolerances import assert_close

PATCH = (2, 3)


class Attention(nn.Module):
    """Attention by PyTorch's kernel, two heads of six channels and an output of eight."""

    num_heads = 2

    def __init__(self):
        super().__init__()
        self.qkv, self.proj = nn.Linear(8, 36), nn.Linear(12, 8)

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 6)).permute(2, 0, 3, 1, 4)
        x = nn.functional.scaled_dot_product_attention(q, k, v)
        return self.proj(x.transpose(1, 2).flatten(2))


class Embedding(nn.Module):
    """Patches that are no squares, of five channels that are mixed first."""

    def __init__(self, patch=PATCH):
        super().__init__()
        self.mixed, self.proj = nn.Conv2d(5, 5, 1), nn.Conv2d(5, 8, patch, patch)

    def forward(self, images):
        return self.proj(self.mixed(images)).flatten(2).transpose(1, 2)


class Patched(nn.Module):
    def __init__(self, prefix=2, each=1):
        super().__init__()
        self.embedding = Embedding()
        self.blocks = nn.Sequential(*(Attention() for _ in range(3)))
        self.prefix, self.each = prefix, each

    def forward(self, images):
        tokens = self.embedding(images).repeat_interleave(self.each, 1)
        first = tokens.new_zeros(len(tokens), self.prefix, 8)
        return self.blocks(torch.cat([first, tokens], 1))


@torch.no_grad()
@pytest.mark.parametrize("prefix", [0, 1, 2])
def test_any_model_is_probed_where_it_is(prefix):
    model = randomise(Patched(prefix).double(), 0)
    found = geometry_of(model)
    assert found == Geometry(PATCH, 5, prefix, 3, 2, 8)
    assert found.registers == max(0, prefix - 1)
    assert found.grid(7, 7) == (3, 2)


@torch.no_grad()
def test_a_model_that_cannot_be_read_is_refused():
    with pytest.raises(InvalidInputError, match=r"(?s)one token for each .*several for each"):
        geometry_of(randomise(Patched(each=2), 0))
    several = nn.Sequential(Embedding(), Embedding((4, 4)))
    with pytest.raises(InvalidInputError, match="2 sizes of patches"):
        patches_of(several)
    with pytest.raises(InvalidInputError, match=r"inside .*Linear that cuts.*\nFound none"):
        patches_of(nn.Linear(3, 3))
    assert patches_of(nn.Sequential(Embedding(), Embedding())) == (PATCH, 5)


@pytest.mark.parametrize(
    ("own", "size"),
    [
        ({}, (16, 24)),
        ({"config": SimpleNamespace()}, (16, 24)),
        ({"config": SimpleNamespace(image_size=12)}, (12, 12)),
        ({"config": SimpleNamespace(image_size=[4, 6])}, (4, 6)),
        ({"config": SimpleNamespace(image_size=(4, 6, 3))}, (16, 24)),
        ({"config": SimpleNamespace(image_size=14)}, (16, 24)),  # no whole patches
        ({"config": SimpleNamespace(image_size=(5, 6))}, (16, 24)),
        ({"patch_embed": SimpleNamespace(img_size=(8, 9))}, (8, 9)),
        ({"patch_embed": SimpleNamespace(img_size=None)}, (16, 24)),
        (
            {
                "patch_embed": SimpleNamespace(img_size=(8, 9)),
                "config": SimpleNamespace(image_size=12),
            },
            (8, 9),
        ),
    ],
)
def test_a_size_of_images_is_the_models_own_or_any(own, size):
    assert size_of_images(SimpleNamespace(**own), PATCH) == size


@pytest.mark.parametrize("name", [*TRANSFORMERS, *TIMM])
@torch.no_grad()
def test_models_of_other_libraries(name):
    model, _ = build(name)
    prefix = {"vit_tiny_patch16_224": 1, "Dinov2Model": 1, "DINOv3ViTModel": 1}.get(name, 5)
    width, heads = (32, 2) if name in TRANSFORMERS else (384, 6)
    width, heads = (192, 3) if "tiny" in name else (width, heads)
    patch = 16 if "patch16" in name else 14
    found = geometry_of(model)
    assert found == Geometry((patch, patch), 3, prefix, 3, heads, width)
    assert geometry_of(model) is found
    assert found.registers == prefix - 1
    assert found.grid(5 * patch, 2 * patch + 1) == (5, 2)


@pytest.mark.parametrize("models", [of_upstream, of_fork, of_dinov3])
def test_upstreams_models(models):
    model, _ = models()
    found = geometry_of(model)
    prefix = 1 if models is not of_dinov3 else 5
    assert (found.prefix, found.depth) == (prefix, len(model.blocks))
    assert found.width == model.embed_dim
    inside = geometry_of(nn.ModuleDict({"backbone": model}))
    assert (inside.patch_size, inside.channels) == (found.patch_size, found.channels)


class TwoStages(Patched):
    """Blocks with two kinds of names, one after the other."""

    def __init__(self):
        super().__init__()
        self.late = nn.Sequential(Attention())

    def forward(self, images):
        return self.late(super().forward(images))


@torch.no_grad()
def test_layers_of_several_kinds_are_rolled_out_if_they_are_named():
    model, images = randomise(TwoStages().double(), 0), noise(2, 5, 4, 9, seed=0).double()
    with pytest.raises(InvalidInputError, match=r"one follows the other\.\nFound blocks"):
        rollout(model, images)
    names = [f"blocks.{number}" for number in range(3)] + ["late.0"]
    product = torch.eye(8, dtype=torch.float64)
    with record(model) as maps:
        model(images)
    for weights in (one for entry in maps for one in entry.weights):
        product = (weights.mean(1) + torch.eye(8)) / 2 @ product
    assert_close(rollout(model, images, names).weights, product[:, :1])
