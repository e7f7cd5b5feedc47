"""``dinov2-attn explore``: every token's attention on one photograph, as an interactive page."""

from __future__ import annotations

import argparse
import logging
from pathlib import Path
from typing import Any

from dinov2_attn.apps.cli.argtypes import above_zero, blocks
from dinov2_attn.apps.cli.image_options import (
    add_image_size,
    add_sample,
    check_reading,
    image_size,
    read,
    require_libraries,
    sample,
)
from dinov2_attn.apps.cli.model_options import add_options, load_model
from dinov2_attn.errors import InvalidInputError

log = logging.getLogger(__name__)

DESCRIPTION = """\
Write one HTML page that needs nothing else: point at a patch to see where it looks, or who looks
at it, in every layer and head. Weights are kept in 8 bits; what the page has no room for is said
in it and here.
"""


def add(subparsers: Any) -> None:
    """Declare the subcommand."""
    parser = subparsers.add_parser(
        "explore", help="every token's attention as an interactive page", description=DESCRIPTION
    )
    parser.add_argument("image", nargs="?", type=Path, metavar="IMAGE")
    add_sample(parser)
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="PAGE.html")
    add_image_size(parser)
    parser.add_argument(
        "--layers",
        type=blocks,
        metavar="I,J,…",
        help="blocks counted from 0, or with --layers=-1 from the end; default: all",
    )
    parser.add_argument("--heads", choices=("each", "mean"), default="each", help="default: each")
    parser.add_argument(
        "--max-mb",
        type=above_zero,
        default=25.0,
        metavar="MB",
        help="the page's greatest size, which decides what it keeps; default: 25",
    )
    add_options(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Write the page of the one image."""
    require_libraries()
    size, swallowed = image_size(args.image_size or [])
    named = [args.image] if args.image else []
    image = _only([*named, *swallowed, *([sample()] if args.sample else [])])
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
            "Name one, or try --sample; a page shows one image.",
        )
    return images[0]
