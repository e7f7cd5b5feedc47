"""Where xFormers has no kernel for a device, PyTorch's instead.

xFormers is available to upstream when it can be imported, whatever the device, and a CPU then
ends in "No operator found". What xFormers can do is left to it: the fallback starts with its
refusal.
"""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dinov2_attn._compat import is_compiling
from dinov2_attn.errors import KernelFallbackWarning
from dinov2_attn.math.bias import dense, groups, is_block_diagonal, is_known


def graft_kernel(original: Callable[..., Any]) -> Callable[..., Any]:
    """Give ``memory_efficient_attention`` a fallback to ``scaled_dot_product_attention``.

    Where xFormers finds an operator its result is returned, bit for bit. Where it finds
    none, the same attention ``(B, N, heads, head_dim)`` is computed by PyTorch, under a
    block-diagonal bias group by group (Σ n²), and one ``KernelFallbackWarning`` warning says why.
    Its errors about wrong inputs stay its own. It replaces the name in the module whose
    ``MemEffAttention.forward`` calls it.
    """
    warned: list[str] = []

    @functools.wraps(original, updated=())
    def memory_efficient_attention(*args: Any, **kwargs: Any) -> Any:
        try:
            return original(*args, **kwargs)
        except (NotImplementedError, ValueError) as error:
            call = _call(*args, **kwargs)
            if call is None or not _finds_no_operator(error, call["query"]):
                raise
            reason = str(error).partition("\n")[0].removesuffix(" with inputs:").rstrip(":")
        if not warned and not is_compiling():  # a warning would break the graph
            warned.append(reason)
            _warn(call["query"], reason)
        return _attend(**call)

    return memory_efficient_attention


def _call(
    query: Any,
    key: Any,
    value: Any,
    attn_bias: Any = None,
    p: float = 0.0,
    scale: float | None = None,
    *,
    op: object = None,
    **others: object,
) -> dict[str, Any] | None:
    """Name the arguments as xFormers does; ``None`` for a call that PyTorch could not answer."""
    known = attn_bias is None or is_known(attn_bias)
    if others or not known or query.ndim != 4 or key.shape[:3] != value.shape[:3]:
        return None
    inputs = {"query": query, "key": key, "value": value}
    return {**inputs, "bias": attn_bias, "dropout": p, "scale": scale}


def _finds_no_operator(error: Exception, query: Tensor) -> bool:
    if isinstance(error, NotImplementedError):  # as documented
        return True
    message = str(error)
    # Upstream's first revision names an operator, and a GPU's mask may meet a model on the CPU.
    elsewhere = query.device.type == "cpu" and "Attention bias and Query/Key/Value" in message
    return elsewhere or "does not support inputs" in message


def _warn(query: Tensor, reason: str) -> None:
    kind = f"{str(query.dtype).removeprefix('torch.')} on {query.device.type}"
    warnings.warn(
        f"xFormers has no operator for attention in {kind}, so PyTorch's "
        f"scaled_dot_product_attention computes it from here on (xFormers: {reason}). "
        "install(fallback=False) leaves that out.",
        KernelFallbackWarning,
        stacklevel=3,
    )


def _attend(
    query: Tensor, key: Tensor, value: Tensor, bias: Any, dropout: float, scale: float | None
) -> Tensor:
    if scale is not None:  # PyTorch before 2.1 knows its own only
        query = query * (scale * math.sqrt(query.shape[-1]))
    if not is_block_diagonal(bias):
        if bias is not None:
            shape = (query.shape[0], query.shape[2], query.shape[1], key.shape[1])
            bias = dense(bias, shape, query.device, query.dtype)
        return _fused(query, key, value, bias, dropout)
    parts = []
    for group in groups(bias, query, query.dtype):
        own = group.split(query, group.queries)
        theirs = [group.split(tensor, group.keys) for tensor in (key, value)]
        parts.append(_fused(own, theirs[0], theirs[1], group.mask, dropout).flatten(0, 1))
    return torch.cat(parts)[None]


def _fused(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, dropout: float
) -> Tensor:
    """Call PyTorch's kernel on ``(B, N, heads, head_dim)``."""
    query, key, value = (tensor.transpose(1, 2) for tensor in (query, key, value))
    out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, dropout_p=dropout)
    return out.transpose(1, 2)
