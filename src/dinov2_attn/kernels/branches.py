"""The branches of an attention class's own ``forward``, each able to run anywhere."""

from __future__ import annotations

from types import FunctionType

import torch
from torch import Tensor

from dinov2_attn.kernels.xformers import FLAG, KERNEL, is_gated
from dinov2_attn.typing import Forward


def branches(forward: Forward) -> dict[bool, Forward]:
    """Return ``forward`` as it runs without and with xFormers.

    The branch with xFormers is the same code over other globals. Its kernel is replaced by the
    definition of it, because the real one needs a GPU and has no float64. Nothing of upstream is
    changed. Code that does not use xFormers has the same branch twice.
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
    """A stand-in for the operators that upstream's first revision names."""

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
