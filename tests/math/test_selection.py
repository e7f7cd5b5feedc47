"""Invariant 4: chosen queries are the slice of the full matrix, the mean of heads its mean."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dinov2_attn.errors import InvalidInputError
from dinov2_attn.math.selection import positions, resolve_names, to_index
from tests.support.strategies import AttentionCase, attention_cases, model_cases
from tests.support.tolerances import assert_close


@st.composite
def cases_with_queries(draw):
    case = draw(attention_cases())
    positions = st.integers(-case.length, case.length - 1)
    queries = st.one_of(
        st.none(), st.just("cls"), positions, st.slices(case.length), st.lists(positions)
    )
    return case, draw(queries)


def rows_of(full, queries):
    """The slice of the full matrix, by plain indexing."""
    if queries is None:
        return full
    if queries == "cls":
        return full[:, :, :1]
    if isinstance(queries, int):
        return full[:, :, [queries]]
    if isinstance(queries, slice):
        queries = list(range(full.shape[2]))[queries]
    return full[:, :, queries]


@given(cases_with_queries())
def test_queries_are_the_slice_of_the_full_matrix(layers, drawn):
    case, queries = drawn
    module, tokens = case.build(layers)
    full = module(tokens, return_attn=True)
    assert_close(module(tokens, return_attn=True, queries=queries), rows_of(full, queries))


@given(cases_with_queries())
def test_the_mean_of_heads_is_the_mean(layers, drawn):
    case, queries = drawn
    module, tokens = case.build(layers)
    full = module(tokens, return_attn=True)
    mean = module(tokens, return_attn=True, queries=queries, heads="mean")
    assert mean.dtype == case.dtype
    assert_close(mean, rows_of(full, queries).double().mean(1), dtype=case.dtype)


@given(model_cases())
def test_words_name_rows_of_the_models_layout(models, case):
    model, prefix = case.build(models), case.prefix(models)
    full = model.get_last_self_attention(case.images)
    rows = {"cls": slice(0, 1), "registers": slice(1, prefix), "patches": slice(prefix, None)}
    for word, expected in rows.items():
        answer = model.get_last_self_attention(case.images, queries=word)
        assert_close(answer, full[:, :, expected])
        mean = model.get_last_self_attention(case.images, queries=word, heads="mean")
        assert_close(mean, full[:, :, expected].mean(1))
    blocks = model.get_self_attention(case.images, queries="patches")
    assert all(b.shape[2] == case.grid[0] * case.grid[1] for b in blocks)


@pytest.mark.parametrize(
    "queries", [range(1, 4), (1, 2, 3), torch.tensor([1, 2, 3]), np.array([1, 2, 3])]
)
def test_any_sequence_of_whole_numbers_will_do(queries):
    assert to_index(queries, 5) == [1, 2, 3]


def test_a_slice_may_run_backwards():
    assert to_index(slice(None, None, -2), 5) == [4, 2, 0]
    assert to_index(slice(1, None), 5) == slice(1, None)


@pytest.mark.parametrize("queries", [4, np.int64(4), torch.tensor(4), -1])
def test_any_whole_number_keeps_the_dimension(queries):
    assert to_index(queries, 5) == slice(4, 5)


@pytest.mark.parametrize(
    ("queries", "expected"),
    [(None, (0, 1, 2, 3)), ("cls", (0,)), (-1, (3,)), (slice(1, 3), (1, 2)), ([2, 0], (2, 0))],
)
def test_positions_are_counted_from_the_first_token(queries, expected):
    assert positions(queries, 4) == expected


@pytest.mark.parametrize(
    ("queries", "expected"),
    [
        (5, r"between -5 and 4, there being 5 tokens\.\nFound 5"),
        (-6, r"Found -6"),
        ([0, 7], r"Found 7"),
        ("CLS", r"(?s)'cls', 'registers', 'patches'.*Found 'CLS'"),
        ("patches", r"(?s)does not know how many registers.*get_self_attention"),
        (1.0, r"tokens as whole numbers\.\nFound 1.0 of type float"),
        ([True, False], r"Found True of type bool"),
        (torch.tensor([True, False]), r"Found True of type bool"),
        ({0: 1}, r"Found \{0: 1\} of type dict"),
        ((i for i in [0, 1]), r"Found <generator"),  # the second block would find it empty
        (b"01", r"Found b'01' of type bytes"),
        (slice(None, None, 0), r"(?s)step other than 0\.\nFound slice.*zero"),
        (slice(0.5, 2), r"(?s)slice of whole numbers.*\.\nFound slice\(0\.5"),
    ],
)
def test_the_error_for_an_impossible_query_lists_possible_ones(queries, expected):
    with pytest.raises(InvalidInputError, match=expected):
        to_index(queries, 5)


def test_words_are_spelled_out_for_any_number_of_registers():
    assert resolve_names("cls", 4) == to_index("cls", 5) == slice(0, 1)
    assert resolve_names("registers", 0) == slice(1, 1)
    assert resolve_names("patches", 4) == slice(5, None)
    assert resolve_names([3], 4) == [3]
    with pytest.raises(InvalidInputError, match="register'"):
        resolve_names("register", 4)


@pytest.mark.parametrize("heads", ["max", 0, [1], True])
def test_an_unknown_fusion_of_heads_is_refused(layers, heads):
    module, tokens = AttentionCase(1, 2, 4, 1, 5, True, torch.float32, 0).build(layers)
    with pytest.raises(InvalidInputError, match=r'heads="mean"\.\nFound heads='):
        module(tokens, return_attn=True, heads=heads)
