"""A figure measured in inches: a caption, a mosaic with its colour bar, a warning below."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from dinov2_attn.apps.viz.mosaic import Cells
from dinov2_attn.apps.viz.shown import ShownAxes, ShownFigure
from dinov2_attn.apps.viz.text import FONT, POINTS_PER_INCH, wrap

POINTS = 9.0  # of captions
LINE = 1.3 * POINTS / POINTS_PER_INCH
MARGIN = 0.15
BAR = 0.15  # of the colour bar
BAR_LABELS = 1.05
BAR_POINTS = 7.0
LEAST_WIDTH = 3.6  # a narrower caption has a word or two on a line
LEAST_BAR = 1.2  # the length of its label


@dataclass(frozen=True, eq=False)
class Sheet:
    """The size of a picture, in inches.

    Attributes:
        cells: The cells, in patches.
        patch: The side of a patch.
        left: The room for labels of rows.
        top: The room for labels of columns.
        bar: Whether there is a colour bar.
        second: Whether there is another one at its right.

    """

    cells: Cells
    patch: float
    left: float = 0.0
    top: float = 0.0
    bar: bool = True
    second: bool = False

    def figure(self, caption: list[str], warning: str | None) -> tuple[Figure, Axes, Any]:
        """Return a figure, its Axes for the mosaic, and its Axes for the colour bar."""
        figure, ax, bars = self.figure_with_bars(caption, warning)
        return figure, ax, bars[0] if bars else None

    def figure_with_bars(
        self, caption: list[str], warning: str | None
    ) -> tuple[Figure, Axes, list[Axes]]:
        """Return a figure, its Axes for the mosaic, and the Axes of each colour bar."""
        height, width = (side * self.patch for side in self.cells.size)
        count = self.bar + self.second
        right = MARGIN + count * (BAR + BAR_LABELS) if count else 0.0
        whole = max(LEAST_WIDTH, 2 * MARGIN + self.left + width + right)
        lines = wrap(caption, whole - 2 * MARGIN, POINTS)
        red = wrap([warning], whole - 2 * MARGIN, POINTS, bold=True) if warning else []
        above = 2 * MARGIN + LINE * len(lines) + self.top
        below = MARGIN + (LINE * len(red) + MARGIN if red else 0)
        middle = max(height, LEAST_BAR) if self.bar else height
        total = above + middle + below
        figure = ShownFigure(figsize=(whole, total), facecolor="white")
        FigureCanvasAgg(figure)

        def axes(x: float, w: float, h: float) -> Axes:
            box = x / whole, (total - above - h) / total, w / whole, h / total
            return figure.add_axes(box, axes_class=ShownAxes)

        ax = axes(MARGIN + self.left, width, height)
        first = 2 * MARGIN + self.left + width
        bars = [axes(first + i * (BAR + BAR_LABELS), BAR, middle) for i in range(count)]
        _write(figure, lines, (MARGIN, MARGIN))
        if red:
            strip = LINE * len(red) + MARGIN
            figure.add_artist(
                Rectangle((0, 0), 1, strip / total, color="firebrick", transform=figure.transFigure)
            )
            top = total - strip + MARGIN / 2
            _write(figure, red, (MARGIN, top), color="white", weight="bold")
        return figure, ax, bars


def _write(figure: Figure, lines: list[str], at: tuple[float, float], **font: Any) -> None:
    width, height = figure.get_size_inches()
    for number, line in enumerate(lines):
        y = at[1] + number * LINE
        figure.text(
            at[0] / width,
            1 - y / height,
            line,
            va="top",
            fontsize=POINTS,
            family=FONT,
            parse_math=False,
            **font,
        )
