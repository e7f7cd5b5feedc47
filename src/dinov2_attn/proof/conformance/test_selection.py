"""Invariant 4: selected queries are a slice of the full matrix, the mean of heads its mean."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from dinov2_attn.proof.conformance.building import (
    ATTENTION_CASES,
    MODEL_CASES,
    AttentionCase,
    ModelCase,
    prefix,
)
from dinov2_attn.proof.conformance.code import Code
from dinov2_attn.proof.conformance.tolerances import assert_close

# queries=, and the equivalent index.
QUERIES: list[tuple[Any, Any]] = [
    (None, slice(None)),
    ("cls", slice(0, 1)),
    (-1, slice(-1, None)),
    (slice(None, None, 2), slice(None, None, 2)),
    (slice(1, None), slice(1, None)),
    ([0, -1, 0], [0, -1, 0]),
    (torch.tensor([0]), [0]),
]


@pytest.mark.parametrize(("queries", "index"), QUERIES, ids=[str(q) for q, _ in QUERIES])
@pytest.mark.parametrize("case", ATTENTION_CASES[:-1], ids=str)
def test_queries_are_rows_and_the_mean_is_the_mean(
    grafted: Code, attention_class: type, case: AttentionCase, queries: Any, index: Any
) -> None:
    """Compared to the full matrix of the same module."""
    module, tokens = case.build(attention_class)
    rows = module(tokens, return_attn=True)[:, :, index]
    chosen = module(tokens, return_attn=True, queries=queries)
    assert_close(chosen, rows, f"queries={queries} = those rows")
    mean = module(tokens, return_attn=True, queries=queries, heads="mean")
    assert_close(mean, rows.double().mean(1), 'heads="mean" = the mean', dtype=case.dtype)


@pytest.mark.parametrize("case", MODEL_CASES, ids=str)
def test_words_name_the_rows_of_the_layout(
    grafted: Code, model_class: type, case: ModelCase
) -> None:
    """In the order CLS, registers, patches."""
    model = case.build(grafted, model_class)
    full, first = model.get_last_self_attention(case.images), prefix(model)
    rows = {"cls": slice(0, 1), "registers": slice(1, first), "patches": slice(first, None)}
    for word, index in rows.items():
        answer = model.get_last_self_attention(case.images, queries=word)
        assert_close(answer, full[:, :, index], f"{word} = rows {index}")
    patches = model.get_self_attention(case.images, queries="patches", heads="mean")
    assert all(layer.shape[1] == case.patches for layer in patches)
