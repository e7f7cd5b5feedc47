"""`record`: an ordinary pass leaves its attention, and is not changed by that."""

from __future__ import annotations

import gc
import weakref
from functools import partial, reduce

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import dinov2_attn
from dinov2_attn import attention_maps, record
from dinov2_attn.errors import NotRecordedError
from tests.support import reference, upstreams
from tests.support.recordings import (
    IMAGES,
    Adapted,
    N,
    assert_all_close,
    assert_nothing_on,
    build,
    is_explicit,
)
from tests.support.strategies import model_cases, noise
from tests.support.tolerances import are_close, assert_close, assert_same_bits
from tests.support.xformers_visibility import quiet

queries = st.sampled_from([None, "cls", "registers", "patches", 0, [0, -1], slice(None, None, 2)])
heads = st.sampled_from([None, "mean"])


class Containing(nn.Module):
    """A model around a DINOv2, such as Depth Anything's head over intermediate layers."""

    def __init__(self, backbone, use):
        super().__init__()
        self.pretrained, self.use, self.head = backbone, use, nn.Linear(8, 3).double()

    def forward(self, x):
        return self.head(self.use(self.pretrained, x))


USES = {
    "classifier": lambda m, x: m(x),
    "depth": lambda m, x: m.get_intermediate_layers(x, 2, return_class_token=True)[0][0],
    "dense": lambda m, x: m.forward_features(x)["x_norm_patchtokens"],
    "loop": lambda m, x: _loop(m, x),
}


def _loop(model, tokens):
    tokens = model.prepare_tokens_with_masks(tokens)
    for block in model.blocks:
        tokens = block(tokens)
    return tokens


# The same weights as every other way


@given(case=model_cases(), queries=queries, heads=heads, grad=st.booleans(), data=st.data())
def test_a_recording_is_what_get_self_attention_returns(models, case, queries, heads, grad, data):
    model = case.build(models)
    some = st.lists(st.integers(-case.depth, case.depth - 1), min_size=1)
    n = data.draw(st.one_of(st.none(), st.integers(1, case.depth), some))
    with torch.set_grad_enabled(grad), record(model, n, queries=queries, heads=heads) as maps:
        output = model(case.images, masks=case.masks)
    assert_same_bits(output, model(case.images, masks=case.masks))
    expected = model.get_self_attention(case.images, n, case.masks, queries=queries, heads=heads)
    assert len(maps.weights) == len(maps.layers) == len(expected)
    assert_all_close(maps.weights, expected)
    assert [w.dtype for w in maps.weights] == [case.dtype] * len(expected)
    assert maps.grid == case.grid
    assert maps.prefix == case.prefix(models)
    if n is not None and not isinstance(n, int):
        assert maps.layers == tuple(sorted({i % case.depth for i in n}))
    assert_nothing_on(model)


@given(case=model_cases())
def test_a_recording_is_the_attention_by_its_definition(models, case):
    model = case.build(models)
    inputs = []
    attentions = [m for m in model.modules() if hasattr(m, "qkv")]
    hooks = [m.register_forward_pre_hook(lambda m, a: inputs.append((m, *a))) for m in attentions]
    with record(model) as maps:
        model(case.images)
    for hook in hooks:
        hook.remove()
    for weights, (module, tokens) in zip(maps.weights, inputs, strict=True):
        assert_close(weights, reference.weights(module, tokens))


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("chunks", [0, 2])
def test_a_model_that_contains_one_is_recorded(models, use, chunks):
    if use == "loop" and chunks:
        pytest.skip("a flat model's loop: the other uses run chunked ones")
    inner = build(models, block_chunks=chunks, depth=4)
    model = Containing(inner, USES[use])
    expected = model(IMAGES)
    with record(model, queries="cls") as maps:
        assert_same_bits(model(IMAGES), expected)
    assert_all_close(maps.weights, inner.get_self_attention(IMAGES, queries="cls"))
    assert maps.grid == (2, 3)


def test_blocks_and_projections_of_others_are_not_taken_for_its_own(models):
    """Heads and decoders around a DINOv2 have children of the same names."""
    inner = build(models)
    model = Containing(inner, USES["classifier"])
    model.blocks = nn.ModuleList()
    inner.blocks[0].mlp.qkv = nn.Linear(8, 24)
    with record(model) as maps:
        model(IMAGES)
    assert_all_close(maps.weights, inner.get_self_attention(IMAGES))


@quiet
@given(case=model_cases(), queries=queries, heads=heads)
def test_a_nested_list_gives_an_entry_for_each_batch(nested, case, queries, heads):
    model = case.build(nested)
    images = [case.images, noise(2, 3, 2, 6, seed=case.seed, dtype=case.dtype)]
    if nested is upstreams.MOGE:  # its own forward_features_list unpacks three of two
        tokens = [model.prepare_tokens_with_masks(x) for x in images]
        run = lambda: model.blocks[0](tokens)  # noqa: E731
        model, n = (model, [0]) if not case.chunks else pytest.skip("a chunk is no block")
    else:
        run, n = (lambda: model(images, masks=[None, None], is_training=True)), None
    plain = run()
    with record(model, n, queries=queries, heads=heads) as maps:
        again = run()
    expected = model.get_self_attention(images, n, queries=queries, heads=heads)
    assert len(maps) == 2
    for ours, theirs in zip(maps, zip(*expected, strict=True), strict=True):
        assert_all_close(ours.weights, theirs)
    if nested is not upstreams.MOGE:
        assert [one.grid for one in maps] == [case.grid, (1, 3)]
        one_by_one = attention_maps(model, images, queries=queries, heads=heads)
        assert [one.queries for one in maps] == [one.queries for one in one_by_one]
        for a, b in zip(plain, again, strict=True):
            assert_same_bits(b["x_prenorm"], a["x_prenorm"])


@quiet
def test_a_single_tensor_through_xformers_is_recorded(nested):
    model = build(nested)
    with record(model) as maps:
        model(IMAGES)
    assert_close(maps.weights, model.get_self_attention(IMAGES))


def test_causal_attention_is_recorded_as_causal(models):
    """CausalAttentionBlock passes ``is_causal`` by position."""
    if not hasattr(models.module(models.block), "CausalAttentionBlock"):
        pytest.skip("this copy has no causal block; a checkout of the newest era has")
    block = models.cls("CausalAttentionBlock")(8, 2).double()
    model = build(models)
    model.blocks[1] = block
    with record(model) as maps:
        model(IMAGES)
    assert not maps.weights[1].triu(1).any()
    assert_close(maps.weights, model.get_self_attention(IMAGES))


# The pass is what it was


@given(case=model_cases(), drop_path=st.sampled_from([0.0, 0.05, 0.5]), training=st.booleans())
def test_outputs_gradients_and_draws_are_bit_identical(models, case, drop_path, training):
    model = case.build(models, drop_path_rate=drop_path, drop_path_uniform=True)
    for parameter in model.parameters():
        parameter.requires_grad_()
    model.train(training)

    def run():
        torch.manual_seed(0)
        model.zero_grad()
        output = model(case.images, masks=case.masks, is_training=True)["x_prenorm"]
        output.square().sum().backward()
        grads = [p.grad.clone() for p in model.parameters() if p.grad is not None]
        return [output, torch.get_rng_state(), *grads]

    before = run()
    with record(model):
        after = run()
    assert len(before) == len(after)
    assert_same_bits(before, after)


def test_queries_and_keys_are_projected_once(models):
    model, calls = build(models), []
    for block in model.blocks:
        block.attn.qkv.register_forward_hook(lambda *_: calls.append(1))
    with record(model), record(model, queries="cls"):
        model(IMAGES)
    assert len(calls) == 3


@quiet
def test_a_nested_list_is_projected_once(nested):
    block = partial(nested.cls("NestedTensorBlock"), attn_class=nested.cls("MemEffAttention"))
    model, calls = build(nested, block_fn=block), []
    model.blocks[0].attn.qkv.register_forward_hook(lambda *_: calls.append(1))
    images = [model.prepare_tokens_with_masks(x) for x in (IMAGES, IMAGES[:1])]
    plain = reduce(lambda tokens, block: block(tokens), model.blocks, images)
    calls.clear()
    with record(model, [0]):
        again = reduce(lambda tokens, block: block(tokens), model.blocks, images)
    assert len(calls) == 1
    assert_same_bits(again, plain)


def test_a_projection_that_draws_is_recorded_as_it_was_drawn(models):
    model, seen = build(models).train(), []
    for block in model.blocks:
        block.attn.qkv.register_forward_hook(lambda *a: nn.functional.dropout(a[-1], 0.5))
        block.attn.register_forward_pre_hook(lambda m, args: seen.append((m, args[0])))
    torch.manual_seed(3)
    plain = model(IMAGES)
    seen.clear()
    torch.manual_seed(3)
    with record(model) as maps:
        assert_same_bits(model(IMAGES), plain)
    assert not any(map(are_close, maps.weights, model.eval().get_self_attention(IMAGES)))


def test_hooks_and_adapters_on_the_projection_have_their_say(models):
    model = build(models)
    model.blocks[1].attn.qkv.register_forward_hook(lambda _, __, out: out * 3)
    model.blocks[2].attn.qkv = Adapted(model.blocks[2].attn.qkv)
    with record(model) as maps:
        model(IMAGES)
    expected = model.get_self_attention(IMAGES)
    assert_all_close(maps.weights, expected)
    assert not are_close(expected[1], expected[0])
    assert len(model.blocks[1].attn.qkv._forward_hooks) == 1


def test_gradients_flow_through_what_is_recorded(models):
    model = build(models)
    with record(model) as maps:
        model(IMAGES)
    maps.weights[2].square().sum().backward()
    ours = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    model.get_last_self_attention(IMAGES).square().sum().backward()
    theirs = [p.grad for p in model.parameters() if p.grad is not None]
    assert len(ours) == len(theirs) > 0
    for a, b in zip(ours, theirs, strict=True):
        assert_close(a, b)


def test_stochastic_depth_leaves_the_weights_of_the_samples_that_ran(models):
    model = build(models, drop_path_rate=0.5, drop_path_uniform=True).train()
    seen = []
    for block in model.blocks:
        block.attn.register_forward_pre_hook(lambda m, args: seen.append((m, args[0])))
    with record(model) as maps:
        model(IMAGES.repeat(2, 1, 1, 1))
    for weights, (module, tokens) in zip(maps.weights, seen, strict=True):
        assert len(weights) == 2
        assert_close(weights, reference.weights(module, tokens))


# reduce


def test_reduce_decides_what_is_kept(models):
    model = build(models)
    with record(model, [0, 2], reduce=lambda layer, w: (layer, w.sum())) as maps:
        model(IMAGES)
    assert maps.layers == (0, 2)
    assert [layer for layer, _ in maps.weights] == [0, 2]
    for _, total in maps.weights:
        assert_close(total, torch.tensor(2.0 * 2 * N))


@pytest.mark.parametrize("grad", [False, True])
def test_a_full_matrix_does_not_outlive_its_layer(models, grad):
    model, alive, most = build(models), weakref.WeakSet(), []
    if grad and is_explicit(model):
        pytest.skip("explicit code keeps its matrix for the backward pass; without grad it runs")

    def reduce(layer, weights):
        alive.add(weights)
        gc.collect()
        most.append(len(alive))
        return weights.detach().mean()

    with torch.set_grad_enabled(grad), record(model, reduce=reduce):
        model(IMAGES)
    assert most == [1, 1, 1]
    gc.collect()
    assert not alive


def test_what_is_recorded_with_a_graph_is_freed_with_it(models):
    model = build(models)
    with record(model) as maps:
        model(IMAGES)
    last = weakref.ref(maps.weights[-1])
    del maps
    gc.collect()
    assert last() is None


@quiet
def test_reduce_is_given_one_batch_of_a_nested_list_at_a_time(nested):
    block = partial(nested.cls("NestedTensorBlock"), attn_class=nested.cls("MemEffAttention"))
    model, shapes = build(nested, block_fn=block), []

    def reduce(layer, weights):
        shapes.append((layer, *weights.shape))
        return weights[..., 0].detach()

    with dinov2_attn.install(model), record(model, [1, 2], reduce=reduce) as maps:
        tokens = [model.prepare_tokens_with_masks(x) for x in (IMAGES, IMAGES[:1, ..., :2])]
        for one in model.blocks:
            tokens = one(tokens)
    assert shapes == [(1, 2, 2, 7, 7), (1, 1, 2, 3, 3), (2, 2, 2, 7, 7), (2, 1, 2, 3, 3)]
    assert [[tuple(w.shape) for w in one.weights] for one in maps] == [
        [(2, 2, 7)] * 2,
        [(1, 2, 3)] * 2,
    ]
    assert [one.grid for one in maps] == [(2, 3), (2, 1)]
    with pytest.raises(NotRecordedError, match="Found 2"):
        _ = maps.weights


@quiet
def test_layers_of_different_batches_are_no_pass(nested):
    """A pass that takes a list in one block and a tensor in the next has no batches."""
    block = partial(nested.cls("NestedTensorBlock"), attn_class=nested.cls("MemEffAttention"))
    model = build(nested, block_fn=block)
    tokens = noise(2, 7, 8, seed=0).double()

    def run(recordings):
        with record(model, [0, 1]) as maps:
            recordings.append(maps)
            model.blocks[0]([tokens, tokens])
            model.blocks[1](tokens)

    recordings = []
    with (
        dinov2_attn.install(model),
        pytest.raises(NotRecordedError, match="without some of these layers"),
    ):
        run(recordings)
    assert list(recordings[0]) == []
