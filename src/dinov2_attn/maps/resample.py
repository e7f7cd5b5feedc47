"""Maps on another grid, whose cells share what they cover of the old ones."""

from __future__ import annotations

import torch
from torch import Tensor

from dinov2_attn.typing import Grid


def resample(maps: Tensor, grid: Grid) -> Tensor:
    """Return ``maps (…, h, w)`` on ``grid``, ``(…, H, W)``, float32 at least; sums stay.

    A patch gives to each new cell what lies in it of its area, so that a map still sums to
    one together with what CLS and the registers hold, whatever the two grids are. On its own
    grid a map keeps its values.
    """
    maps = maps.to(torch.promote_types(maps.dtype, torch.float32))
    height, width = grid
    rows = _shares(maps.shape[-2], height).to(maps)
    columns = _shares(maps.shape[-1], width).to(maps)
    return rows @ maps @ columns.T


def _shares(old: int, new: int) -> Tensor:
    """Return what of each of ``old`` cells lies in each of ``new`` ones, ``(new, old)``.

    ::

        old   |  0  |  1  |  2  |        1.0  0.5  0.0
        new   |   0    |   1    |   →    0.0  0.5  1.0
    """
    # In units in which both have whole lengths.
    old_starts, new_starts = torch.arange(old)[None] * new, torch.arange(new)[:, None] * old
    ends = torch.minimum(old_starts + new, new_starts + old)
    covered = (ends - torch.maximum(old_starts, new_starts)).clamp(min=0)
    return covered.to(torch.float64) / new
