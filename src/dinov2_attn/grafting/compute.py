"""What the graft on an attention module returns: its weights, or its queries and keys."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from dinov2_attn.backbone.projection import Piece, Projection
from dinov2_attn.errors import InvalidInputError
from dinov2_attn.kernels.xformers import Kernel
from dinov2_attn.math.attention import attention_weights, check_heads, may_tile, shape_of_weights
from dinov2_attn.math.bias import Group, bias_of_rows, dense, groups, is_block_diagonal
from dinov2_attn.math.buffers import NewResult, new_result
from dinov2_attn.math.selection import to_index
from dinov2_attn.typing import Heads, Queries


def module_weights(
    module: Any,
    kernel: Kernel,
    *,
    x: Tensor,
    attn_bias: Any = None,
    is_causal: bool = False,
    queries: Queries = None,
    heads: Heads = None,
    projected: Tensor | None = None,
    new: NewResult = new_result,
) -> Tensor | list[Tensor]:
    """Return the weights of an attention module.

    Never more than Σ n² weights are computed, in little more memory than they need.

    Args:
        module: The attention module.
        kernel: The kernel of its class.
        x: Its tokens, ``(B, N, C)``.
        attn_bias: As the module's own forward takes it.
        is_causal: Whether a token sees no token after it.
        queries: The rows to return, all by default.
        heads: None for each head, ``"mean"`` for their mean.
        projected: What ``module.qkv`` returned for ``x``, ``(B, N, 3 · C)``, if it ran already.
        new: Allocates results that are written in place.

    Returns:
        ``(B, heads, Q, N)``, or ``(B, Q, N)`` for the mean of heads. For a block-diagonal
        ``attn_bias`` over ``x (1, ΣN, C)``, a list with one such tensor for each element that
        was nested (``_batch_sizes``), or for each block.

    """
    check_heads(heads)
    check_tokens(x)
    request = _Request(module, kernel, queries, heads, is_causal, new)
    batch, length = x.shape[:2]
    if attn_bias is not None:
        kernel.check_bias(attn_bias)
        wide = torch.promote_types(x.dtype, torch.float32)
        if is_block_diagonal(attn_bias):
            found, source = groups(attn_bias, x, wide), Projection(module, x, projected)
            return [request.weights(source, g.batch, g.length, g.mask, g) for g in found]
        attn_bias = dense(attn_bias, (batch, module.num_heads, length, length), x.device, wide)
    return request.weights(Projection(module, x, projected), batch, length, attn_bias)


def queries_and_keys(
    module: Any,
    kernel: Kernel,
    *,
    x: Tensor,
    attn_bias: Any = None,
    is_causal: bool = False,
    queries: Queries = None,
) -> list[tuple[Piece, float]]:
    """Return pieces of the batch with their queries and keys, and the scale of the products.

    Raises:
        InvalidInputError: If a mask or bias decides about the weights too.

    """
    if attn_bias is not None or is_causal:
        raise InvalidInputError(
            "attention that sees all tokens alike",
            "a causal block" if is_causal else "one with attn_bias",
            "Use get_self_attention, whose weights include it.",
        )
    pieces = Projection(module, x).pieces(to_index(queries, x.shape[1]))
    return [(piece, kernel.scale(module, piece.head_dim)) for piece in pieces]


def check_tokens(tokens: object) -> None:
    """Raise ``InvalidInputError`` unless ``tokens`` are ``(B, N, C)``."""
    if not isinstance(tokens, Tensor) or tokens.ndim != 3:
        found = tuple(tokens.shape) if isinstance(tokens, Tensor) else type(tokens).__name__
        raise InvalidInputError(
            "tokens as a tensor of shape (B, N, C), to a block also a list of such tensors",
            f"{found}",
            "Call the model instead if you have images, or add the batch dimension.",
        )


@dataclass(frozen=True)
class _Request:
    module: Any
    kernel: Kernel
    queries: Queries
    heads: Heads
    is_causal: bool
    new: NewResult

    def weights(
        self,
        source: Projection,
        batch: int,
        length: int,
        bias: Tensor | None,
        group: Group | None = None,
    ) -> Tensor:
        """Return the weights of ``batch`` sequences of ``length`` queries, piece by piece."""
        rows = to_index(self.queries, length)
        if bias is not None:
            bias = bias_of_rows(bias, rows)
        pieces = source.pieces(rows, group)
        first = next(pieces)
        causal_rows = None
        if self.is_causal:
            causal_rows = torch.arange(length, device=first.query.device)[rows]
        shape = (batch, *shape_of_weights(first.query, first.key, self.heads)[1:])
        if first.query.shape[0] == batch and not may_tile(first.query):
            return self._weigh(first, bias, causal_rows)
        out = self.new(first.query, shape)
        for piece in chain([first], pieces):
            some = bias if bias is None else _samples(bias, piece.samples)
            self._weigh(piece, some, causal_rows, out[piece.samples])
        return out

    def _weigh(
        self,
        piece: Piece,
        bias: Tensor | None,
        causal_rows: Tensor | None,
        out: Tensor | None = None,
    ) -> Tensor:
        return attention_weights(
            piece.query,
            piece.key,
            self.kernel.scale(self.module, piece.head_dim),
            bias=bias,
            causal_rows=causal_rows,
            heads=self.heads,
            out=out,
        )


def _samples(bias: Tensor, samples: slice) -> Tensor:
    return bias if bias.ndim < 4 or bias.shape[0] == 1 else bias[samples]
