"""Invariant 5: every way of asking gives the same attention, and it is that of the pass."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import dinov2_attn
from tests.support import reference
from tests.support.strategies import model_cases, noise
from tests.support.tolerances import assert_close, assert_same_bits


def attention_inputs(model, run):
    """Run, and return what every attention module was given: upstream's own pass, watched."""
    caught = []
    modules = [m for m in model.modules() if hasattr(m, "qkv")]
    hooks = [
        m.register_forward_pre_hook(lambda m, args: caught.append((m, *args))) for m in modules
    ]
    run()
    for hook in hooks:
        hook.remove()
    return caught


@given(model_cases())
def test_weights_are_those_of_the_models_own_pass(models, case):
    model = case.build(models)
    calls = attention_inputs(model, lambda: model(case.images, case.masks))
    answers = model.get_self_attention(case.images, masks=case.masks)
    assert len(answers) == len(calls) == case.depth
    for answer, (module, tokens) in zip(answers, calls, strict=True):
        assert_close(answer, reference.weights(module, tokens))


@given(model_cases(), st.data())
def test_n_takes_layers_as_get_intermediate_layers_does(models, case, data):
    model = case.build(models)
    every = model.get_self_attention(case.images)
    count = data.draw(st.integers(0, case.depth))
    some = data.draw(
        st.lists(st.integers(-case.depth, case.depth - 1), unique_by=lambda i: i % case.depth)
    )
    last = model.get_self_attention(case.images, count)
    for a, b in zip(last, every[case.depth - count :], strict=True):
        assert_close(a, b)
    chosen = [every[i] for i in sorted(i % case.depth for i in some)]
    for n in (some, torch.tensor(some, dtype=torch.long), np.array(some, dtype=int)):
        answers = model.get_self_attention(case.images, n=n)
        for a, b in zip(answers, chosen, strict=True):
            assert_close(a, b)
    assert_close(model.get_last_self_attention(case.images), every[-1])
    assert_close(model.get_last_selfattention(case.images), every[-1])


@given(model_cases())
def test_flat_equals_chunked(models, case):
    model, flat = case.build(models), case.build(models, chunks=0)
    for a, b in zip(
        model.get_self_attention(case.images), flat.get_self_attention(case.images), strict=True
    ):
        assert_same_bits(a, b)


@given(model_cases())
def test_a_batch_equals_sample_by_sample(models, case):
    model = case.build(models)
    batch = model.get_last_self_attention(case.images, case.masks)
    for i in range(case.batch):
        one = model.get_last_self_attention(case.images[i : i + 1], case.masks[i : i + 1])
        assert_close(batch[i : i + 1], one)


@given(model_cases(), st.integers(1, 3), st.booleans())
def test_a_list_equals_one_by_one(models, case, count, masked):
    model = case.build(models)
    images = [noise(1 + i, 3, 2 + 2 * i, 4, seed=i, dtype=case.dtype) for i in range(count)]
    masks = [noise(len(x), x[0, 0].numel() // 4, seed=9) > 0 for x in images] if masked else None
    each = [None] * count if masks is None else masks
    ask = partial(model.get_self_attention, queries="patches", heads="mean")
    answer = ask(images, masks=masks)
    assert len(answer) == case.depth
    for layer, weights in enumerate(answer):
        assert isinstance(weights, list)
        for x, mask, w in zip(images, each, weights, strict=True):
            assert_close(w, ask(x, [layer], mask)[0])
    last = model.get_last_self_attention(images, masks)
    assert isinstance(last, list)
    assert [w.shape[0] for w in last] == [len(x) for x in images]


@given(model_cases(), st.booleans())
def test_features_and_attentions_come_from_one_pass(models, case, training):
    model = case.build(models)
    plain = model.forward_features(case.images, case.masks)
    both = model.forward_features(case.images, case.masks, return_attention=True)
    attentions = both.pop("attentions")
    assert plain.keys() == both.keys()
    assert_same_bits(both, plain)
    expected = model.get_self_attention(case.images, masks=case.masks)
    assert_close(attentions, expected)
    output, again = model(case.images, is_training=training, return_attention=True, heads="mean")
    assert isinstance(output, dict) == training
    assert_close(again[-1], model.get_last_self_attention(case.images, heads="mean"))


@given(model_cases())
def test_lists_get_features_and_attentions_too(models, case):
    model = case.build(models)
    images = [case.images, case.images[:1]]
    masks = [case.masks, None]
    dicts = model.forward_features(images, masks, return_attention=True, queries="cls")
    outputs, attentions = model(images, masks, return_attention=True, queries="cls")
    trained, _ = model(images, masks, is_training=True, return_attention=True)
    for i, (x, m) in enumerate(zip(images, masks, strict=True)):
        one = model.forward_features(x, m, return_attention=True, queries="cls")
        for features in (dicts[i], trained[i]):
            assert_close(features["x_norm_clstoken"], one["x_norm_clstoken"])
        assert_close(outputs[i], one["x_norm_clstoken"])
        for layer in range(case.depth):
            assert_close(dicts[i]["attentions"][layer], one["attentions"][layer])
            assert_close(attentions[layer][i], one["attentions"][layer])


def test_with_stochastic_depth_the_weights_belong_to_the_very_pass(models):
    """Two passes would draw twice; the attention must be that of the features returned."""
    model = models.cls("DinoVisionTransformer")(
        img_size=8, patch_size=2, embed_dim=8, depth=4, num_heads=2, block_chunks=0,
        drop_path_rate=0.6, drop_path_uniform=True, init_values=1.0,
    ).double().train()  # fmt: skip
    images = noise(6, 3, 8, 8, seed=0, dtype=torch.float64)
    inputs = []
    model.blocks[3].register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    torch.manual_seed(5)
    plain = model.forward_features(images)
    torch.manual_seed(5)
    both = model.forward_features(images, return_attention=True)
    assert_same_bits(plain["x_prenorm"], both["x_prenorm"])
    block = model.blocks[3]
    expected = reference.weights(block.attn, block.norm1(inputs[1]))
    assert_close(both["attentions"][3], expected)


def test_classes_of_upstream_go_by_their_projection(layers):
    """What the proof refuses would go by its kernel, with the same answers and more work."""
    for module in (layers.attention, layers.block):
        layers.module(module)
    status = dinov2_attn.status()
    assert (status.at_kernel, status.left_out) == ({}, {})


def test_blocks_answer_for_themselves(layers):
    block = layers.cls("Block")(12, num_heads=2, qkv_bias=True).double()
    tokens = noise(2, 7, 12, seed=1, dtype=torch.float64)
    weights = block(tokens, return_attention=True)
    assert_close(weights, reference.weights(block.attn, block.norm1(tokens)))
    assert_same_bits(block(x=tokens, return_attention=True), weights)
    mean = block(tokens, return_attention=True, queries=[3], heads="mean")
    assert_close(mean, weights[:, :, [3]].mean(1))


def test_a_nested_block_answers_a_list_with_a_list(models):
    block = models.cls("NestedTensorBlock")(12, num_heads=2).double()
    tokens = [noise(2, 7, 12, seed=1, dtype=torch.float64), noise(1, 4, 12, seed=2).double()]
    answer = block(tokens, return_attention=True)
    assert isinstance(answer, list)
    for weights, x in zip(answer, tokens, strict=True):
        assert_close(weights, block(x, return_attention=True))


def test_the_last_block_runs_norm_and_projection_only(models):
    model = models.cls("DinoVisionTransformer")(
        img_size=8, patch_size=2, embed_dim=8, depth=3, num_heads=2, block_chunks=0
    )
    ran = []
    for i in (1, 2):
        for name, module in model.blocks[i].named_modules():
            module.register_forward_hook(lambda *_, n=f"{i}.{name}": ran.append(n))
    model.norm.register_forward_hook(lambda *_: ran.append("norm"))
    model.get_last_self_attention(noise(1, 3, 8, 8, seed=0))
    assert [n for n in ran if n.startswith("2")] == ["2.norm1", "2.attn.qkv", "2.attn", "2."]
    assert "1.mlp" in ran
    assert "norm" not in ran
    ran.clear()
    model.get_self_attention(noise(1, 3, 8, 8, seed=0), n=[0])
    assert ran == []


def test_hooks_on_the_projection_have_their_say(models):
    """What the kernel sees is what counts: adapters and hooks included."""
    module = models.attentions[1](12, num_heads=2).double()
    module.qkv.register_forward_hook(lambda _, __, out: out * 2)
    tokens = noise(2, 7, 12, seed=1, dtype=torch.float64)
    weights = module(tokens, return_attn=True)
    assert_close(weights, reference.weights(module, tokens))


def test_installing_on_a_model_is_as_good_as_on_its_package(models):
    images = noise(1, 3, 8, 8, seed=0)
    model = models.cls("DinoVisionTransformer")(
        img_size=8, patch_size=2, embed_dim=8, depth=2, num_heads=2, block_chunks=0
    )
    expected = model.get_last_self_attention(images)
    dinov2_attn.uninstall()
    assert not hasattr(model, "get_last_self_attention")
    with dinov2_attn.install(torch.nn.Sequential(torch.nn.Linear(2, 2), model)):
        assert_same_bits(model.get_last_self_attention(images), expected)
    assert not hasattr(model, "get_last_self_attention")
    dinov2_attn.install(models.package)


@pytest.mark.parametrize("precision", [torch.bfloat16])
def test_autocast_reaches_the_whole_model(models, precision):
    model = models.cls("DinoVisionTransformer")(
        img_size=8, patch_size=2, embed_dim=8, depth=2, num_heads=2, block_chunks=0
    )
    images = noise(1, 3, 8, 8, seed=0)
    with torch.autocast("cpu", dtype=precision):
        weights = model.get_last_self_attention(images)
    assert weights.dtype == precision
    assert_close(weights, model.get_last_self_attention(images))
