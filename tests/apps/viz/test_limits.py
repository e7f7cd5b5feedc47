"""Limits of colours and marks on them: what can be seen in a picture, by its pixels."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from dinov2_attn import AttentionMaps, viz
from dinov2_attn.apps.viz.limits import scale
from dinov2_attn.apps.viz.mosaic import Cells, Mosaic
from tests.support.figure_probes import Drawn, artifacts_at, caption_of, maps_on

RED = (148, 0, 0)
CMAPS = ("viridis", "inferno", "magma", "plasma", "cividis", "gray")
maps_of_numbers = arrays(
    np.float64,
    st.tuples(st.integers(1, 4), st.integers(1, 12), st.integers(1, 12)),
    elements=st.floats(0, 100),
)


# Robust limits


@given(values=maps_of_numbers)
def test_robust_limits_leave_out_few_patches_that_stand_out_and_no_others(values):
    norm = scale(values, viz.Style())
    highest, end = values.max(), norm.vmax
    assert norm.vmin == 0
    above = (values > end).sum()
    assert above <= len(values) * max(3, 0.005 * values[0].size)
    assert above <= max(0.02, 0.005) * values.size
    if above:
        assert end in values
        assert highest > 2 * end
        assert values[values > end].sum() <= 2 / 3 * values.sum()
    else:
        assert end == (highest or 1)


def test_a_large_map_may_have_half_a_percent_above():
    values = np.ones((1, 50, 50))
    values.flat[:12] = 100
    assert scale(values, viz.Style()).vmax == 1
    values.flat[12] = 100
    assert scale(values, viz.Style()).vmax == 100


def test_few_patches_that_hold_most_of_the_attention_are_within_the_limits():
    values = np.full((1, 10, 10), 0.1)
    values.flat[:2] = 5
    assert scale(values, viz.Style()).vmax == 0.1
    values.flat[:2] = 50
    assert scale(values, viz.Style()).vmax == 50


@given(values=maps_of_numbers, data=st.data())
def test_artifacts_that_are_marked_have_no_part_in_robust_limits(values, data):
    shape = values.shape[1:]
    mask = data.draw(arrays(bool, shape))
    loud = np.where(mask, 1e6, values)
    style = viz.Style()
    if mask.all():
        assert scale(loud, style, mask).vmax == 1e6
    else:
        quiet = np.where(mask, np.nan, values)
        kept = scale(loud, style, mask).vmax
        assert kept <= 100
        assert kept == scale(quiet[:, ~mask][:, None], style).vmax


@given(values=maps_of_numbers)
def test_other_limits_are_exact(values):
    for limits in ("shared", "each"):
        norm = scale(values, viz.Style(limits=limits))
        assert (norm.vmin, norm.vmax) == (0, values.max() or 1)
    fixed = scale(values, viz.Style(limits=(0.5, 2)))
    assert (fixed.vmin, fixed.vmax) == (0.5, 2)
    log = scale(values, viz.Style(limits=(0, 2), log=True))
    assert (log.vmin, log.vmax) == (2 / 1e4, 2)


# What is seen


def planted(grid, places, heads=3, registers=0):
    """A blob in every head, and in head 0 patches of 50 times the weight of the others."""
    rows, columns = np.indices(grid)
    middle = np.array(grid) * (0.4, 0.6)
    distance = ((rows - middle[0]) ** 2 + (columns - middle[1]) ** 2) / (0.15 * min(grid)) ** 2
    noise = np.random.default_rng(0).random((heads, *grid))
    maps = 0.7 + 0.3 * noise + 4 * np.exp(-distance / 2)
    for place in places:
        maps[(0, *place)] = 50 * np.median(maps)
    tokens = np.concatenate([np.full((heads, 1 + registers), 1.0), maps.reshape(heads, -1)], axis=1)
    weights = torch.from_numpy(tokens / tokens.sum(1, keepdims=True))[None, :, None]
    blob = np.exp(-distance / 2)
    return AttentionMaps((weights, weights), (0, 1), grid, 1 + registers, (0,)), blob


def brightness(colours):
    """Relative luminance as WCAG defines it, of colours (…, 3) of 0…255."""
    share = np.asarray(colours) / 255
    linear = np.where(share <= 0.04045, share / 12.92, ((share + 0.055) / 1.055) ** 2.4)
    return linear @ (0.2126, 0.7152, 0.0722)


def contrast(one, other):
    """The contrast of two colours, as WCAG defines it."""
    brighter, darker = np.maximum(one, other), np.minimum(one, other)
    return (brighter + 0.05) / (darker + 0.05)


def light_on(blob, cells):
    """The share of the visible light of drawn maps (h, w, 3) that is on a blob, and its contrast.

    Light is visible if it has a contrast of 1.5 with most of its map.
    """
    lights = [brightness(colours) for colours in cells]
    usual = [np.median(light) for light in lights]
    visible = sum(
        np.where(contrast(light, dark) > 1.5, light - dark, 0).clip(0)
        for light, dark in zip(lights, usual, strict=True)
    )
    middle = max(
        contrast(light[blob > 0.7].mean(), dark) for light, dark in zip(lights, usual, strict=True)
    )
    return visible[blob > 0.05].sum() / max(visible.sum(), 1e-9), middle


DRAWS = {
    "heads": viz.plot_heads,
    "layers": viz.plot_layers,
    "one": lambda maps, **options: viz.plot(maps, head=0, **options).figure,
}


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("grid", [(10, 15), (18, 16), (37, 37), (40, 12)])
@pytest.mark.parametrize("draw", DRAWS.values(), ids=DRAWS)
def test_a_blob_is_what_one_sees_beside_three_artifacts(draw, grid, known):
    places = [(0, grid[1] - 2), (grid[0] - 2, 1), (grid[0] - 1, grid[1] - 1)]
    maps, blob = planted(grid, places)
    artifacts = artifacts_at(grid, *places) if known else None

    def draw_with(limits):
        return Drawn(draw(maps, artifacts=artifacts, style=viz.Style(limits=limits)))

    def light(drawn):
        return light_on(blob, [drawn.middles(i, grid) for i in range(len(drawn.cells))])

    robust = draw_with("robust")
    share, middle = light(robust)
    assert share > 2 / 3
    assert middle > 3
    assert light(draw_with("shared"))[0] < 0.5  # only the artifacts are seen
    for cell in range(len(robust.cells)):
        assert robust.frames(cell, grid, RED) == (set(places) if known else set())
    assert "lie above the last colour, the highest at " in caption_of(robust.figure)


@pytest.mark.parametrize("cmap", CMAPS)
@pytest.mark.parametrize("mark", ["artifacts", "query", "mask"])
def test_marks_have_a_contrast_of_three_on_every_colour(mark, cmap):
    """A pixel of each frame, of patches in all of the 256 colours, is three times as bright."""
    grid = (16, 16)
    drawn = _all_colours(grid, cmap)
    cells, style = Cells(grid), viz.Style(cmap=cmap)
    assert len(np.unique(drawn.middles(0, grid).reshape(-1, 3), axis=0)) > 220
    mosaic = Mosaic(drawn.ax, cells, style, 1.5)
    chosen = np.indices(grid).sum(axis=0) % 2 == 0
    for some in (chosen, ~chosen):
        plain = brightness(drawn.middles(0, grid))
        if mark == "artifacts":
            mosaic.outlines((0, 0), some)
        elif mark == "mask":
            mosaic.contour((0, 0), some)
        else:
            for patch in np.argwhere(some):
                mosaic.query((0, 0), tuple(patch))
        marked = Drawn(drawn.figure)
        for place in np.argwhere(some):
            across = [marked.at(0, place[0], place[1] + x) for x in np.linspace(0.2, 0.8, 60)]
            assert contrast(brightness(across), plain[tuple(place)]).max() >= 3, place
        drawn = _all_colours(grid, cmap)
        mosaic = Mosaic(drawn.ax, cells, style, 1.5)


def _all_colours(grid, cmap):
    maps = maps_on(grid, heads=1, layers=1)
    maps.weights[0][..., 1:] = torch.linspace(0, 1, 256, dtype=torch.float64)
    return Drawn(viz.plot(maps, style=viz.Style(cmap=cmap, limits="shared")).figure)
