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
    count = gradient.shape[1]
    if heads != "mean":
        return product_with_values(gradient, value)
    wide = torch.promote_types(gradient.dtype, torch.float32)
    joined = gradient.to(wide).transpose(1, 2).flatten(2) / count
    return product_with_values(joined, value.transpose(1, 2).flatten(2)).to(gradient.dtype)


def product_with_values(gradient: Tensor, value: Tensor) -> Tensor:
    """Return ``gradient @ valueᵀ`` in the dtype of ``gradient``. Autograd may follow it.

    Args:
        gradient: ``(…, Q, d)``.
        value: ``(…, N, d)``.

    """
    wide = torch.promote_types(gradient.dtype, torch.float32)
    with without_autocast(gradient.device):
        product = gradient.to(wide) @ value.to(wide).transpose(-2, -1)
    return product.to(gradient.dtype)
