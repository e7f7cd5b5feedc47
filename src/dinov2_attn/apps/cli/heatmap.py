"""``dinov2-attn heatmap``: the attention of tokens, as pictures."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dinov2_attn.apps.cli import early, filming, plot_options, relevance_options, two_models
from dinov2_attn.apps.cli.argtypes import add_output
from dinov2_attn.apps.cli.comparing import REFUSED, write_comparison
from dinov2_attn.apps.cli.drawing import Drawn, Subject, write
from dinov2_attn.apps.cli.image_options import (
    add_example,
    add_image_size,
    check_reading,
    read,
    require_libraries,
    some_images,
)
from dinov2_attn.apps.cli.model_options import Loaded, add_options
from dinov2_attn.apps.cli.report import (
    add_open,
    next_command,
    open_file,
    removed,
    say,
    wrote,
)
from dinov2_attn.errors import Dinov2AttnError

if TYPE_CHECKING:
    from dinov2_attn.apps.viz.images import ImageSize

log = logging.getLogger(__name__)

DESCRIPTION = """\
Draw the attention of the CLS token in the last block, or of other tokens and layers. heads shows
the image, the mean and every head on one scale. overlay shows the mean on top of the image. Their
captions name the model, layer, head and query, the share of CLS and registers, and artifact
tokens. DINO v1's files are written as well: img.png, attn-head{j}.png and, with --threshold,
mask_th{t}_head{j}.png. attention.npy holds the maps (heads, h, w). With --target, relevance shows
which patches made a class or a similarity, and relevance.npy holds that map (h, w). Names without a
token are of CLS. Files of another token end in its name, such as attention-3-17.npy. image.json
records how the image was read (size, range, mean, std), and run.json the image, model, options and
files of the run. The next run into the same folder removes these files. One image goes directly
into DIR. Several images go into a folder each. Two models (--weights A --weights B) are drawn side
by side in compare, on one scale, with the difference B - A. compare-heads has a row for each head.
Of a video (clip.mp4), or a folder of frames, film.mp4 shows the attention in every frame. film.txt
is its caption.
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
    parser.add_argument(
        "images",
        nargs="*",
        type=Path,
        metavar="IMAGE",
        help="An image to draw, or a video or a folder of frames, of which a film is made.",
    )
    add_example(parser)
    add_output(parser, "DIR", "The folder for the pictures.")
    add_open(parser, "the picture of all heads")
    add_image_size(parser)
    plot_options.add_options(parser)
    relevance_options.add_options(parser.add_argument_group("explanation"))
    filming.add_options(parser)
    add_options(parser)
    two_models.allow(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Draw every image; report those that fail, and return 1 if there are any."""
    require_libraries()
    size, images = some_images(args)
    filming.check(images, args)
    two_models.refuse(args, REFUSED)
    relevance_options.check(args)
    two_models.check_models(args, args.queries or (), args.layers)
    early.check_folder(args.output)
    jobs = list(zip(images, _folders(args.output, images), strict=True))
    readable = [job for job in jobs if _is_readable(job[0])]
    if not readable:
        return 1
    loaded = two_models.load_models(args)
    for model in loaded:
        plot_options.check(args, model)
        relevance_options.check(args, model)
        filming.check_head(args, model)
        check_reading(model, args)
    draw = partial(write_comparison, loaded) if len(loaded) > 1 else partial(_draw, loaded[0])
    drawn = _draw_all(draw, readable, size, args)
    if drawn:
        _end(args, *drawn[0])
    return 1 if len(drawn) < len(jobs) else 0


def _is_readable(image: Path) -> bool:
    try:
        if filming.is_film(image):
            early.check_input(image)
        else:
            early.check_image(image)
    except Dinov2AttnError as error:
        log.error("%s", error)
        return False
    return True


# Draws an image of some size into a folder.
Draw = Callable[[Path, Path, "ImageSize", argparse.Namespace], Drawn]


def _draw_all(
    draw: Draw, jobs: Sequence[tuple[Path, Path]], size: ImageSize, args: argparse.Namespace
) -> list[tuple[Path, Drawn]]:
    """Draw images into folders; return those that did not fail."""
    from tqdm import tqdm
    from tqdm.contrib.logging import logging_redirect_tqdm

    drawn: list[tuple[Path, Drawn]] = []
    hidden = True if args.quiet or len(jobs) == 1 else None  # None: unless this is a terminal
    with (
        logging_redirect_tqdm(),
        tqdm(total=len(jobs), unit="image", disable=hidden) as bar,
    ):
        for i, (image, folder) in enumerate(jobs):
            try:
                drawn.append((image, draw(image, folder, size, args)))
            except Dinov2AttnError as error:
                log.error("%s", error)
            else:
                with bar.external_write_mode():
                    say(args, _said(args, image, drawn[-1][1]))
            if failed := i + 1 - len(drawn):
                bar.set_postfix_str(f"{failed} failed", refresh=False)
            bar.update()
    return drawn


def _draw(
    loaded: Loaded, image: Path, folder: Path, size: ImageSize, args: argparse.Namespace
) -> Drawn:
    from dinov2_attn.apps.viz.provenance import origin_of

    if filming.is_film(image):
        return filming.write_film(loaded, image, folder, size, args)
    subject = Subject(read(loaded, image, size, args), origin_of(image))
    return write(loaded, subject, folder, args)


def _said(args: argparse.Namespace, image: Path, drawn: Drawn) -> str:
    lines = [
        f"{image}: {drawn.said}",
        wrote(args, drawn.folder, drawn.files, _what(args, drawn.files[0])),
    ]
    if drawn.removed:
        lines.append(removed(args, drawn.folder, drawn.removed))
    return "\n".join(lines)


def _what(args: argparse.Namespace, first: str) -> str:
    """Return what the ``first`` file shows."""
    if first.startswith("film"):
        return "the attention in each frame"
    if two_models.are_two(args):
        return "A, B and B − A, mean of heads"
    return "every head on one scale" if args.target is None else "which patches made the target"


def _end(args: argparse.Namespace, image: Path, drawn: Drawn) -> None:
    if not filming.is_film(image):
        page = Path(image.with_suffix(".html").name)
        say(args, next_command(args, "explore", image, "-o", page))
    if args.open:
        open_file(drawn.folder / drawn.files[0])


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
