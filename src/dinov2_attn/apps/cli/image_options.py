"""The options that choose, resize and normalise images."""

from __future__ import annotations

import argparse
import logging
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING

from dinov2_attn import _imports
from dinov2_attn.apps.cli.argtypes import numbers, positive, value_range
from dinov2_attn.errors import InvalidInputError

if TYPE_CHECKING:
    from dinov2_attn.apps.cli.model_options import Loaded
    from dinov2_attn.apps.viz.images import ImageSize, LoadedImage

log = logging.getLogger(__name__)


def add_example(parser: argparse.ArgumentParser) -> None:
    """Add ``--example`` to ``parser``."""
    parser.add_argument(
        "--example", action="store_true", help="Use the example image that matplotlib ships."
    )


def add_image_size(parser: argparse.ArgumentParser) -> None:
    """Add to ``parser`` how images are resized, scaled and normalised."""
    parser.add_argument(
        "--image-size",
        nargs="+",
        metavar=("N", "W"),
        help="The length of the short side in pixels, or height and width. Put it after the "
        "images. Default: the size of the image, up to 518.",
    )
    parser.add_argument(
        "--max-pixels",
        type=positive,
        metavar="N",
        help="Reject images with more pixels before they are decoded. Default: 100 million.",
    )
    parser.add_argument(
        "--range",
        type=value_range,
        metavar="LOW,HIGH",
        help="The values that become 0 and 1, such as 0,4095 (or --range=-1,1 with a negative "
        "one), or auto for the minimum and maximum of each image. Default: the range of the "
        "format.",
    )
    parser.add_argument(
        "--mean",
        type=numbers,
        metavar="M,…",
        help="The mean to subtract from values between 0 and 1: one number, or one for each "
        "channel. Default: that of ImageNet, 0.485,0.456,0.406, or 0.449 if the model does not "
        "take 3 channels.",
    )
    parser.add_argument(
        "--std",
        type=numbers,
        metavar="S,…",
        help="The standard deviation to divide by. Default: 0.229,0.224,0.225, or 0.226 if the "
        "model does not take 3 channels.",
    )


def read(loaded: Loaded, image: Path, size: ImageSize, args: argparse.Namespace) -> LoadedImage:
    """Return ``image`` as the model takes it, by the options of ``add_image_size``."""
    from dinov2_attn.apps.viz.images import load_image

    return load_image(
        image,
        loaded.model,
        size,
        args.max_pixels,
        range=args.range,
        mean=args.mean or loaded.mean,
        std=args.std or loaded.std,
    )


def read_on_grid(
    loaded: Loaded, first: Loaded, image: Path, size: ImageSize, args: argparse.Namespace
) -> LoadedImage:
    """Return what ``first`` sees of ``image`` for another model, with the same grid of patches."""
    from dinov2_attn.apps.viz.images import load_on_grid

    return load_on_grid(
        image,
        loaded.model,
        first.model,
        size,
        args.max_pixels,
        range=args.range,
        mean=args.mean or loaded.mean,
        std=args.std or loaded.std,
    )


def check_reading(loaded: Loaded, args: argparse.Namespace) -> None:
    """Raise ``InvalidInputError`` if the mean has other channels; log what is assumed."""
    from dinov2_attn.apps.viz.reading import reading_for

    channels = loaded.geometry.channels
    mean, std = args.mean or loaded.mean, args.std or loaded.std
    reading = reading_for(channels, args.range, mean, std)
    if channels != 3 and None in (mean, std):
        log.warning(
            "the model takes %d channel%s: %s. Pass the values of its training by --mean and --std",
            *(channels, "s" * (channels != 1), reading),
        )


def require_libraries() -> None:
    """Raise ``UnavailableError`` if a library for pictures is missing."""
    _imports.require("torchvision", "matplotlib", "PIL", "tqdm")


def example() -> Path:
    """Return the example image that matplotlib ships."""
    from matplotlib.cbook import get_sample_data

    return Path(get_sample_data("grace_hopper.jpg", asfileobj=False))


def given_images(args: argparse.Namespace) -> tuple[ImageSize, list[Path]]:
    """Return the size that images get, and the images: also those behind it, and the example."""
    size, swallowed = image_size(args.image_size or [])
    return size, [*args.images, *swallowed, *([example()] if args.example else [])]


def some_images(args: argparse.Namespace) -> tuple[ImageSize, list[Path]]:
    """Return what ``given_images`` does, or raise ``InvalidInputError`` if there is no image."""
    size, images = given_images(args)
    if not images:
        raise InvalidInputError("an image", "none", "Name one, or use --example.")
    return size, images


def image_size(values: list[str]) -> tuple[ImageSize, list[Path]]:
    """Split the one or two lengths from the images after them, which argparse adds."""
    lengths = [int(value) for value in takewhile(_is_length, values)]
    images = [Path(value) for value in values[len(lengths) :]]
    match lengths:
        case [] if not values:
            return None, images
        case [int(short_side)] if short_side:
            return short_side, images
        case [int(height), int(width)] if height and width:
            return (height, width), images
    raise InvalidInputError(
        "--image-size with one or two lengths in pixels",
        " ".join(values),
        "Give N for the short side, or height and width.",
    )


def _is_length(value: str) -> bool:
    # Python reads and shows 4300 digits; the number of pixels has twice as many as this.
    return value.isdecimal() and len(value) < 1000
