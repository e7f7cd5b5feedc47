"""The options of pictures, and the pictures of one image that they ask for."""

from __future__ import annotations

import argparse
import logging
import warnings
from argparse import ArgumentTypeError
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dinov2_attn.apps.cli.argtypes import Options, add_layers, add_queries, numbers, share
from dinov2_attn.apps.cli.model_options import Loaded
from dinov2_attn.apps.viz.tokens import (
    WORDS,
    Token,
    check_queries,
    file_name,
    position_of,
    read_query,
)
from dinov2_attn.errors import InvalidInputError, SuspiciousArtifactsWarning
from dinov2_attn.typing import Layers

if TYPE_CHECKING:
    from dinov2_attn.apps.viz.colours import Grid
    from dinov2_attn.apps.viz.images import LoadedImage
    from dinov2_attn.apps.viz.style import Style
    from dinov2_attn.maps.artifacts import ArtifactTokens
    from dinov2_attn.maps.attention_maps import AttentionMaps

log = logging.getLogger(__name__)

Writer = Callable[[Path], None]

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
        help="Where the colours end. robust: at the highest patch, or at the 99.5th percentile if "
        "the highest is far above it. shared: at the highest patch of all maps. each: at the "
        "highest patch of each map. LOW,HIGH: from LOW to HIGH times uniform attention, such as "
        f"0,8. Default: {chosen}.",
    )
    group.add_argument(
        "--cmap",
        choices=("viridis", "inferno", "magma", "plasma", "cividis", "gray"),
        default="viridis",
        help="The colour map. Default: viridis.",
    )
    group.add_argument("--log", action="store_true", help="Use logarithmic colours.")
    group.add_argument(
        "--outliers",
        choices=("mark", "clip", "mask", "none"),
        default=outliers,
        help="How to treat artifact tokens. mark: frame them. clip: frame them, and exclude them "
        "from all limits of the colours. mask: cover them in grey as well. none: do not search for "
        f"them. Default: {outliers}.",
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


def style_of(args: argparse.Namespace) -> Style:
    """Return the style that the options of ``add_colours`` describe, and those of overlays."""
    from dinov2_attn.apps.viz.style import Style

    names = ("log", "interpolation", "outliers", "limits", "cmap", "alpha", "background")
    return Style(**{name: getattr(args, name) for name in names if hasattr(args, name)})


def check(args: argparse.Namespace, loaded: Loaded) -> None:
    """Raise what is wrong for every image: no such register or layer, nothing to write an MP4."""
    from dinov2_attn.backbone.backbone import Backbone

    check_queries(args.queries or (), prefix_of(loaded) - 1)
    _tokens(args, loaded)
    Backbone(loaded.model).layers(_layers(args))
    if args.animate:
        from dinov2_attn.apps.viz.films import writer_of

        writer_of(args.animate)


def write(
    loaded: Loaded, image: LoadedImage, called: str, folder: Path, args: argparse.Namespace
) -> Grid:
    """Write every picture of ``image`` into ``folder``, all of them or none.

    Args:
        loaded: The model.
        image: The image, as the model takes it.
        called: The name of the image in the log.
        folder: The folder for the pictures.
        args: The options of ``add_options``.

    Returns:
        The attention of CLS to each patch in the last of the layers, float32 (heads, h, w).

    Raises:
        OutOfRangeError: If the image has no such patch.
        UnwritableOutputError: If the folder cannot be written.

    """
    from dinov2_attn.apps.viz import heatmap

    patch_size = loaded.model.patch_size
    height, width = (side // patch_size for side in image.picture.shape[:2])
    tokens = _tokens(args, loaded)
    positions = [position_of(token, prefix_of(loaded), (height, width)) for token in tokens]
    # CLS comes first, for DINO v1's files.
    rows = list(dict.fromkeys([0, *positions]))
    maps = heatmap.maps_of(loaded.model, image, _layers(args), rows, args.device)
    artifacts = (
        None if args.outliers == "none" else artifacts_in(loaded, image, called, args.device)
    )
    last = heatmap.last_cls_maps(maps)
    heatmap.write(
        folder,
        image,
        last,
        heatmap.draw(image, last, patch_size, args.threshold),
        loaded.warning,
        {
            name: write
            for token in tokens
            for name, write in _of_token(token, loaded, image, maps, artifacts, args)
        },
    )
    return last


def _layers(args: argparse.Namespace) -> Layers:
    if args.layers != NOT_GIVEN:
        chosen: Layers = args.layers
        return chosen
    return None if args.overview or args.animate else 1


def _tokens(args: argparse.Namespace, loaded: Loaded) -> list[Token]:
    """Return the tokens to draw, each once."""
    tokens: list[Token] = []
    for text in args.queries or ["cls"]:
        query = read_query(text)
        if query == "registers":
            tokens += [f"register:{number}" for number in range(1, prefix_of(loaded))]
        elif isinstance(query, slice) or query in WORDS:
            raise InvalidInputError(
                "tokens that have pictures of their own",
                f"--queries {text}, which stands for many",
                "Name the tokens one by one, or see every token with `dinov2-attn explore`.",
            )
        else:
            tokens.append(query)
    return list(dict.fromkeys(tokens))


def artifacts_in(loaded: Loaded, image: LoadedImage, called: str, device: str) -> ArtifactTokens:
    """Return the artifact tokens of an image, and report them in the log."""
    from dinov2_attn.apps.viz.heatmap import run
    from dinov2_attn.maps.find_artifacts import artifact_tokens

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SuspiciousArtifactsWarning)  # the log reports it
        found: ArtifactTokens = run(
            lambda images: artifact_tokens(loaded.model, images), image, device
        )
    if found.mask.any():
        log.info("%s: %s", called, found.describe()[0])
    return found


def prefix_of(loaded: Loaded) -> int:
    """Return the number of tokens before the patches."""
    from dinov2_attn.backbone.backbone import Backbone

    return Backbone(loaded.model).prefix


def _of_token(
    token: Token,
    loaded: Loaded,
    image: LoadedImage,
    maps: AttentionMaps,
    artifacts: ArtifactTokens | None,
    args: argparse.Namespace,
) -> Iterator[tuple[str, Writer]]:
    from dinov2_attn.apps.viz.pictures import plot_heads, plot_layers, plot_masks
    from dinov2_attn.apps.viz.saving import write_film

    # The plain names belong to CLS, whatever other tokens this or another run draws.
    suffix = "" if token == "cls" else f"-{file_name(token)}"
    style = style_of(args)
    about = {"query": token, "name": loaded.name, "warning": loaded.warning}
    whole = {**about, "artifacts": artifacts, "style": style}
    picture = {"image": image.picture}

    def figure(stem: str, draw: Callable[..., Any], *given: Any, **options: Any) -> Any:
        return f"{stem}{suffix}.{args.format}", partial(_draw, draw, (maps, *given), options)

    yield figure("heads", plot_heads, **whole, **picture)
    yield figure("overlay", _overlay, **whole, **picture)
    if args.threshold is not None:
        yield figure("masks", plot_masks, args.threshold, **about, **picture)
    if args.overview:
        yield figure("layers", plot_layers, **whole)
    if args.animate:
        options: dict[str, Any] = {**whole, **picture}
        film = f"layers{suffix}.{args.animate}"
        yield film, lambda path: write_film(maps, path, **options)


def _draw(draw: Callable[..., Any], given: Any, options: dict[str, Any], path: Path) -> None:
    from dinov2_attn.apps.viz.saving import write_figure

    write_figure(draw(*given, **options), path)


def _overlay(maps: AttentionMaps, **options: Any) -> Any:
    from dinov2_attn.apps.viz.pictures import plot

    return plot(maps, **options).figure
