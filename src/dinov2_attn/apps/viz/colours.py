"""Convert numbers on the patch grid to pixels: ranges, thresholds, colours, blends."""

from __future__ import annotations

from typing import TypeVar

import matplotlib
import numpy as np
import numpy.typing as npt

Grid = npt.NDArray[np.float32]
Mask = npt.NDArray[np.bool_]
Pixels = npt.NDArray[np.uint8]
Cell = TypeVar("Cell", bound=np.generic)


def viridis(grid: Grid) -> Pixels:
    """Colour a grid ``(h, w)`` from its minimum to its maximum: uint8 ``(h, w, 3)``.

    A constant grid gets the lowest colour. NaN is black.
    """
    finite = grid[np.isfinite(grid)]
    low, high = (finite.min(), finite.max()) if finite.size else (0.0, 1.0)
    scaled = (grid - low) / ((high - low) or 1.0)
    colours: Pixels = matplotlib.colormaps["viridis"](scaled, bytes=True)
    return colours[..., :3]


def top_mass_mask(grid: Grid | npt.NDArray[np.float64], share: float) -> Mask:
    """Mark the fewest cells that together hold a ``share`` of the mass, ``(h, w)``.

    As in DINO v1, cells are sorted in ascending order, and marked once their cumulated mass
    exceeds ``1 - share`` of the total. Nothing is marked if the mass is zero or contains NaN.
    """
    order = grid.ravel().argsort()
    cumulated = grid.ravel()[order].cumsum(dtype=np.float64)
    marked = np.empty(grid.size, dtype=np.bool_)
    marked[order] = cumulated > (1 - share) * cumulated[-1]
    return marked.reshape(grid.shape)


def upsample(cells: npt.NDArray[Cell], patch_size: int) -> npt.NDArray[Cell]:
    """Repeat each cell over its patch: ``(h, w, …)`` to ``(h·patch_size, w·patch_size, …)``."""
    return cells.repeat(patch_size, axis=0).repeat(patch_size, axis=1)


def blend(below: Pixels, above: Pixels) -> Pixels:
    """Blend two pictures half and half."""
    return (below / 2 + above / 2).astype(np.uint8)
