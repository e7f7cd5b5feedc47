"""A few rows of one layer's weights at a time."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import NamedTuple

import torch
from torch import Tensor

from dinov2_attn.kernels.call import KernelCall
from dinov2_attn.math.attention import chunks

# Bytes of the rows that exist at a time: few against one layer's matrix, many against a call.
TILE_BYTES = 2**23


class Tile(NamedTuple):
    """Some rows of the weights of one sample, ``(heads, lines, N)``."""

    heads: slice
    lines: slice
    weights: Tensor


def tiles(call: KernelCall, sample: int, positions: Tensor, together: int) -> Iterator[Tile]:
    """Yield the weights of a ``sample`` in tiles, which share their memory.

    Args:
        call: The kernel call, in float32 at least.
        sample: The sample.
        positions: The position of each row of the call in its sequence.
        together: How many heads a tile has.

    """
    count, length = call.heads, call.columns
    dtype = torch.promote_types(call.dtype, torch.float32)
    step = max(1, TILE_BYTES // (together * length * (torch.finfo(dtype).bits // 8)))
    # One tile for all: fresh memory costs as much as what is written into it.
    memory = positions.new_empty(together * min(step, call.rows) * length, dtype=dtype)
    for heads, lines in product(chunks(count, together), chunks(call.rows, step)):
        yield Tile(heads, lines, call.tile(sample, heads, lines, positions[lines], memory))


def without_lowest(matrix: Tensor, ratio: float, *, keep_first: bool) -> Tensor:
    """Set a share of the elements of ``matrix (N, N)`` to zero in place, the lowest first.

    Args:
        matrix: The weights of one layer, with fused heads.
        ratio: The share, from 0 to 1.
        keep_first: Whether the first element stays, the weight from CLS to itself.

    """
    flat = matrix.view(-1)
    lowest = flat.topk(int(flat.numel() * ratio), largest=False).indices
    flat[lowest[lowest != 0] if keep_first else lowest] = 0
    return matrix
