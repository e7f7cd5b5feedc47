"""Statistics of attention weights, from some of their rows at a time.

Positions and distances are in patches: the centres of two neighbours are 1 apart.
"""

from __future__ import annotations

import torch
from torch import Tensor


def entropy(weights: Tensor, memory: Tensor | None = None) -> Tensor:
    """Return the entropy of each row in nats, ``-Σ w ln w``. A weight of zero adds nothing.

    Args:
        weights: ``(…, N)``.
        memory: A tensor of the shape of ``weights`` to write into.

    Returns:
        ``(…)``, between 0 and ln N.

    """
    # torch.special.entr takes ten times as long on a CPU.
    least = torch.finfo(weights.dtype).tiny
    logarithms = torch.clamp(weights, min=least, out=memory).log_()
    return -logarithms.mul_(weights).sum(-1)


def distances_into(result: Tensor, rows: Tensor, columns: Tensor) -> None:
    """Write the Euclidean distances from places on a patch grid to all cells.

    Args:
        result: ``(Q, h, w)``. Fresh memory would cost more than what is written into it.
        rows: The row of each place, ``(Q,)``. NaN is no place.
        columns: The column of each place, ``(Q,)``.

    """
    down, right = _centres(rows, result.shape[1:])
    down, right = (down - rows[:, None]).square(), (right - columns[:, None]).square()
    torch.add(down[:, :, None], right[:, None], out=result).sqrt_()


def centroid_and_spread(maps: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mean position of each map, and the root mean squared distance from it.

    Both are by the weights in the map: ``c = Σ w p / Σ w`` and ``√(Σ w |p - c|² / Σ w)`` for the
    positions ``p``. They are NaN where a map is zero.

    Args:
        maps: ``(…, h, w)``.

    Returns:
        Row and column ``(…, 2)``, and the spread ``(…)``.

    """
    # The sums over columns and over rows say all. What they need is little, and is centred first,
    # so that nothing cancels.
    total = maps.sum((-2, -1))
    means, squares = [], []
    for along, places in zip((-1, -2), _centres(maps, maps.shape[-2:]), strict=True):
        sums = maps.sum(along)
        mean = (sums * places).sum(-1) / total
        means.append(mean)
        squares.append((sums * (places - mean[..., None]).square()).sum(-1) / total)
    return torch.stack(means, -1), (squares[0] + squares[1]).sqrt()


def _centres(like: Tensor, grid: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Return the numbers of the rows and of the columns of a grid."""
    height, width = (torch.arange(side, dtype=like.dtype, device=like.device) for side in grid)
    return height, width
