"""Kinds of values that argparse reads and, where they are wrong, explains."""

from __future__ import annotations

from argparse import ArgumentTypeError

from dinov2_attn.errors import InvalidInput
from dinov2_attn.show.tokens import Token, read_token


def positive(text: str) -> int:
    """Read a whole number of at least 1."""
    if not (text.isdecimal() and int(text) > 0):
        raise ArgumentTypeError(f"expected a whole number above 0; found {text!r}. Give pixels.")
    return int(text)


def share(text: str) -> float:
    """Read a number above 0 and up to 1."""
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if not 0 < value <= 1:
        raise ArgumentTypeError(f"expected a share in (0, 1]; found {text!r}. Try 0.6.")
    return value


def token(text: str) -> Token:
    """Read cls, register:K or ROW,COL."""
    try:
        return read_token(text)
    except InvalidInput as error:
        raise ArgumentTypeError(str(error)) from error
