"""``dinov2-attn heatmap``: the attention of tokens, as pictures."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dinov2_attn.apps.cli import plot_options
from dinov2_attn.apps.cli.argtypes import add_output
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
from dinov2_attn.errors import Dinov2AttnError, InvalidInputError

if TYPE_CHECKING:
    from dinov2_attn.apps.viz.images import ImageSize

log = logging.getLogger(__name__)

DESCRIPTION = """\
Draw the attention of the CLS token in the last block, or of other tokens and layers. heads shows
the image, the mean and every head on one scale. overlay shows the mean on top of the image. Their
captions name the model, layer, head and query, the share of CLS and registers, and artifact
tokens. DINO v1's files are written as well: img.png, attn-head{j}.png and, with --threshold,
mask_th{t}_head{j}.png. attention.npy holds the maps (heads, h, w), and image.json records how the
image was read (size, range, mean, std). One image goes directly into DIR. Several images go into
a folder each.
"""

EPILOG = """\
Example: dinov2-attn heatmap photo.jpg -o out --queries cls 3,17 --overview
"""


def add(subparsers: Any) -> None:
    """Declare the subcommand."""
    parser = subparsers.add_parser(
        "heatmap",
        help="Draw the attention of tokens as pictures.",
        description=DESCRIPTION,
        epilog=EPILOG,
    )
    parser.add_argument("images", nargs="*", type=Path, metavar="IMAGE", help="An image to draw.")
    add_example(parser)
    add_output(parser, "DIR", "The folder for the pictures.")
    add_image_size(parser)
    plot_options.add_options(parser)
    add_options(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Draw every image; report those that fail, and return 1 if there are any."""
    require_libraries()
    from tqdm import tqdm
    from tqdm.contrib.logging import logging_redirect_tqdm

    size, swallowed = image_size(args.image_size or [])
    images = [*args.images, *swallowed, *([example()] if args.example else [])]
    if not images:
        raise InvalidInputError("an image", "none", "Name one, or use --example.")
    loaded = load_model(args)
    plot_options.check(args, loaded)
    check_reading(loaded.model, args)
    failed = 0
    with logging_redirect_tqdm():
        jobs = zip(images, _folders(args.output, images), strict=True)
        for image, folder in tqdm(jobs, total=len(images), unit="image"):
            try:
                _draw(loaded, image, folder, size, args)
            except Dinov2AttnError as error:
                log.error("%s", error)
                failed += 1
    return 1 if failed else 0


def _draw(
    loaded: Loaded, image: Path, folder: Path, size: ImageSize, args: argparse.Namespace
) -> None:
    plot_options.write(loaded, read(loaded.model, image, size, args), str(image), folder, args)


def _folders(output: Path, images: Sequence[Path]) -> list[Path]:
    """Return the folder of each image: ``output`` for one, folders named by stem for several."""
    if len(images) == 1:
        return [output]
    taken: dict[str, Path] = {}
    for image in images:
        # The stem of "...png" would be a path outside of ``output``.
        stem = image.stem if image.stem.strip(".") else "image"
        name, number = stem, 1
        # On some file systems "Cat" and "cat" are one folder.
        while name.casefold() in taken:
            number += 1
            name = f"{stem}-{number}"
        taken[name.casefold()] = output / name
    return list(taken.values())
