"""Weights without a second matrix: piece by piece, and straight into the result.

A fresh matrix of scores beside the weights would double the memory, and faulting its pages
in costs more than the product. Pieces need writes in place, so this is for tensors that
nothing traces or differentiates (``may_tile``).
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from dinov2_attn._compat import MASKED_ROWS_ARE_ZERO, has_tangents, is_traced, is_transformed
from dinov2_attn.math.buffers import is_fresh

# Scores that become the result where they lie: few calls rather than cached ones, for at the
# end of each all threads wait for the last. Measured on CPUs; on GPUs launches cost as much.
PIECE_BYTES = 2**26

# Scores of which something else is made, on the CPU: they cost memory and stay in its cache.
TILE_BYTES = 2**23

Piece = tuple[slice, slice, slice]


def may_tile(tensor: Tensor) -> bool:
    """Say whether results may be written in place: no autograd, no trace, no subclass."""
    return (
        not torch.is_grad_enabled()
        and type(tensor) in (Tensor, nn.Parameter)
        and not is_transformed()
        and not is_traced()
        and not has_tangents()
    )


def softmax_into(
    result: Tensor,
    query: Tensor,
    key: Tensor,
    scale: float,
    *,
    bias: Tensor | None = None,
    seen: Tensor | None = None,
) -> None:
    """Write ``softmax(query @ keyᵀ · scale + bias)`` into ``result``.

    ======  ====================================================================
    query   ``(B, heads, Q, head_dim)``, float32 or float64
    key     ``(B, heads or 1, N, head_dim)``, likewise
    bias    broadcastable to ``(B, heads, Q, N)``, added to the scores
    seen    ``(Q, N)``, boolean: keys that a query may look at
    result  ``(B, heads, Q, N)``, or ``(B, Q, N)`` for the mean over heads; any
            dtype; contiguous
    ======  ====================================================================

    On a CPU, scores that become the result where they lie are best where it is fresh: the
    product's threads fault its pages in. Where its pages are there, scores in the cache are.
    """
    shape = (*query.shape[:3], key.shape[2])
    mean = result.ndim == 3
    direct = not mean and result.dtype == query.dtype
    in_place = direct and is_fresh(result)
    if bias is not None:
        bias = bias.expand(shape)
    row = max(1, shape[3] * query.element_size())
    limit = PIECE_BYTES if in_place or query.device.type != "cpu" else TILE_BYTES
    pieces = list(_pieces(shape[:3], limit // row, together=mean))
    tile = None if in_place else _tile(query, pieces[:1], shape[3])
    for piece in pieces:
        samples, heads, lines = piece
        part = query[piece] * scale
        own = key[samples] if key.shape[1] == 1 else key[samples, heads]
        out = result[samples, lines] if mean else result[piece]
        scores = out if tile is None else _like(part, tile, shape[3])
        _product_into(scores, part, own)
        if bias is not None:
            scores += bias[piece]
        if seen is not None:
            scores.masked_fill_(~seen[lines], -math.inf)
        _softmax_into(out if direct else scores, scores, biased=bias is not None)
        if not direct:
            out.copy_(scores.mean(dim=1) if mean else scores)


def fully_masked_rows(scores: Tensor) -> Tensor | None:
    """Return which rows ``(…, 1)`` of ``scores`` are nought instead of a softmax, if any can be."""
    if not (MASKED_ROWS_ARE_ZERO and scores.shape[-1]):
        return None
    return scores.amax(dim=-1, keepdim=True) == -math.inf


def _tile(query: Tensor, largest: list[Piece], length: int) -> Tensor:
    """Return memory for the scores of the ``largest`` piece: one for all, which stays cached."""
    return query.new_empty(sum(query[piece].shape[:3].numel() for piece in largest) * length)


def _like(query: Tensor, tile: Tensor, length: int) -> Tensor:
    rows = query.shape[:3]
    return tile[: rows.numel() * length].view(*rows, length)


def _product_into(scores: Tensor, query: Tensor, key: Tensor) -> None:
    # The rows of all heads that share a key make one product.
    units = len(key) * key.shape[1]
    lines = query.shape[:3].numel() // units
    # A view, or else it would not be written: a piece is whole in every dimension behind the
    # first that it cuts.
    out = scores.view(units, lines, key.shape[2])
    query, key = query.reshape(units, lines, key.shape[3]), key.flatten(0, 1)
    torch.bmm(query, key.transpose(-2, -1), out=out)


def _softmax_into(out: Tensor, scores: Tensor, *, biased: bool) -> None:
    masked = fully_masked_rows(scores) if biased else None
    if masked is not None:
        scores.masked_fill_(masked, 0)
    if scores.device.type in ("cpu", "cuda"):
        # In place too: their kernels have read all of a row before they write any of it.
        torch.softmax(scores, -1, out=out)
    else:
        out.copy_(scores.softmax(dim=-1))
    if masked is not None:
        out.masked_fill_(masked, 0)


def _pieces(shape: tuple[int, ...], rows: int, *, together: bool) -> Iterator[Piece]:
    """Cut ``shape (B, heads, Q)`` into pieces of about ``rows`` rows.

    Each is as many whole samples as fit, else whole heads, else rows of one head, or of
    all heads ``together``.
    """
    batch, heads, lines = shape
    several = heads if together else min(heads, max(1, rows // max(1, lines)))
    for samples in chunks(batch, rows // max(1, heads * lines)):
        for some in chunks(heads, several):
            for line in chunks(lines, rows // max(1, several)):
                yield samples, some, line


def chunks(length: int, step: int) -> Iterator[slice]:
    """Cut ``length`` into slices of at least 1 and at most ``step``."""
    step = max(1, step)
    for start in range(0, length, step):
        yield slice(start, min(start + step, length))
