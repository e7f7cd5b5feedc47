"""Attention from its definition, in float64, row by row, without code of the package.

Only the projection is the module's own, so that queries and keys are exactly those of the kernel,
rounding included. Where a class does not attend to its projection, they are caught at the kernel.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from dinov2_attn.grafting.modules import reason_for_kernel
from dinov2_attn.proof.conformance.kernel_call import KernelCall, caught


def is_at_kernel(module: Any) -> bool:
    """Return whether the plugin takes the weights of ``module`` at its kernel."""
    return reason_for_kernel(type(module)) is not None


def kernel_call(module: Any, *args: Any, **kwargs: Any) -> KernelCall:
    """Return what the kernel of ``module`` is given in one pass, caught without the plugin."""
    _, calls = caught(module, lambda: module(*args, **kwargs))
    found = [call for several in calls.values() for call in several]
    assert len(found) == 1, f"expected one kernel call in a pass; found {len(found)}"
    return found[0]


def true_weights(module: Any, *args: Any, **kwargs: Any) -> Tensor:
    """Return the weights of a pass: caught at the kernel, or from the projection."""
    if is_at_kernel(module):
        return kernel_call(module, *args, **kwargs).weights
    tokens, *causal = args
    is_causal = kwargs.pop("is_causal", any(flag is True for flag in causal))
    bias, scale = kwargs.pop("attn_bias", None), scale_of(module, tokens)
    return weights(module, tokens, causal=is_causal, bias=bias, scale=scale)


def projections(module: Any, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return queries, keys, values ``(B, heads, N, head_dim)``: thirds of the channels."""
    out = module.qkv(tokens).detach().double()
    batch, length, channels = out.shape
    width = channels // 3
    thirds = [out[..., i * width : (i + 1) * width] for i in range(3)]
    shape = (batch, length, module.num_heads, width // module.num_heads)
    query, key, value = (third.reshape(shape).transpose(1, 2) for third in thirds)
    return query, key, value


def weights(
    module: Any,
    tokens: Tensor,
    *,
    causal: bool = False,
    bias: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """Return softmax(q kᵀ · scale + bias), computed row by row."""
    query, key, _ = projections(module, tokens)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    return _softmax_of(query, key, scale, causal=causal, bias=bias)


def weights_at_kernel(run: Callable[[], object]) -> Tensor:
    """Return the weights of the queries and keys that ``run`` gives to PyTorch's kernel.

    For attention that rotates them after its projection.
    """
    with _Inputs() as inputs:
        run()
    (query, key, causal), *others = inputs.calls
    assert not others, f"expected one call of the kernel; found {len(inputs.calls)}"
    return _softmax_of(query, key, query.shape[-1] ** -0.5, causal=causal)


class _Inputs(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Tensor, Tensor, bool]] = []

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__name__", "") == "scaled_dot_product_attention":
            query, key = (tensor.detach().double() for tensor in args[:2])
            self.calls.append((query, key, bool(kwargs.get("is_causal"))))
        return func(*args, **kwargs)


def _softmax_of(
    query: Tensor, key: Tensor, scale: float, *, causal: bool = False, bias: Tensor | None = None
) -> Tensor:
    result = query.new_zeros(*query.shape[:3], key.shape[2], dtype=torch.float64)
    for sample, head, row in product(*map(range, query.shape[:3])):
        scores = (key[sample, head] * query[sample, head, row]).sum(-1) * scale
        if bias is not None:
            scores = scores + bias[sample, head, row].double()
        seen = row + 1 if causal else len(scores)
        powers = torch.exp(scores[:seen] - scores[:seen].max())
        result[sample, head, row, :seen] = powers / powers.sum()
    return result


def features(module: Any, tokens: Tensor, attention: Tensor) -> Tensor:
    """Return ``proj(attention @ v)`` for any ``attention``."""
    _, _, value = projections(module, tokens)
    mixed = torch.einsum("bhqk,bhkd->bqhd", attention.detach().double(), value).flatten(2)
    bias = 0 if module.proj.bias is None else module.proj.bias.detach().double()
    made: Tensor = mixed @ module.proj.weight.detach().double().T + bias
    return made


def size_of_terms(module: Any, tokens: Tensor) -> float:
    """Return the size of the terms that ``features`` adds, to which rounding is relative."""
    _, _, value = projections(module, tokens)
    rows = module.proj.weight.detach().double().abs().sum(-1)
    return float(value.abs().max() * rows.max()) + 1


def scale_of(module: Any, tokens: Tensor) -> float:
    """Return the scale that reproduces the module's own output.

    Fused kernels use ``head_dim ** -0.5`` and explicit code uses ``module.scale``, which can
    differ in a copy.
    """
    query, _, _ = projections(module, tokens)
    output = module(tokens).detach().double()

    def error(scale: float) -> float:
        made = features(module, tokens, weights(module, tokens, scale=scale))
        return float((made - output).abs().max())

    fused: float = query.shape[-1] ** -0.5
    return min((fused, float(module.scale)), key=error)
