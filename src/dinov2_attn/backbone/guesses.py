"""The layouts of tokens in which the four corners of an image are where they were measured."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from dinov2_attn.backbone.layout import Layout
from dinov2_attn.backbone.mosaics import Box, Cells, Unclear
from dinov2_attn.typing import Grid

# A sequence of one image, and a position in it.
_Place = tuple[int, int]


@dataclass(frozen=True)
class Corners:
    """How far tokens move, ``(…, S, N)``.

    Attributes:
        box: The pixels that tokens depend on.
        moves: ``(4, S, N)``: when a corner changes, in the order of reading.
        whole: ``(S, N)``: when all pixels change.
        limit: What rounding alone stays below.

    """

    box: Box
    moves: Tensor
    whole: Tensor
    limit: float

    @property
    def places(self) -> list[_Place]:
        """The token that moves most at each corner."""
        length = self.moves.shape[-1]
        return [divmod(int(i), length) for i in self.shares.flatten(1).argmax(-1)]

    @property
    def shares(self) -> Tensor:
        """``moves`` as parts of ``whole``; zero for tokens that do not depend on the image."""
        return torch.where(self.whole > self.limit, self.moves / self.whole, 0)


@dataclass(frozen=True)
class Guess:
    layout: Layout
    windows: Grid = (1, 1)

    @property
    def grid(self) -> Grid:
        """The grid of the whole image."""
        return self.windows[0] * self.layout.grid[0], self.windows[1] * self.layout.grid[1]

    def cells(self, sequences: int, device: torch.device) -> Cells:
        """Return row and column of the cell of each patch token, ``(S, P)``."""
        layout, (height, width) = self.layout, self.layout.grid
        i = torch.arange(len(layout.patches), device=device)
        cell = i % layout.cells if layout.planes else i // layout.per_cell
        window = torch.arange(sequences, device=device)[:, None] % math.prod(self.windows)
        across = self.windows[1]
        return window // across * height + cell // width, window % across * width + cell % width


def guesses(corners: Corners) -> Iterator[Guess]:
    """Yield the layouts in which the corners are where they were seen."""
    moved = corners.moves > corners.limit
    sequences, length = moved.shape[1:]
    reached = moved.any(-1)
    if not reached.all():
        if (reached.sum(-1) != 1).any():
            raise Unclear(f"one patch moves tokens in several of the {sequences} sequences")
        yield from _one_per_cell(corners.places, sequences, length)
        return
    # Each sequence sees the whole image, or a frame of it: one stands for all.
    first = [(0, int(i)) for i in corners.shares[:, 0].argmax(-1)]
    yield from _one_per_cell(first, 1, length)
    yield from _several_per_cell([one.nonzero().flatten().tolist() for one in moved[:, 0]], length)


def _one_per_cell(places: list[_Place], sequences: int, length: int) -> Iterator[Guess]:
    (window, prefix), (right, end_of_row), below, last = places
    across, width = right + 1, end_of_row - prefix + 1
    cells = last[1] - prefix + 1
    if window or sequences % across or width < 1 or cells < 1 or cells % width:
        return
    if last[0] != sequences - 1 or below != (sequences - across, prefix + cells - width):
        return
    layout = Layout(prefix, length - prefix - cells, (cells // width, width))
    yield Guess(layout, (sequences // across, across))


def _several_per_cell(moved: list[list[int]], length: int) -> Iterator[Guess]:
    k, prefix = len(moved[0]), moved[0][0]
    steps = {b - a for one in moved for a, b in pairwise(one)}
    if k == 1 or len(steps) != 1 or any(len(one) != k for one in moved):
        return
    step = steps.pop()
    # The number of cells from the first one to that of each corner.
    unit = k if step == 1 else 1
    if any((one[0] - prefix) % unit for one in moved):
        return
    _, end_of_row, below, last = ((one[0] - prefix) // unit for one in moved)
    width, cells = end_of_row + 1, last + 1
    if width < 1 or cells < 2 or cells % width or below != cells - width:
        return
    if step not in (1, cells):
        raise Unclear(
            f"each patch has {k} tokens, {step} apart, as of several images in one sequence"
        )
    suffix = length - prefix - cells * k
    yield Guess(Layout(prefix, suffix, (cells // width, width), k, planes=step != 1))
