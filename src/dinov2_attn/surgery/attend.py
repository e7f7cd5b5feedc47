"""What one attention module answers when it is asked for its weights."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from dinov2_attn.attention import Heads, attention_weights, check_heads, shape_of_weights
from dinov2_attn.biases import dense, groups, is_block_diagonal
from dinov2_attn.errors import InvalidInput
from dinov2_attn.queries import Queries, Rows, place
from dinov2_attn.upstream.kernel import Kernel
from dinov2_attn.upstream.projection import Piece, Projection


def attend(
    module: Any,
    kernel: Kernel,
    *,
    x: Tensor,
    attn_bias: Any = None,
    is_causal: bool = False,
    queries: Queries = None,
    heads: Heads = None,
    projected: Tensor | None = None,
) -> Tensor | list[Tensor]:
    """Return the weights of ``module`` on tokens ``x (B, N, C)``.

    ``projected (B, N, 3 · C)`` is what ``module.qkv`` has made of them, where it has.

    One tensor ``(B, heads, Q, N)``, or ``(B, Q, N)`` for the mean of heads; under a
    block-diagonal ``attn_bias`` over ``x (1, ΣN, C)`` a list with one such tensor for
    each element that was nested (``_batch_sizes``), or for each block. Never more than
    Σ n² weights are computed, nor as much memory again used.
    """
    check_heads(heads)
    check_tokens(x)
    if attn_bias is not None:
        kernel.check_bias(attn_bias)
    ask = _Question(module, kernel, queries, heads, is_causal)
    wide = torch.promote_types(x.dtype, torch.float32)
    if is_block_diagonal(attn_bias):
        found, source = groups(attn_bias, x, wide), Projection(module, x, projected)
        return [ask.answer(source.pieces(g), g.batch, g.length, g.mask) for g in found]
    batch, length = x.shape[:2]
    if attn_bias is not None:
        attn_bias = dense(attn_bias, (batch, module.num_heads, length, length), x.device, wide)
    return ask.answer(Projection(module, x, projected).pieces(), batch, length, attn_bias)


def check_tokens(tokens: object) -> None:
    """Raise ``InvalidInput`` unless ``tokens`` are ``(B, N, C)``."""
    if not isinstance(tokens, Tensor) or tokens.ndim != 3:
        found = tuple(tokens.shape) if isinstance(tokens, Tensor) else type(tokens).__name__
        raise InvalidInput(
            "tokens as a tensor of shape (B, N, C), to a block also a list of such tensors",
            f"{found}",
            "Ask the model if images are at hand, or add the batch dimension.",
        )


@dataclass(frozen=True)
class _Question:
    module: Any
    kernel: Kernel
    queries: Queries
    heads: Heads
    is_causal: bool

    def answer(
        self, pieces: Iterator[Piece], batch: int, length: int, bias: Tensor | None
    ) -> Tensor:
        """Return the weights of ``batch`` sequences of ``length`` queries, piece by piece."""
        rows = place(self.queries, length)
        if bias is not None:
            bias = _rows(bias, rows)
        first = next(pieces)
        _, query, key = first
        if len(query) == batch:
            return self._weigh(query, key, rows, bias)
        out = query.new_empty((batch, *shape_of_weights(query[:, :, rows], key, self.heads)[1:]))
        for samples, query, key in chain([first], pieces):
            some = bias if bias is None else _samples(bias, samples)
            self._weigh(query, key, rows, some, out[samples])
        return out

    def _weigh(
        self, query: Tensor, key: Tensor, rows: Rows, bias: Tensor | None, out: Tensor | None = None
    ) -> Tensor:
        causal_rows = None
        if self.is_causal:
            causal_rows = torch.arange(query.shape[2], device=query.device)[rows]
        return attention_weights(
            query[:, :, rows],
            key,
            self.kernel.scale(self.module, query.shape[-1]),
            bias=bias,
            causal_rows=causal_rows,
            heads=self.heads,
            out=out,
        )


def _rows(bias: Tensor, rows: Rows) -> Tensor:
    return bias if bias.ndim < 2 or bias.shape[-2] == 1 else bias[..., rows, :]


def _samples(bias: Tensor, samples: slice) -> Tensor:
    return bias if bias.ndim < 4 or bias.shape[0] == 1 else bias[samples]
