"""A figure measured in inches: a caption, a mosaic with its colour bar, a warning below."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from dinov2_attn.apps.viz.mosaic import Cells
from dinov2_attn.apps.viz.style import colour_map
from dinov2_attn.apps.viz.text import FONT, POINTS_PER_INCH, wrap

POINTS = 9.0  # of captions
LINE = 1.3 * POINTS / POINTS_PER_INCH
MARGIN = 0.15
BAR = 0.15  # of the colour bar
BAR_LABELS = 0.75
LEAST_WIDTH = 3.6  # a narrower caption has a word or two on a line
LEAST_BAR = 0.9


@dataclass(frozen=True, eq=False)
class Sheet:
    """The size of a picture, in inches.

    Attributes:
        cells: The cells, in patches.
        patch: The side of a patch.
        left: The room for labels of rows.
        top: The room for labels of columns.
        bar: Whether there is a colour bar.

    """

    cells: Cells
    patch: float
    left: float = 0.0
    top: float = 0.0
    bar: bool = True

    def figure(self, caption: list[str], warning: str | None) -> tuple[Figure, Axes, Any]:
        """Return a figure, its Axes for the mosaic, and its Axes for the colour bar."""
        height, width = (side * self.patch for side in self.cells.size)
        right = MARGIN + BAR + BAR_LABELS if self.bar else 0.0
        whole = max(LEAST_WIDTH, 2 * MARGIN + self.left + width + right)
        lines = wrap(caption, whole - 2 * MARGIN, POINTS)
        red = wrap([warning], whole - 2 * MARGIN, POINTS, bold=True) if warning else []
        above = 2 * MARGIN + LINE * len(lines) + self.top
        below = MARGIN + (LINE * len(red) + MARGIN if red else 0)
        middle = max(height, LEAST_BAR) if self.bar else height
        total = above + middle + below
        figure = Figure(figsize=(whole, total), facecolor="white")
        FigureCanvasAgg(figure)

        def axes(x: float, w: float, h: float) -> Axes:
            return figure.add_axes((x / whole, (total - above - h) / total, w / whole, h / total))

        ax = axes(MARGIN + self.left, width, height)
        bar = axes(2 * MARGIN + self.left + width, BAR, middle) if self.bar else None
        _write(figure, lines, (MARGIN, MARGIN))
        if red:
            strip = LINE * len(red) + MARGIN
            figure.add_artist(
                Rectangle((0, 0), 1, strip / total, color="firebrick", transform=figure.transFigure)
            )
            top = total - strip + MARGIN / 2
            _write(figure, red, (MARGIN, top), color="white", weight="bold")
        return figure, ax, bar


def draw_bar(figure: Figure, bar: Axes, norm: Normalize, beyond: str) -> None:
    """Draw the colour bar of ``norm`` into the Axes ``bar``. Labels show the limits at its ends."""
    ticks = np.linspace(0, 1, 5)
    values = norm.inverse(ticks)
    colours = ScalarMappable(norm, colour_map())
    # The pointed ends are as long as the bar is wide.
    height = bar.get_position().height * figure.get_size_inches()[1]
    figure.colorbar(colours, cax=bar, extend=beyond, extendfrac=BAR / height)
    bar.minorticks_off()
    # On a linear scale the smallest of thousands of weights looks like zero.
    zero = 0 if isinstance(norm, LogNorm) else values[-1] / 1e4
    bar.set_yticks(values, [_in_percent(value if value > zero else 0) for value in values])
    bar.tick_params(labelsize=POINTS - 2, labelfontfamily=FONT)


def _in_percent(value: float) -> str:
    small = 0 < value < 1e-5
    return f"{100 * value:.0e} %" if small else f"{100 * value:.3g} %"


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
