"""Names of tokens: cls, register:2, or a patch by its row and column."""

from __future__ import annotations

from typing import Any

from dinov2_attn.errors import InvalidInputError, OutOfRangeError
from dinov2_attn.math.selection import positions, whole_number

Token = int | str | tuple[int, int]


def read_token(text: str) -> Token:
    """Parse ``cls``, ``register:K`` or ``ROW,COL``. Raise ``InvalidInputError`` otherwise."""
    word, colon, number = text.partition(":")
    if word == "cls" and not colon:
        return word
    if word == "register" and _is_count(number):
        return text
    parts = text.split(",")
    if len(parts) == 2 and all(map(_is_count, parts)):
        return int(parts[0]), int(parts[1])
    raise InvalidInputError(
        "cls, register:K or ROW,COL",
        repr(text),
        "Registers count from 1, rows and columns of patches from 0.",
    )


def position_of(token: Token, prefix: int, grid: tuple[int, int]) -> int:
    """Return the position of ``token`` in the sequence ``[CLS, registers, patches]``.

    Args:
        token: ``"cls"``, ``"register:K"`` with K from 1 to R, a patch ``(row, column)`` counted
            from 0, one of the three as text, or a position.
        prefix: The number of tokens before the patches, ``1 + R``.
        grid: The patch grid ``(h, w)``.

    Raises:
        OutOfRangeError: if there is no such token.
        InvalidInputError: if ``token`` has another form.

    """
    if isinstance(token, str):
        token = read_token(token)
    if isinstance(token, str):
        return 0 if token == "cls" else _register(int(token.partition(":")[2]), prefix - 1)
    if isinstance(token, tuple | list):
        return prefix + _patch(token, grid)
    return positions(token, prefix + grid[0] * grid[1])[0]


def file_name(token: Token) -> str:
    """Return ``token`` as part of a file name: register2, 3-5."""
    if isinstance(token, tuple):
        return "{}-{}".format(*token)
    return str(token).replace(":", "")


def _is_count(text: str) -> bool:
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


def _patch(place: Any, grid: tuple[int, int]) -> int:
    if len(place) != 2:
        raise InvalidInputError("a patch as (row, column)", repr(place), "Give two whole numbers.")
    row, column = (whole_number(number, "row and column of a patch") for number in place)
    if not (0 <= row < grid[0] and 0 <= column < grid[1]):
        raise OutOfRangeError(
            f"a patch in the grid of {grid[0]} rows and {grid[1]} columns",
            f"({row}, {column})",
            f"Rows go from 0 to {grid[0] - 1}, columns from 0 to {grid[1] - 1}.",
        )
    return row * grid[1] + column
