"""The probe says which token is which, on upstream's code, its copies and other libraries'."""

from __future__ import annotations

import random
import re
from collections import deque

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import nn

from dinov2_attn.backbone import mosaics
from dinov2_attn.backbone.backbone import Backbone
from dinov2_attn.backbone.layout import Layout
from dinov2_attn.backbone.probe import Probed, probe
from dinov2_attn.backbone.undisturbed import first_input
from tests.support import upstreams
from tests.support.layouts import (
    PATCH,
    Frames,
    Seen,
    Stem,
    attention_in,
    build,
    registers_behind,
    several_per_cell,
    windowed,
)
from tests.support.strategies import model_cases, noise, randomise
from tests.support.tolerances import assert_same_bits

GRID = (2, 3)
COPIES = pytest.mark.parametrize("upstream", upstreams.WITH_MODELS, ids=str)
grids = st.tuples(st.integers(1, 9), st.integers(1, 9))


def images_of(grid=GRID, batch=2, patch=PATCH, dtype=torch.float32, channels=3):
    return noise(batch, channels, grid[0] * patch, grid[1] * patch, seed=0, dtype=dtype)


def found_in(model, images, layer=0):
    return probe(model, attention_in(model, layer), images)


def seen(stem, images):
    model = randomise(Seen(stem), 0)
    return probe(model, model.attn, images)


# Upstream and its copies


@COPIES
@given(case=model_cases())
def test_upstreams_own_layout(upstream, case):
    model = case.build(upstream)
    expected = Layout(case.prefix(upstream), 0, case.grid)
    assert found_in(model, case.images) == Probed(expected)


@given(
    grid=grids,
    registers=st.integers(0, 4),
    behind=st.integers(0, 4),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_registers_before_and_behind_the_patches(grid, registers, behind, dtype):
    upstream = upstreams.DEPTH_ANYTHING
    base = registers_behind(upstream, behind)
    model = build(upstream, base, registers=registers, dtype=dtype, interpolate_offset=0.0)
    expected = Layout(1 + registers, behind, grid)
    assert found_in(model, images_of(grid, dtype=dtype)) == Probed(expected)


@given(
    grid=grids.filter(lambda grid: grid != (1, 1)),
    per_cell=st.integers(2, 4),
    planes=st.booleans(),
    registers=st.integers(0, 3),
)
def test_several_tokens_a_cell(grid, per_cell, planes, registers):
    upstream = upstreams.DEPTH_ANYTHING
    base = several_per_cell(upstream, per_cell, planes=planes, prefix=1 + registers)
    model = build(upstream, base, registers=registers, interpolate_offset=0.0)
    expected = Layout(1 + registers, 0, grid, per_cell, planes)
    assert found_in(model, images_of(grid)) == Probed(expected)


def test_several_tokens_of_one_cell_are_not_told_from_cells(first):
    base = several_per_cell(first, 3, planes=False, prefix=1)
    assert found_in(build(first, base), images_of((1, 1))).layout is None


def test_a_deep_layer_has_the_layout_of_the_first():
    model = build(upstreams.DEPTH_ANYTHING, registers=2, depth=3)
    with torch.no_grad():  # a trained block changes its tokens less than such noise
        for block in model.blocks:
            block.attn.proj.weight.mul_(0.05)
            block.mlp.fc2.weight.mul_(0.05)
    images = images_of((4, 5))
    assert found_in(model, images, layer=2) == Probed(Layout(3, 0, (4, 5)))


def test_each_channel_that_runs_alone_has_the_grid(first):
    class Adaptive(first.cls("DinoVisionTransformer")):
        def forward(self, images):
            return super().forward(images.flatten(0, 1)[:, None])

    model = build(first, Adaptive, in_chans=1)
    found = found_in(model, images_of(channels=5))
    assert found == Probed(Layout(1, 0, GRID), sequences=5)


@pytest.mark.parametrize("windows", [(1, 2), (2, 1), (2, 3), (3, 2)])
def test_windows_keep_their_own_grid(first, windows):
    model = build(first, windowed(first, windows, GRID))
    images = images_of((windows[0] * GRID[0], windows[1] * GRID[1]))
    found = found_in(model, images)
    assert found == Probed(Layout(1, 0, GRID), "", windows[0] * windows[1], windows)


def test_frames_keep_their_own_grid(first):
    video, inner = images_of()[:, None].repeat(1, 4, 1, 1, 1), build(first)
    model = Frames(inner)
    assert probe(model, attention_in(inner), video) == Probed(Layout(1, 0, GRID), sequences=4)


def test_the_class_token_of_upstreams_masked_images_stays_where_it_is(first):
    model, images = build(first), images_of()
    masks = torch.zeros(1, GRID[0] * GRID[1], dtype=torch.bool)
    found = probe(model, attention_in(model), images, lambda x: model(x, masks.expand(len(x), -1)))
    assert found == Probed(Layout(1, 0, GRID))


# Other libraries


@pytest.mark.parametrize(
    ("name", "patch", "prefix"),
    [("vit_small_patch14_reg4_dinov2", 14, 5), ("vit_small_patch16_dinov3", 16, 5)],
)
def test_timms_models(name, patch, prefix):
    timm = pytest.importorskip("timm", reason="its models are what is asked here")
    model = timm.create_model(name, img_size=4 * patch, dynamic_img_size=True)
    found = probe(model, model.blocks[0].attn, images_of((3, 5), patch=patch))
    assert found == Probed(Layout(prefix, 0, (3, 5)))


def test_timm_pads_a_last_patch():
    timm = pytest.importorskip("timm", reason="its models are what is asked here")
    model = timm.create_model(
        "vit_small_patch14_reg4_dinov2", img_size=56, dynamic_img_size=True, dynamic_img_pad=True
    )
    found = probe(model, model.blocks[0].attn, torch.rand(1, 3, 57, 150))
    assert found == Probed(Layout(5, 0, (5, 11)))


def test_swins_windows():
    timm = pytest.importorskip("timm", reason="its models are what is asked here")
    model = timm.create_model("swin_tiny_patch4_window7_224", img_size=56)
    blocks = model.layers[0].blocks
    found = probe(model, blocks[0].attn, torch.rand(1, 3, 56, 56))
    assert found == Probed(Layout(0, 0, (7, 7)), "", 4, (2, 2))
    shifted = probe(model, blocks[1].attn, torch.rand(1, 3, 56, 56))
    assert shifted.layout is None


def small_transformers_model(kind, **options):
    transformers = pytest.importorskip("transformers", reason="its models are what is asked here")
    if not hasattr(transformers, f"{kind}Model"):
        pytest.skip(f"this transformers has no {kind}")
    config = getattr(transformers, f"{kind}Config")(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, num_register_tokens=3, **options
    )
    model = getattr(transformers, f"{kind}Model")(config)
    attention = next(m for m in model.modules() if type(m).__name__ == f"{kind}Attention")
    return model, attention


def test_dinov2_in_transformers():
    model, attention = small_transformers_model("Dinov2WithRegisters", patch_size=14, image_size=56)
    assert probe(model, attention, images_of((3, 5), patch=14)) == Probed(Layout(4, 0, (3, 5)))


def test_dinov3_in_transformers():
    model, attention = small_transformers_model("DINOv3ViT", intermediate_size=64)
    assert probe(model, attention, images_of((3, 5), patch=16)) == Probed(Layout(4, 0, (3, 5)))


def test_a_rest_that_is_no_whole_patch_is_left_out():
    model, attention = small_transformers_model("DINOv3ViT", intermediate_size=64)
    images = torch.rand(1, 3, 6 * 16 + 15, 3 * 16 + 1)
    assert probe(model, attention, images) == Probed(Layout(4, 0, (6, 3)))


# Stems of any kind


class Patches(nn.Module):
    def __init__(self, change=lambda tokens: tokens):
        super().__init__()
        self.conv, self.change = nn.Conv2d(3, 32, PATCH, PATCH), change

    def forward(self, images):
        return self.change(self.conv(images).flatten(2).mT)


def test_a_rest_is_left_out_of_windows_too():
    """Two sequences for each image: the upper and the lower half of its patches."""
    stem = Patches(lambda tokens: tokens.reshape(2 * len(tokens), -1, tokens.shape[-1]))
    found = seen(stem, noise(2, 3, 4 * PATCH + 1, 6 * PATCH + 1, seed=0))
    assert found == Probed(Layout(0, 0, (2, 6)), sequences=2, windows=(2, 1))


@pytest.mark.parametrize("grid", [(4, 5), (8, 8), (12, 7), (1, 6)])
def test_convolutions_that_overlap(grid):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Seen(Stem())
    assert probe(model, model.attn, images_of(grid, patch=8)) == Probed(Layout(0, 0, grid))


@pytest.mark.parametrize("grid", [(2, 6), (6, 2), (3, 8), (8, 3), (2, 2)])
def test_two_or_three_rows_that_overlap_are_too_few(grid):
    """Each of them sees half of what the next one sees: nothing tells them from chance."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Seen(Stem())
    assert probe(model, model.attn, images_of(grid, patch=8)).layout is None


def test_images_that_the_model_shrinks(first):
    class Shrinking(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = build(first)

        def forward(self, images):
            small = nn.functional.interpolate(images, (6, 8), mode="bilinear")
            return self.inner(small)

    model = Shrinking()
    found = probe(model, attention_in(model.inner), torch.rand(2, 3, 61, 77))
    assert found == Probed(Layout(1, 0, (3, 4)))


@pytest.mark.parametrize("images", [torch.zeros(1, 3, 4, 6), torch.full((1, 3, 4, 6), torch.nan)])
def test_images_without_a_range_of_values(first, images):
    assert found_in(build(first), images) == Probed(Layout(1, 0, GRID))


def test_half_precision(first):
    model = build(first, dtype=torch.bfloat16)
    assert found_in(model, images_of((5, 7), dtype=torch.bfloat16)) == Probed(Layout(1, 0, (5, 7)))


def test_half_precision_by_autocast(first):
    with torch.autocast("cpu", torch.bfloat16):
        assert found_in(build(first), images_of((5, 7))) == Probed(Layout(1, 0, (5, 7)))


def test_one_mean_of_the_image_in_front_is_no_patch():
    stem = Patches(lambda tokens: torch.cat([tokens.mean(1, keepdim=True), tokens], 1))
    assert seen(stem, images_of((4, 6))) == Probed(Layout(1, 0, (4, 6)))


# Where there is no layout, and why


@pytest.mark.parametrize("pair", [(1, 13), (3, 15), (2, 18), (1, 17), (4, 9)])
@pytest.mark.parametrize("axis", [0, 1])
def test_two_rows_or_columns_of_an_overlapping_stem_exchanged_are_no_grid(axis, pair):
    """Rows are told apart by two remainders, however far apart they are."""
    grid = (20, 4) if axis == 0 else (4, 20)
    order = list(range(20))
    order[pair[0]], order[pair[1]] = pair[1], pair[0]

    class Exchanged(Stem):
        def forward(self, images):
            cells = super().forward(images).unflatten(1, grid)
            return cells.index_select(1 + axis, torch.tensor(order)).flatten(1, 2)

    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Seen(Exchanged())
    assert probe(model, model.attn, images_of(grid, patch=8)).layout is None
    order.sort()
    assert probe(model, model.attn, images_of(grid, patch=8)) == Probed(Layout(0, 0, grid))


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("rows", [6, 2, -2])
def test_tokens_of_an_overlapping_stem_that_see_a_far_row_too_are_no_grid(rows, axis):
    class Far(Stem):
        def forward(self, images):
            cells = super().forward(images).unflatten(1, (12, 12))
            return (cells + 0.6 * cells.roll(rows, 1 + axis)).flatten(1, 2)

    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Seen(Far())
    assert probe(model, model.attn, images_of((12, 12), patch=8)).layout is None


@pytest.mark.parametrize("behind", [False, True])
def test_a_mean_of_some_patches_beside_the_others_may_be_a_patch(behind):
    """A register moves with every patch, or with none."""

    def change(tokens):
        some = (tokens[:, :1] + 0.7 * tokens[:, -1:]) / 2
        return torch.cat([tokens, some] if behind else [some, tokens], 1)

    assert seen(Patches(change), images_of((3, 4))).layout is None

    def every(tokens):
        mean = tokens.mean(1, keepdim=True)
        return torch.cat([tokens, mean] if behind else [mean, tokens], 1)

    expected = Layout(0, 1, (3, 4)) if behind else Layout(1, 0, (3, 4))
    assert seen(Patches(every), images_of((3, 4))) == Probed(expected)


def whole_image(tokens):
    mixed = torch.linspace(-1, 1, tokens.shape[1] ** 2).sin().view(1, tokens.shape[1], -1)
    return mixed @ tokens


WITHOUT = {
    "column by column": (
        lambda tokens: tokens.unflatten(1, GRID).transpose(1, 2).flatten(1, 2),
        "on no grid|cell by cell",
    ),
    "from right to left": (lambda tokens: tokens.flip(1), "the tokens 5, 3, 2, 0, as on no grid"),
    "two patches exchanged": (lambda tokens: tokens[:, [0, 4, 2, 3, 1, 5]], "cell by cell"),
    "two patches behind": (lambda tokens: tokens[:, [0, 2, 3, 5, 1, 4]], "cell by cell"),
    "a mean": (lambda tokens: tokens.mean(1, keepdim=True).repeat(1, 6, 1), "no grid|cell by cell"),
    "all of the image": (whole_image, "no grid|cell by cell"),
    "constant": (lambda tokens: torch.ones_like(tokens), "no token moves when the image"),
    "a patch that stays": (
        lambda tokens: torch.cat([tokens[:, :1], tokens[:, :1] * 0 + 1, tokens[:, 2:]], 1),
        "cell by cell",
    ),
    "by chance": (lambda tokens: tokens + 9 * torch.rand_like(tokens), "chance"),
    "pairs of images": (lambda tokens: tokens.unflatten(0, (-1, 2)).flatten(1, 2), "raised"),
    "all images in one": (lambda tokens: tokens.flatten(0, 1)[None], "images became 1 sequences"),
    "the mean of a batch": (
        lambda tokens: torch.arange(len(tokens))[:, None, None] * tokens.mean(0), "chance",
    ),
    "a grid of tokens": (
        lambda tokens: tokens.unflatten(1, GRID), r"is a tensor of shape \(7, 2, 3, 32\), not",
    ),
    "a patch before the class token": (
        lambda tokens: torch.cat([tokens[:, :1], torch.ones_like(tokens[:, :1]), tokens], 1),
        "no grid|cell by cell",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("change", "reason"), WITHOUT.values(), ids=WITHOUT)
def test_tokens_on_no_grid(change, reason):
    found = seen(Patches(change), images_of())
    assert found.layout is None
    assert re.search(reason, found.reason), found.reason


@pytest.mark.parametrize("axis", [0, 1])
@given(pair=st.lists(st.integers(1, 7), min_size=2, max_size=2, unique=True))
@example(pair=[1, 3])  # the same lowest bit
@example(pair=[1, 5])
@example(pair=[2, 3])
def test_two_rows_or_columns_exchanged_are_no_grid(axis, pair):
    """The corners are where they should be: the cells between them tell."""
    order = list(range(9))
    order[pair[0]], order[pair[1]] = pair[1], pair[0]

    def change(tokens):
        cells = tokens.unflatten(1, (9, 9))
        return cells.index_select(1 + axis, torch.tensor(order)).flatten(1, 2)

    found = seen(Patches(change), images_of((9, 9)))
    assert found.reason == "tokens do not move cell by cell on a grid of 9 × 9"


def test_an_attention_that_is_given_no_tensor(first):
    model = build(first)
    model.blocks[0].attn = nn.Identity()
    model.blocks[0].norm1 = Emptied()
    found = probe(model, model.blocks[0].attn, images_of())
    assert found == Probed(None, "the input of the attention module is no tensor, not (B, N, C)")


class Emptied(nn.Module):
    def forward(self, tokens):
        return [tokens]


def test_several_frames_in_one_sequence(first):
    video, inner = images_of()[:, None].repeat(1, 2, 1, 1, 1), build(first)
    found = probe(Frames(inner, joint=True), attention_in(inner), video)
    assert found.layout is None
    assert "2 tokens, 7 apart" in found.reason


def test_a_model_of_sequences():
    model = nn.TransformerEncoderLayer(8, 2, batch_first=True)
    assert probe(model, model.self_attn, torch.rand(2, 6, 8)).layout is None
    assert probe(model, model.self_attn, torch.ones(2, 6)).layout is None


def test_attention_that_is_not_called(first):
    model = build(first)
    found = probe(model, nn.Identity(), images_of())
    assert (found.layout, found.reason) == (
        None,
        "the attention module was not called in the probe",
    )


def test_an_error_of_the_model_is_a_reason(first):
    model = build(first)
    found = probe(model, attention_in(model), torch.rand(1, 3, 5, 6))
    assert found.layout is None
    assert "AssertionError" in found.reason


def test_a_model_without_values(first):
    model = build(first).to("meta")
    assert found_in(model, images_of().to("meta")).layout is None


# What a probe leaves behind: nothing


class Restless(nn.Module):
    """Changes all that a forward pass can, and fails at the last step if it should."""

    def __init__(self):
        super().__init__()
        self.patches, self.norm = Patches(), nn.BatchNorm1d(32)
        self.attn, self.drop = nn.Identity(), nn.Dropout(0.5)
        self.register_buffer("count", torch.zeros(()))
        self.cache, self.last, self.fails = {"kept": 1}, None, False
        self.features, self.by_kind = [torch.ones(())], {"of patches": ([], deque([1, 2], 2))}
        self.sizes = {1, 2}
        self.by_kind["itself"] = self.by_kind
        self.drop.eval()

    def forward(self, images):
        self.count += 1
        self.norm.running_mean.add_(1)
        self.last, self.new = images, images
        self.cache[images.shape] = torch.rand(())
        self.cache.pop("kept", None)
        self.features.append(images)
        for kept in self.by_kind["of patches"]:
            kept.append(images)
        self.sizes.add(len(images))
        self.sizes.discard(1)
        random.random()
        if self.fails:
            raise ValueError("as it should")
        return self.attn(self.norm(self.patches(images).mT).mT)


def state_of(model):
    return {
        "buffers": {name: buffer.clone() for name, buffer in model.named_buffers()},
        "identity": [id(value) for value in (*model.parameters(), *model.buffers())],
        "flags": [m.training for m in model.modules()],
        "hooks": [(*m._forward_pre_hooks, *m._forward_hooks) for m in model.modules()],
        "kwargs": [(*m._forward_pre_hooks_with_kwargs,) for m in model.modules()],
        "attributes": [{k: id(v) for k, v in vars(m).items()} for m in model.modules()],
        "cache": dict(model.cache),
        "features": [id(one) for one in model.features],
        "by kind": [[*kept] for kept in model.by_kind["of patches"]],
        "sizes": set(model.sizes),
        "python": random.getstate(),
        "torch": torch.get_rng_state(),
        "modes": (torch.is_grad_enabled(), torch.is_inference_mode_enabled()),
    }


@pytest.mark.parametrize("fails", [False, True])
def test_nothing_is_left_behind(fails):
    model = Restless().train()
    model.drop.eval()
    model.fails = fails
    model.attn.register_forward_pre_hook(lambda *_: None)
    before = state_of(model)
    found = probe(model, model.attn, images_of())
    assert found.layout == (None if fails else Layout(0, 0, GRID))
    assert ("as it should" in found.reason) == fails
    after = state_of(model)
    for name in ("buffers", "torch"):
        assert_same_bits(after.pop(name), before.pop(name))
    assert after == before


def test_a_run_that_ends_early_leaves_no_hook():
    model = nn.Sequential(nn.Identity(), nn.Identity())
    given = torch.ones(1)
    found, called = first_input(lambda: model(given), model[1])
    assert found is given
    assert called
    assert not model[1]._forward_pre_hooks
    assert first_input(lambda: model(given), nn.Identity()) == (None, False)


def test_the_model_runs_only_up_to_its_attention(first):
    model = build(first, depth=2)
    ran = []
    hooks = [
        block.mlp.register_forward_pre_hook(lambda m, _: ran.append(m)) for block in model.blocks
    ]
    found_in(model, images_of())
    assert not ran
    for hook in hooks:
        hook.remove()


def test_features_and_gradients_are_those_without_a_probe(first):
    model, images = build(first).train(), images_of().requires_grad_()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        expected = torch.autograd.grad(model(images).sum(), [images, model.cls_token])
    torch.manual_seed(0)
    assert found_in(model, images).layout is not None
    assert_same_bits(torch.autograd.grad(model(images).sum(), [images, model.cls_token]), expected)


class Scaled(nn.Module):
    """It multiplies with a buffer, and exchanges its parameter in each pass, as a wrapper may."""

    def __init__(self):
        super().__init__()
        self.patches, self.attn = Patches(), nn.Identity()
        self.register_buffer("scale", torch.ones(32))
        self.shift = nn.Parameter(torch.zeros(32))

    def forward(self, images):
        self.shift = nn.Parameter(self.shift.detach().clone())
        return self.attn(self.patches(images) * self.scale + self.shift)


def test_a_graph_from_before_a_probe_can_go_backward_after_it():
    """A buffer that no pass changed is not written to, or autograd would refuse it."""
    model, images = Scaled(), images_of().requires_grad_()
    output = model(images)
    assert probe(model, model.attn, images).layout == Layout(0, 0, GRID)
    output.sum().backward()
    assert images.grad.any()


def test_a_parameter_that_a_pass_exchanges_stays_exchanged():
    """FSDP does so, and keeps account of it."""
    model = Scaled()
    before = model.shift
    assert probe(model, model.attn, images_of()).layout == Layout(0, 0, GRID)
    assert model.shift is not before


def test_a_compiled_model_is_not_probed(first, fresh_dynamo):
    """A probe would compile it again, and a stance of Dynamo's is that of all threads."""
    model = build(first)
    compiled = torch.compile(model, backend="eager")
    found = probe(compiled, Backbone(model).blocks[0].attn, images_of())
    assert found.layout is None
    assert "compiled modules" in found.reason


@pytest.mark.parametrize("limit", [0, 2**40])
@given(case=model_cases(), upstream=st.sampled_from(upstreams.WITH_MODELS))
def test_large_images_run_one_by_one_with_the_same_answer(limit, case, upstream):
    model, sizes = case.build(upstream), set()
    model.patch_embed.register_forward_pre_hook(lambda _, given: sizes.add(len(given[0])))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mosaics, "_VALUES_AT_ONCE", limit)
        found = found_in(model, case.images)
    assert found == Probed(Layout(case.prefix(upstream), 0, case.grid))
    assert (sizes == {1}) == (limit == 0)


def test_of_images_without_values_the_layout_is_that_of_noise(first):
    model = build(first)
    expected = Probed(Layout(1, 0, GRID))
    assert found_in(model, images_of()[:0]) == expected
    assert found_in(model, images_of().fill_(float("nan"))) == expected
    for other in (images_of().int(), images_of()[0, 0], None, [images_of()]):
        assert "floating images" in found_in(model, other).reason
