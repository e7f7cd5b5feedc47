"""``dinov2-attn explore``: the attention of every token of one image, on an interactive page."""

from __future__ import annotations

import argparse
import logging
from pathlib import Path
from typing import Any

from dinov2_attn.apps.cli.argtypes import HEADS, above_zero, add_layers, add_output
from dinov2_attn.apps.cli.image_options import (
    add_example,
    add_image_size,
    check_reading,
    example,
    image_size,
    read,
    require_libraries,
)
from dinov2_attn.apps.cli.model_options import add_options, load_model
from dinov2_attn.errors import InvalidInputError

log = logging.getLogger(__name__)

DESCRIPTION = """\
Write one HTML page that works offline and needs no other file. Point at a patch to see its
attention, or the attention that it receives, in every layer and head. Queries and keys are
stored where they are smaller than weights, and the page states the error. The page and the log
say what had to be left out to stay below --max-mb.
"""

EPILOG = """\
Example: dinov2-attn explore photo.jpg -o page.html --layers 0,5,11
"""


def add(subparsers: Any) -> None:
    """Declare the subcommand."""
    parser = subparsers.add_parser(
        "explore",
        help="Show the attention of every token on an interactive page.",
        description=DESCRIPTION,
        epilog=EPILOG,
    )
    parser.add_argument("image", nargs="?", type=Path, metavar="IMAGE", help="The image to show.")
    add_example(parser)
    add_output(parser, "PAGE.html", "The file of the page.")
    add_image_size(parser)
    add_layers(parser, None, "all")
    parser.add_argument("--heads", choices=("each", "mean"), default="each", help=HEADS)
    parser.add_argument(
        "--max-mb",
        type=above_zero,
        default=25.0,
        metavar="MB",
        help="The maximum size of the page, which decides what it keeps. Default: 25.",
    )
    add_options(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Write the page of the one image."""
    require_libraries()
    size, swallowed = image_size(args.image_size or [])
    named = [args.image] if args.image else []
    image = _only([*named, *swallowed, *([example()] if args.example else [])])
    loaded = load_model(args)
    check_reading(loaded.model, args)

    from dinov2_attn.apps.explorer.explore import explore

    page = explore(
        loaded.model,
        read(loaded.model, image, size, args),
        args.output,
        args.layers,
        heads="mean" if args.heads == "mean" else None,
        title=image.name,
        name=loaded.name,
        warning=loaded.warning,
        max_mb=args.max_mb,
    )
    log.info("%s, %.1f MB, keeps %s", args.output, page.size / 1e6, page.kept)
    if page.left_out:
        log.warning("%s", page.left_out)
    return 0


def _only(images: list[Path]) -> Path:
    if len(images) != 1:
        raise InvalidInputError(
            "one image",
            ", ".join(map(str, images)) or "none",
            "Name one, or use --example. A page shows one image.",
        )
    return images[0]
