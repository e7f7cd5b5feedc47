"""The sheet of a figure for papers: where its rows, titles, bar and warning stand, in inches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from dinov2_attn.apps.viz.mosaic import Cells
from dinov2_attn.apps.viz.text import FONT, POINTS_PER_INCH, wrap
from dinov2_attn.errors import InvalidInputError

POINTS = 7.0  # of all letters
LINE = 1.25 * POINTS / POINTS_PER_INCH
MARGIN = 0.03
GAP = 0.04
LEAST_WIDTH, MOST_WIDTH = 2.0, 50.0
LEAST_CELL = 0.32  # a narrower column has no room for its title
TALLEST = 1.6  # of a cell, in widths of its column
BAR = 0.08
BAR_SIDES = 0.2  # room for labels that reach beyond the ends


@dataclass(frozen=True, eq=False)
class FigureSheet:
    """The sheet of a figure of so many inches, which letters do not leave.

    Attributes:
        width: The width of the whole, in inches.
        titles: The title of each column.
        grids: The patch grid ``(h, w)`` of each row.
        bar_lines: How many lines of letters the bar has below it.
        warning: A sentence that stays with the picture.

    Raises:
        InvalidInputError: If the columns do not fit into the width.

    """

    width: float
    titles: Sequence[str]
    grids: Sequence[tuple[int, int]]
    bar_lines: int = 2
    warning: str | None = None

    def __post_init__(self) -> None:
        if not LEAST_WIDTH <= self.width <= MOST_WIDTH or self.cell < LEAST_CELL:
            raise InvalidInputError(
                f"a width of {LEAST_WIDTH:g} to {MOST_WIDTH:g} inches, and at least {LEAST_CELL} "
                "for each column",
                f"{self.width:g} inches for {len(self.titles)} columns",
                "Ask for fewer columns, or for another width such as 3.25 or 6.75.",
            )

    @property
    def cell(self) -> float:
        """The width of a column."""
        count = len(self.titles)
        return (self.width - 2 * MARGIN - (count - 1) * GAP) / count

    def patch(self, grid: tuple[int, int]) -> float:
        """Return the side of a patch. Very tall images do not fill the width of their column."""
        return min(self.cell / grid[1], TALLEST * self.cell / grid[0])

    def cells(self, grid: tuple[int, int]) -> Cells:
        """Return the cells of a row."""
        pitch = (self.cell + GAP) / self.patch(grid)
        return Cells(grid, 1, len(self.titles), (0.0, pitch - grid[1]))

    def draw(self) -> tuple[Figure, list[Axes], Axes]:
        """Return a figure with titles and warning, the Axes of each row, and those of the bar."""
        lines = [wrap([title], self.cell, POINTS) for title in self.titles]
        red = wrap([self.warning or ""], self.width - 4 * MARGIN, POINTS, bold=True)
        above = MARGIN + LINE * max(map(len, lines))
        heights = [self.patch(grid) * grid[0] + GAP for grid in self.grids]
        strip = LINE * len(red) + 2 * MARGIN if red else 0.0
        letters = LINE * (self.bar_lines + 0.5)
        total = above + sum(heights) + GAP + BAR + letters + strip
        figure = Figure(figsize=(self.width, total), facecolor="white")
        FigureCanvasAgg(figure)
        for column, title in enumerate(lines):
            x = MARGIN + column * (self.cell + GAP) + self.cell / 2
            self._write(figure, title, x, above - LINE * len(title), ha="center")
        tops = [above + sum(heights[:i]) for i in range(len(heights))]
        rows = [self._row(figure, grid, top) for grid, top in zip(self.grids, tops, strict=True)]
        under = above + sum(heights) + GAP
        width = self.width - 2 * MARGIN - 2 * BAR_SIDES
        bar = self._axes(figure, MARGIN + BAR_SIDES, under, width, BAR)
        if red:
            box = Rectangle((0, 0), 1, strip / total, transform=figure.transFigure)
            box.set_color("firebrick")
            figure.add_artist(box)
            at = total - strip + MARGIN
            self._write(figure, red, 2 * MARGIN, at, color="white", weight="bold")
        return figure, rows, bar

    def _row(self, figure: Figure, grid: tuple[int, int], top: float) -> Axes:
        height, width = (side * self.patch(grid) for side in grid)
        whole = (len(self.titles) - 1) * (self.cell + GAP) + width
        return self._axes(figure, MARGIN + (self.cell - width) / 2, top, whole, height)

    def _axes(self, figure: Figure, x: float, y: float, width: float, height: float) -> Axes:
        """Return new Axes, ``x`` and ``y`` from the upper left corner."""
        whole, total = figure.get_size_inches()
        place = (x / whole, 1 - (y + height) / total, width / whole, height / total)
        return figure.add_axes(place)

    def _write(self, figure: Figure, lines: list[str], x: float, y: float, **font: Any) -> None:
        width, height = figure.get_size_inches()
        for number, line in enumerate(lines):
            figure.text(
                x / width,
                1 - (y + number * LINE) / height,
                line,
                va="top",
                fontsize=POINTS,
                family=FONT,
                parse_math=False,
                **font,
            )
