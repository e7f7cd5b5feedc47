"""The attention of one forward pass."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

Grid = tuple[int, int]


@dataclass(frozen=True, eq=False)
class AttentionMaps:
    """The attention weights of one forward pass, and how their columns are laid out.

    =======  =========================================================================
    weights  one entry for each layer: ``(B, heads, Q, N)``, ``(B, Q, N)`` for the mean of
             heads, a list of these where the pass ran on a list of batches, or whatever
             ``reduce`` made of them
    layers   the blocks they belong to, counted from 0
    grid     height and width ``(h, w)`` of the patch grid, a list of these for a list of
             batches; ``None`` where tokens did not come from images of whole patches
    prefix   ``1 + R``: the columns of CLS and the registers, in front of the patches
    =======  =========================================================================
    """

    weights: tuple[Any, ...]
    layers: tuple[int, ...]
    grid: Grid | list[Grid | None] | None
    prefix: int
