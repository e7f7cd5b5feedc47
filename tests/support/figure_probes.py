"""Maps to draw, and what stands at which place of a drawn figure."""

from __future__ import annotations

import matplotlib
import numpy as np
import torch

from dinov2_attn import ArtifactTokens, AttentionMaps
from dinov2_attn.apps.viz.saving import DPI, pixels_of


def maps_on(grid, *, heads=3, layers=2, registers=0, queries=(0,), seed=0, batch=1):
    """Rows that sum to one, of any numbers."""
    generator = torch.Generator().manual_seed(seed)
    length = 1 + registers + grid[0] * grid[1]
    shape = (batch, heads, len(queries), length)
    weights = [torch.randn(shape, generator=generator).double().softmax(-1) for _ in range(layers)]
    return AttentionMaps(tuple(weights), tuple(range(layers)), grid, 1 + registers, tuple(queries))


def artifacts_at(grid, *places, layer=7, threshold=151.25, batch=1):
    mask = torch.zeros(batch, *grid, dtype=torch.bool)
    for place in places:
        mask[(0, *place)] = True
    none = torch.zeros(batch, *grid)
    limits, layers = torch.full((batch,), threshold), torch.full((batch,), layer)
    return ArtifactTokens(mask, none, layers, limits, none, none, mask, mask)


def photograph_on(grid, patch=14, seed=0):
    """Each patch of one colour, so that its middle is its colour."""
    cells = np.random.default_rng(seed).integers(0, 256, (*grid, 3), dtype=np.uint8)
    return cells.repeat(patch, axis=0).repeat(patch, axis=1)


def viridis(values, low, high, *, log=False):
    """The colour of each value on a scale, uint8 (…, 3)."""
    if log:
        values, low, high = np.log(np.maximum(values, low)), np.log(low), np.log(high)
    scaled = np.clip((values - low) / (high - low), 0, 1)
    return np.array(matplotlib.colormaps["viridis"](scaled, bytes=True))[..., :3].astype(int)


class Drawn:
    """The pixels of a figure, found by the place in its mosaic that they should have."""

    def __init__(self, figure, ax=None, dpi=DPI):
        self.figure, self.ax = figure, ax or figure.axes[0]
        self.pixels = pixels_of(figure, dpi).astype(int)

    @property
    def cells(self):
        """The upper left corner of each cell, in the order of drawing, each once."""
        corners = [(image.get_extent()[0], image.get_extent()[3]) for image in self.ax.images]
        return list(dict.fromkeys(corners))

    def at(self, cell, row, column):
        """The pixel in a cell at a fractional row and column, patches being centred at whole."""
        x, y = self.cells[cell]
        to_pixels = self.ax.transData.transform
        px, py = to_pixels((x + 0.5 + column, y + 0.5 + row))
        return self.pixels[len(self.pixels) - 1 - int(py), int(px)]

    def middles(self, cell, grid):
        return np.array([[self.at(cell, i, j) for j in range(grid[1])] for i in range(grid[0])])

    def frames(self, cell, grid, colour):
        """Which patches have ``colour`` on all four of their sides."""

        def is_framed(i, j):
            sides = [(i - 0.5, j), (i + 0.5, j), (i, j - 0.5), (i, j + 0.5)]
            return all(np.abs(self.near(cell, *side) - colour).max(-1).min() < 60 for side in sides)

        return {(i, j) for i in range(grid[0]) for j in range(grid[1]) if is_framed(i, j)}

    def near(self, cell, row, column):
        """The pixels around a place, a line's being among them."""
        x, y = self.cells[cell]
        px, py = self.ax.transData.transform((x + 0.5 + column, y + 0.5 + row))
        top, left = len(self.pixels) - 1 - int(py), int(px)
        return self.pixels[max(top - 1, 0) : top + 2, max(left - 1, 0) : left + 2].reshape(-1, 3)


def words_of(figure):
    """All that is written in a figure, line by line."""
    from matplotlib.text import Text

    return [text.get_text() for text in figure.findobj(Text) if text.get_text()]


def caption_of(figure):
    """The caption on one line."""
    return " ".join(text.get_text() for text in figure.texts)
