"""``dinov2-attn figure``: images by columns, at the size that they have in a paper."""

from __future__ import annotations

import argparse
from argparse import ArgumentTypeError
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dinov2_attn.apps.cli import early, plot_options
from dinov2_attn.apps.cli.argtypes import above_zero, check_register
from dinov2_attn.apps.cli.drawing import artifacts_in, text_of
from dinov2_attn.apps.cli.image_options import (
    add_example,
    add_image_size,
    check_reading,
    read,
    require_libraries,
    some_images,
)
from dinov2_attn.apps.cli.model_options import Loaded, add_options, load_model
from dinov2_attn.apps.cli.report import (
    RECORD,
    add_open,
    next_command,
    open_file,
    options_of,
    say,
    wrote,
)
from dinov2_attn.apps.viz.tokens import check_queries
from dinov2_attn.errors import (
    InvalidInputError,
    OutOfRangeError,
    UnwritableOutputError,
    in_one_line,
)
from dinov2_attn.math.token_names import Token, position_of, read_token
from dinov2_attn.typing import Layer

if TYPE_CHECKING:
    from dinov2_attn.apps.viz.figure import PaperFigure
    from dinov2_attn.apps.viz.images import ImageSize, LoadedImage
    from dinov2_attn.apps.viz.provenance import Facts
    from dinov2_attn.maps.attention_maps import AttentionMaps

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
        help="The file of the figure: .pdf, .svg or .png. The caption is FILE with .txt, and the "
        "record FILE with .run.json.",
    )
    add_open(parser, "the figure")
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
        token = read_token(text)
    except InvalidInputError as error:
        raise ArgumentTypeError(in_one_line(error)) from error
    check_register(text)
    return token


def run(args: argparse.Namespace) -> int:
    """Draw the figure of all images."""
    require_libraries()
    size, paths = some_images(args)
    _check(args, paths)
    loaded = load_model(args)
    check_reading(loaded, args)
    if isinstance(args.query, str):
        check_queries([args.query], loaded.registers)
    _check_heads(loaded, args.columns)
    figure, layer = _figure(loaded, paths, size, args)
    files = _write(figure, layer, loaded, paths, args)
    width, height = figure.figure.get_size_inches()
    shown = f"the figure, {width:.2f} × {height:.2f} inches; its caption is {files[1]}"
    say(args, wrote(args, args.output.parent, files, shown))
    page = Path(paths[0].with_suffix(".html").name)
    say(args, next_command(args, "explore", paths[0], "-o", page))
    if args.open:
        open_file(args.output)
    return 0


def _check(args: argparse.Namespace, paths: list[Path]) -> None:
    early.check_model(args)
    queries = [args.query] if isinstance(args.query, str) else []
    early.check_tokens(args, queries, [args.layer])
    early.check_file(args.output)
    for path in paths:
        early.check_image(path)


def _check_heads(loaded: Loaded, chosen: list[int | str]) -> None:
    heads = loaded.geometry.heads
    for column in chosen:
        if isinstance(column, int) and column >= heads:
            raise OutOfRangeError(
                f"--columns with heads from 0 to {heads - 1}",
                str(column),
                "Choose one of these, or mean.",
            )


def _figure(
    loaded: Loaded, paths: list[Path], size: ImageSize, args: argparse.Namespace
) -> tuple[PaperFigure, Layer]:
    """Return the figure, and the layer that it shows."""
    from dinov2_attn.apps.viz.figure import figure

    images = [read(loaded, path, size, args) for path in paths]
    maps = [_maps(loaded, image, args) for image in images]
    searched = args.outliers != "none"
    drawn = figure(
        maps,
        images,
        columns=args.columns,
        width=args.width,
        query=args.query,
        artifacts=[artifacts_in(loaded, image, args) if searched else None for image in images],
        style=plot_options.style_of(args),
        name=loaded.name,
        names=[path.name for path in paths],
        warning=loaded.warning,
    )
    return drawn, maps[0].layers[0]


def _maps(loaded: Loaded, image: LoadedImage, args: argparse.Namespace) -> AttentionMaps:
    from dinov2_attn.apps.viz.heatmap import maps_of

    position = position_of(args.query, 1 + loaded.registers, loaded.grid(image))
    return maps_of(loaded.model, image, [args.layer], [position], args.device)


def _write(
    figure: PaperFigure, layer: Layer, loaded: Loaded, paths: list[Path], args: argparse.Namespace
) -> list[str]:
    """Write the figure, its caption and its record, all or none; return their names."""
    from dinov2_attn._files import atomic_folder
    from dinov2_attn.apps.viz.provenance import origin_of, record_of, write_record

    origins = [origin_of(path) for path in paths]
    facts = {
        "image": [origin.name for origin in origins],
        "sha256": [origin.sha256 for origin in origins],
        "model": loaded.name,
        "layer": layer,
        "query": text_of(args.query),
    }
    record = record_of("figure", origins, loaded.name, options_of(args))
    folder, name = args.output.parent, f"{args.output.stem}.{RECORD}"
    others = _others(folder, name, record, args.output)
    with atomic_folder(folder) as unfinished:
        figure.save(unfinished / args.output.name, facts=facts)
        written = list(unfinished.iterdir())
        write_record(unfinished / name, record, [*written, *others])
    return [args.output.name, args.output.with_suffix(".txt").name, name]


def _others(folder: Path, name: str, record: Facts, output: Path) -> list[Path]:
    """Return the same figure in other formats, made by runs before.

    Raises:
        UnwritableOutputError: If one has other images, or other options: they would share a
            caption.

    """
    from dinov2_attn.apps.viz.provenance import files_of_older_run, read_record

    new = (output.name, output.with_suffix(".txt").name, name)
    others = files_of_older_run(folder, name, new)
    before = read_record(folder / name) or {}
    if others and any(before.get(key) != record[key] for key in ("images", "model", "options")):
        raise UnwritableOutputError(
            f"a name for a new figure: {output.stem} is that of another",
            ", ".join(others),
            "Name another file, or remove those.",
        )
    return [folder / other for other in others]
