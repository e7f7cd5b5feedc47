"""The kinds of values on the command line, and the options that several commands share."""

from __future__ import annotations

import argparse
import math
from argparse import ArgumentTypeError
from pathlib import Path
from typing import Any, TypeAlias

from dinov2_attn.apps.viz.tokens import read_query
from dinov2_attn.errors import InvalidInputError, in_one_line

HEADS = "Keep each head, or their mean. Default: each."

# A parser, or a group of one's options.
Options: TypeAlias = "argparse.ArgumentParser | argparse._ArgumentGroup"


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


def layers(text: str) -> list[int] | None:
    """Read blocks with commas between them, negative ones counted from the end, or all."""
    if text == "all":
        return None
    try:
        return [int(part) for part in text.split(",")]
    except ValueError as error:
        raise ArgumentTypeError(
            f"expected blocks with commas between them, or all; found {text!r}. Try 0 or 0,1."
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


def query(text: str) -> str:
    """Return ``text`` if it is an entry of a list of queries."""
    try:
        read_query(text)
    except InvalidInputError as error:
        # The option takes every argument that follows it, images included.
        raise ArgumentTypeError(f"{in_one_line(error)} Put files before this option.") from error
    check_register(text)
    return text


def check_register(text: str) -> None:
    """Raise ``ArgumentTypeError`` for the register 0, which no model has."""
    word, colon, number = text.partition(":")
    if word == "register" and colon and int(number) == 0:
        raise ArgumentTypeError(f"expected a register from 1 on; found {text!r}. Try register:1.")


def add_layers(parser: Options, default: Any, described: str) -> None:
    """Add ``--layers`` to ``parser``; ``described`` is its default in the help."""
    parser.add_argument(
        "--layers",
        type=layers,
        default=default,
        metavar="I,J,…",
        help="The blocks, counted from 0 (negative ones from the end, as in --layers=-2,-1), "
        f"or all. Default: {described}.",
    )


def add_queries(parser: Options) -> None:
    """Add ``--queries`` to ``parser``."""
    parser.add_argument(
        "--queries",
        type=query,
        nargs="+",
        action="extend",
        metavar="TOKEN",
        help="The tokens whose attention is taken, with spaces between them: cls, register:2, "
        "3,17 for the patch in row 3 and column 17, '#17' for position 17 (in quotes: the shell "
        "reads # as a comment), registers, patches, or all. Default: cls.",
    )


def add_output(parser: Options, metavar: str, described: str) -> None:
    """Add ``--output``, which is required, to ``parser``."""
    parser.add_argument("-o", "--output", type=Path, required=True, metavar=metavar, help=described)


def add_source_and_device(parser: Options) -> None:
    """Add ``--repo`` and ``--device`` to ``parser``."""
    parser.add_argument(
        "--repo",
        metavar="PATH",
        help="A checkout of facebookresearch/dinov2. Default: the importable dinov2 package, or "
        "a download of it.",
    )
    parser.add_argument(
        "--device",
        default="cpu",
        help="The device of the model, by its name in PyTorch. Default: cpu.",
    )
