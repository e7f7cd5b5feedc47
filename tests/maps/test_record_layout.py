"""Which token is which in a recording: measured on the live model, not counted."""

from __future__ import annotations

import contextlib
import gc

import pytest
import torch
from torch import nn

import dinov2_attn
from dinov2_attn import add_registers, record
from dinov2_attn.errors import InvalidInputError
from tests.support import upstreams
from tests.support.recordings import IMAGES, build
from tests.support.strategies import noise
from tests.support.tolerances import assert_close

GRID = (2, 3)


def with_registers_behind(models, count):
    """Append registers behind the patches, as test-time-registers does."""
    model = build(models)
    behind = noise(1, count, 8, seed=5)
    base = type(model)

    def prepare_tokens_with_masks(self, x, masks=None):
        tokens = base.prepare_tokens_with_masks(self, x, masks)
        return torch.cat([tokens, behind.expand(len(tokens), -1, -1)], 1)

    own = {"prepare_tokens_with_masks": prepare_tokens_with_masks}
    model.__class__ = type("Own", (base,), own)
    return model


@pytest.mark.parametrize("count", [1, 4])
def test_registers_behind_the_patches_are_no_patches(models, count):
    model = with_registers_behind(models, count)
    with record(model) as maps:
        model.forward_features(IMAGES)
    assert (maps.prefix, maps[0].suffix, maps.grid) == (1, count, GRID)
    for weights, patches, mass in zip(
        maps.weights, maps.patch_maps(), maps.prefix_mass(), strict=True
    ):
        assert_close(patches.flatten(-2), weights[..., 1 : 1 + 6])
        assert_close(patches.sum((-2, -1)) + mass, torch.ones(2, 2, 7 + count))


@pytest.mark.parametrize(("queries", "rows"), [("patches", range(1, 7)), ("registers", [7, 8])])
def test_names_of_rows_mean_what_the_probe_found(models, queries, rows):
    model = with_registers_behind(models, 2)
    with record(model) as whole:
        model.forward_features(IMAGES)
    with record(model, queries=queries) as maps:
        model.forward_features(IMAGES)
    assert maps.queries == tuple(rows)
    for ours, weights in zip(maps.weights, whole.weights, strict=True):
        assert_close(ours, weights[:, :, list(rows)])


def test_grid_and_prefix_may_be_said(models):
    model = build(models)
    tokens = noise(2, 9, 8, seed=0).double()
    with record(model, grid=(2, 3), prefix=2, queries="patches") as maps:
        for block in model.blocks:
            tokens = block(tokens)
    assert (maps.prefix, maps[0].suffix, maps.grid) == (2, 1, (2, 3))
    assert maps.queries == tuple(range(2, 8))
    assert maps.patch_maps()[0].shape == (2, 2, 6, 2, 3)


@pytest.mark.parametrize("name", ["vit_small_patch14_reg4_dinov2", "vit_small_patch16_dinov3"])
@torch.no_grad()
def test_models_of_timm_have_a_grid(name):
    timm = pytest.importorskip("timm", reason="the models of upstream's copies run")
    model = timm.create_model(name, dynamic_img_size=True, depth=2).eval()
    patch = 14 if "14" in name else 16
    for height, width in ((3, 4), (5, 2)):
        images = noise(2, 3, height * patch, width * patch, seed=0).float()
        with record(model, queries="patches") as maps:
            model(images)
        assert (maps.prefix, maps.grid) == (5, (height, width))
        assert maps.queries == tuple(range(5, 5 + height * width))


class Sequence(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv, self.num_heads = nn.Linear(8, 24), 2

    def forward(self, x):
        query, key, value = self.qkv(x).chunk(3, -1)
        return nn.functional.scaled_dot_product_attention(query, key, value)


def test_a_sequence_has_no_grid_and_says_so():
    model = nn.Sequential(Sequence())
    x = noise(1, 5, 8, seed=0).float()
    with record(model) as maps:
        model(x)
    assert maps.grid is None
    with pytest.raises(InvalidInputError, match="grid is known"):
        maps.patch_maps()
    with pytest.raises(InvalidInputError, match="Pass positions"), record(model, queries="patches"):
        model(x)


def test_a_probe_runs_once_for_a_model(models, monkeypatch):
    from dinov2_attn.grafting import tokens

    model, runs = build(models), []
    probe = tokens.probe
    monkeypatch.setattr(tokens, "probe", lambda *a, **k: runs.append(1) or probe(*a, **k))
    for size in ((4, 6), (4, 6), (8, 4)):
        with record(model) as maps:
            model(noise(1, 3, *size, seed=0).double())
        assert maps.grid == (size[0] // 2, size[1] // 2)
    assert len(runs) == 1


@pytest.mark.parametrize("extra", [0, 2])
@pytest.mark.parametrize("queries", ["patches", "registers"])
def test_asking_names_the_tokens_that_recording_names(models, extra, queries):
    """Registers that are counted, but stand behind the patches, and further ones."""
    base, counted = type(build(models)), 3

    class Behind(base):
        num_register_tokens = counted

        def prepare_tokens_with_masks(self, x, masks=None):
            tokens = super().prepare_tokens_with_masks(x, masks)
            tokens = torch.cat([tokens[:, :1], tokens[:, -x[0, 0].numel() // 4 :]], 1)
            behind = noise(1, counted + extra, tokens.shape[-1], seed=5).to(tokens)
            return torch.cat([tokens, behind.expand(len(tokens), -1, -1)], 1)

    model = build(models)
    model.__class__ = Behind
    images = [IMAGES, IMAGES[..., :2]]
    with dinov2_attn.install(model), torch.no_grad():
        whole = [model.get_self_attention(x) for x in images]
        asked = model.get_self_attention(images, queries=queries)
        _, beside = model(images[0], return_attention=True, queries=queries)
        behind = model.get_last_self_attention(images[0], queries=9)
    for layer, answers in enumerate(asked):
        for x, full, ours in zip(images, whole, answers, strict=True):
            patches = x[0, 0].numel() // 4
            rows = slice(1, 1 + patches) if queries == "patches" else slice(1 + patches, None)
            assert_close(ours, full[layer][:, :, rows])
    assert_close(list(beside), [answers[0] for answers in asked])
    assert_close(behind, whole[0][-1][:, :, 9:10])


def test_a_prefix_alone_moves_the_grid(models):
    model = build(models)
    with record(model, prefix=0) as maps, torch.no_grad():
        model.forward_features(IMAGES)
    assert (maps.prefix, maps[0].suffix, maps.grid) == (0, 1, GRID)
    with record(model, prefix=3) as maps, torch.no_grad():
        model.forward_features(IMAGES)
    assert (maps.prefix, maps.grid) == (3, None)
    model = with_registers_behind(models, 2)
    with record(model, prefix=3) as maps, torch.no_grad():
        model.forward_features(IMAGES)
    assert (maps.prefix, maps[0].suffix, maps.grid) == (3, 0, GRID)


def test_a_recording_whose_grid_was_not_asked_for_keeps_no_image(models):
    model, size = with_registers_behind(models, 1), IMAGES.shape[-2:]

    def held():
        tensors = [one for one in gc.get_objects() if issubclass(type(one), torch.Tensor)]
        return sum(one.ndim > 2 and one.shape[-2:] == size for one in tensors)

    before = held()
    with dinov2_attn.record(model) as maps:
        model.forward_features(IMAGES)
    assert held() == before
    assert maps.grid


@torch.no_grad()
@pytest.mark.parametrize("behind", [0, 2])
def test_a_large_image_is_probed_by_a_small_one(models, behind):
    """A DINOv2 has the same tokens at every size, and a large image takes memory and time."""
    model, seen = with_registers_behind(models, behind), []
    model.patch_embed.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[-2:]))
    images = noise(1, 3, 2 * 15, 2 * 20, seed=0).to(IMAGES)
    with record(model, queries="cls") as maps:
        model.forward_features(images)
    seen.clear()
    assert (maps.grid, maps.prefix, maps[0].suffix) == ((15, 20), 1, behind)
    assert set(map(tuple, seen)) == {(24, 24)}


def with_chance(model, behind=0):
    """Let tokens depend on chance in evaluation mode too, so that a probe sees nothing."""
    base = type(model)

    def prepare_tokens_with_masks(self, x, masks=None):
        tokens = base.prepare_tokens_with_masks(self, x, masks)
        tokens = torch.cat([tokens, tokens[:, :behind]], 1)
        return tokens + torch.rand_like(tokens) * 9

    own = {"prepare_tokens_with_masks": prepare_tokens_with_masks}
    model.__class__ = type("Own", (base,), own)
    return model


@torch.no_grad()
def test_tokens_of_a_dinov2_that_cannot_be_probed_are_counted(models):
    registers = 2 if models.has_registers else 0
    options = {"num_register_tokens": registers} if registers else {}
    model = with_chance(build(models, **options))
    for height, width in ((2, 3), (4, 1), (2, 3)):
        with record(model, queries="patches") as maps:
            model.forward_features(noise(1, 3, 2 * height, 2 * width, seed=0).to(IMAGES))
        assert (maps.prefix, maps[0].suffix, maps.grid) == (1 + registers, 0, (height, width))
        assert maps.queries == tuple(range(1 + registers, 1 + registers + height * width))


@torch.no_grad()
def test_tokens_that_are_not_as_many_as_counted_have_no_grid(models):
    model = with_chance(build(models), behind=1)
    with record(model) as maps:
        model.forward_features(IMAGES)
    assert (maps.grid, maps.weights[0].shape[-1]) == (None, 8)
    with record(model, prefix=1) as maps:
        model.forward_features(IMAGES)
    assert maps.grid is None


@torch.no_grad()
def test_added_tokens_are_counted_where_nothing_can_be_probed():
    model = with_chance(build(upstreams.LIGHTLY, num_register_tokens=1))
    recordings = {}
    for count in (0, 2, 1, 0):
        added = add_registers(model, {0: [1]}, count) if count else contextlib.nullcontext()
        with record(model) as recordings[count], added:
            model.forward_features(IMAGES)
    for count, maps in recordings.items():
        assert (maps.prefix, maps[0].suffix, maps.grid) == (2 + count, 0, GRID)
        assert maps.weights[0].shape[-1] == 2 + count + 6


class Resized(nn.Module):
    """No DINOv2: it makes ``grid`` patches of images of any size, and turns wide ones."""

    def __init__(self, grid=(2, 3), prefix=0):
        super().__init__()
        self.cut, self.attention = nn.Conv2d(3, 8, 2, 2), Sequence()
        self.size, self.prefix = [2 * side for side in grid], prefix

    def forward(self, images):
        images = nn.functional.interpolate(images, self.size)
        tokens = self.cut(images).flatten(2).transpose(1, 2)
        tokens = torch.cat([torch.ones_like(tokens[:, :1]).expand(-1, self.prefix, -1), tokens], 1)
        return self.attention(tokens)


@torch.no_grad()
def test_another_model_is_probed_at_each_size():
    """It may resize its images, so that one size says nothing about another."""
    for grid, prefix in (((2, 3), 0), ((5, 4), 2)):
        model = Resized(grid, prefix)
        for times in (2, 4, 1, 2):
            size = [times * side for side in model.size]
            with record(model, queries="patches") as maps:
                model(noise(2, 3, *size, seed=0).float())
            assert (maps.grid, maps.prefix, maps[0].suffix) == (grid, prefix, 0)
            assert maps.queries == tuple(range(prefix, prefix + grid[0] * grid[1]))


@torch.no_grad()
def test_what_a_probe_did_not_find_is_not_probed_again(monkeypatch):
    from dinov2_attn.grafting import tokens

    model, runs = with_chance(build(upstreams.FIRST)), []
    probe = tokens.probe
    monkeypatch.setattr(tokens, "probe", lambda *a, **k: runs.append(1) or probe(*a, **k))
    for expected in (1, 1):
        with record(model) as maps:
            model.forward_features(IMAGES)
        assert maps.grid == GRID
        assert len(runs) == expected
    with record(model) as maps:
        model.forward_features(IMAGES[..., :4])
    assert maps.grid == (2, 2)
    assert len(runs) == 2


@torch.no_grad()
@pytest.mark.parametrize("order", [(0, 2, 0), (2, 0, 2)])
def test_a_pass_that_drops_tokens_has_no_grid(models, order):
    """Which ones are left cannot be told, though the layout of the whole image is known."""
    model = build(models)
    base = type(model)

    def prepare_tokens_with_masks(self, x, masks=None):
        tokens = base.prepare_tokens_with_masks(self, x, masks)
        return tokens[:, : tokens.shape[1] - self.dropped]

    own = {"prepare_tokens_with_masks": prepare_tokens_with_masks}
    model.__class__ = type("Own", (base,), own)
    for model.dropped in order:
        with record(model) as maps:
            model.forward_features(IMAGES)
        assert maps.grid == (None if model.dropped else GRID)


@torch.no_grad()
@pytest.mark.parametrize("probed", [True, False])
def test_patches_that_are_not_square(models, probed):
    model = build(models) if probed else with_chance(build(models))
    base = type(model)
    own = {"interpolate_pos_encoding": lambda self, x, *size: torch.zeros_like(x)}
    model.__class__ = type("Own", (base,), own)
    model.patch_embed.proj = nn.Conv2d(3, 8, (2, 4), (2, 4)).to(IMAGES)
    model.patch_embed.patch_size = model.patch_size = (2, 4)
    for grid in ((3, 2), (2, 3), (4, 1), (13, 14)):
        images = noise(1, 3, 2 * grid[0], 4 * grid[1], seed=0).to(IMAGES)
        with record(model, queries="patches") as maps:
            model.forward_features(images)
        assert (maps.prefix, maps[0].suffix, maps.grid) == (1, 0, grid)
        assert len(maps.queries) == grid[0] * grid[1]


@torch.no_grad()
def test_a_grid_that_is_asked_for_after_the_tokens_are_gone_runs_no_model():
    """The model has fewer tokens then: what it does now says nothing about the recording."""
    model, runs = build(upstreams.LIGHTLY, num_register_tokens=1), []
    with record(model) as maps, add_registers(model, {0: [1]}, 2):
        model.forward_features(IMAGES)
    model.patch_embed.register_forward_pre_hook(lambda *_: runs.append(1))
    assert (maps.prefix, maps[0].suffix, maps.grid) == (4, 0, GRID)
    assert not runs
