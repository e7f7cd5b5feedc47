"""The attention of two models to one image as numbers: on one grid, in one unit."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from dinov2_attn.apps.viz.rows import AttentionRow, Drawable, Values, select_row
from dinov2_attn.errors import InvalidInputError
from dinov2_attn.maps.places import Head
from dinov2_attn.maps.resample import resample
from dinov2_attn.math.token_names import Token, position_of
from dinov2_attn.typing import Grid, Layer


@dataclass(frozen=True, eq=False)
class Pair:
    """The attention of the same token of the same image in two models.

    Attributes:
        rows: The rows of both models.
        layers: The layer of each.

    """

    rows: tuple[AttentionRow, AttentionRow]
    layers: tuple[Layer, Layer]

    @property
    def grid(self) -> Grid:
        """The grid of the difference: that with fewer patches."""
        return min((row.grid for row in self.rows), key=math.prod)

    @property
    def is_resampled(self) -> bool:
        """Whether the two grids differ."""
        return self.rows[0].grid != self.rows[1].grid

    @property
    def heads(self) -> tuple[Head, ...]:
        """The mean and the heads that both models have, if they have equally many."""
        first, second = (row.heads for row in self.rows)
        return ("mean", *first) if first == second and len(first) > 1 else ("mean",)

    def times(self, head: Head) -> tuple[Values, Values]:
        """Return both maps on their own grids, in multiples of uniform attention."""
        first, second = (
            row.times(layer, head) for row, layer in zip(self.rows, self.layers, strict=True)
        )
        return first, second

    def difference(self, head: Head) -> Values:
        """Return the second map minus the first one, in multiples of uniform attention.

        On another grid a patch has the mean, by area, of the patches that lie there.
        """
        first, second = (_mean_by_area(values, self.grid) for values in self.times(head))
        return second - first

    def moved(self, head: Head) -> float:
        """Return the share of attention that is elsewhere in the second model.

        It is half the sum of absolute differences: 0 if both are the same, 1 if they have no
        patch in common. CLS and the registers count as one place.
        """
        pairs = list(zip(self.rows, self.layers, strict=True))
        maps = [_resampled(row.map(layer, head), self.grid) for row, layer in pairs]
        rest = [row.prefix_mass(layer, head) for row, layer in pairs]
        return float(np.abs(maps[1] - maps[0]).sum() + abs(rest[1] - rest[0])) / 2


def pair_of(
    first: Drawable, second: Drawable, layer: Layer | None, query: Token, sample: int
) -> Pair:
    """Return the attention of one token in the maps of two models.

    Args:
        first: The maps of the first model.
        second: The maps of the second model.
        layer: The layer in both. ``None`` is the last of each.
        query: The token, as in ``plot``, in the grid of the first model.
        sample: Which image of both batches.

    Raises:
        InvalidInputError: If there is nothing to draw, or the grids cannot be of the same image.
        OutOfRangeError: If one of the models has no such layer, token or image.

    """
    row = select_row(first, query, sample)
    other = select_row(second, _same_token(query, row, second), sample)
    if not _of_one_shape(row.grid, other.grid):
        raise InvalidInputError(
            "two maps of the same image, with patch grids of the same shape",
            f"{_sides(row.grid)} and {_sides(other.grid)} patches",
            "Give both models the same crop of the image.",
        )
    return Pair((row, other), (row.layers[row.layer(layer)], other.layers[other.layer(layer)]))


def _same_token(query: Token, row: AttentionRow, other: Any) -> Token:
    """Return the token ``query`` of ``row`` as it is called in the ``other`` maps."""
    grid = getattr(other, "grid", None)
    if grid is None:
        return query  # what is wrong with these maps is raised where they are read
    position = position_of(query, row.prefix, row.grid)
    if row.patch is not None and position < row.prefix + math.prod(row.grid):
        return patch_at(row.patch, row.grid, grid)
    if position < row.prefix:
        return f"register:{position}" if position else "cls"
    behind: int = position - row.prefix - math.prod(row.grid)
    return int(other.prefix) + int(math.prod(grid)) + behind


def patch_at(patch: tuple[int, int], grid: Grid, other: Grid) -> tuple[int, int]:
    """Return the patch of the ``other`` grid in which the centre of ``patch`` of ``grid`` lies."""
    row, column = (
        int((2 * place + 1) * new // (2 * old))
        for place, old, new in zip(patch, grid, other, strict=True)
    )
    return row, column


def _of_one_shape(first: Grid, second: Grid) -> bool:
    """Return whether an image can have both grids: sides that differ by one factor, rounded."""
    least = max((b - 0.5) / a for a, b in zip(first, second, strict=True))
    most = min((b + 0.5) / a for a, b in zip(first, second, strict=True))
    return least < most


def _resampled(values: Values, grid: Grid) -> Values:
    """Return a map on another grid. Sums stay the same."""
    if values.shape == tuple(grid):
        return values
    found: Values = resample(torch.from_numpy(values.copy()), grid).numpy()
    return found


def _mean_by_area(values: Values, grid: Grid) -> Values:
    return _resampled(values, grid) * (math.prod(grid) / values.size)


def _sides(grid: Grid) -> str:
    return "{} × {}".format(*grid)
