"""The grammar of one token: ``cls``, ``register:2``, ``3,17`` (a patch) or ``#17`` (a position)."""

from __future__ import annotations

import math
from typing import Any

from dinov2_attn.errors import InvalidInputError, OutOfRangeError
from dinov2_attn.math.selection import positions, whole_number

# A string for CLS and registers, (row, column) for a patch, or a position.
Token = int | str | tuple[int, int]

TOKENS = "cls, register:K, ROW,COL or #POSITION"
HINT = "Registers count from 1, rows and columns of patches from 0. Write the position 17 as '#17'."


def read_token(text: str) -> Token:
    """Return the token that ``text`` names.

    Args:
        text: ``cls``, ``register:K``, ``ROW,COL`` or ``#POSITION``.

    Returns:
        A string for CLS and registers, ``(row, column)`` for a patch, an int for a position.

    Raises:
        InvalidInputError: If ``text`` names no token.

    """
    word, colon, number = text.partition(":")
    if word == "cls" and not colon:
        return word
    if word == "register" and is_count(number):
        return text
    if text.startswith("#") and is_count(text[1:].removeprefix("-")):
        return int(text[1:])
    parts = text.split(",")
    if len(parts) == 2 and all(map(is_count, parts)):
        return int(parts[0]), int(parts[1])
    raise InvalidInputError(TOKENS, repr(text), HINT)


def position_of(token: Token, prefix: int, grid: tuple[int, int]) -> int:
    """Return the position of ``token`` in the sequence ``[CLS, registers, patches]``.

    Args:
        token: ``"cls"``, ``"register:K"`` with K from 1 to R, a patch ``(row, column)`` counted
            from 0, or a position. Text of the grammar is read first.
        prefix: The number of tokens before the patches, 1 + R.
        grid: The rows and columns of patches.

    Raises:
        OutOfRangeError: If the model or the image has no such token.
        InvalidInputError: If ``token`` is no token.

    """
    if isinstance(token, str):
        token = read_token(token)
    if isinstance(token, str) and not prefix:
        raise OutOfRangeError(
            "a patch or a position, of a model without CLS",
            repr(token),
            "Ask for a patch: (0, 0) in Python, 0,0 on the command line.",
        )
    if isinstance(token, str):
        return 0 if token == "cls" else _register(int(token.partition(":")[2]), prefix - 1)
    if isinstance(token, tuple | list):
        return prefix + _patch(token, grid)
    return positions(token, prefix + math.prod(grid))[0]


def is_count(text: str) -> bool:
    """Return whether ``text`` is a whole number of a possible size."""
    # Python parses up to 4300 digits. No image has so many rows.
    return text.isdecimal() and text.isascii() and len(text) < 20


def _register(number: int, count: int) -> int:
    if count == 0:
        raise OutOfRangeError(
            "a model with registers",
            f"register {number} of one without registers",
            "Ask for cls, or for a patch by ROW,COL.",
        )
    if not 1 <= number <= count:
        raise OutOfRangeError(
            f"a register from 1 to {count}", str(number), "Registers count from 1."
        )
    return number


def pair(place: Any) -> tuple[int, int]:
    """Return the row and the column of a patch, as ints."""
    if len(place) != 2:
        raise InvalidInputError("a patch as (row, column)", repr(place), "Give two whole numbers.")
    row, column = (whole_number(number, "row and column of a patch") for number in place)
    return row, column


def _patch(place: object, grid: tuple[int, int]) -> int:
    row, column = pair(place)
    if not (0 <= row < grid[0] and 0 <= column < grid[1]):
        raise OutOfRangeError(
            f"a patch in the grid of {grid[0]} rows and {grid[1]} columns",
            f"({row}, {column})",
            f"Rows go from 0 to {grid[0] - 1}, columns from 0 to {grid[1] - 1}.",
        )
    return row * grid[1] + column
