"""Images made of two, and the tokens that a model makes of them."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from dinov2_attn.backbone.undisturbed import first_input
from dinov2_attn.typing import Grid

# Rows from … to …, columns from … to …, in pixels.
Box = tuple[int, int, int, int]
NOTHING: Box = (0, 0, 0, 0)

# The centres of the first and of the last row of cells, and of such columns, in pixels.
Centres = tuple[tuple[float, float], tuple[float, float]]

# Row and column of the cell of each pixel, or of each token.
Cells = tuple[Tensor, Tensor]


class Unclear(Exception):
    """Why there is no layout."""


class Mosaics:
    """Runs images whose pixels are those of A or B, and returns their tokens."""

    def __init__(
        self, run: Callable[[Tensor], object], attention: nn.Module, images: Tensor
    ) -> None:
        self._run, self._attention = run, attention
        self._a, self._b = _two_images(images)
        self.height, self.width = images.shape[-2:]

    @property
    def box(self) -> Box:
        """All of the image."""
        return 0, self.height, 0, self.width

    def mask(self, box: Box | None = None) -> Tensor:
        """Return a mask ``(H, W)`` that is true in ``box``, or everywhere."""
        top, bottom, left, right = self.box if box is None else box
        mask = torch.zeros(self.height, self.width, dtype=torch.bool, device=self._a.device)
        mask[top:bottom, left:right] = True
        return mask

    def tokens(self, masks: list[Tensor]) -> Tensor:
        """Return the tokens ``(M, S, N, C)`` of M images, which are B where a mask is true."""
        batch = torch.stack([torch.where(mask, self._b, self._a) for mask in masks])
        tokens, called = first_input(partial(self._run, batch), self._attention)
        if not called:
            raise Unclear("the attention module was not called in the probe")
        if tokens is None or tokens.ndim != 3:
            found = "no tensor" if tokens is None else f"a tensor of shape {tuple(tokens.shape)}"
            raise Unclear(f"the input of the attention module is {found}, not (B, N, C)")
        if not len(tokens) or len(tokens) % len(batch):
            raise Unclear(f"a batch of {len(batch)} images became {len(tokens)} sequences")
        tokens = tokens if tokens.dtype == torch.float64 else tokens.float()
        return tokens.reshape(len(batch), -1, *tokens.shape[1:])


def cells_of_pixels(mosaics: Mosaics, grid: Grid, centres: Centres) -> Cells:
    """Return the row and the column of the cell of each pixel, ``(H, W)``.

    Each is in the cell whose centre is the nearest.
    """
    sizes = (mosaics.height, mosaics.width)
    numbers = []
    for size, count, (first, last) in zip(sizes, grid, centres, strict=True):
        step = (last - first) / (count - 1) if count > 1 and last > first else math.inf
        pixels = torch.arange(size) + 0.5
        numbers.append(((pixels - first) / step).round().clamp(0, count - 1).long())
    rows, columns = torch.meshgrid(*numbers, indexing="ij")
    device = mosaics.mask().device
    return rows.to(device), columns.to(device)


def centres_in(box: Box, grid: Grid) -> Centres:
    """Return the centres of equal cells that fill ``box``."""
    edges = ((box[0], box[1]), (box[2], box[3]))
    halves = [(end - start) / count / 2 for (start, end), count in zip(edges, grid, strict=True)]
    first, second = (
        (start + half, end - half) for (start, end), half in zip(edges, halves, strict=True)
    )
    return first, second


def _two_images(images: Tensor) -> tuple[Tensor, Tensor]:
    """Return noise ``(…, H, W)`` in the range of ``images``, and the same half a range away."""
    low, high = (float(limit) for limit in images.detach().aminmax())
    if not math.isfinite(high - low) or low == high:
        low, high = 0.0, 1.0
    generator = torch.Generator("cpu").manual_seed(0)
    noise = torch.rand(images.shape[1:], generator=generator, dtype=torch.float64, device="cpu")
    two = (low + (high - low) * ((noise + shift) % 1) for shift in (0.0, 0.5))
    a, b = (one.to(images.device, images.dtype) for one in two)
    return a, b
