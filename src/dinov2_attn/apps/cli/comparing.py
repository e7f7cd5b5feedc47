"""What ``dinov2-attn heatmap`` draws of two models."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dinov2_attn.apps.cli.drawing import Drawn, artifacts_in, text_of
from dinov2_attn.apps.cli.image_options import read, read_on_grid
from dinov2_attn.apps.cli.model_options import Loaded
from dinov2_attn.apps.cli.plot_options import layers_of, style_of, tokens_of
from dinov2_attn.apps.cli.report import options_of
from dinov2_attn.apps.cli.two_models import LETTERS, named, warning_of
from dinov2_attn.apps.viz.tokens import file_name
from dinov2_attn.math.token_names import Token, position_of

if TYPE_CHECKING:
    from dinov2_attn.apps.viz.difference import Pair
    from dinov2_attn.apps.viz.heatmap import Writer
    from dinov2_attn.apps.viz.images import ImageSize, LoadedImage
    from dinov2_attn.maps.artifacts import ArtifactTokens
    from dinov2_attn.maps.attention_maps import AttentionMaps
    from dinov2_attn.maps.places import Head

REFUSED = ("overview", "animate", "threshold", "target")


def write_comparison(
    loaded: Sequence[Loaded], image: Path, folder: Path, size: ImageSize, args: argparse.Namespace
) -> Drawn:
    """Write the pictures of two models and their difference into ``folder``, all or none.

    Raises:
        OutOfRangeError: If one of the models or the image has no such token.
        UnwritableOutputError: If the folder cannot be written, or a file of the run before has
            changed since.

    """
    from dinov2_attn.apps.viz import heatmap
    from dinov2_attn.apps.viz.provenance import RECORD, files_of_older_run, origin_of, record_of

    images = read_both(loaded, image, size, args)
    tokens = tokens_of(args, loaded[0])
    prefix = loaded[0].geometry.prefix
    both = [_maps(m, one, prefix, tokens, args) for m, one in zip(loaded, images, strict=True)]
    found = _artifacts(loaded, images, args)
    origin = origin_of(image)
    facts = {**origin.facts(), "model": named(loaded)}
    files: dict[str, Writer] = {}
    for token in tokens:
        files.update(_of_token(token, loaded, images, both, found, args, facts))
    files.update(heatmap.image_files(images[0]))
    record = record_of(args.command, [origin], named(loaded), options_of(args))
    removed = files_of_older_run(folder, RECORD, [*files, RECORD])
    heatmap.write(folder, files, removed, record)
    said = "; ".join([named(loaded), f"{_sides(both[0].grid)} patches"])
    return Drawn(folder, [*files, RECORD], removed, said, heatmap.last_maps(both[0]))


def read_both(
    loaded: Sequence[Loaded], image: Path, size: ImageSize, args: argparse.Namespace
) -> list[LoadedImage]:
    """Return an image for two models: the same crop, with the same number of patches."""
    first = read(loaded[0], image, size, args)
    return [first, read_on_grid(loaded[1], loaded[0], image, size, args)]


def _maps(
    model: Loaded,
    image: LoadedImage,
    prefix: int,
    tokens: Sequence[Token],
    args: argparse.Namespace,
) -> AttentionMaps:
    """Return the maps of ``tokens``, positions with the ``prefix`` of the first model."""
    from dinov2_attn.apps.viz.heatmap import maps_of

    own, grid = model.geometry.prefix, model.grid(image)
    rows = [
        position_of(
            token + own - prefix if isinstance(token, int) and token >= prefix else token, own, grid
        )
        for token in tokens
    ]
    return maps_of(model.model, image, layers_of(args), list(dict.fromkeys(rows)), args.device)


def _artifacts(
    loaded: Sequence[Loaded], images: Sequence[LoadedImage], args: argparse.Namespace
) -> tuple[ArtifactTokens | None, ArtifactTokens | None]:
    if args.outliers == "none":
        return None, None
    first, second = (
        artifacts_in(model, image, args) for model, image in zip(loaded, images, strict=True)
    )
    return first, second


def _of_token(
    token: Token,
    loaded: Sequence[Loaded],
    images: Sequence[LoadedImage],
    both: Sequence[AttentionMaps],
    found: tuple[ArtifactTokens | None, ArtifactTokens | None],
    args: argparse.Namespace,
    facts: dict[str, Any],
) -> Iterator[tuple[str, Writer]]:
    """Yield names and writers of every file of one token."""
    from dinov2_attn.apps.viz.compare import compare
    from dinov2_attn.apps.viz.difference import pair_of
    from dinov2_attn.apps.viz.saving import write_figure

    suffix = "" if token == "cls" else f"-{file_name(token)}"
    pair = pair_of(both[0], both[1], None, token, 0)
    options: dict[str, Any] = {
        "query": token,
        "artifacts": found,
        "style": style_of(args),
        "names": tuple(_named(model, image) for model, image in zip(loaded, images, strict=True)),
        "warning": warning_of(loaded),
    }
    import numpy as np

    about = {**facts, "layer": list(pair.layers), "query": text_of(token)}

    def draw(path: Path, **more: Any) -> None:
        write_figure(compare(both[0], both[1], **options, **more), path, facts=about)

    yield f"compare{suffix}.{args.format}", partial(draw, image=images[0].picture)
    if len(pair.heads) > 1:
        yield f"compare-heads{suffix}.{args.format}", partial(draw, head=None)
    numbers = {**about, **_numbers(pair, loaded)}
    yield f"compare{suffix}.json", partial(_write_json, numbers)
    for letter, maps, row in zip("ab", both, pair.rows, strict=True):
        weights = np.stack([row.map(maps.layers[-1], head) for head in row.heads])
        name = f"attention-{letter}{suffix}.npy"
        yield name, partial(_write_array, weights.astype(np.float32))


def _named(model: Loaded, image: LoadedImage) -> str:
    height, width = image.picture.shape[:2]
    return f"{model.name}, image of {height} × {width} pixels"


def _numbers(pair: Pair, loaded: Sequence[Loaded]) -> dict[str, Any]:
    """Return what ``compare.json`` says of both models and of their difference."""
    models = {
        letter: {"model": model.name, "layer": layer, "grid": row.grid, "tokens": row.tokens}
        for letter, model, layer, row in zip(LETTERS, loaded, pair.layers, pair.rows, strict=True)
    }
    return {**models, "B - A": {str(head): _of_head(pair, head) for head in pair.heads}}


def _of_head(pair: Pair, head: Head) -> dict[str, Any]:
    values = pair.difference(head)
    least, most = int(values.argmin()), int(values.argmax())
    return {
        "elsewhere": pair.moved(head),
        "most above A": {"patch": divmod(most, values.shape[1]), "times": float(values.max())},
        "most below A": {"patch": divmod(least, values.shape[1]), "times": float(values.min())},
    }


def _write_json(numbers: dict[str, Any], path: Path) -> None:
    path.write_text(json.dumps(numbers, indent=1) + "\n", encoding="ascii")


def _write_array(values: Any, path: Path) -> None:
    import numpy as np

    np.save(path, values)


def _sides(grid: Any) -> str:
    return "{} × {}".format(*grid)
