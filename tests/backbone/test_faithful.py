"""Invariant 2: ``proj(weights @ v)`` is the module's own output. Every wrong recipe fails it."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import dinov2_attn
from tests.support import reference, upstreams
from tests.support.strategies import AttentionCase, attention_cases, noise, seeds
from tests.support.tolerances import assert_close, assert_same_bits


def assert_faithful(module, tokens, weights, output):
    """Invariant 2 in one line; the tests below feed it right and wrong weights."""
    size = reference.size_of_terms(module, tokens)
    assert_close(reference.features(module, tokens, weights), output, dtype=output.dtype, size=size)


def assert_rounded_once(weights, expected):
    """Each weight is right to the last place of its dtype, not only the largest."""
    in_float32 = 1e-5 * expected
    gap = (weights.double() - expected).abs()
    assert (gap <= torch.finfo(weights.dtype).eps * expected + in_float32).all()


@given(attention_cases())
def test_weights_times_values_projected_are_the_modules_own_output(layers, case):
    module, tokens = case.build(layers)
    weights = module(tokens, return_attn=True)
    assert_faithful(module, tokens, weights, module(tokens))


@given(attention_cases())
def test_weights_equal_a_reference_that_shares_no_code(layers, case):
    module, tokens = case.build(layers)
    weights = module(tokens, return_attn=True)
    assert weights.dtype == case.dtype
    assert_close(weights, reference.weights(module, tokens))


@given(attention_cases(st.sampled_from([torch.bfloat16, torch.float32])))
def test_weights_are_rounded_once_to_the_kernels_dtype(layers, case):
    """Scores and softmax run in float32 at least: each weight is right to its last place."""
    module, tokens = case.build(layers)
    assert_rounded_once(module(tokens, return_attn=True), reference.weights(module, tokens))


PLAIN = AttentionCase(
    which=1, heads=3, head_dim=5, batch=2, length=11, qkv_bias=True, dtype=torch.float64, seed=7
)


def _scores(module, tokens, scale):
    query, key, _ = map(torch.from_numpy, reference.projections(module, tokens))
    return query @ key.transpose(-2, -1) * scale


def _a_v_vt(module, tokens):
    """UPSTREAM trap 1: what circulates for xFormers, the kernel's output times vᵀ."""
    _, _, value = map(torch.from_numpy, reference.projections(module, tokens))
    return reference.weights(module, tokens) @ value @ value.transpose(-2, -1)


WRONG_RECIPES = {
    "A·V·Vᵀ": _a_v_vt,
    "no softmax": lambda m, x: _scores(m, x, 5**-0.5),
    "no scale": lambda m, x: _scores(m, x, 1.0).softmax(-1),
    "scale of all heads": lambda m, x: _scores(m, x, 15**-0.5).softmax(-1),
    "softmax over queries": lambda m, x: _scores(m, x, 5**-0.5).softmax(-2),
    "transposed": lambda m, x: reference.weights(m, x).transpose(-2, -1),
    "heads averaged": lambda m, x: (
        reference.weights(m, x).mean(1, keepdim=True).expand(-1, 3, -1, -1)
    ),
    "heads reversed": lambda m, x: reference.weights(m, x).flip(1),
    "one token off": lambda m, x: reference.weights(m, x).roll(1, dims=-1),
}


@pytest.mark.parametrize("recipe", WRONG_RECIPES.values(), ids=WRONG_RECIPES)
def test_every_wrong_recipe_fails_the_proof(layers, recipe):
    module, tokens = PLAIN.build(layers)
    with pytest.raises(AssertionError, match=r"within .*; found .* apart"):
        assert_faithful(module, tokens, recipe(module, tokens), module(tokens))


def test_the_popular_wrong_recipe_looks_plausible(layers):
    """Why the proof is needed: A·V·Vᵀ correlates with the truth."""
    module, tokens = PLAIN.build(layers)
    right, wrong = reference.weights(module, tokens), _a_v_vt(module, tokens)
    assert torch.corrcoef(torch.stack([right.flatten(), wrong.flatten()]))[0, 1] > 0.2


@pytest.mark.parametrize("which", [0, 1], ids=["Attention", "MemEffAttention"])
def test_a_changed_scale_counts_only_where_the_kernel_reads_it(layers, which):
    """Fused kernels ignore ``module.scale``; the weights must be those of the features."""
    module = layers.attentions[which](15, num_heads=3, qkv_bias=True).double()
    tokens = noise(2, 11, 15, seed=1, dtype=torch.float64)
    module.scale *= 3
    assert_faithful(module, tokens, module(tokens, return_attn=True), module(tokens))


def test_xformers_never_sees_the_scale_either(monkeypatch):
    """Where upstream would call its kernel, the weights are those of its default scale."""
    first = upstreams.FIRST
    with dinov2_attn.install():
        module = first.cls("MemEffAttention")(15, num_heads=3).double()
        tokens = noise(2, 11, 15, seed=1, dtype=torch.float64)
        expected = reference.weights(module, tokens)
        module.scale *= 3
        monkeypatch.setattr(first.module(first.attention), "XFORMERS_AVAILABLE", True)
        assert_close(module(tokens, return_attn=True), expected)


@given(seed=seeds, dtype=st.sampled_from([torch.bfloat16]))
def test_autocast_gives_the_kernels_dtype_and_its_attention(layers, seed, dtype):
    module, tokens = PLAIN.build(layers)
    module, tokens = module.float(), noise(2, 11, 15, seed=seed)
    with torch.autocast("cpu", dtype=dtype):
        weights, output = module(tokens, return_attn=True), module(tokens)
        expected = reference.weights(module, tokens)
        assert_faithful(module, tokens, weights, output)
    assert weights.dtype == dtype
    assert_rounded_once(weights, expected)


@given(attention_cases(st.just(torch.float64)))
def test_gradients_flow_through_the_weights(layers, case):
    module, tokens = case.build(layers)
    assert torch.autograd.gradcheck(
        lambda x: module(x, return_attn=True), (tokens.requires_grad_(),), fast_mode=True
    )
    with torch.no_grad():
        assert not module(tokens, return_attn=True).requires_grad


def test_training_mode_returns_the_weights_before_dropout(layers):
    module = layers.attentions[0](12, num_heads=2, attn_drop=0.5, proj_drop=0.5).double()
    tokens = noise(1, 6, 12, seed=3, dtype=torch.float64)
    state = torch.get_rng_state()
    assert_close(module.train()(tokens, return_attn=True), reference.weights(module, tokens))
    assert_same_bits(state, torch.get_rng_state())


def test_nan_flows_through_as_upstream_lets_it(layers):
    module, tokens = PLAIN.build(layers)
    tokens[0, 3] = float("nan")
    weights = module(tokens, return_attn=True)
    assert weights[0].isnan().all()
    assert not weights[1].isnan().any()
    assert_same_bits(module(tokens).isnan().any(-1), weights.isnan().any(1).any(-1))
