"""The options for pictures, and the pictures of one photograph that they ask for."""

from __future__ import annotations

import argparse
import logging
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dinov2_attn.apps.cli.argtypes import share, token
from dinov2_attn.apps.cli.model_options import Loaded
from dinov2_attn.apps.viz.tokens import Token, file_name, position_of
from dinov2_attn.errors import SuspiciousArtifactsWarning

if TYPE_CHECKING:
    from dinov2_attn.apps.viz.colours import Grid
    from dinov2_attn.apps.viz.images import LoadedImage
    from dinov2_attn.maps.artifacts import ArtifactTokens
    from dinov2_attn.maps.attention_maps import AttentionMaps

log = logging.getLogger(__name__)

Writer = Callable[[Path], None]


def add_options(parser: argparse.ArgumentParser, outliers: str = "mark") -> None:
    """Add ``--query``, ``--outliers`` and the like to ``parser``; ``outliers`` is its default."""
    group = parser.add_argument_group("pictures")
    group.add_argument(
        "--threshold", type=share, metavar="T", help="mark the patches with this share, in (0, 1]"
    )
    group.add_argument(
        "--query",
        action="append",
        type=token,
        metavar="TOKEN",
        help="whose attention: cls (default), register:K or ROW,COL of a patch; may be repeated",
    )
    group.add_argument(
        "--layers", action="store_true", help="layers by heads as well, in one overview"
    )
    group.add_argument(
        "--animate", choices=("gif", "mp4"), help="a film over the layers as well (mp4: ffmpeg)"
    )
    group.add_argument(
        "--outliers",
        choices=("mark", "clip", "mask", "none"),
        default=outliers,
        help="artifact tokens: mark them, leave them out of the colours' limits, mask them in "
        f"grey, or do not look for them; default: {outliers}",
    )
    group.add_argument("--log", action="store_true", help="logarithmic colours")
    group.add_argument(
        "--interpolation", choices=("nearest", "bilinear"), default="nearest", help="of patches"
    )
    group.add_argument(
        "--alpha", type=share, default=0.5, metavar="A", help="of the overlay; default: 0.5"
    )
    group.add_argument("--format", choices=("png", "svg"), default="png", help="default: png")


def check(args: argparse.Namespace, loaded: Loaded) -> None:
    """Raise what no image can mend: no such register, nothing that writes an MP4."""
    for query in _asked(args):
        if not isinstance(query, tuple):
            position_of(query, _prefix(loaded), (1, 1))
    if args.animate:
        from dinov2_attn.apps.viz.saving import writer_of

        writer_of(args.animate)


def write(
    loaded: Loaded, photograph: LoadedImage, called: str, folder: Path, args: argparse.Namespace
) -> Grid:
    """Write every picture of ``photograph`` into ``folder``, all of them or none.

    ``called`` is its name in the log. Returns what CLS gives to each patch in the last block,
    float32 (heads, h, w).
    """
    from dinov2_attn.apps.viz import heatmap

    patch_size = loaded.model.patch_size
    height, width = (side // patch_size for side in photograph.picture.shape[:2])
    queries = [position_of(query, _prefix(loaded), (height, width)) for query in _asked(args)]
    # CLS first, for DINO v1's files.
    rows = list(dict.fromkeys([0, *queries]))
    n = None if args.layers or args.animate else 1
    maps = heatmap.maps_of(loaded.model, photograph, n, rows, args.device)
    artifacts = None if args.outliers == "none" else _artifacts(loaded, photograph, called, args)
    last = heatmap.last_cls_maps(maps)
    heatmap.write(
        folder,
        photograph,
        last,
        heatmap.draw(photograph, last, patch_size, args.threshold),
        loaded.warning,
        {
            name: write
            for query in _asked(args)
            for name, write in _of_query(query, loaded, photograph, maps, artifacts, args)
        },
    )
    return last


def _asked(args: argparse.Namespace) -> list[Token]:
    """Return the queries to draw, each once."""
    return list(dict.fromkeys(args.query or ["cls"]))


def _artifacts(
    loaded: Loaded, photograph: LoadedImage, called: str, args: argparse.Namespace
) -> ArtifactTokens:
    from dinov2_attn.apps.viz.heatmap import run
    from dinov2_attn.maps.artifacts import artifact_tokens

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SuspiciousArtifactsWarning)  # the log says it
        found: ArtifactTokens = run(
            lambda images: artifact_tokens(loaded.model, images), photograph, args.device
        )
    if found.mask.any():
        log.info("%s: %s", called, found.describe()[0])
    return found


def _prefix(loaded: Loaded) -> int:
    from dinov2_attn.backbone.backbone import Backbone

    return Backbone(loaded.model).prefix


def _of_query(
    query: Token,
    loaded: Loaded,
    photograph: LoadedImage,
    maps: AttentionMaps,
    artifacts: ArtifactTokens | None,
    args: argparse.Namespace,
) -> Iterator[tuple[str, Writer]]:
    from dinov2_attn.apps import viz
    from dinov2_attn.apps.viz.saving import write_film

    # The bare names are CLS's, whatever else was asked in this or another run.
    suffix = "" if query == "cls" else f"-{file_name(query)}"
    style = viz.Style(args.log, args.interpolation, args.outliers, args.alpha)
    about = {"query": query, "name": loaded.name, "warning": loaded.warning}
    whole = {**about, "artifacts": artifacts, "style": style}
    image = {"image": photograph.picture}

    def figure(stem: str, draw: Callable[..., Any], *given: Any, **options: Any) -> Any:
        return f"{stem}{suffix}.{args.format}", partial(_draw, draw, (maps, *given), options)

    yield figure("heads", viz.plot_heads, **whole, **image)
    yield figure("overlay", _overlay, **whole, **image)
    if args.threshold is not None:
        yield figure("masks", viz.plot_masks, args.threshold, **about, **image)
    if args.layers:
        yield figure("layers", viz.plot_layers, **whole)
    if args.animate:
        options: dict[str, Any] = {**whole, **image}
        film = f"layers{suffix}.{args.animate}"
        yield film, lambda path: write_film(maps, path, **options)


def _draw(draw: Callable[..., Any], given: Any, options: dict[str, Any], path: Path) -> None:
    from dinov2_attn.apps.viz.saving import write_figure

    write_figure(draw(*given, **options), path)


def _overlay(maps: AttentionMaps, **options: Any) -> Any:
    from dinov2_attn.apps import viz

    return viz.plot(maps, **options).figure
