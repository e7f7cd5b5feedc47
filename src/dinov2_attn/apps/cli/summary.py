"""``dinov2-attn summary``: the maps of a dataset on one page, in an order."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from dinov2_attn.apps.cli import early
from dinov2_attn.apps.cli.argtypes import positive, whole
from dinov2_attn.apps.cli.explore import output
from dinov2_attn.apps.cli.image_options import require_libraries
from dinov2_attn.apps.cli.report import add_open, open_file, say

DESCRIPTION = """\
Write one HTML page with a small map of each image of an extraction, in the order of a number:
the attention to tokens that are no patches, the entropy, or the number of artifact tokens. The
page works offline and has no script.
"""

EPILOG = """\
Example: dinov2-attn summary out -o sheet.html --sort entropy --images photos
"""


def add(subparsers: Any) -> None:
    """Declare the subcommand."""
    parser = subparsers.add_parser(
        "summary",
        help="Show the maps of an extraction on one page.",
        description=DESCRIPTION,
        epilog=EPILOG,
    )
    parser.add_argument("folder", type=Path, metavar="OUT", help="The folder that extract wrote.")
    parser.add_argument(
        "-o",
        "--output",
        type=output,
        required=True,
        metavar="SHEET.html",
        help="The file of the page.",
    )
    add_open(parser, "the page")
    parser.add_argument(
        "--sort",
        choices=("prefix-mass", "entropy", "artifacts"),
        default="prefix-mass",
        help="The number that orders the images. Artifacts need `extract --artifacts`. Default: "
        "prefix-mass.",
    )
    parser.add_argument(
        "--lowest", action="store_true", help="Show the images with the lowest number first."
    )
    parser.add_argument(
        "--layer",
        type=whole,
        metavar="I",
        help="The layer, one of those that are stored. Default: the last of them.",
    )
    parser.add_argument(
        "--count",
        type=positive,
        default=100,
        metavar="N",
        help="How many images to show at most. Default: 100.",
    )
    parser.add_argument(
        "--images",
        type=Path,
        metavar="FOLDER",
        help="The folder of the images, to show them beside their maps. Files that were changed "
        "since are not shown.",
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Write the sheet, and say what it shows."""
    require_libraries()
    early.check_input(args.folder, "the folder of an extraction")
    if args.images is not None:
        early.check_input(args.images, "the folder of its images")
    early.check_file(args.output)
    from dinov2_attn.apps.extraction.read import AttentionDataset

    by: Any = args.sort.replace("-", "_")
    sheet = AttentionDataset(args.folder).sheet(
        by, layer=args.layer, count=args.count, lowest=args.lowest, images=args.images
    )
    sheet.save(args.output)
    size = f"{len(sheet.content) / 1e6:.1f} MB"
    count = f"{sheet.shown} of {sheet.images} images"
    say(args, f"wrote {args.output}: {count}, {size}  <- open this")
    if args.open:
        open_file(args.output)
    return 0
