"""The pictures of one image, as the options of pictures ask for them."""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dinov2_attn.apps.cli.model_options import Loaded
from dinov2_attn.apps.cli.plot_options import layers_of, style_of, tokens_of
from dinov2_attn.apps.cli.relevance_options import relevance_of
from dinov2_attn.apps.cli.report import options_of
from dinov2_attn.apps.viz.tokens import file_name
from dinov2_attn.errors import SuspiciousArtifactsWarning
from dinov2_attn.math.token_names import Token, position_of

if TYPE_CHECKING:
    from dinov2_attn.apps.viz.colours import Grid, Mask
    from dinov2_attn.apps.viz.heatmap import Writer
    from dinov2_attn.apps.viz.images import LoadedImage
    from dinov2_attn.apps.viz.provenance import Origin
    from dinov2_attn.maps.artifacts import ArtifactTokens
    from dinov2_attn.maps.attention_maps import AttentionMaps


@dataclass(frozen=True, eq=False)
class Subject:
    """An image with what is known of it.

    Attributes:
        image: The image, as the model takes it.
        origin: Its name and digest.
        outline: A mask (H, W) of what the reader should see, whose border is drawn, or ``None``.
        more: Other files for its folder: a function for each name.

    """

    image: LoadedImage
    origin: Origin
    outline: Mask | None = None
    more: Mapping[str, Writer] | None = None


@dataclass(frozen=True, eq=False)
class Drawn:
    """What was written of one image.

    Attributes:
        folder: The folder.
        files: The names of all files in it that this run wrote, the one to open first.
        removed: The names of files of the run before that this run removed.
        said: What was drawn, in a line.
        cls: The attention of CLS to each patch in the last of the layers, (heads, h, w).

    """

    folder: Path
    files: list[str]
    removed: list[str]
    said: str
    cls: Grid


def write(loaded: Loaded, subject: Subject, folder: Path, args: argparse.Namespace) -> Drawn:
    """Write every picture of an image into ``folder``, all of them or none.

    Files there of the run before are removed.

    Args:
        loaded: The model.
        subject: The image.
        folder: The folder for the pictures.
        args: The options of ``plot_options.add_options``.

    Raises:
        OutOfRangeError: If the image has no such patch.
        UnwritableOutputError: If the folder cannot be written, or a file of the run before has
            changed since.

    """
    from dinov2_attn.apps.viz import heatmap
    from dinov2_attn.apps.viz.provenance import RECORD, files_of_older_run, record_of

    image = subject.image
    grid = loaded.grid(image)
    tokens = tokens_of(args, loaded)
    positions = [position_of(token, 1 + loaded.registers, grid) for token in tokens]
    rows = list(dict.fromkeys([0, *positions]))
    maps = heatmap.maps_of(loaded.model, image, layers_of(args), rows, args.device)
    artifacts = artifacts_in(loaded, image, args) if args.outliers != "none" else None
    files: dict[str, Writer] = {}
    if getattr(args, "target", None) is not None:
        files.update(_of_target(tokens, positions, loaded, subject, args))
    for token, position in zip(tokens, positions, strict=True):
        files.update(_of_token(token, rows.index(position), loaded, subject, maps, artifacts, args))
    files.update(heatmap.image_files(image))
    files.update(subject.more or {})
    record = record_of(args.command, [subject.origin], loaded.name, options_of(args))
    removed = files_of_older_run(folder, RECORD, [*files, RECORD])
    heatmap.write(folder, files, removed, record)
    said = _said(loaded, maps, tokens, grid, artifacts)
    return Drawn(folder, [*files, RECORD], removed, said, heatmap.last_maps(maps))


def artifacts_in(loaded: Loaded, image: LoadedImage, args: argparse.Namespace) -> ArtifactTokens:
    """Return the artifact tokens of an image."""
    from dinov2_attn.apps.viz.heatmap import run
    from dinov2_attn.maps.find_artifacts import artifact_tokens

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SuspiciousArtifactsWarning)  # captions report it
        found: ArtifactTokens = run(
            lambda images: artifact_tokens(loaded.model, images), image, args.device
        )
    return found


def facts_of(origin: Origin, loaded: Loaded, layer: Any, token: Token) -> dict[str, Any]:
    """Return what the metadata of a picture say."""
    facts = {**origin.facts(), "model": loaded.name, "layer": layer, "query": text_of(token)}
    return {**facts, "warning": loaded.warning} if loaded.warning else facts


def text_of(token: Token) -> str:
    """Return a token as the command line takes it."""
    if isinstance(token, tuple):
        return "{},{}".format(*token)
    return f"#{token}" if isinstance(token, int) else token


def _said(
    loaded: Loaded,
    maps: AttentionMaps,
    tokens: list[Token],
    grid: tuple[int, int],
    artifacts: ArtifactTokens | None,
) -> str:
    parts = [
        loaded.name,
        _layers(maps),
        " ".join(map(text_of, tokens)),
        f"{grid[0]} × {grid[1]} patches",
    ]
    if artifacts is not None and artifacts.mask.any():
        parts.append(artifacts.describe()[0])
    return "; ".join(parts)


def _layers(maps: AttentionMaps) -> str:
    first, last = maps.layers[0], maps.layers[-1]
    if len(maps.layers) == 1:
        return f"layer {first}"
    if isinstance(first, int) and maps.layers == tuple(range(first, first + len(maps.layers))):
        return f"layers {first}–{last}"
    return f"layers {', '.join(map(str, maps.layers))}"


def _of_token(
    token: Token,
    row: int,
    loaded: Loaded,
    subject: Subject,
    maps: AttentionMaps,
    artifacts: ArtifactTokens | None,
    args: argparse.Namespace,
) -> Iterator[tuple[str, Writer]]:
    """Yield names and writers of every file of one token."""
    from dinov2_attn.apps.viz import heatmap
    from dinov2_attn.apps.viz.pictures import plot, plot_heads, plot_layers, plot_masks
    from dinov2_attn.apps.viz.saving import write_film

    # The plain names belong to CLS, whatever other tokens this run draws.
    suffix = "" if token == "cls" else f"-{file_name(token)}"
    image = subject.image
    last, layers = maps.layers[-1], list(maps.layers)
    about = {"query": token, "name": loaded.name, "warning": loaded.warning}
    whole = {**about, "artifacts": artifacts, "style": style_of(args)}
    picture = {"image": image.picture, "outline": subject.outline}

    def figure(
        stem: str, draw: Callable[..., Any], *given: Any, layer: Any = last, **options: Any
    ) -> tuple[str, Writer]:
        facts = facts_of(subject.origin, loaded, layer, token)
        return f"{stem}{suffix}.{args.format}", partial(_draw, draw, (maps, *given), options, facts)

    yield figure("heads", plot_heads, **whole, **picture)
    yield figure("overlay", plot, **whole, **picture)
    if args.threshold is not None:
        masked = {"image": image.picture}
        yield figure("masks", plot_masks, args.threshold, **about, **masked)
    if args.overview:
        yield figure("layers", plot_layers, layer=layers, **whole)
    if args.animate:
        options: dict[str, Any] = {**whole, **picture}
        yield f"layers{suffix}.{args.animate}", lambda path: write_film(maps, path, **options)
    grid = heatmap.last_maps(maps, row)
    pictures = heatmap.draw(image, grid, loaded.patch, args.threshold)
    facts = facts_of(subject.origin, loaded, last, token)
    yield from heatmap.map_files(
        grid, pictures, suffix=suffix, warning=loaded.warning, facts=facts
    ).items()


def _of_target(
    tokens: list[Token],
    positions: list[int],
    loaded: Loaded,
    subject: Subject,
    args: argparse.Namespace,
) -> Iterator[tuple[str, Writer]]:
    """Yield names and writers of the relevance of each token for the target."""
    from dinov2_attn.apps.viz.flows import map_of
    from dinov2_attn.apps.viz.pictures import plot

    found = relevance_of(loaded, subject.image, list(dict.fromkeys(positions)), args)
    if found.queries is None:  # one row for all tokens
        tokens = ["cls"]
    for token in tokens:
        suffix = "" if token == "cls" else f"-{file_name(token)}"
        options = {
            "query": token,
            "image": subject.image.picture,
            "outline": subject.outline,
            "style": style_of(args),
            "name": loaded.name,
            "warning": loaded.warning,
        }
        facts = facts_of(subject.origin, loaded, "all", token)
        facts = {**facts, "target": found.target[0], "method": found.method}
        yield f"relevance{suffix}.{args.format}", partial(_draw, plot, (found,), options, facts)
        values = map_of(found, token).values.astype("float32")
        yield f"relevance{suffix}.npy", partial(_save, values)


def _save(values: Grid, path: Path) -> None:
    import numpy as np

    np.save(path, values)


def _draw(
    draw: Callable[..., Any],
    given: Any,
    options: dict[str, Any],
    facts: dict[str, Any],
    path: Path,
) -> None:
    from dinov2_attn.apps.viz.saving import write_figure

    drawn = draw(*given, **options)
    write_figure(getattr(drawn, "figure", drawn), path, facts=facts)
