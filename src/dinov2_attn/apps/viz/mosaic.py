"""Patch grids side by side on one Axes, in units of patches."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.colors import Normalize
from matplotlib.patheffects import withStroke

from dinov2_attn.apps.viz.colours import Mask
from dinov2_attn.apps.viz.rows import Values
from dinov2_attn.apps.viz.style import Style, colour_map
from dinov2_attn.apps.viz.text import FONT

RED = (0.9, 0.05, 0.05)


@dataclass(frozen=True)
class Cells:
    """The places of the cells of a mosaic.

    The patch (row, column) of the first cell is centred at x = column, y = row.

    Attributes:
        grid: The patch grid ``(h, w)`` of a cell.
        rows: The number of rows.
        columns: The number of columns.
        gap: The distances between cells, down and to the right, in patches.

    """

    grid: tuple[int, int]
    rows: int = 1
    columns: int = 1
    gap: tuple[float, float] = (0.0, 0.0)

    def corner(self, row: int, column: int) -> tuple[float, float]:
        """Return x and y of a cell's upper left corner."""
        height, width = self.pitch
        return column * width - 0.5, row * height - 0.5

    @property
    def pitch(self) -> tuple[float, float]:
        """The distance from cell to cell, down and to the right."""
        return self.grid[0] + self.gap[0], self.grid[1] + self.gap[1]

    @property
    def size(self) -> tuple[float, float]:
        """Height and width of the whole, including a gap at the right and the bottom."""
        height, width = self.pitch
        return self.rows * height, self.columns * width


class Mosaic:
    """Draws maps, images, marks and titles into the cells of one Axes."""

    def __init__(self, ax: Axes, cells: Cells, style: Style, thick: float) -> None:
        self._ax, self._cells, self._style, self._thick = ax, cells, style, thick
        ax.set_xticks([])
        ax.set_yticks([])
        for spine in ax.spines.values():
            spine.set_visible(False)

    def map(
        self, place: tuple[int, int], values: Values, norm: Normalize, alpha: float = 1.0
    ) -> None:
        """Draw values ``(h, w)`` in viridis. NaN and infinity are black."""
        self._ax.imshow(
            np.ma.masked_invalid(values),
            cmap=colour_map(),
            norm=norm,
            alpha=alpha,
            interpolation=self._style.interpolation,
            extent=self._extent(place),
        )

    def picture(self, place: tuple[int, int], pixels: Any) -> None:
        """Draw an image ``(H, W, 3)`` over a whole cell."""
        self._ax.imshow(pixels, extent=self._extent(place))

    def cover(self, place: tuple[int, int], patches: Mask, colour: Any) -> None:
        """Draw ``colour`` (r, g, b, a) over the patches that ``patches`` ``(h, w)`` marks."""
        overlay = np.where(patches[..., np.newaxis], colour, 0.0)
        self._ax.imshow(overlay, interpolation="nearest", extent=self._extent(place))

    def outlines(self, place: tuple[int, int], patches: Mask) -> None:
        """Frame in red the patches that ``patches`` ``(h, w)`` marks."""
        squares = [self._square(place, *patch) for patch in np.argwhere(patches)]
        if squares:
            self._lines(squares, RED, self._thick)

    def query(self, place: tuple[int, int], patch: tuple[int, int] | None) -> None:
        """Frame the patch of the query in white on black."""
        if patch is not None:
            lines = self._lines([self._square(place, *patch)], "white", 1.5 * self._thick)
            lines.set_path_effects([withStroke(linewidth=3 * self._thick, foreground="black")])

    def title(self, place: tuple[int, int], text: str, points: float) -> None:
        """Write ``text`` above a cell, aligned to its left edge."""
        x, y = self._cells.corner(*place)
        self._annotate(text, (x, y), (0, 2), points, ha="left", va="bottom")

    def label(self, row: int, text: str, points: float) -> None:
        """Write ``text`` to the left of a row of cells."""
        x, y = self._cells.corner(row, 0)
        middle = y + self._cells.grid[0] / 2
        self._annotate(text, (x, middle), (-4, 0), points, ha="right", va="center")

    def finish(self) -> None:
        """Show exactly all cells, with square patches."""
        height, width = self._cells.size
        self._ax.set_xlim(-0.5, width - self._cells.gap[1] - 0.5)
        self._ax.set_ylim(height - self._cells.gap[0] - 0.5, -0.5)
        self._ax.set_aspect("equal")

    def _extent(self, place: tuple[int, int]) -> tuple[float, float, float, float]:
        x, y = self._cells.corner(*place)
        return x, x + self._cells.grid[1], y + self._cells.grid[0], y

    def _square(self, place: tuple[int, int], row: int, column: int) -> Any:
        x, y = self._cells.corner(*place)
        left, top = x + column, y + row
        return [
            (left, top),
            (left + 1, top),
            (left + 1, top + 1),
            (left, top + 1),
            (left, top),
        ]

    def _lines(self, squares: list[Any], colour: Any, width: float) -> Any:
        lines = LineCollection(
            squares, colors=[colour], linewidths=width, capstyle="projecting", clip_on=False
        )
        self._ax.add_collection(lines, autolim=False)
        return lines

    def _annotate(
        self,
        text: str,
        at: tuple[float, float],
        offset: tuple[float, float],
        points: float,
        **alignment: Any,
    ) -> None:
        self._ax.annotate(
            text,
            at,
            xytext=offset,
            textcoords="offset points",
            fontsize=points,
            family=FONT,
            annotation_clip=False,
            parse_math=False,
            **alignment,
        )
