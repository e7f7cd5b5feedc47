"""Patch grids side by side on one Axes, in units of patches."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.colors import Colormap, Normalize

from dinov2_attn.apps.viz.colours import Mask
from dinov2_attn.apps.viz.rows import Values
from dinov2_attn.apps.viz.style import Style
from dinov2_attn.apps.viz.text import FONT

# Marks have two strokes, so that one of them stands out from any colour below: white has a
# contrast of 3 : 1 with all that is darker than a third, this red with all that is brighter.
RED = (0.58, 0.0, 0.0)


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
        self,
        place: tuple[int, int],
        values: Values,
        norm: Normalize,
        alpha: float = 1.0,
        colours: Colormap | None = None,
    ) -> None:
        """Draw values of any grid, stretched over the cell. NaN and infinity are black.

        ``colours`` are those of the style by default.
        """
        self._ax.imshow(
            np.ma.masked_invalid(values),
            cmap=colours or self._style.colour_map(),
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
        """Frame in red on white the patches that ``patches``, of any grid, marks."""
        grid = patches.shape[0], patches.shape[1]
        squares = [self._square(place, row, column, grid) for row, column in np.argwhere(patches)]
        self._lines(squares, RED, "white", 1.25)

    def contour(self, place: tuple[int, int], mask: Mask, times: float = 1.0) -> None:
        """Draw a line, white on black, around what ``mask`` marks, stretched over the cell."""
        x, y = self._cells.corner(*place)
        down, right = (n / m for n, m in zip(self._cells.grid, mask.shape, strict=True))
        sides = [
            [(x + a * right, y + b * down), (x + c * right, y + d * down)]
            for a, b, c, d in _borders(mask)
        ]
        self._lines(sides, "white", "black", times)

    def query(
        self,
        place: tuple[int, int],
        patch: tuple[int, int] | None,
        grid: tuple[int, int] | None = None,
    ) -> None:
        """Frame the patch of the query in white on black; ``grid`` is that of cells by default."""
        squares = [] if patch is None else [self._square(place, *patch, grid or self._cells.grid)]
        self._lines(squares, "white", "black", 1.5)

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

    def _square(self, place: tuple[int, int], row: int, column: int, grid: tuple[int, int]) -> Any:
        x, y = self._cells.corner(*place)
        down, right = (n / m for n, m in zip(self._cells.grid, grid, strict=True))
        left, top = x + column * right, y + row * down
        return [
            (left, top),
            (left + right, top),
            (left + right, top + down),
            (left, top + down),
            (left, top),
        ]

    def _lines(self, lines: list[Any], inner: Any, outer: Any, times: float = 1.0) -> None:
        """Draw lines of the colour ``inner`` with edges of the colour ``outer``."""
        width = times * self._thick
        # All edges are drawn first: where lines meet, no edge covers another line.
        for colour, points in ((outer, 2.2 * width), (inner, width)):
            drawn = LineCollection(
                lines,
                colors=[colour],
                linewidths=points,
                capstyle="projecting",
                clip_on=False,
                zorder=3,
            )
            if lines:
                self._ax.add_collection(drawn, autolim=False)

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


def _borders(patches: Mask) -> list[tuple[int, int, int, int]]:
    """Return the sides between marked and other patches, each as x, y, x, y of its ends."""
    padded = np.pad(patches, 1).astype(np.int8)
    across = np.argwhere(np.diff(padded, axis=0)[:, 1:-1])
    along = np.argwhere(np.diff(padded, axis=1)[1:-1])
    return [
        *((int(x), int(y), int(x) + 1, int(y)) for y, x in across),
        *((int(x), int(y), int(x), int(y) + 1) for y, x in along),
    ]
