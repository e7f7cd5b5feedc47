"""The options of an extraction, checked before the first image is read."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from dinov2_attn.apps.extraction.storages import check_format
from dinov2_attn.apps.viz.images import LARGEST_SHORT_SIDE, ImageSize
from dinov2_attn.apps.viz.reading import IMAGENET, Numbers, Reading, reading_for
from dinov2_attn.apps.viz.tokens import as_texts, check_queries, count
from dinov2_attn.errors import InvalidInputError
from dinov2_attn.maps.facets import check_facets
from dinov2_attn.maps.geometry import geometry_of
from dinov2_attn.maps.measuring import check_statistics
from dinov2_attn.math.attention import check_heads
from dinov2_attn.math.selection import layers_to_take, whole_number
from dinov2_attn.typing import Facet, Grid, Heads, Layers, Model, Statistic

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}

# The default sizes: the weights of a batch and of a shard take about so many bytes.
BATCH_BYTES, MOST_IN_A_BATCH = 2**29, 16
SHARD_BYTES, MOST_IN_A_SHARD = 2**27, 1024


@dataclass(frozen=True)
class Options:
    """What ``extract`` stores of each image, and how it runs, with every default filled in.

    ``queries`` are texts of the grammar in ``dinov2_attn.apps.viz.tokens``, since a patch has
    another position in images of other sizes.
    """

    layers: tuple[int, ...]
    queries: tuple[str, ...]
    heads: Heads
    dtype: str
    grid: Grid | None
    artifacts: bool
    image_size: ImageSize
    max_pixels: int | None
    batch_size: int
    shard_size: int
    reading: Reading = IMAGENET
    facets: tuple[Facet, ...] = ()
    statistics: tuple[Statistic, ...] = ()
    format: str = "safetensors"


def check_options(
    model: Model,
    *,
    layers: Layers,
    queries: Any,
    heads: Heads,
    dtype: str,
    grid: Sequence[int] | None,
    image_size: ImageSize,
    max_pixels: int | None,
    batch_size: int | None,
    shard_size: int | None,
    range: object = None,
    mean: Numbers = None,
    std: Numbers = None,
    facets: Sequence[Facet] | Facet = (),
    statistics: Sequence[Statistic] | Statistic = (),
    format: str = "safetensors",
    **others: Any,
) -> Options:
    """Return the options for ``model``; raise ``InvalidInputError`` if one is wrong."""
    check_heads(heads)
    if dtype not in DTYPES:
        raise InvalidInputError(f"a dtype of {', '.join(DTYPES)}", repr(dtype), "Name one.")
    geometry = geometry_of(model)
    taken = layers_to_take(layers, geometry.depth)
    if not taken:
        raise InvalidInputError(
            "at least one layer", f"layers={layers!r}", "Leave it out for the last."
        )
    texts = as_texts(queries)
    check_queries(texts, geometry.registers)
    options = Options(
        layers=tuple(taken),
        queries=texts,
        heads=heads,
        dtype=dtype,
        grid=None if grid is None else _sides("grid", grid),
        image_size=_image_size(image_size),
        max_pixels=None if max_pixels is None else at_least(1, max_pixels, "max_pixels"),
        batch_size=1,
        shard_size=1,
        reading=reading_for(geometry.channels, range, mean, std),
        facets=check_facets(facets),
        statistics=check_statistics(statistics),
        format=check_format(format, dtype),
        **others,
    )
    weights, stored = _bytes_of_one(model, options)
    return replace(
        options,
        batch_size=_count("batch_size", batch_size, BATCH_BYTES // weights, MOST_IN_A_BATCH),
        shard_size=_count("shard_size", shard_size, SHARD_BYTES // stored, MOST_IN_A_SHARD),
    )


def rows_of(model: Model, options: Options, grid: Grid) -> int:
    """Return how many rows of weights an image of ``grid`` has, in all layers and heads."""
    geometry = geometry_of(model)
    rows = count(options.queries, geometry.prefix, grid)
    heads = 1 if options.heads == "mean" else geometry.heads
    return len(options.layers) * heads * rows


def stored_bytes(model: Model, options: Options, grid: Grid) -> int:
    """Return the bytes that an image of ``grid`` takes in a shard."""
    geometry, cells = geometry_of(model), math.prod(options.grid or grid)
    numbers = rows_of(model, options, grid) * (geometry.prefix + cells)
    numbers += len(options.layers) * len(options.facets) * geometry.width * cells
    measured = sum(2 if name == "centroid" else 1 for name in options.statistics)
    heads = 1 if options.heads == "mean" else geometry.heads
    of_statistics = 4 * measured * len(options.layers) * heads * (geometry.prefix + cells)
    return numbers * torch.finfo(DTYPES[options.dtype]).bits // 8 + of_statistics


def images_together(model: Model, options: Options, sides: Grid) -> int:
    """Return how many images of ``sides`` (height, width) in pixels run together.

    Their weights take no more memory than those of ``batch_size`` images of the usual size.
    """
    usual, own = (
        _weight_bytes(model, options, _usual(options)),
        _weight_bytes(model, options, sides),
    )
    return max(1, options.batch_size * min(usual, own) // own)


def _bytes_of_one(model: Model, options: Options) -> tuple[int, int]:
    """Return the bytes of the weights of an image of the usual size, and the bytes stored of it."""
    sides = _usual(options)
    stored = stored_bytes(model, options, geometry_of(model).grid(*sides))
    return _weight_bytes(model, options, sides), max(1, stored)


def _usual(options: Options) -> Grid:
    """Return the sides in pixels of a square image, as large as it gets."""
    size = options.image_size or LARGEST_SHORT_SIDE
    return (size, size) if isinstance(size, int) else size


def _weight_bytes(model: Model, options: Options, sides: Grid) -> int:
    geometry = geometry_of(model)
    grid = geometry.grid(*sides)
    weights = 4 * rows_of(model, options, grid) * (geometry.prefix + math.prod(grid))
    # With sides shorter than a patch there may be no rows. The callers divide by it.
    return max(1, weights)


def _image_size(size: ImageSize) -> ImageSize:
    if isinstance(size, Iterable):
        return _sides("image_size", size)
    return None if size is None else at_least(1, size, "image_size")


def _sides(name: str, sides: Iterable[int]) -> Grid:
    several = sides if isinstance(sides, Iterable) else [sides]
    lengths = tuple(whole_number(length, f"the sides of {name}") for length in several)
    if len(lengths) != 2 or min(lengths) < 1:
        raise InvalidInputError(
            f"{name} as (height, width), 1 at least", repr(sides), "Try (16, 16)."
        )
    return lengths


def _count(name: str, given: int | None, fitting: int, most: int) -> int:
    return max(1, min(fitting, most)) if given is None else at_least(1, given, name)


def at_least(least: int, number: int, name: str) -> int:
    """Return ``number`` as an int; raise ``InvalidInputError`` if it is below ``least``."""
    found = whole_number(number, name)
    if found < least:
        raise InvalidInputError(f"{name} of at least {least}", str(found), "Leave it out.")
    return found
