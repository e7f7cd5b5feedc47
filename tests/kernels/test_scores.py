"""Following products to the softmax that takes them, without keeping any of them alive."""

from __future__ import annotations

import gc
import weakref

import torch

from dinov2_attn._compat import storage_of
from dinov2_attn.kernels.scores import Scores
from tests.support.strategies import noise


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
