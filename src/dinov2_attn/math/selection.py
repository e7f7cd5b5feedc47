"""Selecting rows of the attention matrix, and layers.

The names ``"registers"`` and ``"patches"`` need the number of registers, which only the model has.
Positions need the number of tokens, which only an input has. So the model resolves names first,
and the attention module makes an index of the positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from operator import index
from typing import get_args

from dinov2_attn.errors import InvalidInputError, OutOfRangeError
from dinov2_attn.typing import Layers, Queries, QueryWord

Rows = slice | list[int]

_WORDS = get_args(QueryWord)


def resolve_names(queries: Queries, registers: int) -> Queries:
    """Return the rows that a name means, in the layout ``[CLS, registers, patches]``.

    ``"cls"`` is row 0, ``"registers"`` are rows ``1 … R``, ``"patches"`` are all others. Anything
    else than a name is returned unchanged.
    """
    if not isinstance(queries, str):
        return queries
    _check_word(queries)
    prefix = 1 + registers
    return {"cls": slice(0, 1), "registers": slice(1, prefix), "patches": slice(prefix, None)}[
        queries
    ]


def to_index(queries: Queries, length: int) -> Rows:
    """Return the rows that ``queries`` selects among ``length`` tokens.

    The result indexes a token dimension and keeps it: an int gives one row. Negative positions
    count from the end.

    Raises:
        InvalidInputError: If ``queries`` is no selection of positions.
        OutOfRangeError: If there is no such position.

    """
    if queries is None:
        return slice(None)
    if isinstance(queries, slice):
        return _index_of_slice(queries, length)
    if isinstance(queries, str):
        return _index_of_name(queries)
    if hasattr(queries, "tolist"):  # a tensor or an array, of positions or of one
        queries = queries.tolist()
    # Not any iterable: every block reads the positions again, and a generator ends.
    if isinstance(queries, Sequence) and not isinstance(queries, bytes):
        return [_position(query, length) for query in queries]
    position = _position(queries, length)
    return slice(position, position + 1)


def positions(queries: Queries, length: int) -> tuple[int, ...]:
    """Return the positions of the rows that ``queries`` selects among ``length`` tokens."""
    rows = to_index(queries, length)
    return tuple(range(length)[rows] if isinstance(rows, slice) else rows)


def name_token(position: int, prefix: int, grid: tuple[int, int]) -> str:
    """Return what the token at ``position`` is called: CLS, register 2, patch (3, 17).

    Registers count from 1, the rows and columns of patches from 0.
    """
    if position < prefix:
        return f"register {position}" if position else "CLS"
    return "patch ({}, {})".format(*divmod(position - prefix, grid[1]))


def layers_to_take(n: Layers, depth: int) -> list[int]:
    """Return the numbers of the blocks that ``n`` selects, in ascending order.

    As in upstream's ``get_intermediate_layers``: an int selects the last ``n``, a sequence selects
    those in it, ``None`` selects all. Negative numbers count from the end.
    """
    if n is None:
        return list(range(depth))
    if hasattr(n, "tolist"):  # a tensor or an array
        n = n.tolist()
    if not isinstance(n, Sequence):
        n = whole_number(n, "n, the blocks to take,")
        if not 0 <= n <= depth:
            raise OutOfRangeError(
                f"n, the number of last blocks to take, between 0 and {depth}",
                str(n),
                f"Pass a sequence to choose single blocks: [{depth - 1}] is the last.",
            )
        return list(range(depth - n, depth))
    layers = [whole_number(i, "blocks") for i in n]
    if wrong := [i for i in layers if not -depth <= i < depth]:
        raise OutOfRangeError(
            f"blocks between {-depth} and {depth - 1}, there being {depth}",
            ", ".join(map(str, wrong)),
            "Blocks count from 0.",
        )
    return sorted({i % depth for i in layers})


def _index_of_slice(queries: slice, length: int) -> Rows:
    try:
        positions = range(length)[queries]
    except (TypeError, ValueError) as error:
        raise InvalidInputError(
            "a slice of whole numbers with a step other than 0",
            f"{queries} ({error})",
            "Count tokens: CLS, registers, patches row by row.",
        ) from error
    # PyTorch has no negative steps.
    return list(positions) if positions.step < 0 else queries


def _check_word(word: str) -> None:
    if word not in _WORDS:
        raise InvalidInputError(
            f"queries to be None, one of {', '.join(map(repr, _WORDS))}, an int, "
            "a slice or a sequence of ints",
            repr(word),
            "Check the spelling, or give positions in the token sequence.",
        )


def _index_of_name(word: str) -> slice:
    if word == "cls":
        return slice(0, 1)
    _check_word(word)
    raise InvalidInputError(
        "positions, since a single block or attention module does not know how many "
        "registers its model has",
        repr(word),
        "Ask the model (get_self_attention, get_last_self_attention) or pass a slice.",
    )


def whole_number(value: object, what: str) -> int:
    """Return ``value`` as an int, or raise ``InvalidInputError`` with ``what`` it should be."""
    # A list of booleans looks like a mask but would be read as positions 0 and 1.
    if not isinstance(value, bool):
        try:
            return index(value)  # type: ignore[arg-type]  # the TypeError is the answer
        except TypeError:
            pass
    raise InvalidInputError(
        f"{what} as whole numbers",
        f"{value!r} of type {type(value).__name__}",
        "Pass an int or a sequence of ints.",
    )


def _position(query: object, length: int) -> int:
    position = whole_number(query, "tokens")
    if not -length <= position < length:
        raise OutOfRangeError(
            f"a token between {-length} and {length - 1}, there being {length} tokens",
            str(position),
            "Positions count CLS first, then the registers, then the patches row by row.",
        )
    return position % length
