"""``dinov2-attn explore``: the attention of every token of one image, on an interactive page."""

from __future__ import annotations

import argparse
import logging
from argparse import ArgumentTypeError
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dinov2_attn.apps.cli import early, relevance_options, two_models
from dinov2_attn.apps.cli.argtypes import HEADS, above_zero, add_layers
from dinov2_attn.apps.cli.image_options import (
    add_example,
    add_image_size,
    check_reading,
    given_images,
    read,
    read_on_grid,
    require_libraries,
)
from dinov2_attn.apps.cli.model_options import Loaded, add_options
from dinov2_attn.apps.cli.report import (
    RECORD,
    add_open,
    next_command,
    open_file,
    options_of,
    say,
    wrote,
)
from dinov2_attn.errors import InvalidInputError

if TYPE_CHECKING:
    from dinov2_attn.apps.explorer.write import ExplorerPage
    from dinov2_attn.apps.viz.images import ImageSize

log = logging.getLogger(__name__)

DESCRIPTION = """\
Write one HTML page that works offline and needs no other file. Point at a patch to see its
attention, or the attention that it receives, in every layer and head. Queries and keys are
stored where they are smaller than weights, and the page states the error. The page and the log
say what had to be left out to stay below --max-mb. With two models (--weights A --weights B) the
page shows both on one scale, with the difference B - A. With --target the page also shows which
patches made a class or a similarity.
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
    parser.add_argument(
        "images", nargs="*", type=Path, metavar="IMAGE", help="The image to show: one."
    )
    add_example(parser)
    parser.add_argument(
        "-o",
        "--output",
        type=output,
        required=True,
        metavar="PAGE.html",
        help="The file of the page. Its record is PAGE.html.run.json.",
    )
    add_open(parser, "the page")
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
    relevance_options.add_options(parser.add_argument_group("explanation"))
    add_options(parser)
    two_models.allow(parser)
    parser.set_defaults(run=run)


def output(text: str) -> Path:
    """Read the path of an HTML page."""
    path = Path(text)
    if path.suffix.lower() not in (".html", ".htm"):
        raise ArgumentTypeError(
            f"expected a name that ends in .html; found {text!r}. Try page.html."
        )
    return path


def run(args: argparse.Namespace) -> int:
    """Write the page of the one image."""
    require_libraries()
    size, images = given_images(args)
    image = _only(images)
    _check(args, image)
    loaded = two_models.load_models(args)
    for model in loaded:
        relevance_options.check(args, model)
        check_reading(model, args)
    page = _page(loaded, image, size, args)
    record = f"{args.output.name}.{RECORD}"
    _write(page, loaded, image, record, args)
    if page.left_out:
        log.warning("%s", page.left_out)
    say(args, f"{image}: {_named(loaded)}; {page.size / 1e6:.1f} MB; keeps {page.kept}")
    files = [args.output.name, record]
    say(args, wrote(args, args.output.parent, files, "point at a patch to see its attention"))
    after = _after(args)
    say(args, next_command(args, after, image, "-o", args.output.with_suffix(AFTER[after])))
    if args.open:
        open_file(args.output)
    return 0


def _check(args: argparse.Namespace, image: Path) -> None:
    two_models.refuse(args, ("target", "method"))
    relevance_options.check(args)
    two_models.check_models(args, (), args.layers)
    early.check_file(args.output)
    early.check_image(image)


def _page(
    loaded: Sequence[Loaded], image: Path, size: ImageSize, args: argparse.Namespace
) -> ExplorerPage:
    from dinov2_attn.apps.explorer.explore import explore

    first, seen = loaded[0], read(loaded[0], image, size, args)
    beside: dict[str, Any] = {}
    for second in loaded[1:]:
        on_grid = read_on_grid(second, first, image, size, args)
        beside = {"other": second.model, "other_image": on_grid, "other_name": second.name}
    if args.target is not None:
        beside["target"] = relevance_options.relevance_of(first, seen, [0], args)
    return explore(
        first.model,
        seen,
        None,
        args.layers,
        heads="mean" if args.heads == "mean" else None,
        title=image.name,
        name=first.name,
        warning=two_models.warning_of(loaded),
        max_mb=args.max_mb,
        **beside,
    )


# The command that comes next, and what its output ends in.
AFTER = {"figure": ".pdf", "heatmap": ""}


def _after(args: argparse.Namespace) -> str:
    return "heatmap" if two_models.are_two(args) else "figure"


def _named(loaded: Sequence[Loaded]) -> str:
    return two_models.named(loaded) if len(loaded) > 1 else loaded[0].name


def _write(
    page: ExplorerPage, loaded: Sequence[Loaded], image: Path, record: str, args: argparse.Namespace
) -> None:
    """Write the page and its record, both or none."""
    from dinov2_attn._files import atomic_folder
    from dinov2_attn.apps.viz.provenance import origin_of, read_record, record_of, write_record

    facts = record_of("explore", [origin_of(image)], _named(loaded), options_of(args))
    folder = args.output.parent
    read_record(folder / record)  # raises if it is another file
    with atomic_folder(folder) as unfinished:
        page.save(unfinished / args.output.name)
        write_record(unfinished / record, facts, [unfinished / args.output.name])


def _only(images: list[Path]) -> Path:
    if len(images) != 1:
        raise InvalidInputError(
            "one image",
            ", ".join(map(str, images)) or "none",
            "Name one, or use --example. A page shows one image.",
        )
    return images[0]
