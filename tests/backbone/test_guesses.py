"""Where the corners of an image moved which tokens, so that a layout may be guessed."""

from __future__ import annotations

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from dinov2_attn.backbone.guesses import Corners, Guess, guesses
from dinov2_attn.backbone.layout import Layout
from dinov2_attn.backbone.mosaics import Unclear

sides = st.integers(1, 4)
grids = st.tuples(sides, sides)


def corners_of(guess):
    """Return window and cell of each corner, in the order of reading."""
    (down, across), (height, width) = guess.windows, guess.layout.grid
    for row in (0, 1):
        for column in (0, 1):
            window = row * (down - 1) * across + column * (across - 1)
            yield window, (row * (height - 1), column * (width - 1))


def seen(guess, sequences):
    """Return what is seen of ``guess``: every token of the cell at a corner moves, and no other."""
    layout = guess.layout
    moves = torch.zeros(4, sequences, layout.length)
    for corner, (window, cell) in enumerate(corners_of(guess)):
        for position in range(layout.length):
            if layout.cell(position) == cell:
                moves[corner, window, position] = 1
                if guess.windows == (1, 1):  # every sequence sees the whole image
                    moves[corner, :, position] = 1
    return Corners((0, 8, 0, 8), moves, torch.ones(sequences, layout.length), 0.5)


@st.composite
def layouts_in_windows(draw):
    """A layout that is told by its corners, and the number of sequences of an image."""
    windows = draw(st.one_of(st.just((1, 1)), grids))
    several = windows == (1, 1) and draw(st.booleans())
    grid = draw(grids.filter(lambda grid: not several or grid != (1, 1)))
    layout = Layout(
        draw(st.integers(0, 3)),
        draw(st.integers(0, 3)),
        grid,
        draw(st.integers(2, 3)) if several else 1,
        planes=several and draw(st.booleans()),
    )
    frames = draw(st.integers(1, 3)) if windows == (1, 1) else windows[0] * windows[1]
    return Guess(layout, windows), frames


@settings(max_examples=200)
@given(layouts_in_windows())
def test_the_layout_that_was_seen_is_guessed(drawn):
    guess, sequences = drawn
    assert guess in list(guesses(seen(guess, sequences)))


@st.composite
def almost_layouts(draw):
    """What is seen of a layout, with tokens at one corner moved to other places."""
    guess, sequences = draw(layouts_in_windows())
    corners = seen(guess, sequences)
    moves, length = corners.moves.clone(), corners.moves.shape[-1]
    for corner in draw(st.lists(st.integers(0, 3), min_size=1, max_size=2)):
        moves[corner] = moves[corner].roll(draw(st.integers(-2, 2)), -1)
        if draw(st.booleans()):
            moves[corner] = moves[corner].roll(draw(st.integers(-1, 1)), 0)
        if draw(st.booleans()):
            moves[corner, :, draw(st.integers(0, length - 1))] = 1
    return Corners(corners.box, moves, corners.whole, corners.limit)


@settings(max_examples=200)
@given(almost_layouts())
def test_a_guess_has_its_corners_where_they_were_seen(corners):
    sequences, length = corners.moves.shape[1:]
    try:
        found = list(guesses(corners))
    except Unclear:
        return
    for guess in found:
        assert guess.layout.length == length
        assert min(guess.layout.prefix, guess.layout.suffix) >= 0
        for corner, (window, cell) in enumerate(corners_of(guess)):
            tokens = [i for i in range(length) if guess.layout.cell(i) == cell]
            assert corners.moves[corner, window, tokens].all()
        if guess.windows != (1, 1):
            assert guess.windows[0] * guess.windows[1] == sequences
            places = [(window, cell) for window, cell in corners_of(guess)]
            assert [divmod(int(one.flatten().argmax()), length)[0] for one in corners.moves] == [
                window for window, _ in places
            ]


@settings(max_examples=200)
@given(sequences=st.integers(1, 4), length=st.integers(1, 12), data=st.data())
@example(sequences=1, length=1, data=None)
def test_places_at_random_are_those_of_the_guess_if_there_is_one(sequences, length, data):
    moves = torch.zeros(4, sequences, length)
    places = []
    for corner in range(4):
        window, position = (
            (data.draw(st.integers(0, sequences - 1)), data.draw(st.integers(0, length - 1)))
            if data is not None
            else (0, 0)
        )
        moves[corner, window, position] = 1
        places.append((window, position))
    corners = Corners((0, 8, 0, 8), moves, torch.ones(sequences, length), 0.5)
    assert corners.places == places
    for guess in guesses(corners):
        assert guess.layout.length == length
        for (window, position), (expected, cell) in zip(places, corners_of(guess), strict=True):
            assert (window, guess.layout.cell(position)) == (expected, cell)


def test_a_corner_that_moves_tokens_of_several_windows_is_none():
    moves = torch.zeros(4, 2, 6)
    moves[:, 0, 0] = 1
    moves[3, 1, 5] = 1
    with pytest.raises(Unclear, match="in several of the 2 sequences"):
        list(guesses(Corners((0, 8, 0, 8), moves, torch.ones(2, 6), 0.5)))


def test_windows_that_are_no_whole_rows_are_none():
    moves = torch.zeros(4, 3, 1)
    for corner, window in enumerate((0, 1, 1, 2)):
        moves[corner, window] = 1
    assert not list(guesses(Corners((0, 8, 0, 8), moves, torch.ones(3, 1), 0.5)))


@pytest.mark.parametrize("step", [2, 4])
def test_tokens_of_a_cell_that_are_neither_side_by_side_nor_a_grid_apart_are_named(step):
    """As of several images in one sequence, each with a token of its own in front."""
    moves = torch.zeros(4, 1, 12)
    for corner, first in enumerate((0, 2, 0, 2)):
        moves[corner, 0, [first, first + step]] = 1
    with pytest.raises(Unclear, match=f"2 tokens, {step} apart"):
        list(guesses(Corners((0, 8, 0, 8), moves, torch.ones(1, 12), 0.5)))


@given(layouts_in_windows())
def test_cells_of_the_guess_are_rows_and_columns_of_the_whole_image(drawn):
    guess, sequences = drawn
    rows, columns = guess.cells(sequences, torch.device("cpu"))
    (height, width), across = guess.layout.grid, guess.windows[1]
    every = guess.windows[0] * across
    for sequence in range(sequences):
        for i, position in enumerate(guess.layout.patches):
            row, column = guess.layout.cell(position)
            down, right = divmod(sequence % every, across)
            assert int(rows[sequence, i]) == down * height + row
            assert int(columns[sequence, i]) == right * width + column
    assert guess.grid == (guess.windows[0] * height, across * width)


def test_shares_are_parts_of_what_the_whole_image_moves():
    moves = torch.tensor([[[1.0, 0.2, 3.0]]]).expand(4, 1, 3)
    corners = Corners((0, 8, 0, 8), moves, torch.tensor([[2.0, 0.5, 12.0]]), 0.5)
    assert corners.shares[0].tolist() == [[0.5, 0.0, 0.25]]
    assert corners.places == [(0, 0)] * 4
