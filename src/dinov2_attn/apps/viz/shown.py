"""Figures that a notebook shows as the value of a cell. pyplot is not needed for that."""

from __future__ import annotations

from io import BytesIO
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

DPI = 100  # pixels per inch in a notebook


class ShownFigure(Figure):
    """A figure of matplotlib that shows itself in a notebook."""

    def _repr_png_(self) -> bytes:
        return png(self)


class ShownAxes(Axes):
    """The Axes of one map. As the value of a cell they show their figure."""

    def _repr_png_(self) -> bytes:
        figure: Any = self.figure
        return png(figure)


def png(figure: Figure) -> bytes:
    """Return ``figure`` as a PNG for the screen."""
    file = BytesIO()
    figure.savefig(file, format="png", dpi=DPI)
    return file.getvalue()
