"""A few rows are made without keys, and are the rows of the full matrix all the same."""

from __future__ import annotations

import contextlib

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import dinov2_attn
from dinov2_attn.backbone import projection
from dinov2_attn.grafting.modules import queries_and_keys_from
from tests.backbone.test_faithful import assert_rounded_once
from tests.support import recordings, reference, upstreams
from tests.support.strategies import AttentionCase, attention_cases, noise, randomise, seeds
from tests.support.tolerances import assert_close

DIM, HEADS, TOKENS = 24, 3, 40  # up to 9 rows are few


@contextlib.contextmanager
def break_even(value):
    before, projection.BREAK_EVEN = projection.BREAK_EVEN, value
    try:
        yield
    finally:
        projection.BREAK_EVEN = before


@st.composite
def cases_with_rows(draw):
    case = draw(attention_cases())
    return case, draw(st.lists(st.integers(-case.length, case.length - 1), max_size=12))


@given(drawn=cases_with_rows(), heads=st.sampled_from([None, "mean"]))
@pytest.mark.parametrize("few", [True, False], ids=["without keys", "with keys"])
def test_rows_are_those_of_the_full_matrix(layers, few, drawn, heads):
    case, rows = drawn
    module, tokens = case.build(layers)
    expected = reference.weights(module, tokens)[:, :, rows]
    with torch.no_grad(), break_even(1e9 if few else 0):
        ours = module(tokens, return_attn=True, queries=rows, heads=heads)
    assert ours.dtype == case.dtype
    assert_close(ours, expected.mean(1) if heads else expected)


@given(case=attention_cases(st.sampled_from([torch.bfloat16, torch.float32])))
def test_half_precision_keeps_the_kernels_rounding(layers, case):
    """The kernel's keys are rounded, so keys are made: each weight is right to its last place."""
    module, tokens = case.build(layers)
    with torch.no_grad(), break_even(1e9):
        row = module(tokens, return_attn=True, queries=0)
    assert_rounded_once(row, reference.weights(module, tokens)[:, :, :1])


@torch.no_grad()
@given(seed=seeds)
def test_autocast_keeps_the_kernels_rounding(layers, seed):
    module, tokens = build(layers, seed)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        row = module(tokens, return_attn=True, queries=0)
        expected = reference.weights(module, tokens)
    assert row.dtype == torch.bfloat16
    assert_rounded_once(row, expected[:, :, :1])


@torch.no_grad()
@given(seed=seeds, causal=st.booleans(), row=st.integers(0, TOKENS - 1))
def test_a_bias_and_a_causal_mask_count_for_few_rows_too(seed, causal, row):
    upstream = upstreams.ANOMALIB
    with dinov2_attn.install(upstream.package):
        cls = upstream.cls("Attention" if causal else "MemEffAttention")
        module = randomise(cls(DIM, num_heads=HEADS).double(), seed)
        tokens = noise(2, TOKENS, DIM, seed=seed, dtype=torch.float64)
        bias = None if causal else noise(2, HEADS, TOKENS, TOKENS, seed=seed, dtype=torch.float64)
        options = {"is_causal": True} if causal else {"attn_bias": bias}
        ours = module(tokens, **options, return_attn=True, queries=[row, 0])
    expected = reference.weights(module, tokens, causal=causal, bias=bias)
    assert_close(ours, expected[:, :, [row, 0]])


@pytest.mark.parametrize("queries", [None, [4, 0]])
def test_a_causal_mask_counts_where_gradients_are_kept(queries):
    upstream = upstreams.ANOMALIB
    with dinov2_attn.install(upstream.package):
        module = randomise(upstream.cls("Attention")(DIM, num_heads=HEADS).double(), 0)
        tokens = noise(2, 9, DIM, seed=0, dtype=torch.float64).requires_grad_()
        ours = module(tokens, is_causal=True, return_attn=True, queries=queries)
    expected = reference.weights(module, tokens, causal=True)
    assert_close(ours, expected if queries is None else expected[:, :, queries])
    assert ours.requires_grad


class Products(TorchDispatchMode):
    """Counts the multiplications of all matrix products inside."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name in ("mm", "bmm", "addmm", "baddbmm"):
            left, right = args[1:3] if name in ("addmm", "baddbmm") else args[:2]
            self.count += left.numel() * right.shape[-1]
        return func(*args, **(kwargs or {}))


@torch.no_grad()
@pytest.mark.parametrize("rows", [1, 3, 9])
def test_neither_keys_nor_other_queries_nor_values_are_made(layers, rows):
    module, tokens = build(layers, 0)
    with Products() as products:
        module(tokens, return_attn=True, queries=slice(0, rows))
    queries, through_keys = rows * DIM * DIM, rows * DIM * DIM
    scores = HEADS * rows * TOKENS * DIM
    probe = DIM
    assert products.count == queries + through_keys + scores + probe


@torch.no_grad()
def test_many_rows_make_keys_and_only_their_own_queries(layers):
    module, tokens = build(layers, 0)
    with Products() as products:
        module(tokens, return_attn=True, queries=slice(0, 10))
    assert products.count == (10 + TOKENS) * DIM * DIM + 10 * TOKENS * DIM + DIM
    with Products() as products:
        module(tokens, return_attn=True)
    assert products.count == 2 * TOKENS * DIM * DIM + TOKENS * TOKENS * DIM + DIM


@torch.no_grad()
def test_whoever_asks_inside_a_recording_does_without_keys_too(grafted):
    """What a recording sets on the projection listens to a pass, and is none of their business."""
    model, counts = recordings.build(grafted), []
    tokens = noise(1, TOKENS, 8, seed=0, dtype=torch.float64)

    def ask(*_):
        with Products() as products:
            model.blocks[0].attn(tokens, return_attn=True, queries=0)
        counts.append(products.count)

    ask()
    with dinov2_attn.record(model, [0], reduce=ask):
        model(recordings.IMAGES)
    alone, inside = counts
    assert inside == alone < TOKENS * 8 * 8


@torch.no_grad()
def test_all_rows_of_a_few_tokens_make_keys(layers):
    """Few tokens have few keys: to go round them takes more work and more memory."""
    module, tokens = build(layers, 0)
    few = tokens[:, :6]
    with Products() as products:
        module(few, return_attn=True)
    assert products.count == 2 * 6 * DIM * DIM + 6 * 6 * DIM + DIM


@torch.no_grad()
@pytest.mark.parametrize("queries", [None, "cls", [0, -1], [8, 3]])
def test_queries_and_keys_make_the_rows_that_were_asked(layers, queries):
    block = randomise(layers.cls("Block")(DIM, num_heads=HEADS, qkv_bias=True), 0)
    tokens = noise(2, 9, DIM, seed=0)
    expected = block(tokens, return_attention=True, queries=queries)
    pieces = queries_and_keys_from(block, tokens, queries)
    assert len(pieces) > 0
    for piece, scale in pieces:
        weights = (piece.query * scale @ piece.key.mT).softmax(-1)
        assert_close(weights, expected[piece.samples])


class LoRA(nn.Module):
    """What fine-tuning sets in the place of ``qkv``."""

    def __init__(self, base):
        super().__init__()
        self.base, self.calls = base, []
        self.down = nn.Linear(base.in_features, 2, bias=False)
        self.up = nn.Linear(2, base.out_features, bias=False)

    @property
    def weight(self):  # as peft's layers pass it on
        return self.base.weight

    def forward(self, x):
        self.calls.append(len(x))
        return self.base(x) + self.up(self.down(x))


class Quantised(nn.Linear):
    """A layer that multiplies with other numbers than its ``weight`` holds."""

    calls: list

    def forward(self, x):
        self.calls.append(len(x))
        return nn.functional.linear(x, (self.weight * 4).round() / 4, self.bias)


def hooked(layer):
    layer.calls = []
    layer.register_forward_hook(lambda m, args, out: (m.calls.append(len(out)), out * 1.5)[1])
    return layer


def quantised(layer):
    layer.__class__, layer.calls = Quantised, []
    return layer


@torch.no_grad()
@pytest.mark.parametrize("dress", [LoRA, quantised, hooked])
def test_what_is_more_than_its_weight_takes_the_ordinary_way(layers, dress):
    module, tokens = build(layers, 1)
    plain = reference.weights(module, tokens)[:, :, :1]
    module.qkv = dress(module.qkv)
    row = module(tokens, return_attn=True, queries="cls")
    assert module.qkv.calls == [1]
    expected = reference.weights(module, tokens)[:, :, :1]
    assert_close(row, expected)
    assert (expected - plain).abs().max() > 1e-3  # the dress shows


def test_gradients_take_the_ordinary_way(layers):
    case = AttentionCase(1, HEADS, 8, 1, TOKENS, True, torch.float64, 2)
    module, tokens = case.build(layers)
    for parameter in module.parameters():
        parameter.requires_grad_()
    module(tokens, return_attn=True, queries=0).square().sum().backward()
    queries, keys, values = module.qkv.weight.grad.chunk(3)
    assert queries.any()
    assert keys.any()
    assert not values.any()


def build(upstream, seed):
    module = upstream.attentions[1](DIM, num_heads=HEADS, qkv_bias=True)
    return randomise(module, seed), noise(1, TOKENS, DIM, seed=seed)
