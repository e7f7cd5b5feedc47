"""Weights without a second matrix: tile by tile, softmax straight into the result.

A fresh matrix of scores beside the weights would double the memory, and writing it, reading
it and faulting its pages in costs more than the product. Tiles need writes in place, so
this is for tensors that nothing traces or differentiates (``may_tile``).
"""

from __future__ import annotations

import sys
from collections.abc import Iterator

import torch
from torch import Tensor, nn

# Scores of one tile: small enough to stay in a core's cache, large enough that the calls
# into PyTorch do not count.
TILE_BYTES = 2**20


def may_tile(tensor: Tensor) -> bool:
    """Say whether results may be written in place: no autograd, no trace, no subclass."""
    return (
        not torch.is_grad_enabled()
        and type(tensor) in (Tensor, nn.Parameter)
        and not is_compiling()
        and torch._C._get_tracing_state() is None
        # vmap, jvp and the like of torch.func
        and torch._C._functorch.peek_interpreter_stack() is None
    )


def fill(
    result: Tensor,
    query: Tensor,
    key: Tensor,
    *,
    bias: Tensor | None = None,
    seen: Tensor | None = None,
) -> None:
    """Write ``softmax(query @ keyᵀ + bias)`` into ``result``.

    ======  ====================================================================
    query   ``(B, heads, Q, head_dim)``, scaled, float32 or float64
    key     ``(B, heads, N, head_dim)``, likewise
    bias    broadcastable to ``(B, heads, Q, N)``, added to the scores
    seen    ``(Q, N)``, boolean: keys that a query may look at
    result  ``(B, heads, Q, N)``, or ``(B, Q, N)`` for the mean over heads; any dtype
    ======  ====================================================================
    """
    batch, heads, rows, length = *query.shape[:3], key.shape[2]
    # Heads that are averaged belong into one tile; otherwise each head is a unit of its own.
    together = heads if result.ndim == 3 else 1
    units = batch * heads // together
    query, key = (t.reshape(units, together, *t.shape[2:]) for t in (query, key))
    out = result.view(units, rows, length)
    if bias is not None:
        bias = bias.expand(batch, heads, rows, length)
    row = together * length * query.element_size()
    for some, lines in _tiles(units, rows, row, one_by_one=bias is not None):
        scores = query[some, :, lines] @ key[some].transpose(-2, -1)
        if bias is not None:
            sample, head = divmod(some.start * together, heads)
            scores += bias[sample, head : head + together, lines]
        if seen is not None:
            scores.masked_fill_(~seen[lines], float("-inf"))
        _softmax_into(out[some, lines], scores)


def _softmax_into(out: Tensor, scores: Tensor) -> None:
    if scores.shape[1] > 1:
        out.copy_(scores.softmax(dim=-1).mean(dim=1))
    elif out.dtype == scores.dtype:
        torch.softmax(scores.squeeze(1), -1, out=out)
    else:
        out.copy_(scores.squeeze(1).softmax(dim=-1))


def _tiles(units: int, rows: int, row: int, *, one_by_one: bool) -> Iterator[tuple[slice, slice]]:
    """Cut ``units`` of ``rows`` rows, each of ``row`` bytes, into pieces of about a tile."""
    several = 1 if one_by_one else max(1, TILE_BYTES // max(1, rows * row))
    lines = max(1, min(rows, TILE_BYTES // max(1, row)))
    for unit in range(0, units, several):
        for line in range(0, rows, lines):
            yield slice(unit, min(unit + several, units)), slice(line, min(line + lines, rows))


def is_compiling() -> bool:
    """Say whether Dynamo is following this very call."""
    compiler = getattr(torch, "compiler", None)
    if compiler is not None:
        return bool(compiler.is_compiling())
    dynamo = sys.modules.get("torch._dynamo")  # torch 2.0
    return dynamo is not None and bool(dynamo.is_compiling())
