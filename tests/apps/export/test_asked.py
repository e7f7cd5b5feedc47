"""The text that says whose attention an export returns."""

from __future__ import annotations

import pytest

from dinov2_attn.apps.export.asked import Asked, read_asked
from dinov2_attn.errors import InvalidInputError


@pytest.mark.parametrize(
    ("text", "layers", "query"),
    [
        ("last", 1, "all"),
        ("last:cls", 1, "cls"),
        ("all", None, "all"),
        ("all:registers", None, "registers"),
        ("0", [0], "all"),
        ("5,11:patches", [5, 11], "patches"),
        ("-1:cls", [-1], "cls"),
        ("-2,-1:register:2", [-2, -1], "register:2"),
        ("last:3,17", 1, "3,17"),
        ("last:#1:5", 1, "#1:5"),
    ],
)
def test_layers_come_before_the_colon_and_tokens_after_it(text, layers, query):
    assert read_asked(text) == Asked(layers, query)


@pytest.mark.parametrize(
    "text", ["", ":cls", "last:", "first", "1,", "1.5", "5;11", "last:class", "last:patch", None, 3]
)
def test_anything_else_is_refused_with_an_example(text):
    with pytest.raises(InvalidInputError):
        read_asked(text)
