"""What a model cannot take is refused before anything runs: expected, found, what to do."""

from __future__ import annotations

import pickle
from functools import partial

import pytest
import torch
from torch import nn

import dinov2_attn
from dinov2_attn.errors import InvalidInputError, NotGraftedError, OutOfRangeError, in_one_line
from tests.support import upstreams
from tests.support.strategies import noise

IMAGES = noise(2, 3, 4, 6, seed=0)  # patch size 2: a grid of 2 × 3


@pytest.fixture(scope="module")
def model(models):
    return models.cls("DinoVisionTransformer")(
        img_size=4, patch_size=2, embed_dim=4, depth=2, num_heads=1, block_chunks=0
    )


BAD_IMAGES = {
    "three dimensions": (
        IMAGES[0],
        r"(?s)\(B, C, H, W\).*\.\nFound a float32 tensor of shape \(3, 4, 6\)",
    ),
    "integers": (
        IMAGES.byte(),
        r"(?s)floating tensor.*\.\nFound a uint8 tensor.*images\.float\(\)",
    ),
    "an array": (IMAGES.numpy(), r"(?s)floating tensor.*\.\nFound ndarray"),
    "a generator": ((x for x in [IMAGES]), r"(?s)floating tensor.*\.\nFound generator"),
    "nothing": (None, r"(?s)floating tensor.*\.\nFound NoneType"),
    "four channels": (noise(1, 4, 4, 4, seed=0), r"(?s)3 channels.*\.\nFound .*\(1, 4, 4, 4\)"),
    "channels last": (IMAGES.permute(0, 2, 3, 1), r"(?s)3 channels.*\.\nFound .*\(2, 4, 6, 3\)"),
    "height off": (noise(1, 3, 5, 4, seed=0), r"multiples of the patch size 2 × 2\.\nFound 5 × 4"),
    "width off": (noise(1, 3, 4, 7, seed=0), r"patch size 2 × 2\.\nFound 4 × 7\.\nCrop"),
    "no pixel": (noise(1, 3, 0, 4, seed=0), r"patch size 2 × 2\.\nFound 0 × 4"),
    "empty list": ([], r"at least one tensor\.\nFound an empty list"),
    "bad list": ([IMAGES, IMAGES[0]], r"Found a float32 tensor of shape \(3, 4, 6\)"),
}


@pytest.mark.parametrize(("images", "message"), BAD_IMAGES.values(), ids=BAD_IMAGES)
def test_images_that_cannot_be(model, images, message):
    for ask in (model.get_last_self_attention, model.get_self_attention):
        with pytest.raises(InvalidInputError, match=message):
            ask(images)
    for ask in (model, model.forward_features):
        with pytest.raises(InvalidInputError, match=message):
            ask(images, return_attention=True)


WAYS = {
    "channels last": (torch.zeros(2, 4, 6, 3), r"images\.movedim\(-1, 1\)"),
    "one channel": (torch.zeros(2, 1, 4, 6), r"images\.repeat\(1, 3, 1, 1\)"),
    "a fourth channel": (torch.zeros(2, 4, 6, 8), r"images\[:, :3\]"),
    "two channels": (torch.zeros(2, 2, 4, 6), "in_chans=2"),
    "bytes": (torch.zeros(2, 3, 4, 6).byte(), r"normalize\(images\.float\(\) / 255, "),
    "bytes of one image": (torch.zeros(3, 4, 6).byte(), r"\(images\[None\]\.float\(\) / 255, "),
    "bytes with channels last": (
        torch.zeros(2, 4, 6, 3).byte(),
        r"\(images\.permute\(0, 3, 1, 2\)\.float\(\) / 255, ",
    ),
    "bytes of three columns": (torch.zeros(2, 3, 4, 3).byte(), r"\(images\.float\(\) / 255, "),
    "black and white": (torch.zeros(2, 3, 4, 6).bool(), r"\(images\.float\(\), "),
    "one image": (torch.zeros(3, 4, 6), r"\nGive images\[None\]\.$"),
    "a video": (torch.zeros(2, 5, 3, 4, 6), r"\nReshape them to \(B, C, H, W\)\.$"),
    "no tensor": ("image.png", r"torch\.as_tensor"),
}


@pytest.mark.parametrize(("images", "way"), WAYS.values(), ids=WAYS)
def test_an_error_about_images_says_how_to_make_right_ones(grafted, images, way):
    model = grafted.cls("DinoVisionTransformer")(
        img_size=4, patch_size=2, embed_dim=4, depth=1, num_heads=1, block_chunks=0
    )
    with pytest.raises(InvalidInputError, match=way):
        model.get_self_attention(images)


def test_a_model_of_one_channel_takes_the_mean_of_others(grafted):
    model = grafted.cls("DinoVisionTransformer")(
        img_size=4, patch_size=2, embed_dim=4, depth=1, num_heads=1, block_chunks=0, in_chans=1
    )
    for channels in (3, 4):
        with pytest.raises(InvalidInputError, match=r"(?s)1 channel in.*images\.mean\(1, keepdim"):
            model.get_self_attention(torch.zeros(2, channels, 4, 6))


BAD_MASKS = {
    "another grid": (
        torch.zeros(2, 5, dtype=torch.bool),
        r"(?s)\(2, 6\).*\.\nFound a bool tensor of",
    ),
    "another batch": (
        torch.zeros(3, 6, dtype=torch.bool),
        r"(?s)\(2, 6\).*\.\nFound a bool .*\(3, 6\)",
    ),
    "a grid": (torch.zeros(2, 2, 3, dtype=torch.bool), r"Flatten the mask grid row by row"),
    "floats": (
        torch.zeros(2, 6),
        r"(?s)boolean tensor.*\.\nFound a float32 tensor.*masks\.bool\(\)",
    ),
    "a list": ([None, None], r"Found list"),
}


@pytest.mark.parametrize(("masks", "message"), BAD_MASKS.values(), ids=BAD_MASKS)
def test_masks_that_cannot_be(model, masks, message):
    with pytest.raises(InvalidInputError, match=message):
        model.get_last_self_attention(IMAGES, masks)


@pytest.mark.parametrize("masks", [[None], torch.zeros(2, 6, dtype=torch.bool)])
def test_masks_of_a_list_are_counted(model, masks):
    with pytest.raises(InvalidInputError, match="list of 3 masks, one for each tensor"):
        model.get_self_attention([IMAGES] * 3, masks=masks)


BAD_LAYERS = {
    "too many": (3, OutOfRangeError, r"between 0 and 2\.\nFound 3"),
    "negative": (-1, OutOfRangeError, r"between 0 and 2\.\nFound -1"),
    "beyond": ([0, 2], OutOfRangeError, r"between -2 and 1, there being 2\.\nFound 2\."),
    "before": ([-3], OutOfRangeError, r"Found -3"),
    "a word": ("last", InvalidInputError, r"Expected blocks as whole numbers\.\nFound 'l'"),
    "a generator": ((i for i in [0]), InvalidInputError, r"Found <generator"),
    "a set": ({0}, InvalidInputError, r"whole numbers\.\nFound \{0\} of type set"),
    "a fraction": (
        1.5,
        InvalidInputError,
        r"Expected n, the blocks to take, as whole numbers\.\nFound 1\.5 of type float",
    ),
}


@pytest.mark.parametrize(("n", "error", "message"), BAD_LAYERS.values(), ids=BAD_LAYERS)
def test_layers_that_are_not_there(model, n, error, message):
    with pytest.raises(error, match=message):
        model.get_self_attention(IMAGES, n)


@pytest.mark.parametrize("queries", [7, -8, [0, 99], "class"])
def test_queries_that_are_not_there(model, queries):
    with pytest.raises(InvalidInputError, match="(?s)Expected .*.\nFound "):
        model.get_last_self_attention(IMAGES, queries=queries)


def test_nothing_runs_before_the_refusal(model):
    ran = []
    hook = model.patch_embed.register_forward_pre_hook(lambda *_: ran.append(1))
    for options in ({"queries": "class"}, {"heads": "max"}, {"queries": [0, 99]}):
        for ask in (
            model.get_self_attention,
            partial(model, return_attention=True),
            partial(model.forward_features, return_attention=True),
        ):
            with pytest.raises(InvalidInputError):
                ask(IMAGES, **options)
    with pytest.raises(InvalidInputError):
        model.get_self_attention(IMAGES, n=9)
    hook.remove()
    assert ran == []


def test_every_row_that_a_model_has_may_be_asked_and_no_other(models):
    options = {"num_register_tokens": 3} if models.has_registers else {}
    model = models.cls("DinoVisionTransformer")(
        img_size=4, patch_size=2, embed_dim=4, depth=1, num_heads=1, block_chunks=0, **options
    )
    rows = 1 + sum(options.values()) + 6
    for query in (rows - 1, -rows):
        assert model.get_last_self_attention(IMAGES, queries=query).shape == (2, 1, 1, rows)
    ran = []
    model.patch_embed.register_forward_pre_hook(lambda *_: ran.append(1))
    for query in (rows, -rows - 1):
        with pytest.raises(OutOfRangeError, match=f"there being {rows} tokens"):
            model.get_last_self_attention(IMAGES, queries=query)
    assert ran == []


def test_patches_may_be_oblong(grafted):
    """A pair is height and width: upstream takes it, for images of the size trained at."""
    model = grafted.cls("DinoVisionTransformer")(
        img_size=8, patch_size=(2, 4), embed_dim=4, depth=1, num_heads=1, block_chunks=0
    )
    images = noise(1, 3, 8, 8, seed=0)
    assert model.get_last_self_attention(images, queries=[8, -9]).shape == (1, 1, 2, 9)
    with pytest.raises(InvalidInputError, match="patch size 2 × 4.\nFound 8 × 6"):
        model.get_last_self_attention(images[..., :6])


def test_nan_images_flow_through(model):
    images = IMAGES.clone()
    images[0, 0, 0, 0] = float("nan")
    weights = model.get_last_self_attention(images)
    assert weights[0].isnan().any()
    assert not weights[1].isnan().any()


def test_a_module_that_was_never_grafted_says_so(models):
    """A model may hold blocks of the user's own, which its package does not know."""

    class Block(models.cls("NestedTensorBlock")):
        def forward(self, x):
            return super().forward(x)

    model = models.cls("DinoVisionTransformer")(
        img_size=4, patch_size=2, embed_dim=4, depth=2, num_heads=1, block_chunks=0
    )
    model.blocks[1] = Block(4, num_heads=1)
    with pytest.raises(NotGraftedError, match=r"(?s)Block, whose forward was never.*install\("):
        model.get_last_self_attention(IMAGES)
    with dinov2_attn.install(model):
        assert len(model.get_self_attention(IMAGES)) == 2

    model.blocks[1] = nn.Identity()
    assert len(model.get_self_attention(IMAGES)) == 1  # chunks are padded with these

    model.blocks[1] = models.cls("NestedTensorBlock")(4, num_heads=1)
    model.blocks[1].attn = nn.Linear(4, 4)
    with pytest.raises(NotGraftedError, match="Linear, whose forward was never grafted"):
        model.get_last_self_attention(IMAGES)
    with pytest.raises(NotGraftedError):
        model(IMAGES, return_attention=True)


def test_too_many_positional_arguments_are_refused(layers):
    """UPSTREAM trap 2: what a hand-patched call passes by position lands nowhere by accident."""
    module = layers.attentions[1](4, num_heads=1)
    with pytest.raises(InvalidInputError, match="(?s)positional arguments.*.\nFound 4"):
        module(noise(1, 3, 4, seed=0), None, None, True, return_attn=True)


@pytest.mark.parametrize(
    "call", [lambda b, x: b(return_attention=True), lambda b, x: b(x, pos=1, return_attention=True)]
)
def test_a_block_takes_tokens_and_nothing_else(layers, call):
    block = layers.cls("Block")(4, num_heads=1)
    with pytest.raises(
        InvalidInputError,
        match=r"(?s)tokens of a block.*\.\nFound nothing|x, queries.*\.\nFound pos",
    ):
        call(block, noise(1, 3, 4, seed=0))


def test_a_bias_of_unknown_kind_is_named():
    with dinov2_attn.install(upstreams.MOGE.package):
        module = upstreams.MOGE.cls("Attention")(4, num_heads=1)
        with pytest.raises(
            InvalidInputError, match=r"(?s)dense tensor.*\.\nFound .*builtins\.dict"
        ):
            module(noise(1, 3, 4, seed=0), {}, return_attn=True)


def test_a_bias_that_upstream_would_refuse_is_refused(models):
    """Without xFormers ``MemEffAttention`` has no kernel that takes one."""
    module, tokens = models.attentions[1](4, num_heads=1), noise(1, 3, 4, seed=0)
    with pytest.raises(AssertionError):
        module(tokens, attn_bias=noise(3, 3, seed=0))
    with pytest.raises(InvalidInputError, match="XFORMERS_AVAILABLE is true.\nFound one of type"):
        module(tokens, attn_bias=noise(3, 3, seed=0), return_attn=True)


def test_arguments_that_a_class_does_not_have_are_refused():
    upstream = upstreams.DEPTH_ANYTHING
    with dinov2_attn.install(upstream.package):
        module, tokens = upstream.attentions[0](4, num_heads=1), noise(1, 3, 4, seed=0)
        for name in ("attn_bias", "is_causal", "pos"):
            with pytest.raises(InvalidInputError, match=f"(?s)arguments x, queries.*{name}"):
                module(tokens, **{name: None}, return_attn=True)


@pytest.mark.parametrize(
    ("tokens", "found"),
    [
        ("x", "str"),
        (None, "NoneType"),
        (noise(3, 4, seed=0), r"\(3, 4\)"),
        ((noise(1, 3, 4, seed=0),), "tuple"),
    ],
)
def test_tokens_that_are_none_are_refused(layers, tokens, found):
    for ask in (
        lambda t: layers.cls("Block")(4, num_heads=1)(t, return_attention=True),
        lambda t: layers.attentions[1](4, num_heads=1)(t, return_attn=True),
    ):
        words = rf"(?s)tensor of shape \(B, N, C\).*\.\nFound {found}\."
        with pytest.raises(InvalidInputError, match=words):
            ask(tokens)


def test_an_error_is_three_lines_and_three_attributes():
    error = InvalidInputError("whole patches", "5 × 4 pixels", "Crop the images.")
    assert str(error) == "Expected whole patches.\nFound 5 × 4 pixels.\nCrop the images."
    assert (error.expected, error.found, error.hint) == error.args
    again = InvalidInputError(error.expected, "what?", error.hint)
    assert str(again).splitlines()[1] == "Found what?"


def test_an_error_can_be_said_in_one_line():
    error = InvalidInputError("whole patches", "5\n× 4 pixels", "Crop the images.")
    assert in_one_line(error) == "expected whole patches; found 5 × 4 pixels. Crop the images."
    assert in_one_line(OSError("no\nroom")) == "no room"


def test_errors_survive_pickling():
    """They cross process boundaries, out of data loader workers for instance."""
    error = OutOfRangeError("one", "two", "Three.")
    again = pickle.loads(pickle.dumps(error))
    assert str(again) == str(error) == "Expected one.\nFound two.\nThree."
    assert isinstance(again, ValueError)
    assert isinstance(again, IndexError)
