"""Every attention bias that can be made dense, recognised by what it can do."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dinov2_attn.errors import InvalidInputError
from dinov2_attn.math import bias as biases
from tests.support import reference, xformers_visibility
from tests.support.strategies import noise, randomise, seeds
from tests.support.tolerances import assert_close, assert_same_bits
from tests.support.xformers_visibility import quiet

pytestmark = quiet

lengths = st.lists(st.integers(1, 6), min_size=1, max_size=5)


def module_of(upstream, seed=0, dtype=torch.float64):
    module = upstream.cls("MemEffAttention")(24, num_heads=3, qkv_bias=True)
    return randomise(module.double(), seed).to(dtype)


def tokens_of(length, seed=0, batch=1):
    return noise(batch, length, 24, seed=seed, dtype=torch.float64)


def masks():
    with xformers_visibility.visible():
        from xformers.ops.fmha import attn_bias

    return attn_bias


class Slope:
    """Somebody's own bias, for each head: knows nothing but ``materialize``."""

    def materialize(self, shape, dtype=torch.float32, device="cpu"):
        steps = torch.arange(shape[1], dtype=dtype, device=device).view(-1, 1, 1)
        places = torch.arange(shape[-1], dtype=dtype, device=device)
        return -(steps * (places[:, None] - places).abs()).expand(shape)


def starts_of(lens):
    return SimpleNamespace(seqstart_py=[sum(lens[:i]) for i in range(len(lens) + 1)])


class OwnBlocks:
    """Somebody's own blocks: no private method of xFormers', no ``k_seqinfo``."""

    def __init__(self, lens):
        self.q_seqinfo = starts_of(lens)

    def materialize(self, shape, dtype=torch.float32, device="cpu"):
        assert shape[-2:] == (self.q_seqinfo.seqstart_py[-1],) * 2 == shape
        inner = torch.tensor(self.q_seqinfo.seqstart_py[1:-1])
        owner = torch.bucketize(torch.arange(shape[-1]), inner, right=True)
        same = owner[:, None] == owner
        return torch.zeros(shape, dtype=dtype).masked_fill(~same, float("-inf"))


class OwnMasks(OwnBlocks):
    """Blocks that can be made one by one, and all at once only at the price of a matrix."""

    def _create_block_mask(self, shape, dtype, device):
        return torch.full(shape, 1 / 3, dtype=dtype, device=device)

    def materialize(self, shape, dtype, device):
        raise AssertionError("the whole matrix is not needed")


class Third:
    """As exact as the dtype that it is asked for."""

    def materialize(self, shape, dtype=torch.float32, device="cpu"):
        return torch.full(shape, 1 / 3, dtype=dtype, device=device)


DENSE = {
    "triangular": lambda m, n: m.LowerTriangularMask(),
    "triangular and a tensor": lambda m, n: m.LowerTriangularMask().add_bias(
        noise(2, 3, n, n, seed=1)
    ),
    "own": lambda m, n: Slope(),
    "tensor": lambda m, n: noise(2, 3, n, n, seed=2),
    "tensor for every head": lambda m, n: noise(1, 1, n, n, seed=3),
    "matrix": lambda m, n: noise(n, n, seed=3),
    "tensor for keys": lambda m, n: noise(1, 1, 1, n, seed=3),
    "booleans": lambda m, n: (noise(2, 1, n, n, seed=4) > 0) | torch.eye(n).bool(),
}


@pytest.mark.parametrize("kind", DENSE)
@given(length=st.integers(1, 9), seed=seeds, grad=st.booleans())
def test_a_bias_is_added_to_the_scores(nested, kind, length, seed, grad):
    module, tokens = module_of(nested, seed), tokens_of(length, seed, batch=2)
    bias = DENSE[kind](masks(), length)
    shape = (2, 3, length, length)
    added = bias if isinstance(bias, torch.Tensor) else bias.materialize(shape, dtype=torch.float64)
    if added.dtype == torch.bool:
        added = torch.zeros(shape).masked_fill(~added, float("-inf"))
    with torch.set_grad_enabled(grad):
        weights = module(tokens, attn_bias=bias, return_attn=True)
        row = module(tokens, attn_bias=bias, return_attn=True, queries=[length - 1], heads="mean")
    assert_close(weights, reference.weights(module, tokens, bias=added.expand(shape)))
    assert_close(row, weights[:, :, -1:].mean(1))
    if isinstance(bias, torch.Tensor) and (bias.shape != shape or bias.dtype == torch.bool):
        return  # weights only: xFormers broadcasts nothing
    size = reference.size_of_terms(module, tokens)
    output = module(tokens, attn_bias=bias)
    assert_close(reference.features(module, tokens, weights), output, size=size)


@given(lens=lengths, seed=seeds, grad=st.booleans())
def test_without_batch_sizes_each_block_has_its_own(nested, lens, seed, grad):
    module, together = module_of(nested, seed), tokens_of(sum(lens), seed)
    for bias in (masks().BlockDiagonalMask.from_seqlens(lens), OwnBlocks(lens)):
        with torch.set_grad_enabled(grad):
            weights = module(together, attn_bias=bias, return_attn=True)
        for ours, x in zip(weights, together.split(lens, dim=1), strict=True):
            assert_close(ours, reference.weights(module, x))


@given(lens=lengths, seed=seeds, grad=st.booleans())
def test_causal_blocks_are_causal_inside(nested, lens, seed, grad):
    module, together = module_of(nested, seed), tokens_of(sum(lens), seed)
    bias = masks().BlockDiagonalMask.from_seqlens(lens).make_causal()
    with torch.set_grad_enabled(grad):
        weights = module(together, attn_bias=bias, return_attn=True)
    for ours, x in zip(weights, together.split(lens, dim=1), strict=True):
        assert_close(ours, reference.weights(module, x, causal=True))


@given(lens=lengths, seed=seeds)
def test_blocks_of_unequal_sides_keep_to_their_keys(nested, lens, seed):
    module, together = module_of(nested, seed), tokens_of(sum(lens), seed)
    bias = masks().BlockDiagonalMask.from_seqlens(lens, lens[::-1])
    whole = reference.weights(
        module, together, bias=bias.materialize((1, 3, sum(lens), sum(lens)), dtype=torch.float64)
    )
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            weights = module(together, attn_bias=bias, return_attn=True)
        row = column = 0
        for ours, (n, m) in zip(weights, zip(lens, lens[::-1], strict=True), strict=True):
            assert_close(ours, whole[:, :, row : row + n, column : column + m])
            row, column = row + n, column + m


@pytest.mark.parametrize("grad", [True, False])
def test_a_block_may_see_no_key_at_all(nested, grad):
    module, together = module_of(nested), tokens_of(4)
    bias = masks().BlockDiagonalMask.from_seqlens([2, 2], [0, 4])
    with torch.set_grad_enabled(grad):
        weights = module(together, attn_bias=bias, return_attn=True)
        row = module(together, attn_bias=bias, return_attn=True, queries=[0], heads="mean")
    assert [ours.shape for ours in weights] == [(1, 3, 2, 0), (1, 3, 2, 4)]
    assert [ours.shape for ours in row] == [(1, 1, 0), (1, 1, 4)]
    assert_close(weights[1], reference.weights(module, together)[:, :, 2:])


def test_keys_with_gaps_give_one_matrix(nested):
    """Padded keys leave holes between the blocks: materialize knows, so it is asked."""
    attn_bias = masks()
    bias = attn_bias.BlockDiagonalCausalWithOffsetPaddedKeysMask.from_seqlens(
        q_seqlen=[4, 4], kv_padding=4, kv_seqlen=[3, 4]
    )
    module, tokens = module_of(nested), tokens_of(8)
    assert not biases.is_block_diagonal(bias)
    weights = module(tokens, attn_bias=bias, return_attn=True)
    added = bias.materialize((1, 3, 8, 8), dtype=torch.float64)
    rows = ~added.isinf().all(-1)[0, 0]  # a query before the first key sees none
    with np.errstate(invalid="ignore"):
        expected = reference.weights(module, tokens, bias=added)
    assert_close(weights[:, :, rows], expected[:, :, rows])


def test_a_bias_is_made_where_and_as_exactly_as_the_scores_are():
    shape, cpu = (2, 3, 4, 4), torch.device("cpu")
    third = torch.full(shape, 1 / 3, dtype=torch.float64)
    assert_same_bits(biases.dense(Third(), shape, cpu, torch.float64), third)
    assert biases.dense(Third(), shape, torch.device("meta"), torch.float64).is_meta
    assert biases.dense(third, shape, cpu, torch.float32).dtype == torch.float32
    assert biases.dense(third > 0, shape, cpu, torch.float32).dtype == torch.bool


def test_a_block_is_made_alone_where_its_class_can():
    tokens = tokens_of(5)
    with torch.device("meta"):  # a device that no argument names
        found = biases.groups(OwnMasks([2, 3]), tokens, torch.float64)
    for group, length in zip(found, (2, 3), strict=True):
        assert_same_bits(group.mask, torch.full((length, length), 1 / 3, dtype=torch.float64))


def test_what_is_inside_of_blocks_is_as_exact_as_the_scores(monkeypatch):
    bias = OwnBlocks([2, 3])
    monkeypatch.setattr(bias, "materialize", Third().materialize, raising=False)
    for group in biases.groups(bias, tokens_of(5), torch.float64):
        assert (group.mask == 1 / 3).all()


def test_blocks_without_starts_or_with_pages_give_one_matrix():
    bias, paged = Slope(), OwnBlocks([2, 2])
    bias.q_seqinfo = SimpleNamespace()
    assert biases.is_block_diagonal(paged)
    paged.block_tables = torch.zeros(1, 1)
    assert not any(map(biases.is_block_diagonal, (bias, paged)))


# What is refused


def test_an_unknown_kind_is_named(nested):
    module, tokens = module_of(nested), tokens_of(4)
    for bias in ({"a": 1}, SimpleNamespace(), "mask", masks().AttentionBias()):
        kind = f"{type(bias).__module__}.{type(bias).__qualname__}"
        with pytest.raises(InvalidInputError, match=kind):
            module(tokens, attn_bias=bias, return_attn=True)


def test_a_bias_that_does_not_fit_is_refused_with_both_numbers(nested):
    module, tokens = module_of(nested), tokens_of(4)
    blocks = masks().BlockDiagonalMask.from_seqlens([2, 3])
    with pytest.raises(InvalidInputError, match=r"(?s)\(1, 5, C\).*Found \(1, 4, 24\)"):
        module(tokens, attn_bias=blocks, return_attn=True)
    with pytest.raises(InvalidInputError, match=r"(?s)\(1, 5, C\).*Found \(2, 5, 24\)"):
        module(tokens.new_ones(2, 5, 24), attn_bias=blocks, return_attn=True)
    with pytest.raises(InvalidInputError, match=r"(?s)= \(1, 3, 4, 4\)\.\nFound .* \(2, 3, 4, 4\)"):
        module(tokens, attn_bias=torch.zeros(2, 3, 4, 4), return_attn=True)


@pytest.mark.parametrize("sizes", [[], [1], [1, 2], [2, 0]])
def test_batch_sizes_that_do_not_add_up_are_refused(nested, sizes):
    blocks = masks().BlockDiagonalMask.from_seqlens([2, 2])
    blocks._batch_sizes = sizes
    with pytest.raises(InvalidInputError, match="_batch_sizes"):
        module_of(nested)(torch.zeros(1, 4, 24).double(), attn_bias=blocks, return_attn=True)


@pytest.mark.parametrize(
    ("queries", "keys", "found"),
    [
        ([1, 3], [1, 3], r"lengths \[1, 3\]\.\nLeave"),
        ([1, 3], [2, 2], r"lengths \[1, 3\], of keys \[2, 2\]\.\nLeave"),
        ([2, 2], [1, 3], r"lengths \[2, 2\], of keys \[1, 3\]\.\nLeave"),
    ],
)
def test_blocks_of_one_group_must_have_the_same_shape(nested, queries, keys, found):
    blocks = masks().BlockDiagonalMask.from_seqlens(queries, keys)
    blocks._batch_sizes = [2]
    with pytest.raises(InvalidInputError, match=rf"(?s)group 0 .*\.\nFound {found}"):
        module_of(nested)(torch.zeros(1, 4, 24).double(), attn_bias=blocks, return_attn=True)


def test_blocks_of_queries_without_keys_are_refused(nested):
    blocks = OwnBlocks([2, 2])
    blocks.k_seqinfo = starts_of([4])
    with pytest.raises(InvalidInputError, match=r"(?s)blocks of keys as of queries.*1 and 2\."):
        module_of(nested)(tokens_of(4), attn_bias=blocks, return_attn=True)


def test_a_class_without_xformers_takes_tensors_only(nested):
    """MoGe's Attention hands its bias to PyTorch, which knows no masks of xFormers'."""
    attention = nested.cls("Attention")
    module = attention(24, num_heads=3)
    with pytest.raises((InvalidInputError, TypeError), match="dense tensor|takes|argument"):
        module(torch.zeros(1, 4, 24), attn_bias=masks().LowerTriangularMask(), return_attn=True)
