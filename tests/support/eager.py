"""A pass in which every kernel is the textbook's: one matrix for each call, changed by a function.

It shares no code with the package. It serves models whose attention is PyTorch's fused kernel, and
upstream's own attention, whose explicit code is replaced on the instances.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

Matrix = Callable[[int, Tensor], Tensor]


def attend(
    query: Tensor, key: Tensor, value: Tensor, change: Callable[[Tensor], Tensor], scale: float
) -> Tensor:
    """Return ``change(softmax(q kᵀ · scale)) v``."""
    scores = torch.einsum("bhqd,bhkd->bhqk", query, key) * scale
    powers = (scores - scores.amax(-1, keepdim=True)).exp()
    return torch.einsum("bhqk,bhkd->bhqd", change(powers / powers.sum(-1, keepdim=True)), value)


class Eager(TorchFunctionMode):
    """Computes each call of ``scaled_dot_product_attention`` by its definition.

    Attributes:
        calls: The number of calls.

    """

    def __init__(self, change: Matrix) -> None:
        super().__init__()
        self.calls, self._change = 0, change

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if getattr(func, "__name__", "") != "scaled_dot_product_attention":
            return func(*args, **(kwargs or {}))
        options = dict(kwargs or {})
        scale = options.pop("scale", None) or args[0].shape[-1] ** -0.5
        assert not any(options.values()), options
        number, self.calls = self.calls, self.calls + 1
        return attend(*args[:3], lambda weights: self._change(number, weights), scale)


@contextmanager
def eager_attention(model: nn.Module, change: Matrix) -> Iterator[None]:
    """Let the attention of upstream's blocks be the textbook's inside."""
    attentions = [block.attn for chunk in model.blocks for block in _blocks_in(chunk)]

    def forward_of(number: int, module: Any) -> Callable[..., Tensor]:
        def forward(x: Tensor, *_: Any) -> Tensor:
            batch, length, channels = x.shape
            split = module.qkv(x).reshape(batch, length, 3, module.num_heads, -1)
            query, key, value = split.permute(2, 0, 3, 1, 4)
            scale = (channels // module.num_heads) ** -0.5
            mixed = attend(query, key, value, lambda weights: change(number, weights), scale)
            return module.proj(mixed.transpose(1, 2).reshape(batch, length, channels))

        return forward

    for number, module in enumerate(attentions):
        module.forward = forward_of(number, module)
    try:
        yield
    finally:
        for module in attentions:
            del module.forward


def _blocks_in(chunk: nn.Module) -> list[Any]:
    """Return a block alone, or the blocks of a chunk of them."""
    return (
        [chunk] if hasattr(chunk, "attn") else [b for b in chunk.children() if hasattr(b, "attn")]
    )
