"""``write_page``: attention maps that are at hand, as an interactive page."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from dinov2_attn.apps.explorer.assemble import Tables, assemble, what_is_missing
from dinov2_attn.apps.explorer.budget import NOTHING, Keep, Shape, describe, left_out, plan
from dinov2_attn.apps.explorer.content import Frame, Outliers, bytes_in
from dinov2_attn.apps.explorer.quantise import Table, quantise
from dinov2_attn.apps.viz.folders import together
from dinov2_attn.errors import InvalidInputError, OutOfRangeError
from dinov2_attn.maps.attention_maps import AttentionMaps


@dataclass(frozen=True)
class Written:
    """A page that was written: its size in bytes, what it keeps, and what it had to leave out."""

    size: int
    kept: str
    left_out: str


def write_page(
    path: str | Path,
    picture: npt.NDArray[np.uint8],
    maps: AttentionMaps,
    *,
    title: str = "Attention",
    model: str = "",
    warning: str | None = None,
    outliers: Outliers | None = None,
    sample: int = 0,
    max_mb: float = 25.0,
) -> Written:
    """Write the interactive page of one image of ``maps`` to ``path``, whole or not at all.

    >>> maps = attention_maps(model, photograph.tensor[None])
    >>> write_page("page.html", photograph.picture, maps, title="cat.jpg")

    ========  ==================================================================
    picture   uint8 ``(H, W, 3)``: the image, cropped to whole patches
    maps      weights ``(B, heads, Q, N)``, or ``(B, Q, N)`` for the mean of heads
    title     any text; it is escaped
    model     what the caption calls the model
    warning   a line that stands out, such as ``banner.NO_MEANING`` for random weights
    outliers  the ``ArtifactTokens`` of the same images, to be marked
    sample    which image of the batch
    max_mb    the greatest size of the page, in 1,000,000 bytes; ``plan`` says what is kept
    ========  ==================================================================

    Raises ``InvalidInputError`` for maps or a picture that cannot be shown, or a size that cannot
    be kept, ``OutOfRangeError`` for a sample that is not there, and ``UnwritableOutputError``.
    """
    if isinstance(maps, list | tuple):
        raise InvalidInputError(
            "the maps of one batch",
            f"a {type(maps).__name__} of {len(maps)}",
            "A list of batches gives a list of maps: pass one of them, such as maps[0].",
        )
    entries = {
        layer: _entry(weights, sample)
        for layer, weights in zip(maps.layers, maps.weights, strict=True)
    }
    shape = _shape(maps, entries)
    frame = Frame(picture, shape, title, model, warning, outliers, sample, bytes_in(max_mb))
    kept = keep(frame, list(entries))
    tables = {
        layer: quantise_layer(weights, shape.queries, kept[layer])
        for layer, weights in entries.items()
        if kept[layer] != NOTHING
    }
    return write(Path(path), frame, kept, tables)


def keep(frame: Frame, layers: list[int]) -> dict[int, Keep]:
    """Decide what is kept of each of the ``layers`` so that the page stays below its limit."""
    bare = len(assemble(frame, {}, {}))
    # What is said of the layers, at the most.
    said = 1000 + 500 * len(layers)
    return plan(layers, frame.shape, frame.limit - bare - said)


def quantise_layer(weights: Tensor, queries: tuple[int, ...], keep: Keep) -> dict[str, Table]:
    """Quantise what is kept of one layer, ``(heads, Q, N)``, or ``(Q, N)`` for the mean of heads.

    ``queries`` are the tokens whose rows are at hand.
    """
    wide = torch.promote_types(weights.dtype, torch.float32)
    tables = {}
    if keep.mean:
        mean = weights[None] if weights.ndim == 2 else weights.mean(0, keepdim=True, dtype=wide)
        tables["mean"] = quantise(_rows(mean, queries, keep.mean), keep.mean)
    if keep.each:
        tables["each"] = quantise(_rows(weights, queries, keep.each), keep.each)
    return tables


def write(
    path: Path, frame: Frame, kept: Mapping[int, Keep], tables: Mapping[int, Tables]
) -> Written:
    """Write the page whole or not at all; say what is in it. Raises ``UnwritableOutputError``."""
    content = assemble(frame, kept, tables)
    with together(path.parent) as unfinished:
        (unfinished / path.name).write_bytes(content)
    lacking = left_out(dict(kept), frame.shape)
    missing = what_is_missing(frame, kept, lacking) if lacking else ""
    return Written(len(content), describe(dict(kept), frame.shape), missing)


def _rows(weights: Tensor, queries: tuple[int, ...], chosen: tuple[int, ...]) -> Tensor:
    if queries == chosen:
        return weights
    return weights[:, [queries.index(query) for query in chosen]]


def _entry(weights: Any, sample: int) -> Tensor:
    if getattr(weights, "ndim", 0) not in (3, 4):
        raise InvalidInputError(
            "weights (B, heads, Q, N) or (B, Q, N) for each layer",
            f"{type(weights).__name__}",
            "Pass the maps of one batch, as attention_maps or record return them.",
        )
    if not -len(weights) <= sample < len(weights):
        raise OutOfRangeError(
            f"a sample between 0 and {len(weights) - 1}", str(sample), "One page shows one image."
        )
    return torch.as_tensor(weights)[sample]


def _shape(maps: AttentionMaps, entries: Mapping[int, Tensor]) -> Shape:
    maps.patch_maps()  # raises unless the columns are the prefix and the grid
    shapes = {tuple(weights.shape) for weights in entries.values()}
    if len(shapes) != 1 or 0 in next(iter(shapes)):
        raise InvalidInputError(
            "weights of one shape in every layer, with at least one row",
            ", ".join(map(str, shapes)) or "no layer",
            "Ask all layers for the same queries and heads.",
        )
    (shape,) = shapes
    queries = maps.queries or tuple(range(shape[-2]))
    heads = shape[0] if len(shape) == 3 else 0
    return Shape(heads, tuple(queries), maps.prefix, maps.grid)  # type: ignore[arg-type]  # patch_maps checks
