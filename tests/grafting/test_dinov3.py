"""DINOv3: the contract on its own code, against what its kernel was given."""

from __future__ import annotations

import sys

import pytest
import torch
from torch import Tensor

import dinov2_attn
from dinov2_attn import record
from dinov2_attn.errors import InvalidInputError
from tests.support import dinov3
from tests.support.dinov3 import CROPS, IMAGES, PATCHES, PREFIX, Truth
from tests.support.tolerances import assert_close, assert_same_bits

NEAR = {"within": 1e-6}
BOTH = [IMAGES, CROPS]
NONE = [None, None]


@pytest.fixture(scope="module", params=dinov3.COPIES, ids=str)
def copy(request):
    """A copy of DINOv3's code, not installed."""
    return request.param.load()


@pytest.fixture
def installed(copy):
    with dinov2_attn.install(copy.package):
        yield copy


@pytest.fixture
def model(installed):
    return installed.build()


def truth_of(run):
    with Truth() as truth:
        run()
    return truth.weights


def tensors_of(features):
    return {name: value for name, value in features.items() if isinstance(value, Tensor)}


def in_order(layers):
    """The weights of a list in the order of the kernel's calls: layer by layer, crop by crop."""
    return [weights for layer in layers for weights in layer]


def test_the_modules_are_grafted_now_and_at_a_later_import(copy):
    for name in copy.modules:
        __import__(name)
    before = dinov2_attn.status().grafted
    with dinov2_attn.install(copy.package):
        status = dinov2_attn.status()
        new = [name for name in status.grafted if name not in before]
        assert {name.rpartition(".")[0].rpartition(".")[0] for name in new} == {*copy.modules}
        assert not status.pending


def test_dinov3_is_waited_for_by_its_three_modules():
    before = {n: sys.modules.pop(n) for n in list(sys.modules) if n.split(".")[0] == "dinov3"}
    try:
        with dinov2_attn.install("dinov3"):
            assert dinov2_attn.status().pending == dinov3.META.modules
    finally:
        sys.modules.update(before)


def test_a_live_model_is_enough(copy):
    model = copy.build()
    truth = truth_of(lambda: model.forward_features(IMAGES))
    with dinov2_attn.install(model):
        assert_close(list(model.get_self_attention(IMAGES)), truth, **NEAR)
    assert not hasattr(model, "get_self_attention")


def test_weights_are_those_of_the_kernel_and_features_are_unchanged(copy):
    model = copy.build()
    before = model.forward_features(IMAGES)
    truth = truth_of(lambda: model.forward_features(IMAGES))
    with dinov2_attn.install(copy.package):
        assert_same_bits(tensors_of(model.forward_features(IMAGES)), tensors_of(before))
        assert_close(list(model.get_self_attention(IMAGES)), truth, **NEAR)
        assert_close(list(model.get_self_attention(IMAGES, [0, 2])), truth[::2], **NEAR)
        assert_close(model.get_last_self_attention(IMAGES), truth[-1], **NEAR)
        features = model.forward_features(IMAGES, return_attention=True)
        assert_close(list(features.pop("attentions")), truth, **NEAR)
        assert_same_bits(tensors_of(features), tensors_of(before))
        output, attentions = model(IMAGES, return_attention=True)
        assert_same_bits(output, model(IMAGES))
        assert_close(list(attentions), truth, **NEAR)


def test_rows_have_their_names_and_heads_their_mean(model):
    full = model.get_last_self_attention(IMAGES)
    assert full.shape == (2, 3, PREFIX + PATCHES, PREFIX + PATCHES)
    rows = {"cls": slice(0, 1), "registers": slice(1, PREFIX), "patches": slice(PREFIX, None)}
    for name, index in rows.items():
        assert_close(model.get_last_self_attention(IMAGES, queries=name), full[:, :, index])
    mean = model.get_last_self_attention(IMAGES, queries=[7], heads="mean")
    assert_close(mean, full[:, :, [7]].mean(1))


def test_masked_patches(model):
    masks = torch.arange(2 * PATCHES).reshape(2, PATCHES) % 3 == 0
    truth = truth_of(lambda: model.forward_features(IMAGES, masks))
    assert_close(list(model.get_self_attention(IMAGES, masks=masks)), truth, **NEAR)
    features = model.forward_features(IMAGES, masks, return_attention=True)
    assert_close(list(features["attentions"]), truth, **NEAR)


def test_a_list_of_crops(model):
    truth = truth_of(lambda: model.forward_features(BOTH, NONE))
    assert len(truth) == 2 * 3
    assert_close(in_order(model.get_self_attention(BOTH)), truth, **NEAR)
    assert_close(list(model.get_last_self_attention(BOTH)), truth[-2:], **NEAR)
    both = model.forward_features(BOTH, NONE, return_attention=True)
    assert_close(in_order(zip(*(f["attentions"] for f in both), strict=True)), truth, **NEAR)
    _, attentions = model(BOTH, NONE, is_training=True, return_attention=True)
    assert_close(in_order(attentions), truth, **NEAR)


@pytest.mark.parametrize("drop_path", [0.0, 0.4])
def test_a_list_runs_in_one_pass_as_local_crops_have_a_norm_of_their_own(installed, drop_path):
    model = installed.build(untie_global_and_local_cls_norm=True, drop_path_rate=drop_path).train()
    torch.manual_seed(3)
    before = model.forward_features(BOTH, NONE)
    torch.manual_seed(3)
    after = model.forward_features(BOTH, NONE, return_attention=True)
    assert [len(features.pop("attentions")) for features in after] == [3, 3]
    assert_same_bits([*map(tensors_of, after)], [*map(tensors_of, before)])


def test_a_block_and_an_attention_module_answer_for_themselves(model):
    tokens, (height, width) = model.prepare_tokens_with_masks(IMAGES)
    rope, block = model.rope_embed(H=height, W=width), model.blocks[1]
    for given, run in (((tokens, rope), block), ((tokens, None, rope), block.attn)):
        (truth,) = truth_of(lambda run=run, given=given: run(*given))
        keyword = "return_attention" if run is block else "return_attn"
        assert_close(run(*given, **{keyword: True}), truth, **NEAR)
    asked = block([tokens, tokens[:1]], [rope, rope], return_attention=True)
    assert_close(asked, truth_of(lambda: block([tokens, tokens[:1]], [rope, rope])), **NEAR)


# Recordings


def test_a_recording(model):
    truth = truth_of(lambda: model.forward_features(IMAGES))
    with record(model) as recording:
        model.forward_features(IMAGES)
    (maps,) = recording
    assert (maps.prefix, maps.grid, maps.layers) == (PREFIX, (2, 5), (0, 1, 2))
    assert_close(list(maps.weights), truth, **NEAR)


@pytest.mark.parametrize("training", [False, True])
def test_a_recorded_list_has_an_entry_for_each_crop(model, training):
    model.train(training)
    truth = truth_of(lambda: model.forward_features(BOTH, NONE))
    with record(model) as recording:
        model.forward_features(BOTH, NONE)
    assert [maps.grid for maps in recording] == [(2, 5), (3, 2)]
    for i, maps in enumerate(recording):
        assert_close(list(maps.weights), truth[i::2], **NEAR)


# Training with stochastic depth


@pytest.mark.parametrize("images", [IMAGES, CROPS], ids=["two", "five"])
def test_stochastic_depth_answers_for_all_samples_in_the_very_pass(installed, images):
    """The block calls ``forward_list`` on some samples. The weights of these are the kernel's."""
    model = installed.build(drop_path_rate=0.4).train()
    torch.manual_seed(5)
    with Truth() as truth:
        before = model.forward_features(images)
    torch.manual_seed(5)
    after = model.forward_features(images, return_attention=True)
    attentions = after.pop("attentions")
    assert_same_bits(tensors_of(after), tensors_of(before))
    kept = [
        order[: len(weights)] for order, weights in zip(truth.kept[::2], truth.weights, strict=True)
    ]
    for ours, theirs, samples in zip(attentions, truth.weights, kept, strict=True):
        assert len(ours) == len(images) > len(theirs)
        assert_close(ours[samples], theirs, **NEAR)
    torch.manual_seed(5)
    again = model.get_self_attention(images)
    assert_same_bits(list(again), list(attentions))


def test_stochastic_depth_leaves_a_recording_the_samples_that_ran(installed):
    model = installed.build(drop_path_rate=0.4).train()
    torch.manual_seed(5)
    truth = truth_of(lambda: model.forward_features(BOTH, NONE))
    torch.manual_seed(5)
    with record(model) as recording:
        model.forward_features(BOTH, NONE)
    assert [len(maps.weights[0]) for maps in recording] == [1, 3]
    for i, maps in enumerate(recording):
        assert_close(list(maps.weights), truth[i::2], **NEAR)


def test_the_copy_that_keeps_all_samples_leaves_no_trace(installed):
    model = installed.build(drop_path_rate=0.4).train()
    before = [dict(vars(module)) for module in model.modules()]
    model.get_self_attention(CROPS)
    assert all(block.sample_drop_ratio == 0.4 for block in model.blocks)
    assert [vars(module).keys() for module in model.modules()] == [b.keys() for b in before]


# Numbers


@pytest.mark.parametrize("rotation", ["bf16", "fp32"])
@pytest.mark.parametrize("autocast", [False, True])
def test_autocast_and_the_rotations_own_dtype(installed, rotation, autocast):
    model = installed.build(pos_embed_rope_dtype=rotation)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        truth = truth_of(lambda: model.forward_features(IMAGES))
        for found in (
            model.get_self_attention(IMAGES),
            model.forward_features(IMAGES, return_attention=True)["attentions"],
        ):
            assert {w.dtype for w in found} == {torch.bfloat16 if autocast else torch.float32}
            assert_close(list(found), truth, within=2**-8 if autocast else 1e-6)


def test_a_masked_key_bias_before_init_weights_is_named(installed):
    """Its buffer is NaN until then, and so is every token."""
    cls = installed.module("models.vision_transformer").DinoVisionTransformer
    model = cls(**dinov3.SIZES)
    torch.nn.init.zeros_(model.cls_token)
    with pytest.raises(InvalidInputError, match="init_weights"):
        model.get_self_attention(IMAGES)
    model.init_weights()
    assert model.get_last_self_attention(IMAGES).isfinite().all()


def test_one_sample_that_is_not_finite_leaves_the_others_right(installed):
    model = installed.build()
    images = torch.stack([IMAGES[0], torch.full_like(IMAGES[1], torch.nan)])
    truth = truth_of(lambda: model.forward_features(images))
    found = model.get_self_attention(images)
    assert_close([w[0] for w in found], [w[0] for w in truth], **NEAR)


def test_gradients_are_those_of_the_kernels_inputs(model):
    model.get_last_self_attention(IMAGES, queries="cls").square().sum().backward()
    assert model.blocks[0].attn.qkv.weight.grad.isfinite().all()
    assert model.blocks[-1].attn.proj.weight.grad is None


def test_uninstall_restores_the_very_functions(copy):
    classes = [
        cls
        for name in copy.modules
        for cls in vars(__import__(name, fromlist=["_"])).values()
        if isinstance(cls, type)
    ]
    before = [dict(vars(cls)) for cls in classes]
    with dinov2_attn.install(copy.package):
        model = copy.build(drop_path_rate=0.4).train()
        model.forward_features(IMAGES, return_attention=True)
    for cls, was in zip(classes, before, strict=True):
        assert vars(cls).keys() == was.keys()
        assert all(vars(cls)[name] is value for name, value in was.items())
