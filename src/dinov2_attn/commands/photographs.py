"""The options that choose and size photographs, for every subcommand that takes them."""

from __future__ import annotations

import argparse
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING

from dinov2_attn import optional
from dinov2_attn.commands.values import positive
from dinov2_attn.errors import InvalidInput

if TYPE_CHECKING:
    from dinov2_attn.show.images import ImageSize


def add_sample(parser: argparse.ArgumentParser) -> None:
    """Add ``--sample`` to ``parser``."""
    parser.add_argument(
        "--sample", action="store_true", help="the photograph that matplotlib ships"
    )


def add_image_size(parser: argparse.ArgumentParser) -> None:
    """Add ``--image-size`` and ``--max-pixels`` to ``parser``."""
    parser.add_argument(
        "--image-size",
        nargs="+",
        metavar=("N", "W"),
        help="the short side, or height and width, named after the images; "
        "default: as it is, up to 518",
    )
    parser.add_argument(
        "--max-pixels",
        type=positive,
        metavar="N",
        help="refuse larger images before they are decoded; default: 100 million",
    )


def require_libraries() -> None:
    """Raise ``Unavailable`` where a library for pictures is missing."""
    optional.require("torchvision", "matplotlib", "PIL", "tqdm")


def sample() -> Path:
    """Return the photograph that matplotlib ships."""
    from matplotlib.cbook import get_sample_data

    return Path(get_sample_data("grace_hopper.jpg", asfileobj=False))


def image_size(values: list[str]) -> tuple[ImageSize, list[Path]]:
    """Part the one or two lengths from images named behind them, which argparse adds."""
    lengths = [int(value) for value in takewhile(_is_length, values)]
    images = [Path(value) for value in values[len(lengths) :]]
    match lengths:
        case [] if not values:
            return None, images
        case [int(short_side)] if short_side:
            return short_side, images
        case [int(height), int(width)] if height and width:
            return (height, width), images
    raise InvalidInput(
        "--image-size with one or two lengths in pixels",
        " ".join(values),
        "Give N for the short side, or height and width.",
    )


def _is_length(value: str) -> bool:
    # Python reads and shows 4300 digits; the number of pixels has twice as many as this.
    return value.isdecimal() and len(value) < 1000
