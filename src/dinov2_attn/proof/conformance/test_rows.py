"""Invariant 3: rows are distributions, and masked keys have weight 0."""

from __future__ import annotations

import inspect
from typing import Any

import pytest

from dinov2_attn.proof.conformance.building import (
    ATTENTION_CASES,
    MODEL_CASES,
    AttentionCase,
    ModelCase,
    prefix,
)
from dinov2_attn.proof.conformance.code import Code
from dinov2_attn.proof.conformance.tolerances import RELATIVE


@pytest.mark.parametrize("case", ATTENTION_CASES, ids=str)
def test_rows_are_not_negative_and_sum_to_one(
    grafted: Code, attention_class: type, case: AttentionCase
) -> None:
    """The widespread formula A·V·Vᵀ has rows that sum to 40."""
    module, tokens = case.build(attention_class)
    weights = module(tokens, return_attn=True)
    assert weights.shape == (case.batch, case.heads, case.length, case.length)
    assert (weights >= 0).all()
    assert (weights.double().sum(-1) - 1).abs().max() <= 2 * RELATIVE[case.dtype]


@pytest.mark.parametrize("case", ATTENTION_CASES, ids=str)
def test_causal_rows_see_no_later_key(
    grafted: Code, attention_class: Any, case: AttentionCase
) -> None:
    """The weights above the diagonal are 0."""
    module, tokens = case.build(attention_class)
    if "is_causal" not in inspect.signature(attention_class.forward).parameters:
        pytest.skip("this forward takes no is_causal")
    weights = module(tokens, is_causal=True, return_attn=True)
    assert (weights.triu(1) == 0).all()
    assert (weights.double().sum(-1) - 1).abs().max() <= 2 * RELATIVE[case.dtype]


@pytest.mark.parametrize("case", MODEL_CASES, ids=str)
def test_cls_and_registers_take_their_share(
    grafted: Code, model_class: type, case: ModelCase
) -> None:
    """The patch columns alone sum to less than 1."""
    model = case.build(grafted, model_class)
    row = model.get_last_self_attention(case.images, queries="cls")
    assert (row[..., prefix(model) :].sum(-1) < 1).all()
