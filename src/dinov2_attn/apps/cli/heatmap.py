"""``dinov2-attn heatmap``: what the CLS token looks at, as pictures."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dinov2_attn.apps.cli import plot_options
from dinov2_attn.apps.cli.image_options import (
    add_image_size,
    add_sample,
    check_reading,
    image_size,
    read,
    require_libraries,
    sample,
)
from dinov2_attn.apps.cli.model_options import Loaded, add_options, load_model
from dinov2_attn.errors import Dinov2AttnError, InvalidInputError

if TYPE_CHECKING:
    from dinov2_attn.apps.viz.images import ImageSize

log = logging.getLogger(__name__)

DESCRIPTION = """\
Write the attention of the CLS token in the last block as pictures. heads: the photograph, the
mean and every head on one scale; overlay: the mean over the photograph; both with a caption that
names model, layer, head, query, the share of CLS and registers, and artifact tokens. Beside them
DINO v1's files: img.png, attn-head{j}.png and, with --threshold, mask_th{t}_head{j}.png (and
masks); attn-mean.png, overlay-mean.png and attention.npy (heads, h, w), with
image.json (how the image was read: size, range, mean, std). One image goes straight
into DIR, several go into a folder each.
"""


def add(subparsers: Any) -> None:
    """Declare the subcommand."""
    parser = subparsers.add_parser(
        "heatmap", help="the CLS token's attention as pictures", description=DESCRIPTION
    )
    parser.add_argument("images", nargs="*", type=Path, metavar="IMAGE")
    add_sample(parser)
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="DIR")
    add_image_size(parser)
    plot_options.add_options(parser)
    add_options(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Draw every image; report those that cannot be and return 1 if there are any."""
    require_libraries()
    from tqdm import tqdm
    from tqdm.contrib.logging import logging_redirect_tqdm

    size, swallowed = image_size(args.image_size or [])
    images = [*args.images, *swallowed, *([sample()] if args.sample else [])]
    if not images:
        raise InvalidInputError("an image", "none", "Name one, or try --sample.")
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
    photograph = read(loaded.model, image, size, args)
    plot_options.write(loaded, photograph, str(image), folder, args)


def _folders(output: Path, images: Sequence[Path]) -> list[Path]:
    """Say where each image goes: one straight into ``output``, several by their stems."""
    if len(images) == 1:
        return [output]
    taken: dict[str, Path] = {}
    for image in images:
        # The stem of "...png" would lead out of ``output``.
        stem = image.stem if image.stem.strip(".") else "image"
        name, number = stem, 1
        # Some file systems take "Cat" and "cat" for one folder.
        while name.casefold() in taken:
            number += 1
            name = f"{stem}-{number}"
        taken[name.casefold()] = output / name
    return list(taken.values())
