"""Invariant 1: not asked, upstream is bit for bit what it was without the plugin."""

from __future__ import annotations

import inspect

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import dinov2_attn
from tests.support import upstreams
from tests.support.strategies import AttentionCase, attention_cases, model_cases, noise
from tests.support.tolerances import assert_same_bits


@pytest.fixture(scope="module", params=upstreams.ALL, ids=str)
def bare_layers(request):
    """A copy of the code as it is; the tests below install and uninstall."""
    return request.param


@pytest.fixture(scope="module", params=upstreams.WITH_MODELS, ids=str)
def bare_models(request):
    return request.param


def run(module, inputs, **options):
    """Everything observable of one forward and backward pass."""
    torch.manual_seed(0)
    module.zero_grad()
    inputs = inputs.clone().requires_grad_()
    output = module(inputs, **options)
    if isinstance(output, dict):
        output = output["x_prenorm"]
    output.double().square().sum().backward()
    grads = [p.grad for p in module.parameters() if p.grad is not None]
    return [output, inputs.grad, torch.get_rng_state(), *grads]


@given(case=attention_cases(), training=st.booleans())
def test_an_attention_module_is_bit_identical(bare_layers, case, training):
    module, tokens = case.build(bare_layers)
    module.train(training)
    before = run(module, tokens)
    with dinov2_attn.install(bare_layers.package):
        assert type(module).forward.__wrapped__ is not None
        assert_same_bits(before, run(module, tokens))
    assert_same_bits(before, run(module, tokens))


@given(case=model_cases(), drop_path=st.sampled_from([0.0, 0.05, 0.5]), training=st.booleans())
def test_a_model_is_bit_identical_stochastic_depth_included(bare_models, case, drop_path, training):
    model = case.build(bare_models, drop_path_rate=drop_path, drop_path_uniform=True)
    for parameter in model.parameters():
        parameter.requires_grad_()  # RoMa freezes its copy
    model.train(training)
    before = run(model, case.images, masks=case.masks, is_training=True)
    with dinov2_attn.install(bare_models.package):
        assert_same_bits(before, run(model, case.images, masks=case.masks, is_training=True))


@given(case=model_cases())
def test_intermediate_layers_are_bit_identical(bare_models, case):
    model = case.build(bare_models, chunks=0)
    before = model.get_intermediate_layers(case.images, n=case.depth)
    with dinov2_attn.install(bare_models.package):
        after = model.get_intermediate_layers(case.images, n=case.depth)
    assert_same_bits(before, after)


def _failure(call):
    with pytest.raises(Exception) as caught:  # noqa: PT011  # whatever upstream raises
        call()
    return caught.type, str(caught.value)


def not_whole_patches(model):
    model(noise(2, 3, 5, 4, seed=0))


@pytest.mark.parametrize(
    "misuse",
    [
        not_whole_patches,
        lambda m: m(noise(2, 4, 4, 4, seed=0)),  # four channels
        lambda m: m([noise(2, 3, 4, 4, seed=0)]),  # a list without xFormers
        lambda m: m(noise(2, 3, 4, 4, seed=0), queries="cls"),  # ours, but nothing asked
        lambda m: m.blocks[0](noise(2, 5, 4, seed=0), True),  # a positional too many
        lambda m: m.blocks[0].attn(noise(2, 5, 4, seed=0), None, None, None),
        lambda m: m.blocks[0]("tokens"),
        lambda m: m(),
    ],
)
def test_exceptions_are_the_same(bare_models, misuse):
    if bare_models is upstreams.LIGHTLY and misuse is not_whole_patches:
        pytest.skip("LightlyTrain resizes such images: no exception; every other copy raises")
    model = bare_models.cls("DinoVisionTransformer")(
        img_size=4, patch_size=2, embed_dim=4, depth=1, num_heads=1, block_chunks=0
    )
    before = _failure(lambda: misuse(model))
    with dinov2_attn.install(bare_models.package):
        assert _failure(lambda: misuse(model)) == before


def test_installing_draws_nothing_and_leaves_no_trace_on_instances(bare_models):
    model = bare_models.cls("DinoVisionTransformer")(
        img_size=4, patch_size=2, embed_dim=4, depth=1, num_heads=1, block_chunks=0
    )
    torch.manual_seed(1)
    state, keys, attributes = torch.get_rng_state(), list(model.state_dict()), set(vars(model))
    with dinov2_attn.install(bare_models.package):
        assert_same_bits(state, torch.get_rng_state())
        assert list(model.state_dict()) == keys
        assert set(vars(model)) == attributes


def test_signatures_show_what_is_added_and_keep_what_was_there(bare_layers):
    cls = bare_layers.attentions[1]
    before = list(inspect.signature(cls.forward).parameters)
    with dinov2_attn.install(bare_layers.package):
        after = inspect.signature(cls.forward).parameters
    assert list(after) == [*before, "return_attn", "queries", "heads"]
    added = list(after.values())[len(before) :]
    assert [str(parameter) for parameter in added] == [
        "return_attn=False",
        "queries=None",
        "heads=None",
    ]
    assert {parameter.kind for parameter in added} == {inspect.Parameter.KEYWORD_ONLY}


@pytest.mark.parametrize("name", ["forward", "forward_features"])
def test_signatures_of_a_model_show_what_is_added_too(bare_models, name):
    cls = bare_models.cls("DinoVisionTransformer")
    with dinov2_attn.install(bare_models.package):
        shown = str(inspect.signature(getattr(cls, name)))
    assert "return_attention=False, queries=None, heads=None" in shown


def test_the_signature_of_an_override_that_hands_everything_on_shows_it_too(first):
    class Own(first.cls("MemEffAttention")):
        def forward(self, *args, **kwargs):
            return super().forward(*args, **kwargs)

    with dinov2_attn.install(Own(4, num_heads=1)):
        shown = str(inspect.signature(Own.forward))
    assert shown == "(self, *args, return_attn=False, queries=None, heads=None, **kwargs)"


def test_the_comparison_sees_a_single_changed_bit(bare_layers):
    """The check itself can fail: one unit in the last place of one parameter."""
    case = AttentionCase(0, 2, 4, 2, 5, True, torch.float64, 3)
    module, tokens = case.build(bare_layers)
    before = run(module, tokens)
    with torch.no_grad():
        module.proj.bias[0] = torch.nextafter(module.proj.bias[0], module.proj.bias[0] + 1)
    with pytest.raises(AssertionError):
        assert_same_bits(before, run(module, tokens))
