"""The options for captioned pictures, and the pictures of one image that they ask for."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dinov2_attn.commands.loading import Loaded
from dinov2_attn.commands.values import share, token
from dinov2_attn.show.tokens import Token, file_name, position_of

if TYPE_CHECKING:
    from dinov2_attn.maps.artifacts import ArtifactTokens
    from dinov2_attn.maps.attention_maps import AttentionMaps
    from dinov2_attn.show.images import Photograph

Writer = Callable[[Path], None]


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add ``--query``, ``--outliers`` and the like to ``parser``."""
    group = parser.add_argument_group("captioned pictures")
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
        default="mark",
        help="artifact tokens: mark them (default), leave them out of the colours' limits, mask "
        "them in grey, or do not look for them",
    )
    group.add_argument("--log", action="store_true", help="logarithmic colours")
    group.add_argument(
        "--interpolation", choices=("nearest", "bilinear"), default="nearest", help="of patches"
    )
    group.add_argument(
        "--alpha", type=share, default=0.5, metavar="A", help="of the overlay; default: 0.5"
    )
    group.add_argument("--format", choices=("png", "svg"), default="png", help="default: png")


def check(args: argparse.Namespace, prefix: int) -> None:
    """Raise what no image can mend: no such register, nothing that writes an MP4."""
    for query in asked(args):
        if not isinstance(query, tuple):
            position_of(query, prefix, (1, 1))
    if args.animate:
        from dinov2_attn.show.saving import writer_of

        writer_of(args.animate)


def asked(args: argparse.Namespace) -> list[Token]:
    """Return the queries to draw, each once."""
    return list(dict.fromkeys(args.query or ["cls"]))


def layers_needed(args: argparse.Namespace) -> int | None:
    """Return the ``n`` of ``attention_maps``."""
    return None if args.layers or args.animate else 1


def files_of(
    loaded: Loaded,
    photograph: Photograph,
    maps: AttentionMaps,
    artifacts: ArtifactTokens | None,
    args: argparse.Namespace,
) -> dict[str, Writer]:
    """Return the names of the files that ``args`` ask for, with what writes each."""
    return {
        name: write
        for query in asked(args)
        for name, write in _of_query(query, loaded, photograph, maps, artifacts, args)
    }


def _of_query(
    query: Token,
    loaded: Loaded,
    photograph: Photograph,
    maps: AttentionMaps,
    artifacts: ArtifactTokens | None,
    args: argparse.Namespace,
) -> Iterator[tuple[str, Writer]]:
    from dinov2_attn import show
    from dinov2_attn.show.banner import NO_MEANING
    from dinov2_attn.show.saving import write_film

    # The bare names are CLS's, whatever else was asked in this or another run.
    suffix = "" if query == "cls" else f"-{file_name(query)}"
    style = show.Style(args.log, args.interpolation, args.outliers, args.alpha)
    warning = NO_MEANING if loaded.random else None
    about = {"query": query, "name": loaded.name, "warning": warning}
    whole = {**about, "artifacts": artifacts, "style": style}
    image = {"image": photograph.picture}

    def figure(stem: str, draw: Callable[..., Any], *given: Any, **options: Any) -> Any:
        return f"{stem}{suffix}.{args.format}", partial(_draw, draw, (maps, *given), options)

    yield figure("heads", show.plot_heads, **whole, **image)
    yield figure("overlay", _overlay, **whole, **image)
    if args.threshold is not None:
        yield figure("masks", show.plot_masks, args.threshold, **about, **image)
    if args.layers:
        yield figure("layers", show.plot_layers, **whole)
    if args.animate:
        options: dict[str, Any] = {**whole, **image}
        film = f"layers{suffix}.{args.animate}"
        yield film, lambda path: write_film(maps, path, **options)


def _draw(draw: Callable[..., Any], given: Any, options: dict[str, Any], path: Path) -> None:
    from dinov2_attn.show.saving import write_figure

    write_figure(draw(*given, **options), path)


def _overlay(maps: AttentionMaps, **options: Any) -> Any:
    from dinov2_attn import show

    return show.plot(maps, **options).figure
