"""A layout names each token, and cuts maps out of weights of any kind."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dinov2_attn.backbone.layout import Layout, cut_maps
from dinov2_attn.errors import InvalidInputError
from tests.support.strategies import noise
from tests.support.tolerances import assert_same_bits

layouts = st.builds(
    Layout,
    prefix=st.integers(0, 5),
    suffix=st.integers(0, 4),
    grid=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    per_cell=st.integers(1, 3),
    planes=st.booleans(),
)


@given(layouts)
def test_every_position_is_prefix_patch_or_suffix(layout):
    cells = [layout.cell(i) for i in range(layout.length)]
    before, behind = cells[: layout.prefix], cells[layout.length - layout.suffix :]
    assert {*before, *behind} <= {None}
    height, width = layout.grid
    every = [(row, column) for row in range(height) for column in range(width)]
    patches = [cells[i] for i in layout.patches]
    if layout.planes:
        assert patches == every * layout.per_cell
    else:
        assert patches == [cell for cell in every for _ in range(layout.per_cell)]


@given(layout=layouts, lead=st.sampled_from([(), (2,), (2, 3, 4)]), seed=st.integers(0, 9))
def test_each_weight_is_at_its_cell(layout, lead, seed):
    weights = noise(*lead, layout.length, seed=seed)
    maps = cut_maps(weights, layout)
    k, grid = layout.per_cell, layout.grid
    assert maps.shape == ((*lead, *grid) if k == 1 else (*lead, k, *grid))
    maps, seen = maps.reshape(*lead, k, *grid), {}
    for position in layout.patches:
        cell = layout.cell(position)
        form = seen[cell] = seen.get(cell, -1) + 1
        assert_same_bits(maps[(..., form, *cell)], weights[..., position])


@given(layouts)
def test_arrays_are_cut_like_tensors(layout):
    weights = noise(2, layout.length, seed=0)
    assert_same_bits(torch.from_numpy(cut_maps(weights.numpy(), layout)), cut_maps(weights, layout))


@pytest.mark.parametrize("weights", [torch.ones(2, 8), torch.ones(()), "eight columns"])
def test_other_columns_are_refused(weights):
    with pytest.raises(InvalidInputError, match="1 \\+ 2 · 3 \\+ 2 = 9 columns"):
        cut_maps(weights, Layout(1, 2, (2, 3)))
    with pytest.raises(InvalidInputError, match="1 \\+ 2 · 3 · 2 \\+ 2 = 15 columns"):
        cut_maps(weights, Layout(1, 2, (2, 3), 2))
    with pytest.raises(InvalidInputError, match="1 \\+ 2 · 3 = 7 columns: .*, then the patches\\."):
        cut_maps(weights, Layout(1, 0, (2, 3)))
