"""The options of pictures, and what they mean for a model."""

from __future__ import annotations

import argparse
from argparse import ArgumentTypeError
from typing import TYPE_CHECKING

from dinov2_attn.apps.cli.argtypes import Options, add_layers, add_queries, numbers, share
from dinov2_attn.apps.cli.model_options import Loaded
from dinov2_attn.apps.viz.tokens import WORDS, check_queries, read_query
from dinov2_attn.errors import InvalidInputError
from dinov2_attn.math.token_names import Token
from dinov2_attn.typing import Layers

if TYPE_CHECKING:
    from dinov2_attn.apps.viz.style import Cmap, Style

# The value of --layers if it is not on the command line, where None means all.
NOT_GIVEN = ()


def add_options(parser: argparse.ArgumentParser, outliers: str = "mark") -> None:
    """Add the options of pictures to ``parser``; ``outliers`` is the default of ``--outliers``."""
    group = parser.add_argument_group("pictures")
    add_queries(group)
    add_layers(group, NOT_GIVEN, "the last, or all with --overview or --animate")
    group.add_argument(
        "--overview", action="store_true", help="Draw layers by heads as well, in one picture."
    )
    group.add_argument(
        "--animate",
        choices=("gif", "webp", "mp4"),
        help="Write a film over the layers as well. A webp has the most exact colours. An mp4 "
        "needs ffmpeg.",
    )
    group.add_argument(
        "--threshold",
        type=share,
        metavar="T",
        help="Draw the image as well with all dimmed but the fewest patches that hold this share "
        "of the attention, above 0 and up to 1.",
    )
    add_colours(group, outliers)
    group.add_argument(
        "--alpha",
        type=share,
        default=0.5,
        metavar="A",
        help="The opacity of the map over the image, above 0 and up to 1. Default: 0.5.",
    )
    group.add_argument(
        "--background",
        choices=("grey", "colour"),
        default="grey",
        help="How the image is drawn below a map. Default: grey.",
    )
    group.add_argument(
        "--format",
        choices=("png", "svg", "pdf"),
        default="png",
        help="The format of the figures. Default: png.",
    )


def add_colours(group: Options, outliers: str = "mark", chosen: str = "robust") -> None:
    """Add the options of colours to ``group``, with defaults of ``--outliers`` and ``--limits``."""
    group.add_argument(
        "--limits",
        type=limits,
        default=chosen,
        metavar="{robust,shared,each,LOW,HIGH}",
        help="Where the colours end. robust: at the highest patch, or below the few highest "
        "patches (0.5 %% of them, in small maps 2 %% but at most three for each map) if the "
        "highest is more than twice that end and they hold at most two thirds of the attention to "
        "patches. shared: at the highest patch of all maps. each: at the highest patch of each "
        "map. LOW,HIGH: from LOW to HIGH times uniform attention, such as 0,8. "
        f"Default: {chosen}.",
    )
    group.add_argument(
        "--cmap",
        choices=("viridis", "inferno", "magma", "plasma", "cividis", "gray"),
        help="The colour map. Default: viridis, or inferno for a film of a video.",
    )
    group.add_argument("--log", action="store_true", help="Use logarithmic colours.")
    group.add_argument(
        "--outliers",
        choices=("mark", "clip", "mask", "none"),
        default=outliers,
        help="How to treat artifact tokens. mark: frame them; robust and each limits leave them "
        "out. clip: frame them, and leave them out of shared limits too. mask: as clip, and cover "
        f"them in grey. none: do not search for them, so they count. Default: {outliers}.",
    )
    group.add_argument(
        "--interpolation",
        choices=("nearest", "bilinear"),
        default="nearest",
        help="How patches are enlarged to pixels. Default: nearest.",
    )


def limits(text: str) -> str | tuple[float, float]:
    """Read robust, shared, each or LOW,HIGH."""
    if text in ("robust", "shared", "each"):
        return text
    try:
        ends = numbers(text)
    except ArgumentTypeError:
        ends = []
    if len(ends) != 2 or not 0 <= ends[0] < ends[1]:
        raise ArgumentTypeError(
            "expected robust, shared, each, or LOW,HIGH with LOW from 0 on and below HIGH; "
            f"found {text!r}. Try 0,8."
        )
    return ends[0], ends[1]


def style_of(args: argparse.Namespace, cmap: Cmap = "viridis") -> Style:
    """Return the style that the options of ``add_colours`` describe, and those of overlays.

    ``cmap`` is the colour map if none is chosen.
    """
    from dinov2_attn.apps.viz.style import Style

    names = ("log", "interpolation", "outliers", "limits", "alpha", "background")
    given = {name: getattr(args, name) for name in names if hasattr(args, name)}
    return Style(**given, cmap=args.cmap or cmap)


def check(args: argparse.Namespace, loaded: Loaded) -> None:
    """Raise what is wrong for every image: no such register or layer, nothing to write an MP4."""
    from dinov2_attn.maps.layers import recorded_in

    check_queries(args.queries or (), loaded.registers)
    tokens_of(args, loaded)
    recorded_in(loaded.model, layers_of(args))
    if args.animate:
        from dinov2_attn.apps.viz.films import writer_of

        writer_of(args.animate)


def layers_of(args: argparse.Namespace) -> Layers:
    """Return the layers to draw: the last one, or all for a picture or film of all."""
    if args.layers != NOT_GIVEN:
        chosen: Layers = args.layers
        return chosen
    return None if args.overview or args.animate else 1


def tokens_of(args: argparse.Namespace, loaded: Loaded) -> list[Token]:
    """Return the tokens to draw, each once."""
    tokens: list[Token] = []
    for text in args.queries or ["cls"]:
        query = read_query(text)
        if query == "registers":
            tokens += [f"register:{number}" for number in range(1, 1 + loaded.registers)]
        elif isinstance(query, slice) or query in WORDS:
            raise InvalidInputError(
                "tokens that have pictures of their own",
                f"--queries {text}, which stands for many",
                "Name the tokens one by one, or see every token with `dinov2-attn explore`.",
            )
        else:
            tokens.append(query)
    return list(dict.fromkeys(tokens))
