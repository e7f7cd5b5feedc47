"""Attention weights from queries and keys, at once or in pieces.

Nothing here knows a model. Without autograd, weights are written piece by piece into the result.
A second matrix of scores would double the memory, and its page faults cost more than the product.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

from dinov2_attn._compat import MASKED_ROWS_ARE_ZERO, has_tangents, is_traced, is_transformed
from dinov2_attn.errors import InvalidInputError
from dinov2_attn.math.buffers import is_fresh, new_result
from dinov2_attn.typing import Heads

# Every torch from 2.0 on has autocast for these. For other devices (meta, mps, ...) there is
# nothing to switch off, or no way to ask for it in all versions.
_AUTOCAST_DEVICES = ("cpu", "cuda")

# Bytes of scores that become the result in place. At the end of each call all threads wait for
# the last one, so few large calls are best. Measured on CPUs; on GPUs launches cost as much.
PIECE_BYTES = 2**26

# Bytes of scores that are reduced or converted, on the CPU. They should stay in its cache.
TILE_BYTES = 2**23

Piece = tuple[slice, slice, slice]


def attention_weights(
    query: Tensor,
    key: Tensor,
    scale: float,
    *,
    bias: Tensor | None = None,
    causal_rows: Tensor | None = None,
    heads: Heads = None,
    out: Tensor | None = None,
) -> Tensor:
    """Return ``softmax(query @ keyᵀ · scale + bias)``, the weights before dropout.

    Product and softmax run in float32 at least, with autocast or without. The fused kernels
    accumulate in float32 too. In half precision the scores alone would lose more than the kernel
    does. The equivalent code is::

        scores = query.float() @ key.float().transpose(-2, -1) * scale
        return (scores + bias).softmax(dim=-1).to(query.dtype)

    Rows that ``bias`` masks completely are those of PyTorch's kernel: zeros from PyTorch 2.5 on,
    NaN before.

    Source: Vaswani et al., *Attention Is All You Need*, 2017, equation 1.

    Args:
        query: ``(B, heads, Q, head_dim)``, any floating dtype.
        key: ``(B, heads, N, head_dim)`` of the same dtype, or ``(B, 1, N, head_dim)`` if all
            heads share one.
        scale: The factor on the products.
        bias: Broadcastable to ``(B, heads, Q, N)``. A floating bias is added to the scores. A
            boolean bias is true where a key is visible, as in PyTorch's kernel.
        causal_rows: The position of each query in its sequence, ``(Q,)``. A query then sees no
            key after its own position. For positions 0 and 2 of 4::

                1 0 0 0
                1 1 1 0

        heads: None for each head, ``"mean"`` for their mean.
        out: The tensor to write into, allowed if ``may_tile(query)``.

    Returns:
        ``(B, heads, Q, N)``, or ``(B, Q, N)`` for the mean, in the dtype of ``query``.

    """
    with without_autocast(query.device):
        dtype = torch.promote_types(query.dtype, torch.float32)
        wide = key.to(dtype)
        seen = None if causal_rows is None else past(causal_rows, key.shape[2])
        if bias is not None and bias.dtype == torch.bool:
            bias = torch.zeros_like(bias, dtype=dtype).masked_fill_(~bias, -math.inf)
        if may_tile(query):
            if out is None:
                out = new_result(query, shape_of_weights(query, key, heads))
            softmax_into(out, query.to(dtype), wide, scale, bias=bias, seen=seen)
            return out
        scores = (query.to(dtype) * scale) @ wide.transpose(2, 3)
        if bias is not None:
            scores = scores + bias
        if seen is not None:
            scores = scores.masked_fill(~seen, -math.inf)
        masked = None if bias is None else fully_masked_rows(scores.detach())
        if masked is None:
            weights = scores.softmax(dim=-1)
        else:
            weights = scores.masked_fill(masked, 0).softmax(dim=-1).masked_fill(masked, 0)
        if heads == "mean":
            weights = weights.mean(dim=1)
        return weights.to(query.dtype)


def shape_of_weights(query: Tensor, key: Tensor, heads: Heads) -> tuple[int, ...]:
    """Return the shape of what ``attention_weights`` returns."""
    kept = query.shape[:1] if heads == "mean" else query.shape[:2]
    return (*kept, query.shape[2], key.shape[2])


def check_heads(heads: object) -> None:
    """Raise ``InvalidInputError`` unless ``heads`` is ``None`` (keep all) or ``"mean"``."""
    if not (heads is None or (isinstance(heads, str) and heads == "mean")):
        raise InvalidInputError(
            'heads=None (every head) or heads="mean"',
            f"heads={heads!r}",
            "Leave heads out and select from dimension 1 of the result.",
        )


def may_tile(tensor: Tensor) -> bool:
    """Return whether results may be written in place: no autograd, no trace, no subclass."""
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

    On a CPU, scores are written into a fresh result, so that the threads of the product fault
    its pages in. If its pages are resident, scores in the cache are faster.

    Args:
        result: ``(B, heads, Q, N)``, or ``(B, Q, N)`` for the mean over heads. Any dtype,
            contiguous.
        query: ``(B, heads, Q, head_dim)``, float32 or float64.
        key: ``(B, heads or 1, N, head_dim)``, the same dtype.
        scale: The factor on the products.
        bias: Broadcastable to ``(B, heads, Q, N)``, added to the scores.
        seen: Boolean ``(Q, N)``, true where a key is visible.

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
    """Return a mask ``(…, 1)`` of the rows that are zero, ``None`` if no row can be."""
    if not (MASKED_ROWS_ARE_ZERO and scores.shape[-1]):
        return None
    return scores.amax(dim=-1, keepdim=True) == -math.inf


def chunks(length: int, step: int) -> Iterator[slice]:
    """Yield slices of at least 1 and at most ``step`` that cover ``length``."""
    step = max(1, step)
    for start in range(0, length, step):
        yield slice(start, min(start + step, length))


def past(rows: Tensor, length: int) -> Tensor:
    """Return a mask ``(Q, N)`` of the keys that are not after the position of each row."""
    keys = torch.arange(length, device=rows.device)
    return keys[None, :] <= rows[:, None]


def without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """Switch autocast off inside, where there is one for ``device``."""
    if device.type in _AUTOCAST_DEVICES:
        return torch.autocast(device.type, enabled=False)
    return nullcontext()


def _tile(query: Tensor, largest: list[Piece], length: int) -> Tensor:
    """Return memory for the scores of the ``largest`` piece. All pieces use it, in the cache."""
    return query.new_empty(sum(query[piece].shape[:3].numel() for piece in largest) * length)


def _like(query: Tensor, tile: Tensor, length: int) -> Tensor:
    rows = query.shape[:3]
    return tile[: rows.numel() * length].view(*rows, length)


def _product_into(scores: Tensor, query: Tensor, key: Tensor) -> None:
    # The rows of all heads that share a key make one product.
    units = len(key) * key.shape[1]
    lines = query.shape[:3].numel() // units
    # It must be a view, because the product writes into it. A piece is whole in every dimension
    # after the first one that it cuts, so a view exists.
    out = scores.view(units, lines, key.shape[2])
    query, key = query.reshape(units, lines, key.shape[3]), key.flatten(0, 1)
    torch.bmm(query, key.transpose(-2, -1), out=out)


def _softmax_into(out: Tensor, scores: Tensor, *, biased: bool) -> None:
    masked = fully_masked_rows(scores) if biased else None
    if masked is not None:
        scores.masked_fill_(masked, 0)
    if scores.device.type in ("cpu", "cuda"):
        # Safe if out is scores: these kernels read a whole row before they write to it.
        torch.softmax(scores, -1, out=out)
    else:
        out.copy_(scores.softmax(dim=-1))
    if masked is not None:
        out.masked_fill_(masked, 0)


def _pieces(shape: tuple[int, ...], rows: int, *, together: bool) -> Iterator[Piece]:
    """Yield pieces of ``shape (B, heads, Q)`` with about ``rows`` rows each.

    Each has as many whole samples as fit, else whole heads, else rows of one head, or of
    all heads ``together``.
    """
    batch, heads, lines = shape
    several = heads if together else min(heads, max(1, rows // max(1, lines)))
    for samples in chunks(batch, rows // max(1, heads * lines)):
        for some in chunks(heads, several):
            for line in chunks(lines, rows // max(1, several)):
                yield samples, some, line
