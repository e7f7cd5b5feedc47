"""The mathematics of attention weights, on tensors alone.

Nothing here knows upstream: queries and keys come in, weights come out.
"""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from dinov2_attn.errors import InvalidInputError
from dinov2_attn.math.buffers import new_result
from dinov2_attn.math.tiles import fully_masked_rows, may_tile, softmax_into
from dinov2_attn.typing import Heads

# Where autocast exists in every torch from 2.0 on. Elsewhere (meta, mps, ...) there is either
# nothing to switch off or no way to ask for it in all of them.
_AUTOCAST_DEVICES = ("cpu", "cuda")


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

    ======  ======================================================================
    query   ``(B, heads, Q, head_dim)``, any floating dtype
    key     ``(B, heads, N, head_dim)``, the same dtype; ``(B, 1, N, head_dim)`` where
            all heads share one
    bias    broadcastable to ``(B, heads, Q, N)``: added to the scores when floating,
            a mask of what may be seen when boolean, as in PyTorch's kernel
    out     what to write the result into, where ``may_tile(query)``
    result  ``(B, heads, Q, N)``, or ``(B, Q, N)`` with ``heads="mean"``, in the dtype
            of ``query``
    ======  ======================================================================

    ``causal_rows`` makes the attention causal: it holds the position ``(Q,)`` of every
    query in its sequence, and a query sees no key behind its own position::

        positions 0, 2 of 4        1 0 0 0
                                   1 1 1 0

    A query to which ``bias`` shows no key at all gets what PyTorch's kernel gives it: nought
    from PyTorch 2.5 on, NaN before.

    Product and softmax run in float32 at least, autocast or not: the fused kernels
    accumulate in float32 too, and in half precision the scores alone would lose more
    than the kernel does. The equivalent code is::

        scores = query.float() @ key.float().transpose(-2, -1) * scale
        return (scores + bias).softmax(dim=-1).to(query.dtype)

    Source: Vaswani et al., *Attention Is All You Need*, 2017, equation 1.
    """
    with _without_autocast(query.device):
        dtype = torch.promote_types(query.dtype, torch.float32)
        wide = key.to(dtype)
        seen = None if causal_rows is None else _past(causal_rows, key.shape[2])
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


def _past(rows: Tensor, length: int) -> Tensor:
    """Mask ``(Q, N)`` of the keys that do not lie behind each row's own position."""
    keys = torch.arange(length, device=rows.device)
    return keys[None, :] <= rows[:, None]


def _without_autocast(device: torch.device) -> AbstractContextManager[object]:
    if device.type in _AUTOCAST_DEVICES:
        return torch.autocast(device.type, enabled=False)
    return nullcontext()
