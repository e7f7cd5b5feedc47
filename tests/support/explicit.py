"""The gradients of a pass by its attention weights, from explicit attention and autograd.

Each call of PyTorch's kernel inside is computed from its definition, so that the weights are part
of the graph. It shares no code with the package.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode


class Eager(TorchFunctionMode):
    """Explicit attention in place of PyTorch's kernel.

    Attributes:
        weights: The weights of each call, ``(B, heads, N, N)``, as the graph holds them.
        values: What they were multiplied with.
        queries: What the scores were made of.
        keys: What the scores were made of.

    """

    def __init__(self) -> None:
        super().__init__()
        self.weights: list[Tensor] = []
        self.values: list[Tensor] = []
        self.queries: list[Tensor] = []
        self.keys: list[Tensor] = []

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = getattr(func, "__name__", "")
        if name == "softmax":  # of code that is explicit already
            self.weights.append(func(*args, **(kwargs or {})))
            return self.weights[-1]
        if name != "scaled_dot_product_attention":
            return func(*args, **(kwargs or {}))
        return self._attend(*args, **(kwargs or {}))

    def _attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
    ) -> Tensor:
        assert not dropout_p
        scores = query @ key.transpose(-2, -1) * (scale or query.shape[-1] ** -0.5)
        if is_causal:
            scores = scores.masked_fill(torch.ones_like(scores).triu(1) > 0, -torch.inf)
        if attn_mask is not None:
            scores = scores + attn_mask
        self.queries.append(query)
        self.keys.append(key)
        self.values.append(value)
        self.weights.append(scores.softmax(-1))
        return self.weights[-1] @ value


def eager_gradients(run: Any, target: Any) -> tuple[list[Tensor], list[Tensor]]:
    """Return the weights of ``run()`` and the gradients of ``target(run())`` by them."""
    with Eager() as eager:
        output = run()
    return eager.weights, list(torch.autograd.grad(target(output), eager.weights))
