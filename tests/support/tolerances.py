"""The two equalities of the shipped conformance suite, for the tests."""

from __future__ import annotations

from dinov2_attn.proof.conformance.tolerances import (
    RELATIVE,
    are_close,
    assert_close,
    assert_same_bits,
    same_bits,
)

__all__ = ["RELATIVE", "are_close", "assert_close", "assert_same_bits", "same_bits"]
