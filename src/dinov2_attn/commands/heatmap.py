"""``dinov2-attn heatmap``: what the CLS token looks at, as pictures."""

from __future__ import annotations

import argparse
import importlib.util
import logging
from collections.abc import Sequence
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dinov2_attn.commands.loading import add_options, load_model
from dinov2_attn.commands.values import share
from dinov2_attn.errors import Dinov2AttnError, InvalidInput, Unavailable

if TYPE_CHECKING:
    from dinov2_attn.show.images import ImageSize

log = logging.getLogger(__name__)

DESCRIPTION = """\
Write the attention of the CLS token in the last block, head by head, under DINO v1's names:
img.png, attn-head{j}.png and, with --threshold, mask_th{t}_head{j}.png; attn-mean.png,
overlay-mean.png and attention.npy (heads, h, w) besides. One image goes straight into DIR,
several go into a folder each.
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
    parser.add_argument(
        "--image-size",
        nargs="+",
        metavar=("N", "W"),
        help="the short side, or height and width, named after the images; "
        "default: as it is, up to 518",
    )
    parser.add_argument(
        "--threshold", type=share, metavar="T", help="mark the patches with this share, in (0, 1]"
    )
    add_options(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Draw every image; report those that cannot be and return 1 if there are any."""
    _require_libraries()
    from tqdm import tqdm
    from tqdm.contrib.logging import logging_redirect_tqdm

    size, swallowed = _image_size(args.image_size or [])
    images = [*args.images, *swallowed, *([_sample()] if args.sample else [])]
    if not images:
        raise InvalidInput("an image", "none", "Name one, or try --sample.")
    model = load_model(args)
    failed = 0
    with logging_redirect_tqdm():
        jobs = zip(images, _folders(args.output, images), strict=True)
        for image, folder in tqdm(jobs, total=len(images), unit="image"):
            try:
                _draw(model, image, folder, size, args)
            except Dinov2AttnError as error:
                log.error("%s", error)
                failed += 1
    return 1 if failed else 0


def _draw(model: Any, image: Path, folder: Path, size: ImageSize, args: argparse.Namespace) -> None:
    from dinov2_attn.show.banner import NO_MEANING
    from dinov2_attn.show.heatmap import cls_maps, draw, write
    from dinov2_attn.show.images import read_photograph

    photograph = read_photograph(image, args.patch_size, size)
    maps = cls_maps(model, photograph, args.device)
    pictures = draw(photograph, maps, args.patch_size, args.threshold)
    write(folder, photograph, maps, pictures, NO_MEANING if args.random_weights else None)


def _require_libraries() -> None:
    for name in ("torchvision", "matplotlib", "PIL", "tqdm"):
        if importlib.util.find_spec(name) is None:
            raise Unavailable(
                "the libraries for pictures",
                f"no {name} in this environment",
                "Install them with `pip install 'dinov2-attn[viz]'`.",
            )


def _sample() -> Path:
    from matplotlib.cbook import get_sample_data

    return Path(get_sample_data("grace_hopper.jpg", asfileobj=False))


def _image_size(values: list[str]) -> tuple[ImageSize, list[Path]]:
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
