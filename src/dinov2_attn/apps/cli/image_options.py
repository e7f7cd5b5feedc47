"""The options that choose and size photographs, for every subcommand that takes them."""

from __future__ import annotations

import argparse
import logging
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dinov2_attn import _optional
from dinov2_attn.apps.cli.argtypes import numbers, positive, value_range
from dinov2_attn.errors import InvalidInputError

if TYPE_CHECKING:
    from dinov2_attn.apps.viz.images import ImageSize, LoadedImage

log = logging.getLogger(__name__)


def add_sample(parser: argparse.ArgumentParser) -> None:
    """Add ``--sample`` to ``parser``."""
    parser.add_argument(
        "--sample", action="store_true", help="the photograph that matplotlib ships"
    )


def add_image_size(parser: argparse.ArgumentParser) -> None:
    """Add to ``parser`` how photographs are sized, scaled and normalised."""
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
    parser.add_argument(
        "--range",
        type=value_range,
        metavar="LOW,HIGH",
        help="the values that become 0 and 1, such as 0,4095 (--range=-1,1 where it is negative), "
        "or auto for the least and the greatest of each image; default: those of the format",
    )
    parser.add_argument(
        "--mean",
        type=numbers,
        metavar="M,…",
        help="subtracted from values of 0 to 1, one number or one for each channel; default: "
        "0.485,0.456,0.406 (ImageNet's), or for other than 3 channels 0.449",
    )
    parser.add_argument(
        "--std",
        type=numbers,
        metavar="S,…",
        help="what they are divided by; default: 0.229,0.224,0.225, or 0.226",
    )


def read(model: Any, image: Path, size: ImageSize, args: argparse.Namespace) -> LoadedImage:
    """Read ``image`` as ``model`` and the options of ``add_image_size`` want it."""
    from dinov2_attn.apps.viz.images import load_image

    return load_image(
        image,
        model,
        size,
        args.max_pixels,
        range=args.range,
        mean=args.mean,
        std=args.std,
    )


def check_reading(model: Any, args: argparse.Namespace) -> None:
    """Raise what no image can mend: a mean of other channels. Say what is assumed."""
    from dinov2_attn.apps.viz.reading import reading_for
    from dinov2_attn.backbone.backbone import Backbone

    channels = Backbone(model).channels
    reading = reading_for(channels, args.range, args.mean, args.std)
    if channels != 3 and None in (args.mean, args.std):
        log.warning(
            "the model takes %d channel%s: %s. Give those it was trained with by --mean and --std",
            *(channels, "s" * (channels != 1), reading),
        )


def require_libraries() -> None:
    """Raise ``UnavailableError`` where a library for pictures is missing."""
    _optional.require("torchvision", "matplotlib", "PIL", "tqdm")


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
    raise InvalidInputError(
        "--image-size with one or two lengths in pixels",
        " ".join(values),
        "Give N for the short side, or height and width.",
    )


def _is_length(value: str) -> bool:
    # Python reads and shows 4300 digits; the number of pixels has twice as many as this.
    return value.isdecimal() and len(value) < 1000
