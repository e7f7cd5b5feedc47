"""A photograph with one bright patch, for a model that attends to bright patches."""

from __future__ import annotations

import numpy as np

# Of the photograph that tests of the program look at.
GRID, BRIGHT = (4, 7), (1, 5)


def photograph_of(grid, bright, patch_size=14):
    """Return dark pixels for a grid (h, w) of patches with a white one at (row, column)."""
    cells = np.full((*grid, 3), 20, dtype=np.uint8)
    cells[bright] = 255
    return cells.repeat(patch_size, axis=0).repeat(patch_size, axis=1)
