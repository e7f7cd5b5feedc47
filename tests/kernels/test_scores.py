"""Following products to the softmax that takes them, without keeping any of them alive."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch

from dinov2_attn._compat import storage_of
from dinov2_attn.kernels.scores import Scores
from tests.support.strategies import noise
from tests.support.tolerances import assert_close, assert_same_bits


def noted(scores):
    """Return a product, and the factors of it that ``scores`` knows."""
    query, key = noise(1, 2, 5, 4, seed=0), noise(1, 2, 5, 4, seed=1)
    product = query @ key.mT
    scores.note_product("matmul", (query, key.mT), {}, product)
    return product


def test_no_product_is_kept_alive():
    scores = Scores()
    product = noted(scores)
    assert scores.of(product) is not None
    seen = weakref.ref(product)
    del product
    gc.collect()
    assert seen() is None


def test_a_tensor_in_the_memory_of_a_product_that_is_gone_is_none():
    """The allocator gives the same memory again, to tensors that have nothing to do with it."""
    scores = Scores()
    products = [noted(scores) for _ in range(50)]
    places = {storage_of(product) for product in products}
    del products
    others = [torch.empty(1, 2, 5, 5) for _ in range(500)]
    again = [other for other in others if storage_of(other) in places]
    assert again, "this allocator gave none of 50 places again"
    assert [scores.of(other) for other in again] == [None] * len(again)


SIZES = {"b": 2, "h": 3, "q": 4, "k": 5, "d": 6, "e": 1}


def tensor_of(letters, seed):
    return noise(*(SIZES[letter] for letter in letters), seed=seed)


@pytest.mark.parametrize("as_list", [False, True])
@pytest.mark.parametrize("spaces", [False, True])
@pytest.mark.parametrize(
    "equation",
    [
        "qd,kd->qk",
        "dq,dk->qk",
        "bqd,bkd->bqk",
        "bhqd,bhkd->bhqk",
        "bqhd,bkhd->bhqk",
        "hqbd,dbhk->bhqk",
        "bhkd,bhqd->bhqk",
        "bkhd,bqhd->bhqk",
        "bqhd,bkhd->hbqk",
    ],
)
def test_the_letters_of_an_einsum_tell_queries_from_keys(equation, spaces, as_list):
    names = equation.partition("->")[0].split(",")
    operands = [tensor_of(name, seed) for seed, name in enumerate(names)]
    if spaces:
        equation = f" {' '.join(equation).replace('- >', '->')} "
    args = (equation, operands) if as_list else (equation, *operands)
    out, scores = torch.einsum(*args), Scores()
    scores.note_product("einsum", args, {}, out)
    query, key = scores.of(out)
    assert (query.shape[-2:], key.shape[-2:]) == ((4, 6), (5, 6))
    assert_close(query @ key.mT, out)


@pytest.mark.parametrize(
    "equation",
    [
        "bhqd,bhkd->bqk",  # over heads too
        "bhqd,hkd->bhqk",  # keys of all samples
        "bhqd,bhkd",  # no letters of the result
        "bhqd,bhke->bhqk",  # each over its own channels
        "bhqd,bhkd->bhqkd",  # over none
        "qd,kd->q",
        "...qd,...kd->...qk",
        "bhqd,bhkd,d->bhqk",
        "bhqd,bhkd,e->bhqk",
        "bhdd,bhkd->bhk",  # a diagonal
        "bhqd->bhq",
    ],
)
def test_an_einsum_that_is_no_matrix_of_scores_has_no_factors(equation):
    names = equation.replace("...", "bh").partition("->")[0].split(",")
    operands = [tensor_of(name, seed) for seed, name in enumerate(names)]
    out, scores = torch.einsum(equation, *operands), Scores()
    scores.note_product("einsum", (equation, *operands), {}, out)
    assert scores.of(out) is None


LEFT, RIGHT, START = noise(3, 4, 6, seed=0), noise(3, 6, 5, seed=1), noise(3, 4, 5, seed=2)
PRODUCTS = {
    "matmul": [((LEFT, RIGHT), {}), ((LEFT,), {"other": RIGHT})],
    "bmm": [((LEFT, RIGHT), {}), ((LEFT,), {"mat2": RIGHT}), ((), {"mat2": RIGHT, "input": LEFT})],
    "mm": [((LEFT[0],), {"mat2": RIGHT[0]})],
    "baddbmm": [
        ((START, LEFT, RIGHT), {}),
        ((START, LEFT), {"batch2": RIGHT}),
        ((START,), {"batch1": LEFT, "batch2": RIGHT, "beta": 0}),
        ((), {"input": START, "batch1": LEFT, "batch2": RIGHT}),
        ((START, LEFT, RIGHT), {"beta": 0, "alpha": 2}),
    ],
}


@pytest.mark.parametrize("name", PRODUCTS)
def test_the_factors_of_a_product_are_found_wherever_they_are_given(name):
    for args, kwargs in PRODUCTS[name]:
        out, scores = getattr(torch, name)(*args, **kwargs), Scores()
        scores.note_product(name, args, kwargs, out)
        query, key = scores.of(out)
        assert_same_bits(query, LEFT[0] if name == "mm" else LEFT)
        assert_same_bits(key, RIGHT[0].mT if name == "mm" else RIGHT.mT)


@pytest.mark.parametrize("args", [(LEFT, RIGHT[0, :, 0]), (LEFT[0, 0], RIGHT), (LEFT,), (LEFT, 2)])
def test_a_vector_or_a_number_is_no_factor(args):
    scores, out = Scores(), noise(3, 4, 5, seed=3)
    scores.note_product("matmul", args, {}, out)
    assert scores.of(out) is None


def test_scores_are_followed_where_all_of_them_stay():
    scores = Scores()
    product = noted(scores)
    followed, part, other = product * 2, product.sum(-1), product + 1
    scores.follow((followed, product), followed)  # made of something else
    scores.follow((), followed)
    scores.follow((product, 2), None)
    scores.follow((product, -1), part)
    assert [scores.of(one) for one in (followed, part, other, None)] == [None] * 4
    scores.follow((product, 2), followed)
    assert scores.of(followed) is scores.of(product)
    scores.note_product("matmul", (LEFT, RIGHT), {}, None)
