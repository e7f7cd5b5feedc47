"""Changes of matrices of weights, and of the biases that hide keys."""

from __future__ import annotations

import math

import pytest
import torch

from dinov2_attn.errors import InvalidInputError
from dinov2_attn.math.patterns import (
    renormalised,
    sees_any,
    with_hidden,
    with_rows,
    without_heads,
)
from tests.support.strategies import noise
from tests.support.tolerances import assert_close, assert_same_bits


def elsewhere():
    """What is made inside has to be where its tensors are, not where others would be."""
    return torch.device("meta")


@pytest.mark.parametrize("shape", [(2, 3, 4, 5), (2, 3, 4, 1)])
@pytest.mark.parametrize("heads", [[], [1], [0, -1], (2, 2)])
def test_chosen_heads_are_zero_and_others_stay(shape, heads):
    tensor = noise(*shape, seed=0)
    expected = tensor.clone()
    for head in heads:
        expected[:, head] = 0
    with elsewhere():
        found = without_heads(tensor, heads)
    assert_same_bits(found, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_rows_are_put_in_their_places_in_the_dtype_of_the_rest(dtype):
    tensor, part = noise(2, 3, 4, 5, seed=0, dtype=dtype), noise(2, 3, 2, 5, seed=1)
    expected = tensor.clone()
    expected[:, :, [3, 0]] = part.to(dtype)
    with elsewhere():
        found = with_rows(tensor, (3, 0), part)
    assert_same_bits(found, expected)


def test_hidden_keys_are_hidden_by_a_bias_of_either_kind_or_none():
    seen = torch.tensor([[[[True, False, True]]]])
    visible = torch.tensor([[[[True, True, False], [False, True, True]]]])
    added = noise(1, 1, 2, 3, seed=0)
    assert with_hidden(None, seen) is seen
    assert with_hidden(visible, seen).tolist() == [[[[True, False, False], [False, False, True]]]]
    hidden = with_hidden(added, seen)
    assert hidden[..., 1].isneginf().all()
    assert_same_bits(hidden[..., ::2], added[..., ::2])


def test_a_row_sees_a_key_if_its_bias_leaves_one():
    mask = torch.tensor([[True, False], [False, False], [False, True]])
    added = torch.zeros(3, 2).masked_fill(~mask, -math.inf) - 1e4
    assert sees_any(mask).tolist() == sees_any(added).tolist() == [True, False, True]


def test_the_other_keys_of_a_row_take_the_sum_that_it_had():
    weights = noise(2, 3, 4, 5, seed=0).softmax(-1) * 0.5
    weights[0, 1, 2] = 0  # a row without weights has none afterwards
    keys = torch.tensor([[False, True, False, False, True]])
    each = torch.cat([keys, ~keys])
    expected = weights.double().clone()
    for sample, hidden in zip(expected, each, strict=True):
        sample[..., hidden] = 0
    expected *= weights.double().sum(-1, keepdim=True) / expected.sum(-1, keepdim=True)
    expected = expected.nan_to_num(0)
    found = renormalised(weights, each)
    assert_close(found, expected)
    assert_same_bits(found[:1], renormalised(weights[:1], keys))
    assert (found.sum(-1) == 0).sum() == 1


def test_a_row_that_would_lose_all_of_its_weight_is_refused():
    weights = torch.tensor([[[[1.0, 0.0], [0.5, 0.5]]]])
    keys = torch.tensor([[True, False]])
    with pytest.raises(InvalidInputError, match=r"(?s)row of explicit weights.*float32"):
        renormalised(weights, keys)
