"""Invariant 3: rows are distributions, and nothing is seen that must not be."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import dinov2_attn
from dinov2_attn.math.attention import attention_weights
from tests.math.test_softmax_numerics import cut_into
from tests.support import reference, upstreams
from tests.support.strategies import attention_cases, model_cases, noise, randomise, seeds
from tests.support.tolerances import RELATIVE, assert_close


@given(attention_cases())
def test_rows_are_not_negative_and_sum_to_one(layers, case):
    module, tokens = case.build(layers)
    weights = module(tokens, return_attn=True)
    assert (weights >= 0).all()
    sums = weights.double().sum(-1)
    assert (sums - 1).abs().max() <= 2 * RELATIVE[case.dtype]


@given(model_cases())
def test_patch_columns_alone_do_not_sum_to_one(models, case):
    """CLS and registers take their share (UPSTREAM trap 11)."""
    model = case.build(models)
    row = model.get_last_self_attention(case.images, queries="cls")
    prefix = case.prefix(models)
    assert row.shape[-1] == prefix + case.grid[0] * case.grid[1]
    assert (row[..., prefix:].sum(-1) < 1).all()


@pytest.fixture(scope="module")
def newest():
    """The newest era, where attention can be causal."""
    with dinov2_attn.install(upstreams.ANOMALIB.package):
        yield upstreams.ANOMALIB


@given(attention_cases(st.sampled_from([torch.float64, torch.float32, torch.bfloat16])))
def test_causal_rows_see_no_later_key(newest, case):
    module, tokens = case.build(newest)
    if case.which == 1:  # MemEffAttention takes no is_causal, neither here nor upstream
        return
    # Positionally, as upstream's CausalAttentionBlock calls it (UPSTREAM trap 2).
    weights = module(tokens, True, return_attn=True)
    assert (weights.triu(1) == 0).all()
    assert_close(weights, reference.weights(module, tokens, causal=True))
    assert_close(
        reference.features(module, tokens, weights), module(tokens, True), dtype=case.dtype
    )


@given(seed=seeds, row=st.integers(0, 8))
def test_one_causal_row_knows_its_own_position(newest, seed, row):
    module = randomise(newest.cls("Attention")(12, num_heads=2).double(), seed)
    tokens = noise(2, 9, 12, seed=seed, dtype=torch.float64)
    full = module(tokens, is_causal=True, return_attn=True)
    assert_close(
        module(tokens, is_causal=True, return_attn=True, queries=row), full[:, :, row : row + 1]
    )


@pytest.mark.parametrize("is_causal", [True, False])
def test_a_causal_block_asks_as_it_runs(newest, is_causal):
    block = newest.cls("CausalAttentionBlock")(12, num_heads=2, is_causal=is_causal).double()
    block = randomise(block, 5)
    tokens = noise(2, 7, 12, seed=5, dtype=torch.float64)
    weights = block(tokens, return_attention=True)
    expected = reference.weights(block.attention, block.attention_norm(tokens), causal=is_causal)
    assert_close(weights, expected)
    assert dinov2_attn.status().at_kernel == {}


def test_a_causal_block_takes_a_list_in_training(newest):
    """It drops no samples and has no rate at which to."""
    block = randomise(newest.cls("CausalAttentionBlock")(12, num_heads=2), 5).train()
    tokens = [noise(2, 7, 12, seed=5), noise(1, 3, 12, seed=6)]
    for x, weights in zip(tokens, block(tokens, return_attention=True), strict=True):
        assert_close(weights, block(x, return_attention=True))


@pytest.mark.parametrize("name", ["moge", "anomalib"])
def test_a_dense_bias_joins_the_scores(name):
    """Both pass ``attn_bias`` to PyTorch's kernel, one of them from either class."""
    upstream = {"moge": upstreams.MOGE, "anomalib": upstreams.ANOMALIB}[name]
    with dinov2_attn.install(upstream.package):
        cls = upstream.cls("Attention" if name == "moge" else "MemEffAttention")
        module = randomise(cls(12, num_heads=2, qkv_bias=True).double(), 2)
        tokens = noise(2, 7, 12, seed=2, dtype=torch.float64)
        bias = noise(2, 2, 7, 7, seed=3, dtype=torch.float64)
        weights = module(tokens, bias, return_attn=True)
        assert_close(weights, reference.weights(module, tokens, bias=bias))
        assert_close(reference.features(module, tokens, weights), module(tokens, bias))
        rows = module(tokens, attn_bias=bias, return_attn=True, queries=[4, 0])
        assert_close(rows, weights[:, :, [4, 0]])
        hidden = bias > 2
        weights = module(tokens, ~hidden, return_attn=True)
        assert (weights[hidden] == 0).all()
        assert_close(reference.features(module, tokens, weights), module(tokens, ~hidden))


@pytest.mark.parametrize(
    "shape",
    [
        *((), (5,), (5, 5), (1, 5), (2, 5, 5), (1, 5, 5), (2, 1, 5)),
        *((3, 2, 5, 5), (3, 1, 5, 5), (1, 2, 5, 5), (3, 2, 1, 5), (2, 2, 5, 5)),
    ],
)
@torch.no_grad()
def test_a_bias_gives_its_rows_and_samples_where_it_has_them(shape):
    """Broadcast where it has one or none, whether the batch is weighed at once or by the sample."""
    with dinov2_attn.install(upstreams.MOGE.package):
        module = randomise(upstreams.MOGE.cls("Attention")(12, num_heads=2).double(), 2)
        batch = shape[0] if len(shape) == 4 and shape[0] > 1 else 3
        tokens = noise(batch, 5, 12, seed=2, dtype=torch.float64)
        bias = noise(*shape, seed=3, dtype=torch.float64)
        expected = reference.weights(module, tokens, bias=bias.expand(batch, 2, 5, 5))
        for size in (1, 2**20):
            with cut_into(size):
                assert_close(module(tokens, bias, return_attn=True), expected)
                rows = module(tokens, bias, return_attn=True, queries=[4, 0])
            assert_close(rows, expected[:, :, [4, 0]])


@pytest.mark.parametrize("differentiated", [True, False])
def test_masks_are_made_where_the_queries_are(differentiated):
    """On a device that only this machine's lacks: nothing may be made on the CPU in between."""
    query = torch.empty(1, 2, 3, 4, device="meta")
    rows = torch.arange(3, device="meta")
    with torch.set_grad_enabled(differentiated):
        weights = attention_weights(query, query, 0.5, causal_rows=rows)
    assert (weights.device.type, weights.shape) == ("meta", (1, 2, 3, 3))


def test_a_causal_module_runs_on_its_own_device(newest):
    module = newest.cls("Attention")(12, num_heads=2).to("meta")
    tokens = torch.empty(2, 5, 12, device="meta")
    weights = module(tokens, is_causal=True, return_attn=True, queries=[3, 1])
    assert (weights.device.type, weights.shape) == ("meta", (2, 2, 2, 5))
