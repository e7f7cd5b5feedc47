"""Attention from its definition, in NumPy and float64: shares no code with the package.

Only the projection is the module's own, so that queries and keys have the
same bits as those that upstream's kernel is given.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor


def _numpy(tensor: Tensor) -> np.ndarray:
    return tensor.detach().double().numpy()


def projections(module: Any, tokens: Tensor) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Queries, keys, values ``(B, heads, N, head_dim)``: thirds of the projection's channels."""
    out = _numpy(module.qkv(tokens))
    batch, length, dim = tokens.shape
    parts = [out[..., i * dim : (i + 1) * dim] for i in range(3)]
    by_heads = batch, length, module.num_heads, dim // module.num_heads
    split = [p.reshape(by_heads).swapaxes(1, 2) for p in parts]
    return split[0], split[1], split[2]


def weights(
    module: Any, tokens: Tensor, *, causal: bool = False, bias: Tensor | None = None
) -> Tensor:
    """Rows one by one: exp(score − max), normalised."""
    query, key, _ = projections(module, tokens)
    result = np.zeros((*query.shape[:3], key.shape[2]))
    for place in np.ndindex(*query.shape[:3]):
        scores = key[place[:2]] @ query[place] / np.sqrt(query.shape[-1])
        if bias is not None:
            scores = scores + _numpy(bias)[place]
        seen = place[2] + 1 if causal else len(scores)
        powers = np.exp(scores[:seen] - scores[:seen].max())
        result[place][:seen] = powers / powers.sum()
    return torch.from_numpy(result)


def features(module: Any, tokens: Tensor, attention: Tensor) -> Tensor:
    """``proj(weights @ v)`` for whatever ``attention`` is claimed to be."""
    mixed = _mixed(module, tokens, _numpy(attention))
    bias = 0 if module.proj.bias is None else _numpy(module.proj.bias)
    return torch.from_numpy(mixed @ _numpy(module.proj.weight).T + bias)


def size_of_terms(module: Any, tokens: Tensor) -> float:
    """How large the terms are that ``features`` adds up: rounding is relative to these."""
    _, _, value = projections(module, tokens)
    return float(np.abs(value).max() * np.abs(_numpy(module.proj.weight)).sum(-1).max()) + 1


def _mixed(module: Any, tokens: Tensor, attention: np.ndarray) -> np.ndarray:
    _, _, value = projections(module, tokens)
    return (attention @ value).swapaxes(1, 2).reshape(*tokens.shape[:2], -1)
