"""All recipes for attention that were seen in copies of DINOv2, and what each returns.

Each recipe is a name and a formula on one kernel call. ``q``, ``k`` and ``v`` are the kernel's
query, key and value, and ``x`` is its output. Only the first recipe gives attention weights.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor

from dinov2_attn.proof.conformance.kernel_call import KernelCall, explicit


@dataclass(frozen=True)
class Recipe:
    """A way to make something that is offered as attention.

    Attributes:
        name: What the result is, as a report says it.
        formula: Makes it from a kernel call. ``None`` where the call lacks what it needs.
        note: Where the recipe comes from.

    """

    name: str
    formula: Callable[[KernelCall], Tensor | None]
    note: str = ""


DROPPED = "weights after dropout"
WEIGHTS = Recipe("equal to the kernel's weights", lambda call: call.weights)

# Published for MemEffAttention as `x.permute(0, 2, 1, 3) @ v.permute(0, 2, 3, 1)`. There x is what
# memory_efficient_attention returned, so this is A v vᵀ where A was wanted.
CIRCULATING = (
    "the recipe that circulates for xFormers, facebookresearch/dinov2 issue 90: x is the kernel's "
    "output"
)


def _logits(call: KernelCall, scale: float, bias: Tensor | None) -> Tensor | None:
    if call.query is None or call.key is None:
        return None
    logits = call.query @ call.key.mT * scale
    return logits if bias is None else logits + bias


def _softmax(call: KernelCall, scale: float, bias: Tensor | None) -> Tensor | None:
    logits = _logits(call, scale, bias)
    return None if logits is None else logits.softmax(-1)


def _unbiased(call: KernelCall) -> Tensor | None:
    return None if call.bias is None else _softmax(call, call.scale, None)


_OPERANDS: dict[str, Callable[[KernelCall], Tensor | None]] = {
    "q": lambda call: call.query,
    "k": lambda call: call.key,
    "v": lambda call: call.value,
    "x": lambda call: call.output,
}


def _pair(left: str, right: str, scaled: bool, softmax: bool) -> Recipe:
    """Return the recipe of ``left @ rightᵀ``, with the scale and with a softmax or without."""

    def formula(call: KernelCall) -> Tensor | None:
        a, b = _OPERANDS[left](call), _OPERANDS[right](call)
        if a is None or b is None:
            return None
        made = a @ b.mT * (call.scale if scaled else 1)
        return made.softmax(-1) if softmax else made

    name = f"{left} {right}ᵀ" + (" · scale" if scaled else "")
    name = f"softmax({name})" if softmax else name
    return Recipe(f"{name}, not weights", formula, CIRCULATING if left + right == "xv" else "")


def _between_heads(left: str) -> Recipe:
    """Return the recipe of ``left @ vᵀ`` on ``(B, N, heads, head_dim)``, which mixes up heads."""

    def formula(call: KernelCall) -> Tensor | None:
        a = _OPERANDS[left](call)
        if a is None or a.ndim != 4:
            return None
        return a.transpose(1, 2) @ call.value.transpose(1, 2).mT

    name = f"{left} vᵀ between the heads of each token, not weights"
    return Recipe(name, formula, CIRCULATING if left == "x" else "")


RECIPES: tuple[Recipe, ...] = (
    WEIGHTS,
    Recipe(DROPPED, lambda call: call.dropped),
    Recipe("logits before softmax", lambda call: _logits(call, call.scale, call.bias)),
    Recipe("q kᵀ without scale, before softmax", lambda call: _logits(call, 1, None)),
    Recipe("logits without the mask or bias", lambda call: _logits(call, call.scale, None)),
    Recipe("weights without scale", lambda call: _softmax(call, 1, call.bias)),
    Recipe("weights without the mask or bias", _unbiased),
    Recipe(
        "softmax over the queries, not over the keys",
        lambda call: None if call.bias is not None else _columns(call),
    ),
    *(
        _pair(left, right, scaled, softmax)
        for (left, right), softmax, scaled in product(
            product("xqkv", repeat=2), (False, True), (False, True)
        )
        if (left, right) != ("q", "k")
    ),
    *map(_between_heads, "xqk"),
)

# What is done to a whole recipe before it is returned.
REDUCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "": lambda full: full,
    "mean over heads": lambda full: full.mean(1),
    "max over heads": lambda full: full.amax(1),
    "sum over heads": lambda full: full.sum(1),
    "transpose": lambda full: full.mT,
}


def _columns(call: KernelCall) -> Tensor | None:
    logits = _logits(call, call.scale, None)
    return None if logits is None else logits.softmax(-2)


def from_projection(call: KernelCall, projected: Tensor) -> KernelCall | None:
    """Return ``call`` with queries and keys as ``qkv`` gave them, ``(B, N, 3·heads·head_dim)``.

    They are not the kernel's where a norm or a rotation follows. ``None`` if they are the same.
    """
    query, key = call.query, call.key
    if query is None or key is None or query.ndim != 4:
        return None
    batch, heads, length, dim = query.shape
    if projected.numel() != 3 * query.numel():
        return None
    split = projected.double().reshape(batch, length, 3, heads, dim).permute(2, 0, 3, 1, 4)
    if torch.allclose(split[0] @ split[1].mT, query @ key.mT, rtol=1e-4, atol=1e-4):
        return None
    weights = explicit(split[0], split[1], call.scale, call.bias)
    return KernelCall(
        split[0], split[1], call.value, call.scale, call.bias, weights, weights, call.output
    )


def fitted_scale(call: KernelCall, found: Tensor) -> float | None:
    """Return the scale with which ``found`` would be weights, by least squares; ``None`` without.

    Args:
        call: The kernel call.
        found: What was returned, of the shape of its weights.

    """
    logits = _logits(call, 1, None)
    if logits is None or logits.shape != found.shape or not bool((found > 0).all()):
        return None
    target = found.double().log() - (0 if call.bias is None else call.bias)
    target = target - target.mean(-1, keepdim=True)
    centred = logits - logits.mean(-1, keepdim=True)
    scale = float((target * centred).sum() / (centred * centred).sum())
    return scale if math.isfinite(scale) else None
