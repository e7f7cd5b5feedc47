"""How large the cells of a picture are, and where they go."""

from __future__ import annotations

import math

from dinov2_attn.apps.viz.mosaic import Cells
from dinov2_attn.apps.viz.sheet import Sheet
from dinov2_attn.apps.viz.text import POINTS_PER_INCH

SMALL = 7.0  # points, of the titles of cells
TITLE = 0.2  # inches above a cell for its title
GAP = 0.1  # inches between cells
LARGEST = 14.0  # inches of a mosaic's longer side


def single_sheet(grid: tuple[int, int]) -> Sheet:
    """Return a sheet for one map."""
    return Sheet(Cells(grid), _side(grid, 6.0, 1, 1))


def grid_sheet(
    grid: tuple[int, int], count: int, *, full: bool = False
) -> tuple[Sheet, list[tuple[int, int]]]:
    """Return a sheet of about 4 by 3 for ``count`` titled cells, and the places of the cells.

    With ``full`` every row has as many cells as the others.
    """
    height, width = grid

    def badness(columns: int) -> float:
        rows = math.ceil(count / columns)
        empty = rows * columns - count
        return abs(math.log(columns * width / (rows * height) * 3 / 4)) + empty / count

    possible = [n for n in range(1, count + 1) if not (full and count % n)]
    columns = min(possible, key=badness)
    rows = math.ceil(count / columns)
    patch = _side(grid, 2.4, rows, columns)
    title = 14 * 0.6 * SMALL / POINTS_PER_INCH  # head 12 · 43.1 %
    aside = max(width * patch, title) - width * patch + GAP
    cells = Cells(grid, rows, columns, (TITLE / patch, aside / patch))
    places = [divmod(i, columns) for i in range(count)]
    return Sheet(cells, patch, top=TITLE), places


def table_sheet(grid: tuple[int, int], rows: int, columns: int) -> Sheet:
    """Return a sheet with labelled rows and columns."""
    height, width = grid
    patch = max(_side(grid, 1.6, rows, columns), 0.35 / max(grid))
    least = 0.45  # room for "head 12" above a cell, and for two lines at its left
    gaps = tuple(
        (max(side * patch, least) - side * patch + 0.05) / patch for side in (height, width)
    )
    cells = Cells(grid, rows, columns, (gaps[0], gaps[1]))
    return Sheet(cells, patch, left=0.7, top=TITLE)


def line_width(patch: float) -> float:
    """Return the width in points of a frame around a patch of so many inches."""
    return min(1.5, max(0.4, 0.12 * patch * POINTS_PER_INCH))


def _side(grid: tuple[int, int], target: float, rows: int, columns: int) -> float:
    """Return the side of a patch in inches, for cells of about ``target`` inches."""
    height, width = grid
    longest = LARGEST / max(rows * height, columns * width)
    return min(target / math.sqrt(height * width), longest, 1.0)
