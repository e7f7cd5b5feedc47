"""Statistics of the weights of one kernel call, a few rows at a time: no matrix is kept.

Rows are made of queries and keys, or taken of explicit code, as everywhere else. So biases, masks,
causal rows, shared keys and edits count. On a CPU a tile stays in its cache. That is faster than
another call of the fused kernel with other values, which makes the same product and a second one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import product
from typing import Any, get_args

import torch
from torch import Tensor

from dinov2_attn.backbone.layout import Layout, cut_maps
from dinov2_attn.errors import InvalidInputError
from dinov2_attn.kernels.call import FusedCall
from dinov2_attn.math.attention import chunks, may_tile, without_autocast
from dinov2_attn.math.statistics import (
    centroid_and_spread,
    distances_into,
    entropy,
)
from dinov2_attn.typing import Heads, Statistic

STATISTICS: tuple[Statistic, ...] = get_args(Statistic)

# Those that need to know which tokens are patches.
ON_GRID = frozenset({"distance", "prefix_mass", "spread", "centroid"})

# Bytes of the rows that exist at a time: on a CPU in its second-level cache, elsewhere many for
# each launch.
TILE_BYTES = 3 * 2**19
DEVICE_TILE_BYTES = 2**27


def check_statistics(names: object) -> tuple[Statistic, ...]:
    """Return ``names`` as a tuple.

    Raises:
        InvalidInputError: If it is no sequence of names of statistics.

    """
    given: Any = [names] if isinstance(names, str) else names
    if isinstance(given, Sequence) and all(
        isinstance(one, str) and one in STATISTICS and given.count(one) == 1 for one in given
    ):
        return tuple(given)
    raise InvalidInputError(
        f"statistics as some of {', '.join(map(repr, STATISTICS))}, each once",
        repr(names),
        'Say ("entropy", "distance"), for instance.',
    )


@torch.no_grad()
def measure(
    call: Any, names: Sequence[Statistic], layout: Layout | None, heads: Heads = None
) -> dict[Statistic, Tensor]:
    """Return statistics of the weights of ``call``, in float32 at least.

    Args:
        call: The call of a kernel, without autograd's graph, and not on a nested list.
        names: Which statistics.
        layout: Which keys are patches, or None if that is not known.
        heads: None for each head. ``"mean"`` for those of the mean of their weights.

    Returns:
        ``(B, heads, Q)`` for each name, of ``"received"`` ``(B, heads, N)``, of ``"centroid"``
        ``(B, heads, Q, 2)``. Without the dimension of heads for their mean.

    Raises:
        InvalidInputError: If a statistic needs a patch grid, and there is none.

    """
    _check_grid(call, names, layout)
    with without_autocast(call.device):
        found = _measured(call.wide(), names, layout, together=heads == "mean")
    return {name: one[:, 0] if heads == "mean" else one for name, one in found.items()}


def measure_parts(
    parts: Sequence[Any],
    names: Sequence[Statistic],
    layouts: Sequence[Callable[[int], Layout | None]],
    heads: Heads = None,
) -> list[dict[Statistic, Tensor]]:
    """Return the statistics of each of ``parts``.

    Args:
        parts: The call of each batch.
        names: Which statistics.
        layouts: Returns the layout of each of so many tokens. It is not asked without need.
        heads: As for ``measure``.

    """
    needed = not ON_GRID.isdisjoint(names)
    return [
        measure(part, names, find(part.columns) if needed else None, heads)
        for part, find in zip(parts, layouts, strict=True)
    ]


def _measured(
    call: Any, names: Sequence[Statistic], layout: Layout | None, *, together: bool
) -> dict[Statistic, Tensor]:
    dtype = torch.promote_types(call.dtype, torch.float32)
    row = call.columns * torch.finfo(dtype).bits // 8
    limit = max(1, (TILE_BYTES if call.device.type == "cpu" else DEVICE_TILE_BYTES) // max(1, row))
    several = call.heads if together else max(1, min(call.heads, limit // max(1, call.rows)))
    step = min(max(1, limit // several), call.rows)
    rows_of, at_once = _rows_of(call)
    at_once = min(at_once, max(1, limit // max(1, several * step))) if several == call.heads else 1
    size = at_once * several * step * call.columns
    memory, other = torch.empty(2, size, dtype=dtype, device=call.device)
    sums = _Sums(call, names, layout, 1 if together else call.heads, other, step)
    for lines in chunks(call.rows, step):
        positions = torch.arange(lines.start, lines.stop, device=call.device)
        places = sums.distances(positions)
        for samples, heads in product(chunks(call.batch, at_once), chunks(call.heads, several)):
            weights = rows_of(samples, heads, lines, positions, memory)
            if together:
                weights = weights.mean(1, keepdim=True)
            sums.add(weights, (samples, heads, lines), places)
    return sums.found


Place = tuple[slice, slice, slice]
Rows = Callable[[slice, slice, slice, Tensor, Tensor], Tensor]


def _rows_of(call: Any) -> tuple[Rows, int]:
    """Return what makes some rows of some samples, and of how many samples at a time.

    That is ``call.tile`` for one sample, or less Python for all of them where nothing is masked: a
    tile takes a fraction of a millisecond, so that the steps around its product count.
    """

    def by_tile(
        samples: slice, heads: slice, lines: slice, positions: Tensor, memory: Tensor
    ) -> Tensor:
        tile: Tensor = call.tile(samples.start, heads, lines, positions, memory)
        return tile[None]

    plain = isinstance(call, FusedCall) and call.bias is None and not call.is_causal
    in_place = call.device.type in ("cpu", "cuda")  # elsewhere a softmax may not be
    if not (plain and in_place and call.key.shape[1] == call.heads and may_tile(call.query)):
        return by_tile, 1
    query, key = call.query * call.scale, call.key.transpose(2, 3)

    def rows(samples: slice, heads: slice, lines: slice, _: Tensor, memory: Tensor) -> Tensor:
        part = query[samples, heads, lines]
        shape = (*part.shape[:3], key.shape[3])
        out = memory[: math.prod(shape)].view(-1, *shape[2:])
        torch.bmm(part.flatten(0, 1), key[samples, heads].flatten(0, 1), out=out)
        return torch.softmax(out, -1, out=out).view(shape)

    return rows, call.batch


class _Sums:
    """Statistics of a call, filled tile by tile.

    Attributes:
        found: The results.

    """

    def __init__(
        self,
        call: Any,
        names: Sequence[Statistic],
        layout: Layout | None,
        heads: int,
        memory: Tensor,
        lines: int,
    ) -> None:
        self._names, self._layout, self._memory = names, layout, memory
        self._rows = call.rows
        # A softmax is not. What explicit code makes of it may be, and what an edit puts in.
        self._may_be_negative = call.columns > 0 and not isinstance(call, FusedCall)
        if "distance" in names:
            self._distances = memory.new_zeros(lines, call.columns)
        lead = (call.batch, heads)
        shapes = {"received": (*lead, call.columns), "centroid": (*lead, call.rows, 2)}
        self.found = {
            name: memory.new_zeros(shapes.get(name, (*lead, call.rows))) for name in names
        }

    def distances(self, positions: Tensor) -> Tensor | None:
        """Return the distances from tokens at ``positions`` to all tokens, ``(lines, N)``.

        Those to tokens that are no patches are 0, those from such tokens NaN.
        """
        if self._layout is None or "distance" not in self._names:
            return None
        layout = self._layout
        # A product of whole rows is faster than one of their patches, which begin anywhere.
        found = self._distances[: len(positions)]
        row, column = _cells(positions, layout, found.dtype)
        for cells in _by_cell(found[:, _patches(layout)], layout).unbind(1):
            distances_into(cells, row, column)
        return found

    def add(self, weights: Tensor, place: Place, distances: Tensor | None) -> None:
        """Take ``weights (samples, heads, lines, N)``."""
        found, (samples, heads, _) = self.found, place
        memory = self._memory[: weights.numel()].view_as(weights)
        if "entropy" in found:
            numbers = entropy(weights, memory)
            if self._may_be_negative:
                numbers.masked_fill_(weights.amin(-1) < 0, torch.nan)
            found["entropy"][place] = numbers
        if "received" in found:
            found["received"][samples, heads] += weights.sum(-2) / self._rows
        if self._layout is None:
            return
        if "prefix_mass" in found:
            found["prefix_mass"][place] = _others(weights, self._layout)
        if distances is not None:
            sums = torch.mul(weights, distances, out=memory).sum(-1)
            found["distance"][place] = sums / weights[..., _patches(self._layout)].sum(-1)
        if "centroid" in found or "spread" in found:
            self._add_moments(weights, place, self._layout)

    def _add_moments(self, weights: Tensor, place: Place, layout: Layout) -> None:
        maps = cut_maps(weights, layout)
        centroid, spread = centroid_and_spread(maps.sum(-3) if layout.per_cell > 1 else maps)
        if "centroid" in self.found:
            self.found["centroid"][place] = centroid
        if "spread" in self.found:
            self.found["spread"][place] = spread


def _cells(positions: Tensor, layout: Layout, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return row and column of the tokens at ``positions``, NaN for those that are no patches."""
    number = positions - layout.prefix
    inside = (number >= 0) & (number < layout.cells * layout.per_cell)
    cell = number % layout.cells if layout.planes else number // layout.per_cell
    row, column = cell // layout.grid[1], cell % layout.grid[1]
    row, column = (one.to(dtype).masked_fill(~inside, torch.nan) for one in (row, column))
    return row, column


def _by_cell(patches: Tensor, layout: Layout) -> Tensor:
    """Return ``patches (lines, P)`` as a view ``(lines, k, h, w)``, k tokens of each cell."""
    lines, each, grid = len(patches), layout.per_cell, layout.grid
    if layout.planes:
        return patches.view(lines, each, *grid)
    return patches.view(lines, *grid, each).movedim(-1, 1)


def _patches(layout: Layout) -> slice:
    return slice(layout.patches.start, layout.patches.stop)


def _others(weights: Tensor, layout: Layout) -> Tensor:
    """Return the sum of the weights on tokens that are no patches."""
    before = weights[..., : layout.prefix].sum(-1)
    return before + weights[..., layout.patches.stop :].sum(-1) if layout.suffix else before


def _check_grid(call: Any, names: Sequence[Statistic], layout: Layout | None) -> None:
    needing = [name for name in names if name in ON_GRID]
    if needing and layout is None:
        raise InvalidInputError(
            f"a patch grid among the {call.columns} tokens, for {', '.join(map(repr, needing))}",
            "tokens of which none is known to be a patch",
            "Say where the patches are: record(model, grid=(h, w), prefix=p, statistics=...). "
            'Or ask for "entropy" and "received", which need no grid.',
        )
    if "distance" in names and call.rows != call.columns:
        raise InvalidInputError(
            "queries that are the same tokens as the keys, for 'distance'",
            f"{call.rows} queries and {call.columns} keys",
            "Leave 'distance' out for this layer. The other statistics need no place of a query.",
        )
