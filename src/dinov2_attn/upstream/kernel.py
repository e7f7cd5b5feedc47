"""What a class's own ``forward`` does between its projection and its kernel.

Two questions that reading the attributes of a module cannot answer: whose scale the kernel
uses, and which of its branches runs.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from types import FunctionType
from typing import Any, TypeGuard

import torch
from torch import Tensor

Forward = Callable[..., Any]

_FLAG = "XFORMERS_AVAILABLE"


class Kernel:
    """The kernel inside an attention class's own ``forward``.

    Explicit upstream code multiplies by ``module.scale``. PyTorch's and xFormers' fused
    kernels never see that attribute and use ``head_dim ** -0.5``. The two agree until
    somebody changes the attribute; then only the kernel's own choice is the attention
    that the features were made of. Which it is, is measured (``honours_scale``).
    """

    def __init__(self, forward: Forward, honours_scale: dict[bool, bool]) -> None:
        self._forward = forward
        self._honours_scale = honours_scale

    def scale(self, module: Any, head_dim: int, *, xformers: bool | None = None) -> float:
        """Return the factor on ``query @ keyᵀ``, with or without xFormers, or as things are."""
        if xformers is None:
            xformers = xformers_flag(self._forward)
        if self._honours_scale[xformers]:
            return float(module.scale)
        return 1 / math.sqrt(head_dim)

    def takes_bias(self) -> bool:
        """Say whether an ``attn_bias`` reaches a kernel: upstream's own asks for xFormers."""
        return not _is_gated(self._forward) or xformers_flag(self._forward)


def project(module: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return query, key and value ``(B, heads, N, head_dim)`` of tokens ``x (B, N, C)``.

    The module's own ``qkv`` is called, so whatever sits there (hooks, adapters, a
    quantised layer) has its say.
    """
    qkv = module.qkv(x).unflatten(-1, (3, module.num_heads, -1))
    query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    return query, key, value


def xformers_flag(forward: Forward) -> bool:
    """Say whether ``forward`` would call xFormers' kernel now.

    Upstream decides by a global of the module, written once at import. A ``forward``
    without it does not know xFormers.
    """
    return _is_gated(forward) and bool(forward.__globals__[_FLAG])


def branches(forward: Forward) -> dict[bool, Forward]:
    """Return ``forward`` as it runs without and with xFormers, both able to run anywhere.

    The branch with xFormers is the very same code over other globals: xFormers' kernel
    replaced by its definition, since the real one needs a GPU and knows no float64.
    Nothing of upstream is touched. Code that does not know xFormers has one branch twice.
    """
    if not _is_gated(forward):
        return {False: forward, True: forward}
    plain = {"memory_efficient_attention": _definition, "unbind": torch.unbind}
    return {
        False: _over_globals(forward, {_FLAG: False}),
        True: _over_globals(forward, {_FLAG: True, **plain}),
    }


def _is_gated(forward: Forward) -> TypeGuard[FunctionType]:
    return (
        isinstance(forward, FunctionType)
        and _FLAG in forward.__code__.co_names
        and _FLAG in forward.__globals__
    )


def _over_globals(forward: FunctionType, changes: dict[str, object]) -> Forward:
    copy = FunctionType(
        forward.__code__,
        {**forward.__globals__, **changes},
        forward.__name__,
        forward.__defaults__,
        forward.__closure__,
    )
    copy.__kwdefaults__ = forward.__kwdefaults__
    return copy


def _definition(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_bias: Tensor | None = None,
    p: float = 0.0,
    scale: float | None = None,
    *,
    op: object = None,
) -> Tensor:
    """Compute what xFormers documents its kernel to compute, on ``(B, N, heads, head_dim)``."""
    if scale is None:
        scale = query.shape[-1] ** -0.5
    scores = torch.einsum("bqhd,bkhd->bhqk", query * scale, key)
    if attn_bias is not None:
        scores = scores + attn_bias
    return torch.einsum("bhqk,bkhd->bqhd", scores.softmax(dim=-1), value)
