"""The weights of an attention module from its own projection of its tokens: queries and keys."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dinov2_attn._compat import hooks_of, submodules
from dinov2_attn.backbone.structure import BLOCK_CHILDREN
from dinov2_attn.errors import InvalidInputError
from dinov2_attn.kernels.xformers import Kernel
from dinov2_attn.math.attention import (
    attention_weights,
    check_heads,
    chunks,
    may_tile,
    shape_of_weights,
)
from dinov2_attn.math.bias import Group, bias_of_rows, dense, groups, is_block_diagonal
from dinov2_attn.math.buffers import new_result
from dinov2_attn.math.selection import Rows, to_index
from dinov2_attn.typing import Heads, Queries

# Bytes of queries and keys that are made at a time: little next to the weights of a large batch.
TILE_BYTES = 2**20

# The ratio of multiplications, without keys to with them, below which no keys are made. At equal
# counts the times are equal too, as measured by benchmarks/break_even.py.
BREAK_EVEN = 1

_EXACT = (torch.float32, torch.float64)


class Piece(NamedTuple):
    """Some samples, their queries and what these are multiplied with.

    ``query`` is ``(b, heads, Q, d)``, ``key`` ``(b, heads or 1, N, d)``. ``d`` is
    ``head_dim``, unless the queries went through the keys' weights: then the tokens
    themselves are the key of every head, and ``d`` their channels.
    """

    samples: slice
    query: Tensor
    key: Tensor
    head_dim: int


def module_weights(
    module: Any,
    kernel: Kernel,
    *,
    x: Tensor,
    attn_bias: Any = None,
    is_causal: bool = False,
    queries: Queries = None,
    heads: Heads = None,
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

    Returns:
        ``(B, heads, Q, N)``, or ``(B, Q, N)`` for the mean of heads. For a block-diagonal
        ``attn_bias`` over ``x (1, ΣN, C)``, a list with one such tensor for each element that
        was nested (``_batch_sizes``), or for each block.

    """
    check_heads(heads)
    check_tokens(x)
    request = _Request(module, kernel, queries, heads, is_causal)
    batch, length = x.shape[:2]
    if attn_bias is not None:
        kernel.check_bias(attn_bias)
        wide = torch.promote_types(x.dtype, torch.float32)
        if is_block_diagonal(attn_bias):
            found, source = groups(attn_bias, x, wide), Projection(module, x)
            return [request.weights(source, g.batch, g.length, g.mask, g) for g in found]
        attn_bias = dense(attn_bias, (batch, module.num_heads, length, length), x.device, wide)
    return request.weights(Projection(module, x), batch, length, attn_bias)


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
        out = new_result(first.query, shape)
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


def project(module: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return query, key and value ``(B, heads, N, head_dim)`` of tokens ``x (B, N, C)``.

    The module's own ``qkv`` is called, with its hooks, adapters or quantised layer.
    """
    query, key, value = _by_heads(module, module.qkv(x), 3)
    return query, key, value


class Projection:
    """Queries and keys of tokens ``x (B, N, C)``, made as late and as little as is safe.

    A plain linear layer gives the same for a few samples and for some of its outputs. Without
    autograd or a trace, only the needed queries are made, for few of them no keys, and no values.
    Any other ``qkv`` is called as upstream calls it: once, with everything.
    """

    def __init__(self, module: Any, x: Tensor) -> None:
        self._module = module
        self._tokens = x
        is_needed = not (may_tile(x) and _is_plain(module.qkv))
        self._whole = _by_heads(module, module.qkv(x), 3)[:2] if is_needed else None
        # Half precision, autocast's too, rounds queries and keys; only the kernel's own
        # products round them as the kernel has them.
        self._is_exact = self._whole is None and _product_dtype(module, x) in _EXACT

    def pieces(self, rows: Rows, group: Group | None = None) -> Iterator[Piece]:
        """Yield the queries of ``rows`` and what they are multiplied with, sample by sample.

        With ``group``, those of its blocks of the concatenation ``x (1, ΣN, C)``.
        """
        if self._whole is not None:
            query, key = self._whole
            if group is not None:
                query = _regroup(group, query, group.queries)
                key = _regroup(group, key, group.keys)
            yield Piece(slice(None), query[:, :, rows], key, query.shape[-1])
        elif group is None:
            yield from self._few_at_a_time(self._tokens, self._tokens, rows)
        else:
            queries = group.split(self._tokens, group.queries)
            keys = group.split(self._tokens, group.keys)
            yield from self._few_at_a_time(queries, keys, rows)

    def _few_at_a_time(self, queries: Tensor, keys: Tensor, rows: Rows) -> Iterator[Piece]:
        sample = 2 * queries.shape[1] * queries.shape[2] * queries.element_size()
        for some in chunks(max(1, len(queries)), TILE_BYTES // max(1, sample)):
            query = self._queries(queries[some], rows)
            head_dim = query.shape[-1]
            if self._is_exact and _does_without_keys(query, keys):
                query, key = _through_keys(self._module, query), keys[some, None]
            else:
                key = _third(self._module, keys[some], 1)
            yield Piece(some, query, key, head_dim)

    def _queries(self, tokens: Tensor, rows: Rows) -> Tensor:
        if self._is_exact:
            return _third(self._module, tokens[:, rows], 0)
        return _third(self._module, tokens, 0)[:, :, rows]


def draws_nothing(block: nn.Module) -> bool:
    """Return whether only a plain norm and a plain product make queries and keys in ``block``."""
    for names in BLOCK_CHILDREN.values():
        norm, attention = map(submodules(block).get, names)
        if norm is not None and attention is not None and "qkv" in submodules(attention):
            return (
                _is_plain(norm, nn.LayerNorm)
                and not _acted_upon(attention)
                and _is_plain(attention.qkv)
            )
    return False


def _does_without_keys(query: Tensor, tokens: Tensor) -> bool:
    """Return whether it takes fewer multiplications to send queries through the keys' weights."""
    _, heads, rows, head_dim = query.shape
    _, length, channels = tokens.shape
    without = rows * channels * heads * (head_dim + length)
    with_keys = length * heads * head_dim * (channels + rows)
    return without < BREAK_EVEN * with_keys


def _through_keys(module: Any, query: Tensor) -> Tensor:
    """Return ``W_kᵀ q (B, heads, Q, C)``, to be multiplied with tokens in place of keys.

    ``q · (W_k x + b_k) = (W_kᵀ q) · x + q · b_k``. The softmax cancels the last term, which is
    equal for all tokens of a row.
    """
    weight: Tensor = module.qkv.weight.chunk(3)[1]
    return query @ weight.view(query.shape[1], query.shape[3], -1)


def _third(module: Any, x: Tensor, which: int) -> Tensor:
    """Return the queries (0), keys (1) or values (2) of ``x`` and nothing else."""
    weight, bias = module.qkv.weight.chunk(3)[which], module.qkv.bias
    out = F.linear(x, weight, None if bias is None else bias.chunk(3)[which])
    return _by_heads(module, out, 1)[0]


def _product_dtype(module: Any, x: Tensor) -> torch.dtype:
    """Return the dtype of the projection under the current autocast."""
    one: Tensor = F.linear(x[:1, :1], module.qkv.weight[:1])
    return one.dtype


def _by_heads(module: Any, projected: Tensor, parts: int) -> tuple[Tensor, ...]:
    batch, length, channels = projected.shape
    head_dim = channels // (parts * module.num_heads)
    split = projected.reshape(batch, length, parts, module.num_heads, head_dim)
    return tuple(split.permute(2, 0, 3, 1, 4))


def _regroup(group: Group, tensor: Tensor, where: slice) -> Tensor:
    """Return ``tensor (1, heads, ΣN, head_dim)`` of a group as ``(b, heads, n, head_dim)``."""
    return group.split(tensor.transpose(1, 2), where).transpose(1, 2)


def _is_plain(layer: Any, kind: type[nn.Module] = nn.Linear) -> bool:
    """Return whether ``layer`` does what PyTorch's ``kind`` does, and nothing more."""
    return (
        type(layer) is kind
        and not _acted_upon(layer)
        and type(layer.weight) in (Tensor, nn.Parameter)  # no quantised or sharded tensor
    )


def _acted_upon(layer: nn.Module) -> bool:
    """Return whether a hook or an override may change what calling ``layer`` does."""
    return "forward" in vars(layer) or any(hooks_of(layer))
