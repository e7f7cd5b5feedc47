"""Scores as large, as small, as equal and as masked as they come, against their definition.

Everything drawn is a small whole number times a power of two, so that the scores are exact in
float32 whatever their size and in whatever order they are summed. What the softmax makes of
them is then known to the last places, where a bound that grows with the scores would allow
anything.
"""

from __future__ import annotations

from contextlib import contextmanager

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

import dinov2_attn
from dinov2_attn.backbone import projection
from dinov2_attn.math import attention
from dinov2_attn.math.attention import attention_weights
from tests.support import reference, upstreams
from tests.support.strategies import dtypes, seeds
from tests.support.tolerances import RELATIVE, assert_close, assert_same_bits
from tests.support.xformers_visibility import quiet

INF, NAN = float("inf"), float("nan")
ALL_DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]

# How large tokens are, as a power of two, and up to which whole number they are drawn; 0: equal.
SIZES = {"denormal": (-140, 3), "ordinary": (-2, 3), "large": (4, 3), "large and equal": (4, 0)}

# What stands in a row of a bias. The last is what others use in the place of -inf.
ROWS = {
    "none": [0.0],
    "some masked": [0.0, 0.0, -INF],
    "all but one masked": None,
    "masked": [-INF],
    "large": [1e4, -1e4, 0.0],
    "denormal": [1e-40, -1e-40],
    "least": [torch.finfo(torch.float16).min],
}
kinds_of_rows = st.lists(st.sampled_from(list(ROWS)), min_size=1, max_size=5)


def whole(*shape, seed, most=3, power=0, dtype=torch.float32):
    """Whole numbers up to ``most``, times two to the ``power``."""
    generator = torch.Generator().manual_seed(seed)
    numbers = torch.randint(-most, most + 1, shape, generator=generator) if most else 1
    return (torch.ones(shape, dtype=torch.float64) * numbers * 2.0**power).to(dtype)


def bias_of(*shape, rows, seed, dtype):
    """A bias whose rows are, by turns, of the kinds in ``rows``."""
    random = np.random.default_rng(seed)
    bias = np.zeros(shape)
    for i, place in enumerate(np.ndindex(*shape[:-1])):
        values = ROWS[rows[i % len(rows)]]
        if values is None:
            bias[place] = -INF
            bias[place][random.integers(shape[-1])] = 0
        else:
            bias[place] = random.choice(values, shape[-1])
    return torch.from_numpy(bias).to(dtype)


def defined(query, key, scale, bias=None):
    """The softmax in NumPy and float64, of scores that are added up as wide as a kernel does.

    A row with nothing to see is 0 / 0: NaN.
    """
    scores = query.double().numpy() @ key.double().numpy().swapaxes(-2, -1) * scale
    if bias is not None:
        wide = np.float64 if query.dtype == torch.float64 else np.float32
        scores = (scores.astype(wide) + bias.double().numpy().astype(wide)).astype(np.float64)
    with np.errstate(invalid="ignore"):
        powers = np.exp(scores - scores.max(-1, keepdims=True, initial=-INF))
        return torch.from_numpy(powers / powers.sum(-1, keepdims=True))


def kernel(query, key, bias):
    """What PyTorch's own kernel weighs with: its output for values that are the unit vectors."""
    unit = torch.eye(key.shape[-2]).to(query.dtype).expand(*key.shape[:2], -1, -1)
    return F.scaled_dot_product_attention(query, key, unit, attn_mask=bias)


def assert_right(weights, expected):
    """Right to the last places of each weight's dtype, NaN where NaN is expected."""
    assert weights.shape == expected.shape
    assert_same_bits(weights.isnan(), expected.isnan())
    info = torch.finfo(weights.dtype)
    wide = 1e-12 if weights.dtype == torch.float64 else 1e-5
    gap = (weights.detach().double() - expected).abs().nan_to_num()
    limit = (info.eps + wide) * expected.nan_to_num() + max(info.smallest_normal, 1e-37)
    assert (gap <= limit).all(), f"{gap.max():.3g} apart"


@contextmanager
def cut_into(size):
    """Tiles and pieces of ``size`` bytes."""
    before = attention.TILE_BYTES, attention.PIECE_BYTES, projection.TILE_BYTES
    attention.TILE_BYTES = attention.PIECE_BYTES = projection.TILE_BYTES = size
    try:
        yield
    finally:
        attention.TILE_BYTES, attention.PIECE_BYTES, projection.TILE_BYTES = before


def both_ways(ask, size):
    """What ``ask`` gives with grad, made at once, and without, made in tiles."""
    plain = ask()
    with torch.no_grad(), cut_into(size):
        return plain, ask()


shapes = st.tuples(st.integers(0, 3), st.integers(1, 3), st.integers(0, 5), st.integers(1, 6))
cuts = st.sampled_from([1, 100, 2**20])


# Queries and keys, without a module


@given(
    shape=shapes,
    head_dim=st.sampled_from([1, 4, 16]),
    power=st.sampled_from([-149, -60, -3, 0, 3, 6, 12]),
    most=st.sampled_from([0, 3]),
    dtype=st.sampled_from(ALL_DTYPES),
    heads=st.sampled_from([None, "mean"]),
    cut=cuts,
    seed=seeds,
)
def test_scores_of_any_size(shape, head_dim, power, most, dtype, heads, cut, seed):
    """Up to 2**26 and so beyond what float16 holds; down to products that are zero in float32."""
    batch, count, rows, length = shape
    query = whole(batch, count, rows, head_dim, seed=seed, most=most, power=power, dtype=dtype)
    key = whole(batch, count, length, head_dim, seed=seed + 1, most=most, power=power, dtype=dtype)
    expected = defined(query, key, head_dim**-0.5)
    if heads == "mean":
        expected = expected.mean(1)
    assert not expected.isnan().any()
    for weights in both_ways(
        lambda: attention_weights(query, key, head_dim**-0.5, heads=heads), cut
    ):
        assert weights.dtype == dtype
        assert_right(weights, expected)


@given(
    shape=shapes,
    rows=kinds_of_rows,
    boolean=st.booleans(),
    dtype=dtypes,
    cut=cuts,
    seed=seeds,
)
def test_a_bias_of_any_kind_is_what_pytorchs_kernel_makes_of_it(
    shape, rows, boolean, dtype, cut, seed
):
    """A fully masked row is NaN up to PyTorch 2.4, and zero from 2.5 on."""
    batch, count, lines, length = shape
    query = whole(batch, count, lines, 4, seed=seed, dtype=dtype)
    key = whole(batch, count, length, 4, seed=seed + 1, dtype=dtype)
    bias = bias_of(batch, count, lines, length, rows=rows, seed=seed, dtype=dtype)
    given = bias > -INF if boolean else bias
    exact = torch.zeros_like(bias).masked_fill(~given, -INF) if boolean else bias
    expected = defined(query, key, 0.5, exact)
    blind = (exact == -INF).all(-1, keepdim=True)
    theirs = kernel(query, key, given)
    expected = torch.where(blind, theirs.double(), expected)
    wide = torch.promote_types(dtype, torch.float32)
    added = given if boolean else bias.to(wide)
    for weights in both_ways(lambda: attention_weights(query, key, 0.5, bias=added), cut):
        assert_right(weights, expected)


def test_rows_without_keys_are_skipped():
    assert attention.fully_masked_rows(torch.zeros(2, 3, 4, 0)) is None
    found = attention.fully_masked_rows(torch.full((2, 3, 0, 5), -INF))
    assert (found is not None) == attention.MASKED_ROWS_ARE_ZERO


def test_scores_that_overflow_are_not_masked():
    """They are NaN, as in upstream's own softmax: only a bias makes weights zero."""
    query, key = torch.full((1, 1, 2, 1), 1e30), torch.full((1, 1, 3, 1), -1e30)
    for weights in both_ways(lambda: attention_weights(query, key, 1.0), 2**20):
        assert weights.isnan().all()


# Modules, as upstream wrote them


def build(upstream, which, *, heads, head_dim, dtype, seed):
    """An attention module whose parameters are whole numbers too."""
    cls, dim = upstream.attentions[which], heads * head_dim
    module = cls(dim, num_heads=heads, qkv_bias=True).eval()
    with torch.no_grad():
        for i, parameter in enumerate(module.parameters()):
            parameter.copy_(whole(*parameter.shape, seed=seed + i, most=1))
    return module.to(dtype)


def assert_faithful(module, tokens, weights, output, scores):
    """``proj(weights @ v)`` is ``output``, as near as a kernel comes that rounds its scores."""
    size = reference.size_of_terms(module, tokens)
    rounded = 4 * torch.finfo(output.dtype).eps * scores / RELATIVE[output.dtype]
    features = reference.features(module, tokens, weights)
    assert_close(features, output, dtype=output.dtype, size=size * (1 + rounded))


def largest_score(module, tokens):
    query, key, _ = reference.projections(module, tokens)
    return np.abs(query @ key.swapaxes(-2, -1)).max(initial=0) * query.shape[-1] ** -0.5


queries = st.sampled_from([None, 0, [], [-1, 0], slice(0, 0)])


@given(
    which=st.integers(0, 1),
    shape=st.tuples(st.integers(0, 3), st.integers(1, 5)),
    count=st.integers(1, 3),
    head_dim=st.sampled_from([1, 4]),
    size=st.sampled_from(list(SIZES)),
    queries=queries,
    heads=st.sampled_from([None, "mean"]),
    dtype=dtypes,
    cut=cuts,
    seed=seeds,
)
def test_tokens_of_any_size(
    layers, which, shape, count, head_dim, size, queries, heads, dtype, cut, seed
):
    """No sample, no query, one token, one head of one channel: with and without grad."""
    module = build(layers, which, heads=count, head_dim=head_dim, dtype=dtype, seed=seed)
    power, most = SIZES[size]
    tokens = whole(
        shape[0], shape[1], count * head_dim, seed=seed, most=most, power=power, dtype=dtype
    )
    everything = reference.weights(module, tokens)
    rows = slice(None) if queries is None else [0] if queries == 0 else queries
    expected = everything[:, :, rows]
    expected = expected.mean(1) if heads == "mean" else expected
    ask = lambda: module(tokens, return_attn=True, queries=queries, heads=heads)  # noqa: E731
    for weights in both_ways(ask, cut):
        assert weights.dtype == dtype
        assert_right(weights, expected)
    output = module(tokens)
    if not len(tokens):
        assert output.shape == tokens.shape
    elif output.isfinite().all():  # an explicit product in float16 may overflow
        scores = largest_score(module, tokens)
        assert_faithful(module, tokens, module(tokens, return_attn=True), output, scores)
    else:
        assert dtype == torch.float16


@pytest.fixture(scope="module", params=[upstreams.MOGE, upstreams.ANOMALIB], ids=str)
def biased(request):
    """Copies whose attention hands a dense bias to PyTorch's kernel, with their class for it."""
    with dinov2_attn.install(request.param.package):
        yield request.param


def assert_biased(module, rows, batch, dtype, cut, seed):
    """Features and weights are NaN for the same queries, and belong together for the others."""
    tokens = whole(batch, 5, 8, seed=seed, dtype=dtype)
    bias = bias_of(batch, 2, 5, 5, rows=rows, seed=seed, dtype=dtype)
    output = module(tokens, attn_bias=bias)
    for weights in both_ways(lambda: module(tokens, attn_bias=bias, return_attn=True), cut):
        blind = weights.isnan().any(1).any(-1)
        assert_same_bits(output.isnan().any(-1), blind)
        seen = weights.masked_fill(blind[:, None, :, None], 0)
        theirs = torch.where(blind[..., None], module.proj.bias.detach(), output)
        scores = largest_score(module, tokens) + 1e4
        assert_faithful(module, tokens, seen, theirs, scores)
    last = module(tokens, attn_bias=bias, return_attn=True, queries=[-1])
    assert_right(last, weights[:, :, [-1]].double())


@given(rows=kinds_of_rows, batch=st.integers(1, 2), dtype=dtypes, cut=cuts, seed=seeds)
def test_a_bias_of_any_kind_is_what_the_module_makes_of_it(biased, rows, batch, dtype, cut, seed):
    which = 0 if biased is upstreams.MOGE else 1
    module = build(biased, which, heads=2, head_dim=4, dtype=dtype, seed=seed)
    assert_biased(module, rows, batch, dtype, cut, seed)


@quiet
@given(rows=kinds_of_rows, batch=st.integers(1, 2), dtype=dtypes, cut=cuts, seed=seeds)
def test_a_bias_of_any_kind_is_what_the_fallback_makes_of_it(nested, rows, batch, dtype, cut, seed):
    module = build(nested, 1, heads=2, head_dim=4, dtype=dtype, seed=seed)
    assert_biased(module, rows, batch, dtype, cut, seed)


@given(rows=kinds_of_rows, dtype=dtypes, seed=seeds)
def test_gradients_are_finite_where_those_of_the_kernel_are(rows, dtype, seed):
    """What no query may see sends back nothing, instead of NaN into every parameter."""
    query, key = (whole(1, 1, n, 4, seed=seed + n, dtype=dtype) for n in (3, 4))
    bias = bias_of(1, 1, 3, 4, rows=rows, seed=seed, dtype=dtype)
    loss = whole(1, 1, 3, 4, seed=seed, dtype=dtype)
    found = []
    wide = bias.to(torch.promote_types(dtype, torch.float32))
    for ask, own in ((kernel, bias), (lambda q, k, b: attention_weights(q, k, 0.5, bias=b), wide)):
        q, k = query.clone().requires_grad_(), key.clone().requires_grad_()
        (ask(q, k, own) * loss).sum().backward()
        found.append((q.grad, k.grad))
    for theirs, ours in zip(*found, strict=True):
        assert_same_bits(theirs.isfinite(), ours.isfinite())


# NaN and infinity


@given(
    which=st.integers(0, 1),
    wrong=st.sampled_from([NAN, INF, -INF]),
    place=st.tuples(st.integers(0, 2), st.integers(0, 4), st.integers(0, 7)),
    head_dim=st.sampled_from([1, 4]),
    queries=queries,
    cut=cuts,
    seed=seeds,
)
def test_what_is_not_finite_stays_in_its_sample(
    layers, which, wrong, place, head_dim, queries, cut, seed
):
    """And is no weight of its own there, with grad or without."""
    heads = 8 // head_dim
    module = build(layers, which, heads=heads, head_dim=head_dim, dtype=torch.float32, seed=seed)
    tokens = whole(3, 5, 8, seed=seed)
    before = module(tokens, return_attn=True, queries=queries)
    tokens[place] = wrong
    others = [i for i in range(3) if i != place[0]]
    plain, tiled = both_ways(lambda: module(tokens, return_attn=True, queries=queries), cut)
    assert_right(plain[others], before[others].double())
    assert_right(tiled[others], before[others].double())
    if abs(wrong) == INF:
        # Queries sent through the keys' weights meet a token as infinite as it is, and not what
        # its key adds up to: they may see that nothing of it is seen where others see NaN.
        passed = plain.isnan() & ~tiled.isnan()
        assert (tiled[..., place[1]][passed[..., place[1]]] == 0).all()
        plain = torch.where(passed, tiled, plain)
    assert_right(tiled, plain.double())
