"""Changing matrices of weights ``(B, heads, Q, N)``, and the biases that hide keys."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from dinov2_attn.errors import InvalidInputError


def without_heads(tensor: Tensor, heads: Sequence[int]) -> Tensor:
    """Return ``tensor (B, heads, …)`` with zeros for some heads."""
    chosen = torch.zeros(tensor.shape[1], dtype=torch.bool, device=tensor.device)
    chosen[list(heads)] = True
    return tensor.masked_fill(chosen[:, None, None], 0)


def with_rows(tensor: Tensor, rows: Sequence[int], part: Tensor) -> Tensor:
    """Return ``tensor`` with ``part`` as its ``rows`` of dimension 2."""
    index = torch.tensor(list(rows), device=tensor.device)
    return tensor.index_copy(2, index, part.to(tensor.dtype))


def with_hidden(bias: Tensor | None, seen: Tensor) -> Tensor:
    """Return ``bias`` with all keys masked that are not ``seen``."""
    if bias is None:
        return seen
    return bias & seen if bias.dtype == torch.bool else bias.masked_fill(~seen, -math.inf)


def sees_any(mask: Tensor) -> Tensor:
    """Return for each row of a bias whether it leaves a key."""
    return (mask if mask.dtype == torch.bool else mask > -math.inf).any(-1)


def no_key(columns: int, query: str) -> InvalidInputError:
    """Return the error for a ``query`` that is left without any of ``columns`` keys."""
    return InvalidInputError(
        "at least one key for each query",
        f"none of {columns} keys left for {query}",
        "Leave a key, or name other queries=. To remove all that a head reads, ablate it: "
        "heads={layer: [head]}.",
    )


def renormalised(weights: Tensor, keys: Tensor) -> Tensor:
    """Return ``weights`` without ``keys (B or 1, N)``, with the sums of the rows that they had.

    Raises:
        InvalidInputError: If the other keys of a row have no weight.

    """
    left = weights.masked_fill(keys.to(weights.device)[:, None, None], 0)
    before, after = weights.sum(-1, keepdim=True), left.sum(-1, keepdim=True)
    empty = before == 0
    if bool(((after == 0) & ~empty).any()):
        raise InvalidInputError(
            "weights of other keys in each row, which take the place of the hidden ones",
            f"a row of explicit weights whose other keys have none, in {weights.dtype}",
            "Leave a key, or name other queries=. A fused kernel masks before its softmax: "
            'attn_implementation="sdpa" in transformers, fused_attn in timm.',
        )
    return left * (before / after.masked_fill(empty, 1))
