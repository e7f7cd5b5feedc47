"""The grammar of tokens and of lists of queries."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dinov2_attn.apps.viz.tokens import (
    as_texts,
    check_queries,
    count,
    file_name,
    read_query,
    resolve,
)
from dinov2_attn.errors import InvalidInputError, OutOfRangeError
from dinov2_attn.math.selection import positions, resolve_names
from dinov2_attn.math.token_names import position_of, read_token

grids = st.tuples(st.integers(1, 9), st.integers(1, 9))


@pytest.mark.parametrize(
    ("text", "token", "name"),
    [
        ("cls", "cls", "cls"),
        ("register:2", "register:2", "register2"),
        ("3,17", (3, 17), "3-17"),
        ("#17", 17, "position17"),
        ("#0", 0, "position0"),
        ("#-1", -1, "position-1"),
    ],
)
def test_a_token_is_read_as_it_is_written(text, token, name):
    assert read_token(text) == read_query(text) == token
    assert file_name(token) == name


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("registers", "registers"),
        ("patches", "patches"),
        ("all", "all"),
        ("#1:5", slice(1, 5)),
        ("#::2", slice(None, None, 2)),
        ("#-3:", slice(-3, None)),
    ],
)
def test_a_list_takes_words_and_slices_which_are_no_tokens(text, found):
    assert read_query(text) == found
    with pytest.raises(InvalidInputError, match="#POSITION"):
        read_token(text)


@pytest.mark.parametrize(
    "text", ["", "17", "CLS", "#", "#x", "#+1", "# 1", "#1,2", "##1", "#1:2:3:4", "#1:2:0", "#1:x",
             "#--1", "3, 17", "3;17", "register", "register:2,3", "none", "#²", "#" + "9" * 30]
)  # fmt: skip
def test_what_names_no_tokens_is_refused_with_the_grammar(text):
    with pytest.raises(InvalidInputError, match="one of the words registers, patches, all") as said:
        read_query(text)
    assert "'#17'" in said.value.hint


@given(registers=st.integers(0, 5), grid=grids, data=st.data())
def test_a_position_and_the_patch_there_are_one_token(registers, grid, data):
    prefix = 1 + registers
    row, column = data.draw(st.integers(0, grid[0] - 1)), data.draw(st.integers(0, grid[1] - 1))
    position = position_of(f"{row},{column}", prefix, grid)
    assert position == prefix + row * grid[1] + column
    assert position_of(f"#{position}", prefix, grid) == position
    behind = position - prefix - math.prod(grid)
    assert position_of(f"#{behind}", prefix, grid) == position


@given(registers=st.integers(0, 5), grid=grids, data=st.data())
def test_a_list_selects_what_each_of_its_entries_does(registers, grid, data):
    prefix = 1 + registers
    length = prefix + math.prod(grid)
    expected = {
        "cls": [0],
        "all": list(range(length)),
        "patches": list(range(prefix, length)),
        "0,0": [prefix],
        "#0": [0],
        "#-1": [length - 1],
        "#::2": list(range(0, length, 2)),
        "#:0:-1": list(range(length - 1, 0, -1)),
    }
    if registers:
        expected["registers"] = list(range(1, prefix))
        expected[f"register:{registers}"] = [registers]
    texts = data.draw(st.lists(st.sampled_from(sorted(expected)), min_size=1, max_size=4))
    found = positions(resolve_names(resolve(texts, prefix, grid), registers), length)
    assert list(found) == [position for text in texts for position in expected[text]]
    assert count(texts, prefix, grid) == len(found)


@pytest.mark.parametrize(
    ("queries", "texts"),
    [
        (None, ("all",)),
        ("cls", ("cls",)),
        ("3,17", ("3,17",)),
        (5, ("#5",)),
        (-1, ("#-1",)),
        (np.int64(5), ("#5",)),
        (range(2), ("#0", "#1")),
        (slice(1, 5), ("#1:5",)),
        (slice(None, np.int64(-1), 2), ("#:-1:2",)),
        ((3, 17), ("#3", "#17")),  # a sequence of positions, as models take it
        ([(3, 17)], ("3,17",)),
        ([[3, 17], "cls", "registers", 7], ("3,17", "cls", "registers", "#7")),
        (np.array([3, 17]), ("#3", "#17")),
        (np.array([[3, 17], [0, 1]]), ("3,17", "0,1")),
        (torch.tensor(4), ("#4",)),
    ],
    ids=repr,
)
def test_queries_of_python_are_written_in_the_grammar(queries, texts):
    assert as_texts(queries) == texts
    assert as_texts(list(texts)) == texts


@pytest.mark.parametrize(
    "queries",
    [[], (), True, [True], 1.5, b"cls", {"cls"}, "cls register:1", [None],
     [(1,)], [(1, 2, 3)], [(0.5, 1)], [(-1, 0)], slice(0, 1, 0), slice("a"), [""], 10**30]
)  # fmt: skip
def test_what_is_no_query_of_python_is_refused(queries):
    with pytest.raises(InvalidInputError):
        as_texts(queries)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("3,0", "grid of 3 rows and 5 columns"),
        ("0,5", "grid of 3 rows and 5 columns"),
        ("#16", "16"),
        ("#-17", "-17"),
        ("#5:5", "a slice of 16 tokens that has some"),
        ("#99:", "a slice of 16 tokens that has some"),
    ],
)
def test_tokens_that_an_image_does_not_have(text, message):
    for texts in ([text], ["cls", text]):
        with pytest.raises(OutOfRangeError, match=message):
            resolve(texts, 1, (3, 5))


def test_registers_are_checked_without_an_image():
    check_queries(["registers", "register:4", "99,99", "#9999"], 4)
    check_queries(["cls", "99,99", "all"], 0)
    for text in ("registers", "register:1"):
        with pytest.raises(InvalidInputError, match="registers"):
            check_queries(["cls", text], 0)
    for text in ("register:0", "register:5"):
        with pytest.raises(OutOfRangeError, match="a register from 1 to 4"):
            check_queries([text], 4)
