"""Maps on another grid: what each new cell gets, counted in cells that divide both."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dinov2_attn.maps.resample import resample
from tests.support.strategies import noise, seeds
from tests.support.tolerances import assert_close

sides = st.integers(1, 9)
grids = st.tuples(sides, sides)


def counted(maps, grid):
    """Split every cell evenly until both grids are made of whole ones, and count these."""
    for axis, new in zip((-2, -1), grid, strict=True):
        old = maps.shape[axis]
        fine = math.lcm(old, new)
        maps = maps.repeat(fine // old, axis) / (fine // old)
        split = maps.swapaxes(axis, -1)
        maps = split.reshape(*split.shape[:-1], new, fine // new).sum(-1).swapaxes(axis, -1)
    return maps


@given(old=grids, new=grids, seed=seeds)
def test_each_cell_gets_what_it_covers(old, new, seed):
    maps = noise(2, 3, *old, seed=seed, dtype=torch.float64)
    expected = torch.from_numpy(counted(maps.numpy(), new))
    assert_close(resample(maps, new), expected, size=float(maps.abs().sum()))


@given(old=grids, new=grids, seed=seeds)
def test_sums_stay(old, new, seed):
    maps = noise(4, *old, seed=seed).abs()
    ours = resample(maps, new)
    assert ours.dtype == torch.float32
    assert_close(ours.sum((-2, -1)), maps.sum((-2, -1)))


@given(grid=grids, seed=seeds)
def test_on_its_own_grid_a_map_is_what_it_was(grid, seed):
    maps = noise(2, *grid, seed=seed)
    assert_close(resample(maps, grid), maps)  # products with ones and zeros


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_added_up_in_float32(dtype):
    ours = resample(torch.ones(1, 4099, dtype=dtype), (1, 1))  # a number that neither has
    assert ours.dtype == torch.float32
    assert ours.item() == 4099
