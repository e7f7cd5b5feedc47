"""Statistics of rows of weights, by their definitions in NumPy."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dinov2_attn.math.gradients import product_with_values, weight_gradients
from dinov2_attn.math.statistics import centroid_and_spread, distances_into, entropy
from tests.support.strategies import noise
from tests.support.tolerances import assert_close, assert_same_bits


def elsewhere():
    """What is made inside has to be where its tensors are, not where others would be."""
    return torch.device("meta")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_entropy_counts_no_weight_of_zero(dtype):
    weights = noise(3, 4, 6, seed=0, dtype=dtype).softmax(-1)
    weights[0] = torch.eye(6, dtype=dtype)[:4]
    weights[1, 0] = torch.tensor([0.5, 0, 0, 0.5, 0, 0])
    memory = torch.full_like(weights, 7)
    with elsewhere():
        found = entropy(weights)
    array = weights.double().numpy()
    with np.errstate(divide="ignore", invalid="ignore"):
        terms = np.where(array > 0, array * np.log(array), 0)
    assert_close(found, -terms.sum(-1))
    assert_same_bits(found[0].abs(), torch.zeros(4, dtype=dtype))
    assert_same_bits(entropy(weights, memory), found)
    assert not (memory == 7).any()  # which was written to, in place of memory of its own


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_distances_are_those_of_the_centres_of_cells(dtype):
    rows = torch.tensor([0, 2, torch.nan], dtype=dtype)
    columns = torch.tensor([3, 1, torch.nan], dtype=dtype)
    result = torch.empty(3, 4, 5, dtype=dtype)
    with elsewhere():
        distances_into(result, rows, columns)
    down, right = np.mgrid[:4, :5]
    for found, row, column in zip(result, [0, 2], [3, 1], strict=False):
        assert_close(found, np.hypot(down - row, right - column))
    assert result[2].isnan().all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_centroid_and_spread_are_moments_of_a_map(dtype):
    maps = noise(2, 3, 4, 5, seed=0, dtype=dtype).softmax(-1) + 0.1
    maps[1, 2] = 0
    with elsewhere():
        centroid, spread = centroid_and_spread(maps)
    places = np.stack(np.mgrid[:4, :5], -1).reshape(20, 2)
    for ours, own, one in zip(
        centroid.flatten(0, 1), spread.flatten(), maps.flatten(0, 1), strict=True
    ):
        weights = one.double().flatten().numpy()
        if not weights.any():
            assert ours.isnan().all()
            assert own.isnan()
            continue
        mean = weights @ places / weights.sum()
        assert_close(ours, mean)
        assert_close(own, np.sqrt(weights @ ((places - mean) ** 2).sum(-1) / weights.sum()))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("autocast", [False, True])
def test_gradients_by_weights_are_products_in_float32_at_least(dtype, autocast):
    gradient, value = (noise(2, 3, n, 7, seed=n, dtype=dtype).requires_grad_() for n in (4, 5))
    expected = np.einsum(
        "bhqd,bhkd->bhqk", gradient.detach().double().numpy(), value.detach().double().numpy()
    )
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        found = product_with_values(gradient, value)
        each, mean = (weight_gradients(gradient, value, heads) for heads in (None, "mean"))
    assert (found.dtype, each.dtype, mean.dtype) == (dtype,) * 3
    assert_close(found, expected, dtype=dtype)
    assert_same_bits(each, found.detach())
    assert_close(mean, expected.mean(1), dtype=dtype)
    assert found.requires_grad
    assert not each.requires_grad
    assert not mean.requires_grad
