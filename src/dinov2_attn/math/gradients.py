"""Gradients by attention weights, from what a kernel returned and what it was given."""

from __future__ import annotations

import torch
from torch import Tensor

from dinov2_attn.math.attention import without_autocast
from dinov2_attn.typing import Heads


@torch.no_grad()
def weight_gradients(gradient: Tensor, value: Tensor, heads: Heads = None) -> Tensor:
    """Return the gradients by weights whose product with ``value`` has the given ``gradient``.

    ``output = weights @ value``, so ``d weights = d output @ valueᵀ``. The product runs in float32
    at least. The mean of heads is one product over the channels of all of them.

    Args:
        gradient: That by the output, ``(B, heads, Q, d)``.
        value: ``(B, heads, N, d)``.
        heads: None for each head, ``"mean"`` for the mean of their gradients.

    Returns:
        ``(B, heads, Q, N)``, or ``(B, Q, N)`` for the mean, in the dtype of ``gradient``.

    """
    dtype, count = gradient.dtype, gradient.shape[1]
    wide = torch.promote_types(dtype, torch.float32)
    with without_autocast(gradient.device):
        gradient, value = gradient.to(wide), value.to(wide)
        if heads == "mean":
            gradient = gradient.transpose(1, 2).flatten(2) / count
            value = value.transpose(1, 2).flatten(2)
        return (gradient @ value.transpose(-2, -1)).to(dtype)
