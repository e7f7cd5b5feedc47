"""Statistics of attention from their definitions, in NumPy and float64.

It shares no code with the package: matrices are whole, and every patch has its place in a list.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from tests.support.tolerances import assert_close, assert_same_bits

ALL = ("entropy", "distance", "received", "prefix_mass", "spread", "centroid")
Place = tuple[int, int] | None


def softmax(scores: np.ndarray) -> np.ndarray:
    """Return the weights of scores ``(…, N)``. A row that is masked completely is zero."""
    highest = scores.max(-1, keepdims=True)
    powers = np.exp(scores - np.where(np.isfinite(highest), highest, 0))
    total = powers.sum(-1, keepdims=True)
    return np.where(total > 0, powers / np.where(total > 0, total, 1), 0)


def places_of(
    prefix: int, grid: tuple[int, int], suffix: int = 0, per_cell: int = 1, planes: bool = False
) -> list[Place]:
    """Return row and column of each token, None for those that are no patches."""
    cells = [(row, column) for row in range(grid[0]) for column in range(grid[1])]
    patches = cells * per_cell if planes else [cell for cell in cells for _ in range(per_cell)]
    return [*[None] * prefix, *patches, *[None] * suffix]


def statistics(weights: Any, places: list[Place]) -> dict[str, np.ndarray]:
    """Return all statistics of ``weights (…, Q, N)``, for queries that are the keys."""
    weights = np.asarray(torch.as_tensor(weights).double())
    is_patch = np.array([place is not None for place in places])
    spots = np.array([place or (np.nan, np.nan) for place in places], dtype=float)
    on_patches = np.where(is_patch, weights, 0)
    spots_or_zero = np.nan_to_num(spots)
    with np.errstate(all="ignore"):
        logs = np.where(weights > 0, np.log(np.where(weights > 0, weights, 1)), 0)
        mass = on_patches.sum(-1)
        gaps = np.sqrt(((spots[:, None] - spots_or_zero) ** 2).sum(-1))[: weights.shape[-2]]
        centroid = on_patches @ spots_or_zero / mass[..., None]
        from_centre = ((spots_or_zero - centroid[..., None, :]) ** 2).sum(-1)
        return {
            "entropy": -(weights * logs).sum(-1),
            "distance": (on_patches * gaps).sum(-1) / mass,
            "received": weights.mean(-2),
            "prefix_mass": np.where(is_patch, 0, weights).sum(-1),
            "spread": np.sqrt((on_patches * from_centre).sum(-1) / mass),
            "centroid": centroid,
        }


def assert_statistics(ours: Any, theirs: Any, **how: Any) -> None:
    """Raise AssertionError unless both are close, and NaN in the same places."""
    __tracebackhide__ = True
    for name, own in ours.items():
        left, right = torch.as_tensor(own), torch.as_tensor(theirs[name])
        assert_same_bits(left.isnan(), right.isnan(), f"{name}: where it is NaN")
        assert_close(left.nan_to_num(), right.nan_to_num(), name, **how)
