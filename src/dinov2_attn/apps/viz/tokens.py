"""The grammar of tokens: one for every command, picture and extraction.

A token is ``cls``, ``register:2``, ``3,17`` (the patch in row 3 and column 17) or ``#17`` (the
position 17 in the sequence ``[CLS, registers, patches]``). A list of queries also takes the words
``registers``, ``patches`` and ``all``, and slices of positions such as ``#1:5``.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

from dinov2_attn.errors import InvalidInputError, OutOfRangeError
from dinov2_attn.math.selection import to_index, whole_number
from dinov2_attn.math.token_names import (
    TOKENS,
    Token,
    is_count,
    pair,
    position_of,
    read_token,
)
from dinov2_attn.typing import Queries

WORDS = ("registers", "patches", "all")
HINT = (
    "Registers count from 1, rows and columns of patches from 0. Write the position 17 as '#17', "
    "and several of them as '#1:5'."
)


def read_query(text: str) -> Token | slice:
    """Return what one entry of a list of queries stands for.

    Args:
        text: A token, one of ``WORDS``, or a slice of positions: ``#1:5`` or ``#::2``.

    Returns:
        The token as ``read_token`` returns it, the word itself, or the slice.

    Raises:
        InvalidInputError: If ``text`` is none of these.

    """
    if text in WORDS:
        return text
    bounds = text.removeprefix("#").split(":")
    if text.startswith("#") and len(bounds) in (2, 3) and all(map(_is_bound, bounds)):
        numbers = [int(bound) if bound else None for bound in bounds]
        if numbers[2:] != [0]:  # a step of 0 goes nowhere
            return slice(*numbers)
    try:
        return read_token(text)
    except InvalidInputError as error:
        expected = f"{TOKENS}, or one of the words {', '.join(WORDS)}"
        raise InvalidInputError(expected, repr(text), HINT) from error


def file_name(token: Token) -> str:
    """Return ``token`` as a part of a file name: register2, 3-5, position17."""
    if isinstance(token, tuple):
        return "{}-{}".format(*token)
    return f"position{token}" if isinstance(token, int) else token.replace(":", "")


def as_texts(queries: Any) -> tuple[str, ...]:
    """Return ``queries`` as Python takes them, written in the grammar.

    Args:
        queries: ``None`` for all, text of the grammar, a position, a slice, or a sequence of
            texts, positions, slices and patches ``(row, column)``.

    Raises:
        InvalidInputError: If something in it stands for no tokens.

    """
    if queries is None:
        return ("all",)
    if hasattr(queries, "tolist"):  # a tensor or an array
        queries = queries.tolist()
    is_list = isinstance(queries, Sequence) and not isinstance(queries, str | bytes)
    texts = tuple(map(_as_text, queries if is_list else [queries]))
    if not texts:
        raise InvalidInputError("at least one query", repr(queries), "Leave it out for CLS.")
    return texts


def check_queries(texts: Iterable[str], registers: int) -> None:
    """Raise ``InvalidInputError`` if ``texts`` name registers that no image can have."""
    for text in texts:
        query = read_query(text)
        if query == "registers" and not registers:
            raise InvalidInputError(
                "queries that the model has",
                "registers of a model without registers",
                "Ask for cls, patches or all.",
            )
        if isinstance(query, str) and query.startswith("register:"):
            position_of(query, 1 + registers, (1, 1))


def resolve(texts: Sequence[str], prefix: int, grid: tuple[int, int]) -> Queries:
    """Return the rows that ``texts`` select in an image of ``grid``, as models take ``queries``.

    Raises:
        OutOfRangeError: If the image has no such token.

    """
    queries = [read_query(text) for text in texts]
    found = [_positions(query, prefix, grid) for query in queries]
    first = queries[0]
    # A word or a slice alone stays one: its rows are a view, where positions make a copy.
    if len(queries) == 1 and isinstance(first, slice):
        return first
    if len(queries) == 1 and isinstance(first, str) and ":" not in first:
        return None if first == "all" else first  # type: ignore[return-value]  # cls or a word
    return [position for each in found for position in each]


def count(texts: Iterable[str], prefix: int, grid: tuple[int, int]) -> int:
    """Return how many rows ``texts`` select in an image of ``grid``, if it has all of them."""
    total = 0
    for query in map(read_query, texts):
        several = isinstance(query, slice) or query in WORDS
        total += len(_range(query, prefix, grid)) if several else 1
    return total


def _positions(query: Token | slice, prefix: int, grid: tuple[int, int]) -> Sequence[int]:
    if not isinstance(query, slice) and query not in WORDS:
        return [position_of(query, prefix, grid)]
    found = _range(query, prefix, grid)
    if not found:
        raise OutOfRangeError(
            f"a slice of {prefix + math.prod(grid)} tokens that has some",
            repr(query),
            "Positions count CLS first, then the registers, then the patches row by row.",
        )
    return found


def _range(query: Any, prefix: int, grid: tuple[int, int]) -> range:
    length = prefix + math.prod(grid)
    words = {
        "registers": slice(1, prefix),
        "patches": slice(prefix, None),
        "all": slice(None),
    }
    return range(length)[words[query] if isinstance(query, str) else query]


def _as_text(query: object) -> str:
    if isinstance(query, str):
        text = query
    elif isinstance(query, tuple | list):
        text = "{},{}".format(*pair(query))
    elif isinstance(query, slice):
        to_index(query, 1)  # raises what is no slice of whole numbers
        bounds = [query.start, query.stop, *([query.step] * (query.step is not None))]
        text = "#" + ":".join("" if bound is None else str(int(bound)) for bound in bounds)
    else:
        text = f"#{whole_number(query, 'queries')}"
    read_query(text)
    return text


def _is_bound(text: str) -> bool:
    return not text or is_count(text.removeprefix("-"))
