"""Kinds of values that argparse reads and, where they are wrong, explains."""

from __future__ import annotations

import math
from argparse import ArgumentTypeError

from dinov2_attn.apps.viz.tokens import Token, read_token
from dinov2_attn.errors import InvalidInputError, in_one_line


def positive(text: str) -> int:
    """Read a whole number of at least 1."""
    if not (text.isdecimal() and int(text) > 0):
        raise ArgumentTypeError(f"expected a whole number above 0; found {text!r}. Give 1 or more.")
    return int(text)


def whole(text: str) -> int:
    """Read a whole number from 0 on."""
    if not text.isdecimal():
        raise ArgumentTypeError(f"expected a whole number from 0 on; found {text!r}. Try 0.")
    return int(text)


def above_zero(text: str) -> float:
    """Read a finite number above 0."""
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if not 0 < value < float("inf"):
        raise ArgumentTypeError(f"expected a number above 0; found {text!r}. Try 25.")
    return value


def numbers(text: str) -> list[float]:
    """Read finite numbers with commas between them."""
    try:
        values = [float(part) for part in text.split(",")]
    except ValueError:
        values = []
    if not values or not all(map(math.isfinite, values)):
        raise ArgumentTypeError(
            f"expected numbers with commas between them; found {text!r}. Try 0.5 or 0.5,0.5,0.5."
        )
    return values


def value_range(text: str) -> tuple[float, float] | str:
    """Read LOW,HIGH or auto."""
    if text == "auto":
        return text
    try:
        ends = numbers(text)
    except ArgumentTypeError:
        ends = []
    if len(ends) != 2 or not ends[0] < ends[1]:
        raise ArgumentTypeError(
            f"expected LOW,HIGH with LOW below HIGH, or auto; found {text!r}. Try 0,4095."
        )
    return ends[0], ends[1]


def blocks(text: str) -> list[int]:
    """Read whole numbers with commas between them, negative ones counted from the end."""
    try:
        return [int(part) for part in text.split(",")]
    except ValueError as error:
        raise ArgumentTypeError(
            f"expected blocks with commas between them; found {text!r}. Try 0 or 0,1."
        ) from error


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
    except InvalidInputError as error:
        raise ArgumentTypeError(in_one_line(error)) from error
