"""The position of a token that has a name, the name of a position, and layers by number."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dinov2_attn.errors import InvalidInputError, OutOfRangeError
from dinov2_attn.math.selection import layers_to_take, name_token
from dinov2_attn.math.token_names import is_count, pair, position_of

GRID = (3, 5)


@pytest.mark.parametrize(
    ("token", "position"),
    [
        ("cls", 0),
        ("register:1", 1),
        ("register:4", 4),
        ((0, 0), 5),
        ([2, 4], 19),
        ((1, 3), 13),
        ("1,3", 13),
        ("#13", 13),
        (13, 13),
        (-1, 19),
        (-20, 0),
        (np.int64(7), 7),
    ],
)
def test_every_way_to_name_a_token_has_its_position(token, position):
    assert position_of(token, 5, GRID) == position


@given(position=st.integers(0, 19))
def test_the_name_of_a_position_says_what_is_there(position):
    name = name_token(position, 5, GRID)
    if position == 0:
        assert name == "CLS"
    elif position < 5:
        assert name == f"register {position}"
    else:
        assert name == f"patch ({(position - 5) // 5}, {(position - 5) % 5})"


@pytest.mark.parametrize(
    ("token", "prefix", "message"),
    [
        ("cls", 0, r"without CLS\.\nFound 'cls'"),
        ("register:1", 0, r"without CLS\.\nFound 'register:1'"),
        ("register:1", 1, r"with registers\.\nFound register 1 of one without"),
        ("register:0", 5, r"register from 1 to 4\.\nFound 0"),
        ("register:5", 5, r"register from 1 to 4\.\nFound 5"),
        ((3, 0), 5, r"grid of 3 rows and 5 columns\.\nFound \(3, 0\)"),
        ((0, 5), 5, r"grid of 3 rows and 5 columns\.\nFound \(0, 5\)"),
        ((-1, 0), 5, r"grid of 3 rows and 5 columns\.\nFound \(-1, 0\)"),
        ((0, -1), 5, r"Rows go from 0 to 2, columns from 0 to 4"),
        (20, 5, r"between -20 and 19, there being 20 tokens"),
    ],
)
def test_a_token_that_is_not_there_is_out_of_range(token, prefix, message):
    with pytest.raises(OutOfRangeError, match=message):
        position_of(token, prefix, GRID)


@pytest.mark.parametrize(
    ("token", "message"),
    [
        ((1, 2, 3), r"a patch as \(row, column\)\.\nFound \(1, 2, 3\)"),
        ((1,), r"a patch as \(row, column\)"),
        ((0.5, 1), r"row and column of a patch as whole numbers\.\nFound 0\.5"),
        ("CLS", r"cls, register:K"),
        ("cls:", r"cls, register:K"),
        ("register:", r"cls, register:K"),
        ("1,2,3", r"cls, register:K"),
        ("1,x", r"cls, register:K"),
        ("--1", r"cls, register:K"),
        (1.5, r"tokens as whole numbers\.\nFound 1\.5"),
    ],
)
def test_what_names_no_token_is_refused(token, message):
    with pytest.raises(InvalidInputError, match=message):
        position_of(token, 5, GRID)


def test_patches_may_be_found_without_cls():
    assert position_of((1, 0), 0, GRID) == position_of("1,0", 0, GRID) == 5
    assert position_of("#0", 0, GRID) == 0


def test_a_place_of_any_whole_numbers_is_a_pair_of_ints():
    assert pair(np.array([3, 17])) == pair([np.int64(3), torch.tensor(17)]) == (3, 17)


@pytest.mark.parametrize(
    ("text", "expected"),
    [("0", True), ("9" * 19, True), ("9" * 20, False), ("", False), ("-1", False), ("²", False)],
)
def test_a_count_has_a_possible_size(text, expected):
    assert is_count(text) is expected


@pytest.mark.parametrize(
    ("n", "taken"),
    [
        (None, [0, 1, 2, 3]),
        (0, []),
        (1, [3]),
        (4, [0, 1, 2, 3]),
        ([], []),
        ([3, 0], [0, 3]),
        ((-1, 3, 1), [1, 3]),
        ([-4], [0]),
        (range(2), [0, 1]),
        (np.int64(2), [2, 3]),
        (torch.tensor([2, 0]), [0, 2]),
    ],
)
def test_layers_are_taken_in_ascending_order_once(n, taken):
    assert layers_to_take(n, 4) == taken


@pytest.mark.parametrize(
    ("n", "message"),
    [
        (5, r"between 0 and 4\.\nFound 5\.\n.*\[3\] is the last"),
        (-1, r"between 0 and 4\.\nFound -1"),
        ([4], r"between -4 and 3, there being 4\.\nFound 4"),
        ([0, -5, 7], r"Found -5, 7"),
    ],
)
def test_layers_that_are_not_there_are_out_of_range(n, message):
    with pytest.raises(OutOfRangeError, match=message):
        layers_to_take(n, 4)


@pytest.mark.parametrize(
    ("n", "what"),
    [
        *((one, "Expected n, the blocks to take, as whole numbers") for one in (1.0, True, {1: 2})),
        *((one, "Expected blocks as whole numbers") for one in ([1.0], [True], ["a"])),
    ],
)
def test_layers_are_whole_numbers(n, what):
    with pytest.raises(InvalidInputError, match=what):
        layers_to_take(n, 4)
