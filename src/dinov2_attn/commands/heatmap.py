"""``dinov2-attn heatmap``: what the CLS token looks at, as pictures."""

from __future__ import annotations

import argparse
import logging
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dinov2_attn.commands import pictures
from dinov2_attn.commands.loading import Loaded, add_options, load_model
from dinov2_attn.commands.photographs import (
    add_image_size,
    image_size,
    require_libraries,
    sample,
)
from dinov2_attn.commands.values import share
from dinov2_attn.errors import Dinov2AttnError, InvalidInput, SuspiciousArtifacts
from dinov2_attn.show.tokens import position_of

if TYPE_CHECKING:
    from dinov2_attn.maps.artifacts import ArtifactTokens
    from dinov2_attn.show.images import ImageSize, Photograph

log = logging.getLogger(__name__)

DESCRIPTION = """\
Write the attention of the CLS token in the last block as pictures. heads: the photograph, the
mean and every head on one scale; overlay: the mean over the photograph; both with a caption that
names model, layer, head, query, the share of CLS and registers, and artifact tokens. Beside them
DINO v1's files: img.png, attn-head{j}.png and, with --threshold, mask_th{t}_head{j}.png (and
masks); attn-mean.png, overlay-mean.png and attention.npy (heads, h, w). One image goes straight
into DIR, several go into a folder each.
"""


def add(subparsers: Any) -> None:
    """Declare the subcommand."""
    parser = subparsers.add_parser(
        "heatmap", help="the CLS token's attention as pictures", description=DESCRIPTION
    )
    parser.add_argument("images", nargs="*", type=Path, metavar="IMAGE")
    parser.add_argument(
        "--sample", action="store_true", help="the photograph that matplotlib ships"
    )
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="DIR")
    add_image_size(parser)
    parser.add_argument(
        "--threshold", type=share, metavar="T", help="mark the patches with this share, in (0, 1]"
    )
    pictures.add_options(parser)
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
        raise InvalidInput("an image", "none", "Name one, or try --sample.")
    loaded = load_model(args)
    pictures.check(args, _prefix(loaded))
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
    from dinov2_attn.show.banner import NO_MEANING
    from dinov2_attn.show.heatmap import draw, last_cls_maps, maps_of, write
    from dinov2_attn.show.images import read_photograph

    patch_size = loaded.model.patch_size
    photograph = read_photograph(image, patch_size, size)
    height, width = (side // patch_size for side in photograph.picture.shape[:2])
    prefix = _prefix(loaded)
    queries = [position_of(query, prefix, (height, width)) for query in pictures.asked(args)]
    # CLS first, for DINO v1's files.
    rows = list(dict.fromkeys([0, *queries]))
    n = pictures.layers_needed(args)
    maps = maps_of(loaded.model, photograph, n, rows, args.device)
    artifacts = None if args.outliers == "none" else _artifacts(loaded, photograph, image, args)
    last = last_cls_maps(maps)
    write(
        folder,
        photograph,
        last,
        draw(photograph, last, patch_size, args.threshold),
        NO_MEANING if loaded.random else None,
        pictures.files_of(loaded, photograph, maps, artifacts, args),
    )


def _artifacts(
    loaded: Loaded, photograph: Photograph, image: Path, args: argparse.Namespace
) -> ArtifactTokens:
    from dinov2_attn.maps.artifacts import artifact_tokens
    from dinov2_attn.show.heatmap import run

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SuspiciousArtifacts)  # the log says it
        found: ArtifactTokens = run(
            lambda images: artifact_tokens(loaded.model, images), photograph, args.device
        )
    if found.mask.any():
        log.info("%s: %s", image, found.describe()[0])
    return found


def _prefix(loaded: Loaded) -> int:
    from dinov2_attn.upstream.anatomy import count_registers

    return 1 + count_registers(loaded.model)


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
