"""Captioned pictures: the colour of each patch, marks, captions; numbers and not only files."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path

import matplotlib
import numpy as np
import pytest
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text

from dinov2_attn import artifact_tokens, attention_maps, record, viz
from dinov2_attn.apps.viz.colours import top_mass_mask
from dinov2_attn.apps.viz.rows import select_row
from dinov2_attn.apps.viz.style import GREY
from dinov2_attn.apps.viz.text import NO_MEANING
from dinov2_attn.backbone.structure import Role, role_of_module
from dinov2_attn.errors import InvalidInputError, OutOfRangeError
from dinov2_attn.math.selection import name_token
from dinov2_attn.math.token_names import position_of, read_token
from tests.support import reference
from tests.support.figure_probes import (
    Drawn,
    artifacts_at,
    caption_of,
    maps_on,
    photograph_on,
    viridis,
    words_of,
)
from tests.support.recordings import IMAGES, build
from tests.support.strategies import ModelCase
from tests.support.tolerances import assert_close, assert_same_bits

GRID = (3, 5)
RED, WHITE = (148, 0, 0), (255, 255, 255)
SHARED = viz.Style(limits="shared")
grids = st.tuples(st.integers(1, 6), st.integers(1, 6))
EVERY = {"heads": viz.plot_heads, "layers": viz.plot_layers}


def drawn_values(maps, layer=-1):
    """Mean and heads of a layer, (1 + heads, h, w)."""
    each = maps.patch_maps()[layer][0, :, 0].numpy()
    return np.concatenate([each.mean(0, keepdims=True), each])


# Colours


@settings(max_examples=12)
@given(grid=grids, registers=st.integers(0, 4), log=st.booleans(), seed=st.integers(0, 99))
def test_each_patch_has_the_colour_of_its_value_on_the_one_scale_of_all_heads(
    grid, registers, log, seed
):
    assume(grid != (1, 1))
    maps = maps_on(grid, registers=registers, seed=seed)
    drawn = Drawn(viz.plot_heads(maps, style=viz.Style(log=log, limits="shared")))
    values = drawn_values(maps)
    high = values.max()
    expected = viridis(values, max(values.min(), high / 1e4) if log else 0, high, log=log)
    assert len(drawn.cells) == 4
    for cell in range(4):
        assert np.abs(drawn.middles(cell, grid) - expected[cell]).max() <= 3


def test_the_colour_bar_counts_from_zero_in_round_multiples_of_uniform_attention():
    maps = maps_on(GRID)
    figure = viz.plot_heads(maps, style=SHARED)
    highest = 16 * drawn_values(maps).max()
    labels = [label.get_text() for label in figure.axes[1].get_yticklabels()]
    places = figure.axes[1].get_yticks()
    assert labels[0] == "0"
    assert len(labels) >= 3
    assert places[-1] <= highest < places[-1] + places[1] + 1e-9
    for place, label in zip(places[1:], labels[1:], strict=True):
        multiple, share = label.split("×  ")
        assert float(multiple) == pytest.approx(place)
        assert f"{float(multiple):.1g}" in (f"{place:.1g}", multiple)
        assert float(share.removesuffix(" %")) == pytest.approx(100 * place / 16, rel=0.06)
    assert figure.axes[1].get_ylim() == pytest.approx((0, highest))
    assert figure.axes[1].get_ylabel() == "attention (× uniform)"
    bar = Drawn(figure).pixels
    box = figure.axes[1].get_window_extent()
    x = int((box.x0 + box.x1) / 2)
    top, bottom = len(bar) - int(box.y1) + 3, len(bar) - int(box.y0) - 4
    assert np.abs(bar[top, x] - viridis(1.0, 0, 1)).max() < 8
    assert np.abs(bar[bottom, x] - viridis(0.0, 0, 1)).max() < 8


@pytest.mark.parametrize("limits", ["shared", "robust", "each"])
def test_layers_by_heads_have_their_scale_and_their_place(limits):
    maps = maps_on(GRID, layers=4, registers=2)
    for layer, weights in enumerate(maps.weights):
        weights.div_(1 + layer)
    drawn = Drawn(viz.plot_layers(maps, style=viz.Style(limits=limits)))
    values = np.stack([drawn_values(maps, layer) for layer in range(4)])
    axes = {"shared": (0, 1, 2, 3), "robust": (1, 2, 3), "each": (2, 3)}[limits]
    high = values.max(axis=axes, keepdims=True)
    expected = viridis(values, 0, high).reshape(16, *GRID, 3)
    for cell in range(16):
        assert np.abs(drawn.middles(cell, GRID) - expected[cell]).max() <= 3
    # One layer to a row, below one another.
    xs, ys = (sorted({corner[axis] for corner in drawn.cells}) for axis in (0, 1))
    assert (len(xs), len(ys)) == (4, 4)
    assert drawn.cells == [(x, y) for y in ys for x in xs]
    words = words_of(drawn.figure)
    for layer in range(4):
        limit = f"\nto {18 * high.flat[layer]:.2g}×" if limits == "robust" else ""
        assert any(word.startswith(f"layer {layer}{limit}") for word in words)
    assert ("Each layer has its own colours" in caption_of(drawn.figure)) is (limits == "robust")


def test_one_map_alone_is_scaled_by_itself():
    maps = maps_on(GRID, layers=3)
    ax = viz.plot(maps, layer=1, head=2)
    values = maps.patch_maps()[1][0, 2, 0].numpy()
    drawn = Drawn(ax.figure)
    assert np.abs(drawn.middles(0, GRID) - viridis(values, 0, values.max())).max() <= 3
    assert_close(ax.images[0].get_array().data, 16 * values)


@pytest.mark.parametrize("log", [False, True])
def test_a_constant_map_has_one_of_the_end_colours(log):
    maps = maps_on((1, 1), heads=1)
    drawn = Drawn(viz.plot(maps, style=viz.Style(log=log)).figure)
    assert np.abs(drawn.at(0, 0, 0) - viridis(0.0 if log else 1.0, 0, 1)).max() <= 2


def test_a_logarithmic_scale_has_four_decades():
    maps = maps_on((2, 3), heads=1, layers=1)
    maps.weights[0][..., 3] = 1e-30
    bar = viz.plot(maps, style=viz.Style(log=True)).figure.axes[1]
    high = 7 * float(maps.patch_maps()[0].max())
    assert bar.get_ylim() == pytest.approx((high / 1e4, high))


def test_zero_and_nan_do_no_harm():
    maps = maps_on((2, 3), heads=1, layers=1)
    maps.weights[0][..., 2], maps.weights[0][..., 4] = 0, math.nan
    for log in (False, True):
        drawn = Drawn(viz.plot(maps, head=0, style=viz.Style(log=log)).figure)
        assert np.abs(drawn.at(0, 0, 1) - viridis(0.0, 0, 1)).max() <= 2
        assert (drawn.at(0, 1, 0) == 0).all()
    maps.weights[0].fill_(math.nan)
    assert (Drawn(viz.plot(maps).figure).at(0, 1, 2) == 0).all()


@given(alpha=st.floats(0.1, 1), grid=grids)
@settings(max_examples=8)
def test_an_overlay_is_so_much_of_the_map_over_the_photograph(alpha, grid):
    assume(grid != (1, 1))
    maps, photograph = maps_on(grid), photograph_on(grid)
    values = drawn_values(maps)[0]
    colours = viridis(values, 0, values.max())
    cells = photograph[7::14, 7::14]
    grey = (cells @ (0.2126, 0.7152, 0.0722))[..., None]
    for background, below in (("grey", grey), ("colour", cells)):
        style = viz.Style(alpha=alpha, background=background)
        ax = viz.plot(maps, image=photograph, style=style)
        expected = alpha * colours + (1 - alpha) * below
        assert np.abs(Drawn(ax.figure).middles(0, grid) - expected).max() <= 4


def test_between_patches_a_bilinear_map_is_between_their_values():
    maps = maps_on((1, 2), heads=1)
    style = viz.Style(interpolation="bilinear")
    drawn = Drawn(viz.plot(maps, style=style).figure)
    values = maps.patch_maps()[-1][0, 0, 0].numpy()
    for share in (0.0, 0.25, 0.5, 0.9):
        value = (1 - share) * values[0, 0] + share * values[0, 1]
        expected = viridis(value, 0, values.max())
        assert np.abs(drawn.at(0, 0, share) - expected).max() <= 8
    steps = Drawn(viz.plot(maps).figure)
    assert_same_bits(steps.at(0, 0, 0.25), steps.at(0, 0, 0))


@settings(max_examples=10)
@given(grid=grids, share=st.floats(0.1, 1))
def test_masks_dim_all_but_the_patches_that_keep_the_mass(grid, share):
    maps, photograph = maps_on(grid), photograph_on(grid)
    drawn = Drawn(viz.plot_masks(maps, share, image=photograph))
    plain = photograph[7::14, 7::14].astype(int)
    assert np.abs(drawn.middles(0, grid) - plain).max() <= 2
    dark = 0.4 * (plain @ (0.2126, 0.7152, 0.0722))[..., None]
    for cell, values in enumerate(drawn_values(maps), start=1):
        kept = top_mass_mask(values, share)
        expected = np.where(kept[..., None], plain, dark)
        assert np.abs(drawn.middles(cell, grid) - expected).max() <= 3
        assert any(text.endswith(f"· {100 * kept.mean():.1f} %") for text in words_of(drawn.figure))


@pytest.mark.parametrize("fine", [1, 2, 14])
def test_an_object_is_outlined_in_every_cell_whatever_the_resolution(fine):
    mask = np.zeros(GRID, dtype=bool)
    mask[1, 2] = True
    mask = mask.repeat(fine, axis=0).repeat(fine, axis=1)
    picture = np.full((42, 70, 3), 60, dtype=np.uint8)
    for draw, cells in ((viz.plot_heads, 5), (lambda *a, **k: viz.plot(*a, **k).figure, 1)):
        figure = draw(maps_on(GRID), image=picture, outline=mask)
        assert "The thin white line is around the object that was marked." in caption_of(figure)
        drawn = Drawn(figure)
        for cell in range(cells):
            assert drawn.frames(cell, GRID, WHITE) == {(1, 2)}, cell
    assert "thin white line" not in caption_of(viz.plot_heads(maps_on(GRID), image=picture))


def test_a_line_separates_what_a_mask_keeps():
    grid = (4, 6)
    maps = maps_on(grid, heads=1, layers=1)
    maps.weights[0][..., :] = 1e-9
    maps.weights[0][..., 1 + 7 : 1 + 10] = 0.3  # row 1, columns 1 to 3
    dark = np.zeros((56, 84, 3), np.uint8)
    drawn = Drawn(viz.plot_masks(maps, 0.9, image=dark))
    border = [(0.5, 1), (0.5, 2), (0.5, 3), (1.5, 2), (1, 0.5), (1, 3.5)]
    for place in border:
        assert (drawn.near(1, *place).min(axis=1) > 200).any(), place
    for place in ((1, 1.5), (1, 2.5), (2.5, 2), (1, 4.5)):
        assert (drawn.near(1, *place).max(axis=1) < 30).all(), place


# Marks


@settings(max_examples=12)
@given(grid=st.tuples(st.integers(2, 6), st.integers(2, 6)), data=st.data())
def test_the_query_is_framed_where_it_is(grid, data):
    assume(grid[0] != grid[1])
    row = data.draw(st.integers(0, grid[0] - 1))
    column = data.draw(st.integers(0, grid[1] - 1))
    registers = data.draw(st.integers(0, 2))
    position = 1 + registers + row * grid[1] + column
    maps = maps_on(grid, registers=registers, queries=(0, position))
    ax = viz.plot(maps, query=(row, column))
    assert Drawn(ax.figure).frames(0, grid, WHITE) == {(row, column)}
    assert f"Attention of patch ({row}, {column})" in caption_of(ax.figure)
    heads = Drawn(viz.plot_heads(maps, query=(row, column), image=photograph_on(grid) // 2))
    for cell in range(5):
        assert heads.frames(cell, grid, WHITE) == {(row, column)}
    assert not Drawn(viz.plot(maps).figure).frames(0, grid, WHITE)


@pytest.mark.parametrize("grid", [(3, 5), (5, 2)])
@pytest.mark.parametrize("draw", EVERY.values(), ids=EVERY)
def test_artifacts_are_framed_in_red_and_nothing_else_is(draw, grid):
    places = {(0, grid[1] - 1), (2, 0)}
    drawn = Drawn(draw(maps_on(grid), artifacts=artifacts_at(grid, *places)))
    for cell in range(len(drawn.cells)):
        assert drawn.frames(cell, grid, RED) == places
    none = Drawn(draw(maps_on(grid), artifacts=artifacts_at(grid)))
    assert not none.frames(0, grid, RED)


def planted():
    """One patch that outshines all others, and is an artifact."""
    maps = maps_on(GRID)
    for weights in maps.weights:
        weights[..., 1 + 1 * GRID[1] + 3] = 0.9
    return maps, artifacts_at(GRID, (1, 3))


@pytest.mark.parametrize("interpolation", ["nearest", "bilinear"])
@pytest.mark.parametrize("draw", EVERY.values(), ids=EVERY)
@pytest.mark.parametrize(
    ("outliers", "limits"),
    [("mark", "robust"), ("clip", "robust"), ("clip", "shared"), ("mask", "shared")],
)
def test_artifacts_leave_the_scale_to_the_others(draw, outliers, limits, interpolation):
    maps, artifacts = planted()
    style = viz.Style(outliers=outliers, interpolation=interpolation, limits=limits)
    drawn = Drawn(draw(maps, artifacts=artifacts, style=style))
    layers = range(len(maps.layers)) if draw is viz.plot_layers else [-1]
    values = np.stack([drawn_values(maps, layer) for layer in layers])
    others = np.ones(GRID, dtype=bool)
    others[1, 3] = False
    axes = (1, 2) if limits == "robust" else (0, 1, 2)
    high = values[..., others].max(axis=axes, keepdims=True)[..., None]
    expected = viridis(values, 0, high)
    expected[..., 1, 3, :] = np.multiply(GREY[:3], 255) if outliers == "mask" else viridis(1, 0, 1)
    for cell, colours in enumerate(expected.reshape(-1, *GRID, 3)):
        # In a bilinear map the pixel of a middle is not quite its middle.
        tolerance = 3 if interpolation == "nearest" else 25
        assert np.abs(drawn.middles(cell, GRID) - colours).max() <= tolerance
        assert drawn.frames(cell, GRID, RED) == {(1, 3)}
    if outliers == "mask":  # all of the patch and nothing beyond it
        grey = expected[0, 0, 1, 3]
        for row, column in ((0.62, 2.62), (1.38, 3.38)):
            assert np.abs(drawn.at(0, row, column) - grey).max() <= 2
        for row, column in ((0.4, 3), (1.6, 3), (1, 2.4), (1, 3.6)):
            assert np.abs(drawn.at(0, row, column) - grey).max() > 20
        if interpolation == "bilinear":  # what was masked does not shine into its neighbour
            low = values[0, 0][others].min()
            mixed = viridis(0.6 * values[0, 0, 1, 2] + 0.4 * low, 0, high[0, 0])
            assert np.abs(drawn.at(0, 1, 2.4) - mixed).max() <= 25
    elif limits == "shared":
        assert drawn.figure.axes[1].get_ylim()[1] == pytest.approx(16 * high.flat[0])


@pytest.mark.parametrize("outliers", ["mark", "clip", "mask"])
def test_artifacts_are_framed_on_the_image_too(outliers):
    maps, artifacts = planted()
    style, image = viz.Style(outliers=outliers), photograph_on(GRID)
    drawn = Drawn(viz.plot_heads(maps, image=image, artifacts=artifacts, style=style))
    assert drawn.frames(0, GRID, RED) == {(1, 3)}


def test_artifacts_may_be_shown_like_all_others():
    maps, artifacts = planted()
    style = viz.Style(outliers="none")
    ours = Drawn(viz.plot_heads(maps, artifacts=artifacts, style=style))
    plain = Drawn(viz.plot_heads(maps))
    for cell in range(4):
        assert_same_bits(ours.middles(cell, GRID), plain.middles(cell, GRID))
    assert "1 artifact token (not marked)" in caption_of(ours.figure)


def test_where_every_patch_is_an_artifact_all_are_scaled():
    maps = maps_on((1, 2))
    artifacts = artifacts_at((1, 2), (0, 0), (0, 1))
    drawn = Drawn(viz.plot(maps, artifacts=artifacts, style=viz.Style(outliers="clip")).figure)
    values = drawn_values(maps)[0]
    expected = viridis(values, 0, values.max())
    assert np.abs(drawn.middles(0, (1, 2)) - expected).max() <= 3


# Captions


CASE = ModelCase(
    depth=3, chunks=0, registers=2, heads=3, grid=(3, 5), batch=2, dtype=torch.float64, seed=5
)


def by_definition(model, images):
    """The weights of each layer in upstream's own pass, from the reference."""
    attentions = [m for m in model.modules() if role_of_module(m) is Role.ATTENTION]
    seen = []
    hooks = [m.register_forward_pre_hook(lambda _, a: seen.append(a[0])) for m in attentions]
    with torch.no_grad():
        model(images)
    for hook in hooks:
        hook.remove()
    return [reference.weights(*pair) for pair in zip(attentions, seen, strict=True)]


@pytest.mark.filterwarnings("ignore:more than 10%")
@pytest.mark.parametrize("query", ["cls", "register:2", (2, 1)])
def test_a_caption_holds_the_numbers_of_the_reference(models, query):
    if query == "register:2" and not models.has_registers:
        pytest.skip("this copy has no registers: the others run with two, and this with CLS")
    model, prefix = CASE.build(models), CASE.prefix(models)
    images = CASE.images
    position = position_of(query, prefix, CASE.grid)
    maps = attention_maps(model, images, queries=[0, position])
    artifacts = artifact_tokens(model, images, 1, deviations=0.1, floor=1.01)
    weights = by_definition(model, images)
    row = weights[1][1, :, position]
    held, outlying = row[:, :prefix].sum(-1), artifacts.mask[1].flatten()
    assert outlying.any()
    figure = viz.plot_heads(
        maps, layer=1, query=query, sample=1, artifacts=artifacts, name="some model"
    )
    caption = caption_of(figure)
    name = name_token(position, prefix, CASE.grid)
    assert caption.startswith(f"Attention of {name}")
    assert "in layer 1 (counted from 0): each head and their mean. Model: some model." in caption
    assert f"{100 * float(held.mean()):.1f} % of the attention, mean of heads" in caption
    assert f"norm is an outlier, above {float(artifacts.threshold[1]):.4g} after layer 1" in caption
    of_artifacts = row.mean(0)[prefix:][outlying].sum()
    assert f"get {100 * float(of_artifacts):.1f} % of the attention, mean of heads" in caption
    assert f"{int(outlying.sum())} artifact token" in caption
    assert f"each of the {row.shape[-1]} tokens gets if all get the same, " in caption
    words = words_of(figure)
    for head in range(3):
        assert f"head {head} ({100 - 100 * float(held[head]):.0f} %)" in words
    single = caption_of(viz.plot(maps, layer=1, query=query, sample=1, head=2).figure)
    assert single.startswith(f"Attention of {name}")
    assert "in layer 1 (counted from 0): head 2. Colours run from 0 to" in single
    assert f"{100 * float(held[2]):.1f} % of the attention." in single
    registers = "CLS and 2 registers get" if models.has_registers else "CLS gets"
    assert registers in single


def test_nothing_is_said_of_tokens_that_get_next_to_nothing():
    maps = maps_on(GRID, registers=2)
    for weights in maps.weights:
        weights[..., :3] = 1e-3
    for figure in (viz.plot(maps).figure, viz.plot_heads(maps), viz.plot_layers(maps)):
        words = " ".join(words_of(figure)).replace("Attention of CLS", "")
        assert "CLS" not in words
        assert "register" not in words
        assert "artifact" not in words
        assert "(9" not in words


@pytest.mark.parametrize(
    ("style", "words"),
    [
        ({}, "2 artifact tokens (red frames): patches whose norm is an outlier, above 151.2 "
         "after layer 7."),
        ({}, "In large models such patches hold little local information."),
        ({}, "The limits of the colours ignore them."),
        ({"outliers": "clip", "limits": "shared"}, "The limits of the colours ignore them."),
        ({"outliers": "mask"}, "2 artifact tokens (grey in red frames)"),
    ],
)  # fmt: skip
def test_a_caption_says_what_became_of_artifacts(style, words):
    artifacts = artifacts_at(GRID, (0, 0), (2, 4))
    maps = maps_on(GRID)
    for draw in EVERY.values():
        assert words in caption_of(draw(maps, artifacts=artifacts, style=viz.Style(**style)))
        assert "artifact" not in caption_of(draw(maps))
        none = caption_of(draw(maps, artifacts=artifacts_at(GRID)))
        assert "No artifact tokens found." in none


@pytest.mark.parametrize("limits", ["robust", "shared", (0, 1.5)])
def test_a_caption_says_where_the_colours_end_and_what_lies_above(limits):
    maps = maps_on((10, 10), heads=1, layers=1)
    values = 101 * maps.patch_maps()[0][0, 0, 0]
    maps.weights[0][..., 50] = 60 / 101
    caption = caption_of(viz.plot(maps, style=viz.Style(limits=limits)).figure)
    values.flatten()[49] = 60
    above = {"robust": 2, "shared": 0, (0, 1.5): int((values > 1.5).sum())}[limits]
    end = {"robust": values.flatten().sort().values[-3], "shared": 60, (0, 1.5): 1.5}[limits]
    assert f"Colours run from 0 to {float(end):.2g}× uniform attention." in caption
    said = f"{above} of 100 patches lie above the last colour, the highest at 60×."
    assert (said in caption) is bool(above)
    assert ("above the last" in caption) is bool(above)
    assert ("Robust limits: at most" in caption) is (limits == "robust")


def test_a_caption_says_that_colours_are_logarithmic():
    caption = caption_of(viz.plot(maps_on(GRID), style=viz.Style(log=True)).figure)
    assert "Logarithmic colours run from 0." in caption


@pytest.mark.parametrize(
    "draw",
    [
        viz.plot_heads,
        viz.plot_layers,
        lambda maps, **options: viz.plot(maps, **options).figure,
        lambda maps, **options: viz.plot_masks(
            maps, 0.5, image=photograph_on(maps.grid), **options
        ),
    ],
)
@settings(max_examples=8)
@given(
    grid=st.tuples(st.integers(1, 30), st.integers(1, 30)),
    heads=st.integers(1, 8),
    name=st.one_of(
        st.sampled_from(
            ["$x$_\\frac", "漢字🙂\n\x00\u202e", "a" * 300, "i" * 300, "weights of mine " * 20]
        ),
        st.text(max_size=20),
    ),
)
def test_all_words_stand_inside_of_the_picture_and_patches_are_square(draw, grid, heads, name):
    maps = maps_on(grid, heads=heads)
    figure = draw(maps, name=name, warning=NO_MEANING)
    figure.canvas.draw()
    width, height = figure.bbox.size
    for text in figure.findobj(Text):
        if text.get_text() and text.get_visible():
            box = text.get_window_extent()
            assert box.x0 >= 0
            assert box.y0 >= 0
            assert box.x1 <= width + 0.5, text.get_text()
            assert box.y1 <= height + 0.5
    (x0, y0), (x1, y1) = figure.axes[0].transData.transform([(0, 0), (1, 1)])
    assert abs(x1 - x0) == pytest.approx(abs(y1 - y0), rel=1e-3)
    assert max(figure.get_size_inches()) < 20
    assert NO_MEANING in caption_of(figure)


@settings(max_examples=6)
@given(grid=st.tuples(st.integers(1, 30), st.integers(1, 4)), heads=st.integers(1, 13))
@example(grid=(30, 1), heads=6)
def test_titles_do_not_run_into_each_other(grid, heads):
    figure = viz.plot_heads(maps_on(grid, heads=heads, registers=4), image=photograph_on(grid))
    figure.canvas.draw()
    boxes = [text.get_window_extent() for text in figure.axes[0].texts]
    assert len(boxes) == len(set(map(str, boxes))) == 1 + heads + (heads > 1)
    for i, one in enumerate(boxes):
        assert not any(one.overlaps(other) for other in boxes[:i])


@pytest.mark.parametrize("heads", [3, 6, 12, 16, 24])
def test_the_heads_of_a_square_image_make_a_picture_of_a_screens_shape(heads):
    width, height = viz.plot_heads(maps_on((16, 16), heads=heads)).get_size_inches()
    assert 0.7 < width / height < 1.9


# On an Axes of somebody's own


def test_an_axes_of_ones_own_is_drawn_on_and_nothing_else_changes():
    figure = Figure(figsize=(8, 4))
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    maps = maps_on(GRID, queries=(0, 1 + 7))
    settings_before = dict(matplotlib.rcParams)
    returned = viz.plot(maps, right, query=(1, 2), image=photograph_on(GRID), warning=NO_MEANING)
    assert returned is right
    assert len(figure.axes) == 2
    assert not left.images
    assert not left.get_title()
    assert "Attention of patch (1, 2)" in " ".join(right.get_title().split())
    assert NO_MEANING in " ".join(right.get_title().split())
    assert Drawn(figure, right).frames(0, GRID, WHITE) == {(1, 2)}
    assert dict(matplotlib.rcParams) == settings_before
    bar = figure.colorbar(right.images[1])
    values = maps.patch_maps()[-1][0, :, 1].mean(0)
    assert (bar.vmin, bar.vmax) == pytest.approx((0, 16 * float(values.max())))


def test_pyplot_is_never_imported(tmp_path):
    code = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from dinov2_attn import viz
from tests.support.figure_probes import maps_on
maps = maps_on((2, 3))
viz.save(viz.plot(maps).figure, "a.png")
viz.save(viz.plot_heads(maps), "a.svg")
viz.animate(maps, "a.gif")
assert "matplotlib.pyplot" not in sys.modules
"""
    folder = str(Path(__file__).parents[3])
    subprocess.run([sys.executable, "-c", code, folder], check=True, cwd=tmp_path)


# Which row of which image


def test_maps_of_all_kinds_can_be_looked_at(grafted):
    model = build(grafted)
    full = attention_maps(model, IMAGES)
    row = full.weights[1][1, :, 4]
    kinds = [
        (full, 1),
        (attention_maps(model, IMAGES, queries=[2, 4]), 1),
        (attention_maps(model, [IMAGES[:1], IMAGES], queries=[4])[1], 1),
        (attention_maps(model, IMAGES, queries=[4]).numpy(), 1),
    ]
    with record(model, queries=[4]) as recorded:
        model(IMAGES)
    for maps, sample in [*kinds, (recorded, 1)]:
        seen = select_row(maps, (1, 0), sample)
        assert (seen.grid, seen.prefix, seen.patch) == ((2, 3), 1, (1, 0))
        assert_close(seen.row(1, 1), row[1].detach())
        assert_close(seen.row(1, "mean"), row.mean(0).detach())
    averaged = select_row(attention_maps(model, IMAGES, queries=[4], heads="mean"), 4, 1)
    assert_close(averaged.row(1, "mean"), row.mean(0).detach())
    assert averaged.heads == ("mean",)
    assert len(Drawn(viz.plot_heads(attention_maps(model, IMAGES, heads="mean"))).cells) == 1
    with pytest.raises(OutOfRangeError, match="a head among mean"):
        averaged.row(1, 0)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"query": (3, 0)}, OutOfRangeError, r"grid of 3 rows and 5 columns\.\nFound \(3, 0\)"),
        ({"query": (0, 5)}, OutOfRangeError, "columns from 0 to 4"),
        ({"query": (-1, 0)}, OutOfRangeError, "grid of 3 rows and 5 columns"),
        ({"query": (0, 0)}, OutOfRangeError, "a query among the recorded rows: CLS.\nFound patch"),
        ({"query": "register:1"}, OutOfRangeError, "a model with registers.\nFound register 1"),
        ({"query": 16}, OutOfRangeError, "there being 16 tokens"),
        (
            {"query": "patch"},
            InvalidInputError,
            "cls, register:K, ROW,COL or #POSITION.\nFound 'patch'",
        ),
        ({"query": (1, 2, 3)}, InvalidInputError, r"a patch as \(row, column\)"),
        ({"query": (0.5, 1)}, InvalidInputError, "row and column of a patch as whole numbers"),
        ({"layer": 2}, OutOfRangeError, "one of the layers 0, 1.\nFound 2"),
        ({"head": 3}, OutOfRangeError, "a head among 0, 1, 2, or 'mean'.\nFound 3"),
        ({"head": "max"}, OutOfRangeError, "Found 'max'"),
        ({"sample": 1}, OutOfRangeError, "an image from 0 to 0.\nFound 1"),
        ({"sample": (0, 0)}, InvalidInputError, "maps being of one batch"),
        ({"image": np.zeros((2, 3, 7))}, InvalidInputError, r"Found ndarray of shape \(2, 3, 7\)"),
        ({"artifacts": artifacts_at((5, 3))}, InvalidInputError, r"grid of 3 × 5\.\nFound a mask"),
    ],
)
def test_what_cannot_be_drawn_is_an_error_with_the_numbers_in_it(options, error, message):
    with pytest.raises(error, match=message):
        viz.plot(maps_on(GRID), **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"outliers": "hide"}, "'mark', 'clip', 'mask', 'none'.\nFound 'hide'"),
        ({"interpolation": "bicubic"}, "'nearest', 'bilinear'.\nFound 'bicubic'"),
        ({"alpha": 0}, r"alpha as a number in \(0, 1\]\.\nFound 0"),
        ({"alpha": math.nan}, "Found nan"),
        ({"cmap": "jet"}, "'cividis', 'gray'.\nFound 'jet'"),
        ({"background": "gray"}, "'grey', 'colour'.\nFound 'gray'"),
        ({"limits": "all"}, r"'robust', 'shared', 'each', or \(low, high\).*\nFound 'all'"),
        ({"limits": (1, 1)}, r"Found \(1, 1\)"),
        ({"limits": (-1, 1)}, r"Found \(-1, 1\)"),
        ({"limits": (0, math.inf)}, "Found"),
        ({"limits": (0, 1, 2)}, "Found"),
    ],
)
def test_a_style_of_no_sense_is_an_error(options, message):
    with pytest.raises(InvalidInputError, match=message):
        viz.Style(**options)


def test_reduced_and_listed_maps_are_told_what_to_do(grafted):
    model = build(grafted)
    with pytest.raises(InvalidInputError, match=r"(?s)maps of one batch.*list of 2.*maps\[0\]"):
        viz.plot(attention_maps(model, [IMAGES, IMAGES]))
    with record(model, reduce=lambda _, weights: weights.mean((1, 2))) as maps:
        model(IMAGES)
    with pytest.raises(InvalidInputError, match="without reduce"):
        viz.plot(maps)


@given(registers=st.integers(0, 12), grid=grids, data=st.data())
def test_tokens_are_where_their_names_say(registers, grid, data):
    prefix = 1 + registers
    position = data.draw(st.integers(0, registers + grid[0] * grid[1]))
    name = name_token(position, prefix, grid)
    text = name.lower().replace("register ", "register:").replace("patch ", "").strip("()")
    text = text.replace(", ", ",")
    assert position_of(read_token(text), prefix, grid) == position
    assert position_of(text, prefix, grid) == position_of(position, prefix, grid) == position


@pytest.mark.parametrize(
    "text", ["", "CLS", "cls:1", "register", "register:", "register:-1", "1", "1,2,3", "1,", "a,b",
             "-1,2", "1.0,2", "²,1", "٣,1", "9" * 30 + ",1"]
)  # fmt: skip
def test_words_that_name_no_token(text):
    with pytest.raises(InvalidInputError, match="cls, register:K, ROW,COL or #POSITION"):
        read_token(text)


def test_the_public_names_are_there():
    for name in viz.__all__:
        assert getattr(viz, name).__doc__
    with pytest.raises(AttributeError):
        _ = viz.nothing
