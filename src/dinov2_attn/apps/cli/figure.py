"""``dinov2-attn figure``: images by columns, at the size that they have in a paper."""

from __future__ import annotations

import argparse
import logging
from argparse import ArgumentTypeError
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dinov2_attn.apps.cli import plot_options
from dinov2_attn.apps.cli.argtypes import above_zero
from dinov2_attn.apps.cli.image_options import (
    add_example,
    add_image_size,
    check_reading,
    example,
    image_size,
    read,
    require_libraries,
)
from dinov2_attn.apps.cli.model_options import Loaded, add_options, load_model
from dinov2_attn.apps.viz.tokens import Token, check_queries, position_of, read_token
from dinov2_attn.errors import InvalidInputError, in_one_line

if TYPE_CHECKING:
    from dinov2_attn.apps.viz.figure import PaperFigure
    from dinov2_attn.apps.viz.images import ImageSize, LoadedImage

log = logging.getLogger(__name__)

DESCRIPTION = """\
Draw one figure for a paper: a row for each image, and columns of the photo and of maps. The figure
has the width that it has in the paper, and all letters have 7 points. The caption goes into a text
file next to it.
"""

EPILOG = """\
Example: dinov2-attn figure a.jpg b.jpg -o fig.pdf --width 3.25 --columns photo,mean,0,3
"""

SUFFIXES = (".pdf", ".svg", ".png")


def add(subparsers: Any) -> None:
    """Declare the subcommand."""
    parser = subparsers.add_parser(
        "figure",
        help="Draw images and maps as one figure for a paper.",
        description=DESCRIPTION,
        epilog=EPILOG,
    )
    parser.add_argument(
        "images", nargs="*", type=Path, metavar="IMAGE", help="An image, which becomes a row."
    )
    add_example(parser)
    parser.add_argument(
        "-o",
        "--output",
        type=output,
        required=True,
        metavar="FILE",
        help="The file of the figure: .pdf, .svg or .png. The caption is FILE with .txt.",
    )
    add_image_size(parser)
    group = parser.add_argument_group("figure")
    group.add_argument(
        "--width",
        type=above_zero,
        default=3.25,
        metavar="INCHES",
        help="The width of the figure. Default: 3.25, a column of many journals.",
    )
    group.add_argument(
        "--columns",
        type=columns,
        default=["photo", "mean"],
        metavar="C,C,…",
        help="The columns, with commas between them: photo, mean, or the number of a head. "
        "Default: photo,mean.",
    )
    group.add_argument(
        "--layer",
        type=int,
        default=-1,
        metavar="I",
        help="The block, counted from 0, or from the end as in --layer=-2. Default: the last.",
    )
    group.add_argument(
        "--query",
        type=query,
        default="cls",
        metavar="TOKEN",
        help="The token whose attention is drawn: cls, register:2, 3,17 for a patch, or '#17'. "
        "Default: cls.",
    )
    plot_options.add_colours(group)
    add_options(parser)
    parser.set_defaults(run=run)


def output(text: str) -> Path:
    """Read the path of a PDF, SVG or PNG."""
    path = Path(text)
    if path.suffix.lower() not in SUFFIXES:
        raise ArgumentTypeError(
            f"expected a name that ends in .pdf, .svg or .png; found {text!r}. Try fig.pdf."
        )
    return path


def columns(text: str) -> list[int | str]:
    """Read columns with commas between them: photo, mean, or the number of a head."""
    parts = text.split(",")
    if not all(part in ("photo", "mean") or part.isdecimal() for part in parts):
        raise ArgumentTypeError(
            f"expected photo, mean or heads, with commas between them; found {text!r}. "
            "Try photo,mean,0,3."
        )
    return [int(part) if part.isdecimal() else part for part in parts]


def query(text: str) -> Token:
    """Read one token."""
    try:
        return read_token(text)
    except InvalidInputError as error:
        raise ArgumentTypeError(in_one_line(error)) from error


def run(args: argparse.Namespace) -> int:
    """Draw the figure of all images."""
    require_libraries()
    size, swallowed = image_size(args.image_size or [])
    paths = [*args.images, *swallowed, *([example()] if args.example else [])]
    if not paths:
        raise InvalidInputError("an image", "none", "Name one, or use --example.")
    loaded = load_model(args)
    check_reading(loaded.model, args)
    if isinstance(args.query, str):
        check_queries([args.query], plot_options.prefix_of(loaded) - 1)
    figure = _figure(loaded, paths, size, args)
    figure.save(args.output)
    width, height = figure.figure.get_size_inches()
    log.info(
        "%s, %.2f × %.2f inches; its caption is %s",
        *(args.output, width, height, args.output.with_suffix(".txt")),
    )
    return 0


def _figure(
    loaded: Loaded, paths: list[Path], size: ImageSize, args: argparse.Namespace
) -> PaperFigure:
    from dinov2_attn.apps.viz.figure import figure

    images = [read(loaded.model, path, size, args) for path in paths]
    searched = args.outliers != "none"
    artifacts = [
        plot_options.artifacts_in(loaded, image, str(path), args.device) if searched else None
        for image, path in zip(images, paths, strict=True)
    ]
    return figure(
        [_maps(loaded, image, args) for image in images],
        images,
        columns=args.columns,
        width=args.width,
        query=args.query,
        artifacts=artifacts,
        style=plot_options.style_of(args),
        name=loaded.name,
        names=[path.name for path in paths],
        warning=loaded.warning,
    )


def _maps(loaded: Loaded, image: LoadedImage, args: argparse.Namespace) -> Any:
    from dinov2_attn.apps.viz.heatmap import maps_of

    height, width = (side // loaded.model.patch_size for side in image.picture.shape[:2])
    position = position_of(args.query, plot_options.prefix_of(loaded), (height, width))
    return maps_of(loaded.model, image, [args.layer], [position], args.device)
