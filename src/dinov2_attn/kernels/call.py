"""What a class's own ``forward`` does between its projection and its kernel.

Two questions that reading the attributes of a module cannot answer: whose scale the kernel
uses, and which of its branches runs.
"""

from __future__ import annotations

import math
from types import FunctionType
from typing import Any

import torch
from torch import Tensor

from dinov2_attn.errors import InvalidInputError
from dinov2_attn.kernels.xformers import FLAG, KERNEL, describe_flags, flag_of, is_gated
from dinov2_attn.math import bias as biases
from dinov2_attn.typing import Forward


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
            xformers = flag_of(self._forward)
        if self._honours_scale[xformers]:
            return float(module.scale)
        return 1 / math.sqrt(head_dim)

    def check_bias(self, bias: object) -> None:
        """Raise ``InvalidInputError`` unless ``forward`` has a kernel that takes this ``bias``."""
        if not biases.is_known(bias):
            raise biases.unknown(bias)
        if is_gated(self._forward) and not flag_of(self._forward):
            raise InvalidInputError(
                f"no attn_bias, which this attention takes only where its module's {FLAG} is true",
                f"one of type {type(bias).__name__}, where {describe_flags(self._forward)}",
                "Leave it out, or install xFormers and import upstream without XFORMERS_DISABLED.",
            )
        if not (is_gated(self._forward) or isinstance(bias, Tensor)):
            raise InvalidInputError(
                "attn_bias as a dense tensor: this class hands it to PyTorch's kernel",
                f"one of type {type(bias).__name__}",
                "Use MemEffAttention, or pass attn_bias.materialize(...).",
            )


def branches(forward: Forward) -> dict[bool, Forward]:
    """Return ``forward`` as it runs without and with xFormers, both able to run anywhere.

    The branch with xFormers is the very same code over other globals: xFormers' kernel
    replaced by its definition, since the real one needs a GPU and knows no float64.
    Nothing of upstream is touched. Code that does not know xFormers has one branch twice.
    """
    if not is_gated(forward):
        return {False: forward, True: forward}
    plain = {KERNEL: _definition, "unbind": torch.unbind, "fmha": _AnyOperator()}
    return {
        False: _over_globals(forward, {FLAG: False}),
        True: _over_globals(forward, {FLAG: True, **plain}),
    }


def _over_globals(forward: FunctionType, changes: dict[str, object]) -> Forward:
    copy = FunctionType(
        forward.__code__,
        {**forward.__globals__, **changes},
        argdefs=forward.__defaults__,
        closure=forward.__closure__,
    )
    copy.__kwdefaults__ = forward.__kwdefaults__
    return copy


class _AnyOperator:
    """Stands for the operators that upstream's first revision names."""

    def __getattr__(self, name: str) -> None:
        return None


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
