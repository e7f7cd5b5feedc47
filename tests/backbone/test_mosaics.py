"""Images made of two: their values, how far their tokens are, and the pixels that count."""

from __future__ import annotations

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import nn

from dinov2_attn.backbone import mosaics as module_of_mosaics
from dinov2_attn.backbone.guesses import Guess
from dinov2_attn.backbone.layout import Layout
from dinov2_attn.backbone.mosaics import (
    NOTHING,
    KindOfImages,
    Mosaics,
    Unclear,
    cells_of_pixels,
    centres_in,
)
from dinov2_attn.backbone.probe import Probed, _centres, measure_corners, probe
from tests.support.layouts import Seen, Stem
from tests.support.strategies import noise
from tests.support.tolerances import assert_close, assert_same_bits


class Pixels(nn.Module):
    """Each pixel is a token, except those in a margin at the top, bottom, left and right."""

    def __init__(self, margins=(0, 0, 0, 0)):
        super().__init__()
        self.margins = margins

    def forward(self, images):
        top, bottom, left, right = self.margins
        height, width = images.shape[-2:]
        return images[..., top : height - bottom, left : width - right].flatten(-2).mT


def mosaics_of(images, stem=None):
    model = Seen(stem or Pixels())
    return Mosaics(model, model.attn, KindOfImages.of(images))


# The two images


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_two_images_differ_in_every_value_and_stay_in_the_range_of_the_first(dtype):
    images = torch.stack([noise(3, 6, 8, seed=0), noise(3, 6, 8, seed=1) * 9]).to(dtype)
    seen = []
    model = Seen(Pixels())
    model.stem.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    mosaics = Mosaics(model, model.attn, KindOfImages.of(images))
    mosaics.distances([mosaics.mask((1, 3, 2, 7))])
    a, b, mixed = seen[0]
    low, high = images[0].double().min(), images[0].double().max()
    half = (high - low) / 2
    for one in (a, b):
        assert one.dtype == dtype
        assert low <= one.double().min() < low + half / 4
        assert high - half / 4 < one.double().max() <= high
    assert ((a.double() - b.double()).abs() / half - 1).abs().max() < 0.05
    is_b = torch.zeros(6, 8, dtype=torch.bool)
    is_b[1:3, 2:7] = True
    assert_same_bits(mixed, torch.where(is_b, b, a))


def test_the_kind_of_images_is_that_of_the_first_and_no_part_of_a_graph():
    images = torch.tensor([[[[0.5, 2.0]]], [[[-7.0, 7.0]]]]).requires_grad_()
    kind = KindOfImages.of(images)
    assert (kind.shape, kind.dtype, kind.device) == ((1, 1, 2), torch.float32, images.device)
    assert [float(limit) for limit in kind.limits] == [0.5, 2.0]
    assert not any(limit.requires_grad for limit in kind.limits)
    for without in (images[:0], images.detach().int()):
        kind = KindOfImages.of(without)
        assert (kind.shape, [float(limit) for limit in kind.limits]) == ((1, 1, 2), [0.0, 0.0])


@pytest.mark.parametrize("value", [0.0, -3.0, float("nan"), float("inf")])
def test_an_image_without_a_range_has_that_from_nought_to_one(value):
    mosaics = mosaics_of(torch.full((1, 1, 30, 30), value))
    everywhere = mosaics.distances([mosaics.mask()])
    assert_close(everywhere.from_a, torch.full((1, 1, 900), 0.5))


def test_a_range_too_large_for_its_dtype_is_none():
    images = torch.tensor([[[[-1.7e308, 1.7e308]]]], dtype=torch.float64).expand(1, 1, 30, 2)
    mosaics = mosaics_of(images)
    assert_close(mosaics.distances([mosaics.mask()]).from_a, torch.full((1, 1, 60), 0.5).double())


def test_the_two_images_are_the_same_each_time_and_draw_nothing():
    found = []
    for _ in range(2):
        before = torch.get_rng_state()
        mosaics = mosaics_of(torch.ones(1, 1, 2, 2), Pixels((0, 1, 0, 1)))
        found.append(mosaics.distances([mosaics.mask(NOTHING)]).resolution)
        assert_same_bits(torch.get_rng_state(), before)
        torch.rand(3)  # as any other code may
    assert found[0] == found[1] > 0


# Masks, distances and cells


def test_a_mask_is_true_in_its_box_or_everywhere():
    mosaics = mosaics_of(torch.rand(1, 1, 4, 5))
    assert mosaics.box == (0, 4, 0, 5)
    assert mosaics.mask().all()
    assert not mosaics.mask(NOTHING).any()
    inside = torch.zeros(4, 5, dtype=torch.bool)
    inside[1:3, 2:5] = True
    assert_same_bits(mosaics.mask((1, 3, 2, 5)), inside)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_a_token_is_as_far_from_a_and_b_as_its_pixels_are(dtype):
    mosaics = mosaics_of(torch.stack([torch.zeros(2, 3, 4), torch.ones(2, 3, 4)], 1)[:1].to(dtype))
    box = (0, 2, 1, 4)
    nothing, some, everything = (mosaics.mask(one) for one in (NOTHING, box, None))
    found = mosaics.distances([nothing, some, everything])
    whole = found.from_a[2]
    is_b = some.flatten()
    zero = torch.zeros_like(whole)
    assert found.from_a.shape == found.from_b.shape == (3, 1, 12)
    assert found.from_a.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert_same_bits(found.from_a[0], zero)
    assert_same_bits(found.from_b[2], zero)
    assert_same_bits(found.from_b[0], whole)
    assert_same_bits(found.from_a[1], torch.where(is_b, whole, zero))
    assert_same_bits(found.from_b[1], torch.where(is_b, zero, whole))
    assert 0 < found.resolution <= torch.finfo(found.from_a.dtype).eps * 2


@given(
    grid=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    size=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    margins=st.tuples(*[st.integers(0, 2)] * 4),
)
@example(grid=(3, 2), size=(12, 9), margins=(1, 0, 2, 1))
def test_equal_cells_fill_their_box_and_the_margin_is_of_the_nearest(grid, size, margins):
    top, bottom, left, right = margins
    height, width = grid[0] * size[0], grid[1] * size[1]
    mosaics = mosaics_of(torch.rand(1, 1, top + height + bottom, left + width + right))
    box = (top, top + height, left, left + width)
    rows, columns = cells_of_pixels(mosaics, grid, centres_in(box, grid))
    assert rows.shape == columns.shape == (mosaics.height, mosaics.width)
    for found, start, one, count in (
        (rows[:, 0], top, size[0], grid[0]),
        (columns[0], left, size[1], grid[1]),
    ):
        numbers = [(pixel - start) // one for pixel in range(len(found))]
        assert found.tolist() == [min(max(number, 0), count - 1) for number in numbers]
    assert_same_bits(rows, rows[:, :1].expand_as(rows))
    assert_same_bits(columns, columns[:1].expand_as(columns))


def test_one_centre_for_all_cells_puts_every_pixel_in_the_first():
    """What is measured of a model that sees all of the image in each token."""
    mosaics = mosaics_of(torch.rand(1, 1, 4, 4))
    for grid, ends in (((3, 3), (2.0, 2.0)), ((1, 3), (1.5, 2.5))):
        rows, columns = cells_of_pixels(mosaics, grid, (ends, (3.0, 1.0)))
        assert not rows.any()
        assert not columns.any()


# The pixels that tokens depend on

MARGINS = [
    (0, 0, 0, 0),
    (1, 0, 0, 0),
    (0, 1, 0, 0),
    (0, 0, 1, 0),
    (0, 0, 0, 1),
    (2, 3, 1, 4),
    (5, 0, 0, 3),
    (2, 1, 0, 9),  # one column is left
    (0, 8, 2, 3),  # one row
]


@pytest.mark.parametrize("margins", MARGINS)
def test_a_margin_that_a_model_crops_is_measured_to_the_pixel(margins):
    images = noise(1, 3, 9, 10, seed=0)
    top, bottom, left, right = margins
    model = Seen(Pixels(margins))
    mosaics = Mosaics(model, model.attn, KindOfImages.of(images))
    corners = measure_corners(mosaics)
    assert corners.box == (top, 9 - bottom, left, 10 - right)
    height, width = 9 - top - bottom, 10 - left - right
    ends = [0, width - 1, (height - 1) * width, height * width - 1]
    assert corners.places == [(0, end) for end in ends]
    for corner, end in enumerate(ends):
        moving = (corners.moves[corner] > corners.limit).nonzero()
        assert moving.tolist() == [[0, end]]
    assert probe(model, model.attn, images) == Probed(Layout(0, 0, (height, width)))


@pytest.mark.parametrize(("grid", "bits"), [((8, 8), 3 + 3), ((5, 4), 3 + 2), ((1, 6), 0 + 3)])
def test_as_many_images_run_as_the_corners_and_the_bits_of_a_grid_need(grid, bits):
    """Two images; four corners and one equal to the first; each bit of a row or a column."""
    model, counts = Seen(Pixels()), []
    model.stem.register_forward_pre_hook(lambda _, given: counts.append(len(given[0])))
    assert probe(model, model.attn, noise(1, 3, *grid, seed=0)).layout == Layout(0, 0, grid)
    assert counts == [2 + 4 + 1, 2 + bits]


def test_one_cell_is_proved_by_its_corners():
    model, counts = Seen(Cut([5], [7])), []
    model.stem.register_forward_pre_hook(lambda _, given: counts.append(len(given[0])))
    assert probe(model, model.attn, noise(1, 3, 5, 7, seed=0)).layout == Layout(0, 0, (1, 1))
    assert counts == [2 + 4 + 1]


def test_an_axis_of_one_row_needs_no_image_of_its_own_where_stems_overlap():
    """Six columns are told apart by their remainders by four and by five."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model, counts = Seen(Stem()), []
    model.stem.register_forward_pre_hook(lambda _, given: counts.append(len(given[0])))
    assert probe(model, model.attn, noise(1, 3, 8, 48, seed=0)).layout == Layout(0, 0, (1, 6))
    assert counts[-2:] == [2 + 4, 2 + 5]
    assert counts.count(2 + 5) == 2  # and that of the corners


@pytest.mark.parametrize("values", [3 * 8 * 8 * 7, 3 * 8 * 8 * 7 - 1])
def test_images_run_together_that_have_few_values_together(monkeypatch, values):
    monkeypatch.setattr(module_of_mosaics, "_VALUES_AT_ONCE", values)
    model, counts = Seen(Pixels()), []
    model.stem.register_forward_pre_hook(lambda _, given: counts.append(len(given[0])))
    together = values == 3 * 8 * 8 * 7
    measure_corners(Mosaics(model, model.attn, KindOfImages.of(noise(1, 3, 8, 8, seed=0))))
    assert counts == ([7] if together else [1] * 7)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda tokens: tokens * float("nan"), "tokens are not finite numbers"),
        (torch.zeros_like, "no token moves when the image changes"),
        (lambda tokens: tokens + torch.arange(len(tokens))[:, None, None], "equal images give"),
    ],
)
def test_why_the_corners_say_nothing(change, reason):
    class Changed(Pixels):
        def forward(self, images):
            return change(super().forward(images))

    mosaics = mosaics_of(noise(1, 3, 4, 4, seed=0), Changed())
    with pytest.raises(Unclear, match=reason):
        measure_corners(mosaics)


def test_corners_that_move_nothing_are_named():
    class Middle(Pixels):
        """Tokens that depend on the middle of the image alone, however many pixels change."""

        def forward(self, images):
            return images[..., 20:21, 20:21].flatten(-2).mT.expand(-1, 4, -1)

    class Parity(Pixels):
        """Tokens that count how many values are other than at first, so that few are none."""

        def forward(self, images):
            many = (images != images[:1]).double().mean((1, 2, 3)) > 0.5
            return many.double()[:, None, None].expand(-1, 4, 2) + torch.ones(4, 2).double()

    with pytest.raises(Unclear, match="no token moves when a corner of the image changes"):
        measure_corners(mosaics_of(noise(1, 3, 40, 40, seed=0), Parity()))
    box = measure_corners(mosaics_of(noise(1, 3, 41, 41, seed=0), Middle())).box
    assert box == (20, 21, 20, 21)


class Cut(nn.Module):
    """Each cell of an uneven grid is a token: all of its pixels."""

    def __init__(self, rows, columns):
        super().__init__()
        self.rows, self.columns = rows, columns

    def forward(self, images):
        cells = [
            cell.flatten(1)
            for row in images.split(self.rows, -2)
            for cell in row.split(self.columns, -1)
        ]
        size = max(cell.shape[1] for cell in cells)
        return torch.stack([nn.functional.pad(one, (0, size - one.shape[1])) for one in cells], 1)


@pytest.mark.parametrize("windows", [(1, 1), (2, 1)])
def test_centres_are_those_of_what_the_first_and_the_last_cell_see(windows):
    """A stem may pad, and its last patch may be cut."""
    rows, columns = [3, 5, 5, 1], [3, 7, 7, 9, 5]

    class InWindows(Cut):
        def forward(self, images):
            tokens = super().forward(images)
            return tokens.reshape(windows[0] * len(tokens), -1, tokens.shape[-1])

    mosaics = mosaics_of(noise(1, 3, sum(rows), sum(columns), seed=0), InWindows(rows, columns))
    guess = Guess(Layout(0, 0, (4 // windows[0], 5)), windows)
    assert _centres(guess, mosaics) == ((1.5, 13.5), (1.5, 28.5))
