"""Kinds of values that argparse reads and, where they are wrong, explains."""

from __future__ import annotations

from argparse import ArgumentTypeError


def positive(text: str) -> int:
    """Read a whole number of at least 1."""
    if not (text.isdecimal() and int(text) > 0):
        raise ArgumentTypeError(f"expected a whole number above 0; found {text!r}. Try 14.")
    return int(text)


def whole(text: str) -> int:
    """Read a whole number from 0 on."""
    if not text.isdecimal():
        raise ArgumentTypeError(f"expected a whole number from 0 on; found {text!r}. Try 0.")
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
