"""Maps on another grid, weighted by the area that old and new cells share."""

from __future__ import annotations

import torch
from torch import Tensor

from dinov2_attn.typing import Grid


def resample(maps: Tensor, grid: Grid) -> Tensor:
    """Return ``maps`` on another grid; sums are kept.

    A patch gives each new cell the part of its value that lies in it by area. So a map and
    the attention to CLS and registers still sum to one, for any two grids. A map keeps its
    values on its own grid.

    Args:
        maps: ``(…, h, w)``.
        grid: Height and width ``(H, W)`` of the new grid, in cells.

    Returns:
        The maps, ``(…, H, W)``, float32 at least.

    """
    maps = maps.to(torch.promote_types(maps.dtype, torch.float32))
    height, width = grid
    rows = _shares(maps.shape[-2], height).to(maps)
    columns = _shares(maps.shape[-1], width).to(maps)
    return rows @ maps @ columns.T


def _shares(old: int, new: int) -> Tensor:
    """Return the share of each of ``old`` cells in each of ``new`` ones, ``(new, old)``.

    ::

        old   |  0  |  1  |  2  |        1.0  0.5  0.0
        new   |   0    |   1    |   →    0.0  0.5  1.0
    """
    # In units in which cells of both grids have whole lengths.
    old_starts, new_starts = torch.arange(old)[None] * new, torch.arange(new)[:, None] * old
    ends = torch.minimum(old_starts + new, new_starts + old)
    covered = (ends - torch.maximum(old_starts, new_starts)).clamp(min=0)
    return covered.to(torch.float64) / new
