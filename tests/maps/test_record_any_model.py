"""Recording models of other libraries, without install: against what they say themselves."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import dinov2_attn
from dinov2_attn import record
from dinov2_attn.errors import InvalidInputError, NotRecordedError, OutOfRangeError
from tests.support.recordings import build
from tests.support.strategies import noise
from tests.support.tolerances import assert_close, assert_same_bits

SIZE = 56
IMAGES = noise(2, 3, SIZE, SIZE, seed=0).float()


def sharp(model):
    """Make attention far from uniform, so that a wrong row shows."""
    with torch.no_grad():
        for i, parameter in enumerate(model.parameters()):
            if parameter.ndim > 1:
                parameter.copy_(noise(*parameter.shape, seed=i) / parameter[0].numel() ** 0.5 * 2)
    return model.eval()


def of_transformers(name, attention):
    transformers = pytest.importorskip("transformers", reason="record of timm's models runs")
    config = getattr(transformers, name.replace("Model", "Config"))(
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        intermediate_size=48,
        image_size=SIZE,
        patch_size=14,
    )
    config._attn_implementation = attention
    try:
        return sharp(getattr(transformers, name)(config))
    except ImportError:  # a stand-in of theirs
        pytest.skip("this transformers takes no such torch; record of timm's models runs")


TRANSFORMERS = ["Dinov2Model", "Dinov2WithRegistersModel", "DINOv3ViTModel"]


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("name", TRANSFORMERS)
@torch.no_grad()
def test_models_of_transformers(name, attention):
    model, eager = of_transformers(name, attention), of_transformers(name, "eager")
    eager.load_state_dict(model.state_dict())
    # In float64: features of the two kernels drift apart from layer to layer.
    model, eager, images = model.double(), eager.double(), IMAGES.double()
    plain = model(images).last_hidden_state
    with record(model, check="every") as maps:
        features = model(images).last_hidden_state
    assert_same_bits(features, plain)
    expected = eager(images, output_attentions=True).attentions
    assert len(maps.weights) == len(expected) == 3
    for ours, theirs in zip(maps.weights, expected, strict=True):
        assert_close(ours, theirs)
    assert all(str(layer).endswith("attention") for layer in maps.layers)


TIMM = ["vit_tiny_patch16_224", "vit_small_patch14_reg4_dinov2", "vit_small_patch16_dinov3"]


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("name", TIMM)
@torch.no_grad()
def test_models_of_timm(name, fused):
    timm = pytest.importorskip("timm", reason="record of transformers' models runs")
    size = 56 if "14" in name else 64
    model = sharp(timm.create_model(name, img_size=size, depth=2))
    for block in model.blocks:
        block.attn.fused_attn = fused
    images = noise(2, 3, size, size, seed=0).float()
    plain = model(images)
    with record(model, check="every") as maps:
        features = model(images)
    assert_same_bits(features, plain)
    assert maps.layers == ("blocks.0.attn", "blocks.1.attn")
    # The other branch of timm's own code, whose weights a softmax makes.
    seen = []
    for block in model.blocks:
        block.attn.fused_attn = False
        block.attn.attn_drop.register_forward_hook(lambda _, args, __: seen.append(args[0]))
    model(images)
    for ours, theirs in zip(maps.weights, seen, strict=True):
        assert_close(ours, theirs)


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv, self.proj, self.num_heads = nn.Linear(8, 24), nn.Linear(8, 8), 2

    def project(self, x):
        split = self.qkv(x).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
        return split.unbind(0)

    def forward(self, x):
        return self.proj(
            F.scaled_dot_product_attention(*self.project(x)).transpose(1, 2).flatten(2)
        )


class Aggregator(nn.Module):
    """Frames and all tokens by turns, as in VGGT."""

    def __init__(self, depth=2):
        super().__init__()
        self.frame_blocks = nn.ModuleList([Attention() for _ in range(depth)])
        self.global_blocks = nn.ModuleList([Attention() for _ in range(depth)])

    def forward(self, x):
        batch, frames, length, channels = x.shape
        for one, all_ in zip(self.frame_blocks, self.global_blocks, strict=True):
            x = x + one(x.flatten(0, 1)).reshape(x.shape)
            x = x + all_(x.reshape(batch, frames * length, channels)).reshape(x.shape)
        return x


def test_several_kinds_of_attention_are_told_apart():
    model = Aggregator()
    x = noise(2, 3, 5, 8, seed=0).float()
    with record(model) as maps:
        model(x)
        model(x)
    assert [one.layers for one in maps] == [
        ("frame_blocks.0", "frame_blocks.1"),
        ("global_blocks.0", "global_blocks.1"),
    ] * 2
    assert [tuple(one.weights[0].shape) for one in maps[:2]] == [(6, 2, 5, 5), (2, 2, 15, 15)]
    query, key, _ = model.frame_blocks[0].project(x.flatten(0, 1))
    assert_close(maps[0].weights[0], (query @ key.mT / 2).softmax(-1))


def test_layers_by_name_and_by_number():
    model = Aggregator()
    x = noise(1, 2, 3, 8, seed=0).float()
    for layers, expected in (
        (1, ("global_blocks.1",)),
        ([0], ("frame_blocks.0",)),
        (["global_blocks.0"], ("global_blocks.0",)),
        ("frame_blocks.1", ("frame_blocks.1",)),
        ([-1, "frame_blocks.0"], ("frame_blocks.0", "global_blocks.1")),
    ):
        with record(model, layers) as maps:
            model(x)
        assert tuple(layer for one in maps for layer in one.layers) == expected
    with (
        pytest.raises(OutOfRangeError, match="Did you mean 'frame_blocks"),
        record(model, "frame_block.1"),
    ):
        model(x)


class FromOutside(nn.Module):
    """The kernel of the last block is called by the model, as LightlyTrain's EoMT does."""

    def __init__(self, inside=2):
        super().__init__()
        self.blocks = nn.ModuleList([Attention() for _ in range(3)])
        self.inside = inside

    def forward(self, x):
        for i, block in enumerate(self.blocks):
            if i < self.inside:
                x = block(x)
            else:
                mixed = F.scaled_dot_product_attention(*block.project(x))
                x = block.proj(mixed.transpose(1, 2).flatten(2))
        return x


@pytest.mark.parametrize("inside", [0, 2])
def test_a_kernel_that_is_called_from_outside_its_module_is_an_error(inside):
    model, x = FromOutside(inside), noise(1, 3, 8, seed=0).float()
    words = "Found 1 that did not: blocks.2" if inside else "in which none ran"
    with pytest.raises(NotRecordedError, match=words), record(model):
        model(x)
    if inside:
        with record(model, ["blocks.0", "blocks.1"]) as maps:
            model(x)
        assert len(maps.weights) == 2


class ByHand(Attention):
    def forward(self, x):
        query, key, value = self.project(x)
        powers = (query @ key.mT / 2).exp()
        return self.proj((powers / powers.sum(-1, keepdim=True) @ value).transpose(1, 2).flatten(2))

    def unused(self, x):
        return x.softmax(-1)


def test_what_cannot_be_seen_is_an_error_that_names_the_module():
    with (
        pytest.raises(NotRecordedError, match=r"(?s)ByHand to call.*exp and a sum"),
        record(model := nn.Sequential(ByHand())),
    ):
        model(noise(1, 3, 8, seed=0).float())


def test_an_instance_whose_forward_was_replaced_is_recorded_and_left_as_it_was():
    model = nn.Sequential(Attention())
    own = model[0].forward
    model[0].forward = lambda x: own(x) * 2
    replaced = model[0].forward
    x = noise(1, 3, 8, seed=0).float()
    plain = model(x)
    with record(model) as maps:
        assert_same_bits(model(x), plain)
    assert maps.weights[0].shape == (1, 2, 3, 3)
    assert model[0].forward is replaced


def test_classes_are_left_as_they_were():
    before = dict(vars(Attention))
    model = Aggregator()
    with record(model):
        assert vars(Attention)["forward"] is not before["forward"]
        model(noise(1, 2, 3, 8, seed=0).float())
    assert dict(vars(Attention)) == before
    assert dinov2_attn.status().grafted == ()


def test_cls_of_a_model_without_one_is_no_patch():
    timm = pytest.importorskip("timm", reason="this case needs timm's options; others run")
    model = sharp(
        timm.create_model(
            "vit_tiny_patch16_224",
            img_size=64,
            depth=2,
            class_token=False,
            global_pool="avg",
        )
    )
    images = noise(1, 3, 64, 64, seed=0).float()
    with (
        pytest.raises(InvalidInputError, match="Found patches from position 0 on"),
        record(model, queries="cls"),
    ):
        model(images)
    with record(model, queries=0) as maps:
        model(images)
    assert (maps.prefix, maps.queries) == (0, (0,))
    with pytest.raises(InvalidInputError, match="for CLS"):
        dinov2_attn.rollout(model, images)
    assert dinov2_attn.rollout(model, images, queries=0).weights.shape == (1, 1, 16)


class WithDecoder(nn.Module):
    """A DINOv2, and attention of another class behind it, as in Dinomaly."""

    def __init__(self, encoder, decoder):
        super().__init__()
        self.encoder, self.decoder = encoder, decoder

    def forward(self, images):
        return self.decoder(self.encoder.forward_features(images)["x_norm_patchtokens"])


def test_attention_beside_a_dinov2_is_recorded_too(models):
    encoder = build(models).float()
    decoder = sharp(Attention())
    model, images = WithDecoder(encoder, decoder), noise(2, 3, 4, 6, seed=0).float()
    with record(model) as every:
        model(images)
    assert [len(maps.layers) for maps in every] == [3, 1]
    assert every[1].layers == ("decoder",)
    with record(model, [0, 1, 2]) as numbered, record(encoder) as alone:
        model(images)
    assert numbered.layers == alone.layers == (0, 1, 2)
    assert_close(list(every[0].weights), list(alone.weights))
    assert_close(list(numbered.weights), list(alone.weights))
    tokens = encoder.forward_features(images)["x_norm_patchtokens"]
    query, key, _ = decoder.project(tokens)
    assert_close(every[1].weights[0], (query @ key.mT / 2).softmax(-1))
    assert every[0].layers == tuple(path for path in paths_of(model) if path != "decoder")
    with record(encoder) as itself:
        encoder(images)
    assert itself.layers == (0, 1, 2)


def paths_of(model):
    return [name for name, module in model.named_modules() if hasattr(module, "qkv")]


def tiny(**options):
    timm = pytest.importorskip("timm", reason="these cases need timm's models; others run")
    given = {"depth": 2, "img_size": 32, "patch_size": 16, "embed_dim": 48, "num_heads": 2}
    return sharp(timm.create_model("vit_tiny_patch16_224", **{**given, **options}))


def test_a_pass_that_failed_leaves_nothing_in_the_next():
    model, (a, b) = tiny(), noise(2, 1, 3, 32, 32, seed=0).float()
    calls = []

    def fail_once(*_):
        calls.append(1)
        if len(calls) == 1:
            raise RuntimeError("out of memory")

    model.blocks[1].register_forward_pre_hook(fail_once)
    recording = record(model)
    maps = recording.__enter__()
    with pytest.raises(RuntimeError, match="out of memory"):
        model(a)
    model(b)
    with pytest.raises(NotRecordedError, match="1 without some of these layers"):
        recording.__exit__(None, None, None)
    expected = dinov2_attn.attention_maps(model, b)
    assert_close(list(maps.weights), list(expected.weights))


def test_a_pass_of_some_layers_is_one_of_its_own():
    model, (a, b) = tiny(), noise(2, 1, 3, 32, 32, seed=0).float()
    with record(model) as maps:
        model.forward_intermediates(a, indices=[0], stop_early=True, intermediates_only=True)
        model.forward_features(b)
    assert [one.layers for one in maps] == [("blocks.0.attn",), ("blocks.0.attn", "blocks.1.attn")]
    assert_close(maps[0].weights[0], dinov2_attn.attention_maps(model, a).weights[0])
    assert_close(list(maps[1].weights), list(dinov2_attn.attention_maps(model, b).weights))


class Tiled(nn.Module):
    def __init__(self, vit):
        super().__init__()
        self.vit = vit

    def forward(self, images):
        return torch.stack([self.vit(tile) for tile in images.split(32, -1)])


def test_an_earlier_call_does_not_end_a_later_one_too_soon():
    model, wide = Tiled(tiny()), noise(1, 3, 32, 64, seed=0).float()
    for images in (wide, wide[..., :32], wide):
        if images.shape[-1] == 32:
            assert len(dinov2_attn.attention_maps(model, images, 1).layers) == 1
            continue
        with pytest.raises(InvalidInputError, match="by each layer once"):
            dinov2_attn.attention_maps(model, images, 1)


class Resizing(nn.Module):
    def __init__(self, vit):
        super().__init__()
        self.vit = vit

    def forward(self, images):
        return self.vit(F.interpolate(images, (64, 64)))


def test_the_grid_of_one_size_is_not_taken_for_another():
    model = Resizing(tiny(img_size=64))
    for size in ((128, 128), (64, 256), (64, 64)):
        maps = dinov2_attn.attention_maps(model, noise(1, 3, *size, seed=0).float())
        assert maps.grid == (4, 4)


class Flat(nn.Module):
    """Its own child cuts the images, as in torchvision's and CLIP's vision transformers."""

    def __init__(self):
        super().__init__()
        self.cut = nn.Conv2d(3, 8, 2, 2)
        self.layers = nn.ModuleList(Attention() for _ in range(2))

    def forward(self, images):
        tokens = self.cut(images).flatten(2).transpose(1, 2)
        for layer in self.layers:
            tokens = tokens + layer(tokens)
        return tokens


@torch.no_grad()
def test_passes_of_a_model_that_cuts_its_images_itself_have_their_own_grids():
    model, images = sharp(Flat()), noise(2, 3, 8, 12, seed=0).float()
    with record(model) as maps:
        for some in (images, images[..., :8], images[:, :, :6]):
            model(some)
    assert [one.grid for one in maps.passes] == [(4, 6), (4, 4), (3, 6)]


class Guided(Flat):
    def forward(self, images, guide=None, prompt=None):
        return super().forward(images)


@torch.no_grad()
def test_the_grid_is_that_of_the_first_images_that_a_model_is_given():
    model, images = sharp(Guided()), noise(2, 3, 8, 12, seed=0).float()
    prompt, guide = noise(2, 4, 8, seed=1).float(), noise(2, 3, 10, 10, seed=2).float()
    with record(model) as maps:
        model(images, guide)
        model(prompt=prompt, guide=None, images=images)
    assert [one.grid for one in maps.passes] == [(4, 6), (4, 6)]


class Two(nn.Module):
    def __init__(self, first, second):
        super().__init__()
        self.first, self.second = first, second

    def forward(self, images):
        return self.first(images).mean() + self.second(images).mean()


@pytest.mark.parametrize("order", [1, -1])
def test_names_of_rows_are_those_of_each_encoder(order):
    encoders = [tiny(class_token=False, global_pool="avg"), tiny()][::order]
    images = noise(1, 3, 32, 32, seed=0).float()
    model = Two(*encoders)
    with record(model, queries="patches") as maps:
        model(images)
    assert [(one.prefix, one.queries) for one in maps] == [
        (prefix, tuple(range(prefix, prefix + 4))) for prefix in [0, 1][::order]
    ]
    with pytest.raises(InvalidInputError, match="for CLS"), record(model, queries="cls"):
        model(images)


class Hidden(nn.Module):
    """Attention by another library's helper, which names no kernel that is seen."""

    def __init__(self):
        super().__init__()
        self.wq, self.wk, self.wv = (nn.Linear(8, 8) for _ in range(3))

    def forward(self, x):
        scores = self.wq(x) @ self.wk(x).mT
        powers = scores.exp()
        return powers / powers.sum(-1, keepdim=True) @ self.wv(x)


def test_attention_by_its_projections_alone_is_an_error_and_not_left_out():
    model = nn.Sequential(Attention(), Hidden())
    with pytest.raises(NotRecordedError, match="Hidden to call one kernel"), record(model):
        model(noise(1, 4, 8, seed=0).float())


@pytest.mark.parametrize("cls", [nn.MultiheadAttention, type("Own", (nn.MultiheadAttention,), {})])
def test_pytorchs_own_attention_returns_its_weights_itself(cls):
    """A subclass without code of its own is no other."""
    model = nn.Sequential(cls(8, 2))
    with pytest.raises(InvalidInputError, match="need_weights=True"), record(model):
        pass


FIRST, SECOND, THIRD, FOURTH, FIFTH, SIXTH = range(6)


def mix(query, key, value):
    return F.scaled_dot_product_attention(query, key, value)


class Numbered(nn.Module):
    """Its kernel is in a function beside it, one of many names that its code has."""

    def __init__(self):
        super().__init__()
        self.one, self.two, self.three = (nn.Linear(8, 8) for _ in range(3))

    def forward(self, x):
        several = [x, x, x, self.one(x), self.two(x), self.three(x)]
        assert several[FIRST] is several[SECOND] is several[THIRD]
        return mix(several[FOURTH], several[FIFTH], several[SIXTH])


def test_a_kernel_in_a_function_among_other_names_is_found():
    model, x = nn.Sequential(Numbered()), noise(1, 3, 8, seed=0).float()
    with record(model) as maps:
        model(x)
    expected = (model[0].one(x) @ model[0].two(x).mT / 8**0.5).softmax(-1)
    assert_close(maps.weights[0].flatten(), expected.flatten())
