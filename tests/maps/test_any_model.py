"""Maps and rollouts of models of other libraries: against recordings of their passes."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import dinov2_attn
from dinov2_attn import artifact_tokens, attention_maps, record, rollout
from dinov2_attn.errors import IncompatibleUpstreamError, InvalidInputError, OutOfRangeError
from dinov2_attn.maps import tiles
from tests.maps.test_record_any_model import (
    IMAGES,
    TRANSFORMERS,
    Aggregator,
    of_transformers,
    sharp,
)
from tests.support import layouts, models_at_kernel
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


def product_of(maps, heads, residual):
    """The textbook's product ``(B, N, N)`` in float64 of recorded matrices."""
    product = torch.eye(maps[0].shape[-1], dtype=torch.float64)
    for weights in maps:
        fused = {"mean": weights.mean(1), "min": weights.amin(1), "max": weights.amax(1)}[heads]
        mixed = residual * torch.eye(weights.shape[-1]) + (1 - residual) * fused.double()
        product = mixed / mixed.sum(-1, keepdim=True) @ product
    return product


def assert_is_the_product(model, images, layers=None, queries=(0, 3), heads="mean", residual=0.5):
    with record(model, layers) as recorded:
        model(images)
    expected = product_of(recorded.weights, heads, residual)[:, list(queries)]
    ours = rollout(model, images, layers, queries=queries, heads=heads, residual=residual)
    assert (ours.weights.double() - expected).abs().max() < (
        1e-12 if images.dtype == torch.float64 else 1e-6
    )
    assert (ours.grid, ours.prefix) == (recorded.grid, recorded.prefix)


@pytest.fixture
def _small_tiles(monkeypatch):
    monkeypatch.setattr(tiles, "TILE_BYTES", 500)


@pytest.mark.parametrize("heads", ["mean", "min", "max"])
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.usefixtures("_small_tiles")
@torch.no_grad()
def test_a_rollout_is_the_product_of_what_the_kernels_were_given(name, heads):
    model, images = build(name)
    assert_is_the_product(model, images, heads=heads)
    model, images = model.double(), images.double()
    assert_is_the_product(model, images, heads=heads, residual=0.25)
    assert_is_the_product(model, images, [0, 2], heads=heads)


@pytest.mark.parametrize("name", TRANSFORMERS)
@torch.no_grad()
def test_explicit_code_is_rolled_out_too(name):
    assert_is_the_product(*build(name, "eager", torch.float64))
    assert_is_the_product(*build(name, "eager", torch.float64), heads="max", residual=0.0)


@pytest.mark.parametrize("install", [True, False])
@pytest.mark.parametrize("heads", ["mean", "max"])
@pytest.mark.parametrize("kind", [{}, {"bias": True}, {"causal": True}], ids=str)
@pytest.mark.usefixtures("_small_tiles")
@torch.no_grad()
def test_biases_and_causal_masks_of_the_kernel_count(first, kind, heads, install):
    model = models_at_kernel.build(first, **kind)
    images = noise(2, 3, 6, 8, seed=0, dtype=torch.float64)
    handle = dinov2_attn.install(model) if install else None
    assert_is_the_product(model, images, heads=heads)
    assert_is_the_product(model, images, 1, heads=heads, residual=0.0)
    if handle is not None:
        handle.uninstall()


@torch.no_grad()
def test_tokens_behind_the_patches_are_rolled_out_and_not_shown(grafted):
    model = layouts.build(grafted, layouts.registers_behind(grafted, 2), depth=2)
    images = noise(2, 3, 4, 6, seed=0, dtype=torch.float32)
    with dinov2_attn.install(model):
        assert_is_the_product(model, images)
        ours = rollout(model, images, queries="patches")
    assert (ours.suffix, ours.weights.shape) == (2, (2, 6, 9))
    assert_same_bits(ours.patch_maps().flatten(2), ours.weights[..., 1:7])


# Artifact tokens


def norms_and_attention(model, images, outputs, layer):
    """What artifact_tokens reports, from the outputs of blocks and the recorded matrices."""
    seen = []
    hooks = [block.register_forward_hook(lambda _, __, out: seen.append(out)) for block in outputs]
    with record(model) as recorded:
        model(images)
    for hook in hooks:
        hook.remove()
    tokens = seen[layer][0] if isinstance(seen[layer], tuple) else seen[layer]
    patches = slice(recorded.prefix, None)
    mean = recorded.weights[-1].mean(1)[..., patches]
    return tokens.norm(dim=-1)[:, patches], mean[:, 0], mean.mean(1)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_artifact_tokens_read_the_outputs_of_blocks(name):
    model, images = build(name, dtype=torch.float64)
    blocks = next(
        m for m in model.modules() if isinstance(m, nn.ModuleList | nn.Sequential) and len(m) == 3
    )
    for layer in (0, 2):
        found = artifact_tokens(model, images, layer)
        expected = norms_and_attention(model, images, blocks, layer)
        for ours, theirs in zip(
            (found.norms, found.from_cls, found.from_all), expected, strict=True
        ):
            assert_close(ours.flatten(1), theirs)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.filterwarnings("ignore")
@torch.no_grad()
def test_artifact_tokens_of_a_kernel_of_its_own_are_those_of_its_blocks(first):
    model = models_at_kernel.build(first)
    images = noise(2, 3, 6, 8, seed=0, dtype=torch.float64)
    with dinov2_attn.install(model):
        found = artifact_tokens(model, images, 1)
        expected = norms_and_attention(model, images, model.blocks, 1)
    for ours, theirs in zip((found.norms, found.from_cls, found.from_all), expected, strict=True):
        assert_close(ours.flatten(1), theirs)


@torch.no_grad()
def test_blocks_that_do_not_hand_their_tokens_on_are_an_error():
    model, images = build(TIMM[0])
    model.blocks.register_forward_pre_hook(lambda *_: None)
    model.blocks[1].register_forward_pre_hook(lambda _, args: (args[0] * 2,))
    with pytest.raises(IncompatibleUpstreamError, match="another input of block 1"):
        artifact_tokens(model, images)
    assert not model.blocks[0]._forward_hooks
    with pytest.raises(IncompatibleUpstreamError, match="no such list"):
        artifact_tokens(nn.Sequential(model.patch_embed, model.blocks[0].attn), images)


def test_status_says_which_classes_go_by_their_kernel(first):
    model = models_at_kernel.build(first)
    with dinov2_attn.install(model):
        status = dinov2_attn.status()
    (own,) = [name for name in status.at_kernel if name.endswith("Normalised")]
    assert f"weights at the kernel: {own}: {status.at_kernel[own]}" in str(status).splitlines()
