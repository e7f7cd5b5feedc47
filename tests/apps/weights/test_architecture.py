"""What a checkpoint's weights say of the model that they are of, and what they cannot say."""

from __future__ import annotations

import contextlib
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dinov2_attn.apps.weights.architecture import describe, infer
from dinov2_attn.apps.weights.checkpoints import fill
from dinov2_attn.apps.weights.config_files import ModelConfig
from dinov2_attn.apps.weights.models import Architecture, build, build_like
from dinov2_attn.apps.weights.reading import Checkpoint, read
from dinov2_attn.errors import InvalidInputError, UnreadableFileError
from tests.support import checkpoint_files, upstreams
from tests.support.strategies import noise, randomise
from tests.support.tolerances import assert_close, assert_same_bits


@pytest.fixture(scope="module", autouse=True)
def _imported():
    upstreams.FIRST.module("dinov2.models.vision_transformer")


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    return tmp_path_factory.mktemp("architectures") / "weights.pth"


SMALL = Architecture(
    embed_dim=64,
    depth=2,
    num_heads=1,
    patch_size=2,
    img_size=6,
    in_chans=3,
    registers=0,
    ffn="mlp",
    hidden=256,
    layer_scale=True,
    qkv_bias=True,
    proj_bias=True,
    ffn_bias=True,
)


def with_hidden(architecture):
    """Draw what the FFN has inside: of SwiGLU upstream makes a multiple of 8."""
    ffns = {
        "mlp": st.integers(1, 300),
        "swiglufused": st.integers(1, 30).map(lambda n: 8 * n),
        "identity": st.just(0),
    }
    return ffns[architecture.ffn].map(
        lambda hidden: replace(
            architecture, hidden=hidden, ffn_bias=architecture.ffn_bias and hidden > 0
        )
    )


architectures = st.builds(
    lambda patch_size, grid, **options: Architecture(
        patch_size=patch_size, img_size=patch_size * grid, hidden=0, **options
    ),
    embed_dim=st.integers(1, 70),
    depth=st.integers(1, 12),
    num_heads=st.just(1),
    patch_size=st.integers(1, 5),
    grid=st.integers(1, 5),
    in_chans=st.integers(1, 4),
    registers=st.integers(0, 3 if upstreams.CHECKOUT else 0),
    ffn=st.sampled_from(["mlp", "swiglufused", "identity"]),
    layer_scale=st.booleans(),
    qkv_bias=st.booleans(),
    proj_bias=st.booleans(),
    ffn_bias=st.booleans(),
).flatmap(with_hidden)


@given(architecture=architectures, seed=st.integers(0, 99))
def test_the_inferred_model_equals_the_saved_model(file, architecture, seed):
    """Upstream's own constructor, its weights, and back: the same architecture, the same output."""
    model = randomise(build_like(architecture), seed)
    torch.save({"teacher": checkpoint_files.training(model).state_dict()}, file)
    checkpoint = read(file)
    assert infer(checkpoint, heads=1) == architecture
    again = build_like(infer(checkpoint, heads=1))
    fill(again, checkpoint)
    side = architecture.img_size
    images = noise(1, architecture.in_chans, side, side, seed=seed)
    with torch.no_grad():
        assert_close(again(images), model(images))


def test_a_published_architecture_has_its_name():
    model = build("vit_small", patch_size=7, img_size=28)
    found = infer(Checkpoint("x.pth", model.state_dict()))
    assert str(found) == "ViT-S/7"
    assert found.num_heads == model.num_heads
    again = build_like(found)
    assert {k: v.shape for k, v in again.state_dict().items()} == {
        k: v.shape for k, v in model.state_dict().items()
    }
    assert str(again) == str(model)
    assert_same_bits(again.blocks[0].ls1.gamma, model.blocks[0].ls1.gamma)


def test_larger_published_architectures_have_their_names():
    """Their dimensions alone: as models they would take gigabytes."""
    sizes = {
        "ViT-B/14": (768, 12, 0),
        "ViT-L/14": (1024, 24, 0),
        "ViT-g/14, 4 registers": (1536, 40, 4),
    }
    for caption, (embed_dim, depth, registers) in sizes.items():
        dimensions = {"embed_dim": embed_dim, "depth": depth, "registers": registers}
        assert str(replace(SMALL, patch_size=14, **dimensions)) == caption


def test_other_architectures_are_named_by_their_dimensions():
    assert str(SMALL) == "ViT-64x2/2"
    assert str(replace(SMALL, registers=1)) == "ViT-64x2/2, 1 register"


def test_registers_come_with_the_published_interpolation(with_registers):
    model = build_like(replace(SMALL, registers=2))
    assert model.register_tokens.shape == (1, 2, 64)
    assert (model.interpolate_antialias, model.interpolate_offset) == (True, 0.0)


@pytest.mark.parametrize("name", ["reg_token", "model.timm.reg_token"])
def test_timms_registers_without_a_config_file_state_the_interpolation(name):
    state = {name: torch.ones(1, 2, 64), **build_like(SMALL).state_dict()}
    assert infer(Checkpoint("x.pth", state)).interpolation == (True, 0.0)


@pytest.mark.parametrize("name", ["reg_token.more", "register_tokens", "other"])
def test_without_them_the_interpolation_is_upstreams(name):
    state = {name: torch.ones(1, 2, 64), **build_like(SMALL).state_dict()}
    assert infer(Checkpoint("x.pth", state)).interpolation is None


def test_a_config_file_of_another_model_is_ignored_and_logged(caplog):
    caplog.set_level("INFO", "dinov2_attn")
    config = ModelConfig("config.json", embed_dim=65, interpolation=(False, 0.5))
    found = infer(replace(checkpoint(), config=config))
    assert found.interpolation is None
    assert caplog.messages == ["config.json describes another model than x.pth"]


def test_weights_are_described_if_they_can_be_read():
    """For a message of what does not fit: of what cannot be read there is nothing to say."""
    state = build_like(SMALL).state_dict()
    assert describe(state) == "ViT-64x2/2"
    assert describe({}) == ""
    assert describe({**state, "register_tokens": torch.ones(1, 3, 64)}) == "ViT-64x2/2, 3 registers"
    assert describe({**state, "register_tokens": torch.ones(1, 3)}) == ""


# Heads


def checkpoint(metadata=None, **changes):
    model = build_like(replace(SMALL, **changes))
    return Checkpoint("x.pth", dict(model.state_dict()), metadata=metadata or {})


def test_a_head_has_64_features_unless_stated_otherwise(caplog):
    caplog.set_level("INFO", "dinov2_attn")
    assert infer(checkpoint(embed_dim=128)).num_heads == 2
    assert infer(checkpoint(embed_dim=128)).heads_assumed
    assert not caplog.messages
    assert infer(checkpoint({"num_heads": "4"}, embed_dim=128)).num_heads == 4
    assert infer(checkpoint(embed_dim=128), heads=8).num_heads == 8
    assert infer(checkpoint({"num_heads": "3"}, embed_dim=96)).num_heads == 3


@pytest.mark.parametrize(
    ("metadata", "asked", "error", "message"),
    [
        (
            {},
            None,
            InvalidInputError,
            r"(?s)weights do not contain\.\nFound x.pth with 96 fea.*--num-heads N.*'num_",
        ),
        ({}, 5, InvalidInputError, r"divides 96 features\.\nFound 5\.\nGive another"),
        ({"num_heads": "7"}, None, InvalidInputError, r"divides 96 features\.\nFound 7\."),
        (
            {"num_heads": "3"},
            6,
            InvalidInputError,
            r"6 heads, as requested\.\nFound x.pth with 3\.\nLeave",
        ),
        ({"num_heads": "0"}, None, UnreadableFileError, r"(?s)above 0 as num_heads .*with '0'"),
        ({"num_heads": "-1"}, 3, UnreadableFileError, r"Found x.pth with '-1'"),
        ({"num_heads": "9" * 5000}, None, UnreadableFileError, r"Found x.pth with '9{20}'"),
        ({"num_heads": "100000"}, None, UnreadableFileError, r"with '100000'"),
        ({"num_heads": "99999"}, None, InvalidInputError, r"divides 96 features\.\nFound 99999\."),
        ({"num_heads": "²"}, None, UnreadableFileError, r"Found x.pth with '²'"),
    ],
)
def test_heads_that_are_unknown_impossible_or_contradicted(metadata, asked, error, message):
    with pytest.raises(error, match=message):
        infer(checkpoint(metadata, embed_dim=96), heads=asked)


# What is none


def change(name, tensor):
    return lambda state: {**state, name: tensor}


def in_every_block(name, tensor):
    return lambda state: {**state, **{f"blocks.{i}.{name}": tensor.clone() for i in range(2)}}


def without(*starts):
    return lambda state: {k: v for k, v in state.items() if not k.startswith(starts)}


def shared(state):
    """Of one number: a file of a kilobyte that asks for a model of any size."""
    return {name: torch.ones(1).expand(tensor.shape) for name, tensor in state.items()}


def one_block_many_times(state):
    first = {k[len("blocks.0.") :]: v for k, v in state.items() if k.startswith("blocks.0.")}
    return {**state, **{f"blocks.{i}.{k}": v for i in range(99) for k, v in first.items()}}


NONE = {
    "other names": (
        without("patch_embed", "cls"),
        r"without patch_embed.proj.weight; it holds pos",
    ),
    "another library's": (
        lambda _: {"embeddings.cls_token": torch.ones(1, 1, 64)},
        r"without patch_embed.proj.weight; it holds cls_token",
    ),
    "nothing of it": (
        lambda _: {"fc.weight": torch.ones(2)},
        r"without patch_embed.proj.weight; it holds fc.weight",
    ),
    "nothing at all": (lambda _: {}, r"without patch_embed.proj.weight; it holds none of it\."),
    "no blocks": (without("blocks"), r"without blocks\."),
    "a gap": (without("blocks.0"), "without blocks"),
    "a block more": (
        change("blocks.7.norm1.weight", torch.ones(64)),
        r"without blocks\.2",
    ),
    "a block of its own": (change("blocks.1.norm1.weight", torch.ones(65)), "with blocks.1 unlike"),
    "half a block": (without("blocks.1.mlp"), "with blocks.1 unlike blocks.0"),
    "attention of another width": (
        change("patch_embed.proj.weight", torch.ones(65, 3, 2, 2)),
        "whose attention does not have 65 features",
    ),
    "attention that ends in another width": (
        in_every_block("attn.proj.weight", torch.ones(65, 64)),
        "whose attention does not have 64 features",
    ),
    "keys of another width": (
        in_every_block("attn.qkv.weight", torch.ones(191, 64)),
        "whose attention does not have 64 features",
    ),
    "patches that are no squares": (
        change("patch_embed.proj.weight", torch.ones(64, 3, 2, 3)),
        "with patches of 2 × 3",
    ),
    "positions that are no square": (
        change("pos_embed", torch.ones(1, 9, 64)),
        "with 9 positions, not 1 and a square",
    ),
    "one position": (change("pos_embed", torch.ones(1, 1, 64)), "with 1 positions, not 1 and a sq"),
    "a matrix for positions": (
        change("pos_embed", torch.ones(10, 64)),
        r"with pos_embed of shape \(10, 64\)",
    ),
    "no features": (
        change("patch_embed.proj.weight", torch.ones(0, 3, 2, 2)),
        r"with patch_embed.proj.weight of shape \(0, 3, 2, 2\)",
    ),
    "no memory": (shared, r"with tensors that share their memory\."),
    "too little memory for one": (
        change("blocks.0.mlp.fc1.weight", torch.ones(64).expand(256, 64)),
        "with tensors that share their memory",
    ),
    "blocks of one memory": (one_block_many_times, "with tensors that share their memory"),
    "two blocks of one memory": (
        lambda state: {k: state[k.replace("blocks.1.", "blocks.0.")] for k in state},
        "with tensors that share their memory",
    ),
    "sparse": (
        change("pos_embed", torch.ones(1, 10, 64).to_sparse()),
        "with tensors that share their memory",
    ),
    "meta": (
        change("pos_embed", torch.ones(1, 10, 64, device="meta")),
        "with tensors that share their memory",
    ),
}


@pytest.mark.parametrize(("damage", "found"), NONE.values(), ids=NONE)
def test_weights_that_are_not_of_upstreams_classes(damage, found):
    state = damage(dict(build_like(SMALL).state_dict()))
    message = rf"(?s)Expected a checkpoint of a DINOv2 backbone with .*\.\nFound x.pth, ({found})"
    with pytest.raises(UnreadableFileError, match=message):
        infer(Checkpoint("x.pth", state))


@st.composite
def damages(draw):
    """Some changes to a state dict: names, shapes and what is missing."""
    names = st.sampled_from(sorted(build_like(SMALL).state_dict()))
    shapes = st.lists(st.sampled_from([0, 1, 2, 3, 64, 192]), max_size=4).map(tuple)
    change = st.one_of(
        st.tuples(st.just("lose"), names),
        st.tuples(st.just("reshape"), names, shapes),
        st.tuples(st.just("rename"), names, names),
    )
    return draw(st.lists(change, min_size=1, max_size=3))


@given(changes=damages())
def test_damaged_weights_are_an_error_before_or_after_building(changes):
    """Not one of upstream's or of torch's: a model that does not fit is ours to refuse."""
    state = dict(build_like(SMALL).state_dict())
    for kind, name, *more in changes:
        tensor = state.pop(name, torch.ones(64))
        if kind == "reshape":
            state[name] = torch.ones(*more)
        elif kind == "rename":
            state[more[0]] = tensor
    file = Checkpoint("x.pth", state)
    with contextlib.suppress(UnreadableFileError, InvalidInputError):
        fill(build_like(infer(file)), file)
