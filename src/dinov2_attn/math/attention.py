"""Attention weights from queries and keys, at once or in pieces.

Nothing here knows a model. Without autograd, weights are written piece by piece into the result.
A second matrix of scores would double the memory, and more of it would leave the cache.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

from dinov2_attn._compat import (
    BMM_HAS_OUT_DTYPE,
    MASKED_ROWS_ARE_ZERO,
    has_tangents,
    is_autocast_on,
    is_compiling,
    is_traced,
    is_transformed,
)
from dinov2_attn.errors import InvalidInputError
from dinov2_attn.math.buffers import is_fresh, new_result
from dinov2_attn.typing import Heads

# Every torch from 2.0 on has autocast for these. For other devices (meta, mps, ...) there is
# nothing to switch off, or no way to ask for it in all versions.
_AUTOCAST_DEVICES = ("cpu", "cuda")

# Bytes of scores that become the result in place. At the end of each call all threads wait for
# the last one, so few large calls are best. Measured on CPUs; on GPUs launches cost as much.
PIECE_BYTES = 2**26

# Bytes of scores on a CPU that stay in the cache: a head of a thousand tokens. Fewer would stay in
# the second level, but then products are small and steps many, which costs more.
TILE_BYTES = 2**23

# Bytes of the weights of a sample that a third-level cache may hold.
HEADS_BYTES = 2**26

# Bytes of the keys of a sample from which on samples of a batch are cheaper one by one, on the CPU:
# one product of several samples copies their keys.
KEY_BYTES = 2**18

Piece = tuple[slice, slice, slice]


def attention_weights(
    query: Tensor,
    key: Tensor,
    scale: float,
    *,
    bias: Tensor | None = None,
    causal_rows: Tensor | None = None,
    heads: Heads = None,
    out: Tensor | None = None,
) -> Tensor:
    """Return ``softmax(query @ keyᵀ · scale + bias)``, the weights before dropout.

    Product and softmax run in float32 at least, with autocast or without. The fused kernels
    accumulate in float32 too. In half precision the scores alone would lose more than the kernel
    does. The equivalent code is::

        scores = query.float() @ key.float().transpose(-2, -1) * scale
        return (scores + bias).softmax(dim=-1).to(query.dtype)

    Rows that ``bias`` masks completely are those of PyTorch's kernel: zeros from PyTorch 2.5 on,
    NaN before.

    Source: Vaswani et al., *Attention Is All You Need*, 2017, equation 1.

    Args:
        query: ``(B, heads, Q, head_dim)``, any floating dtype.
        key: ``(B, heads, N, head_dim)`` of the same dtype, or ``(B, 1, N, head_dim)`` if all
            heads share one.
        scale: The factor on the products.
        bias: Broadcastable to ``(B, heads, Q, N)``. A floating bias is added to the scores. A
            boolean bias is true where a key is visible, as in PyTorch's kernel.
        causal_rows: The position of each query in its sequence, ``(Q,)``. A query then sees no
            key after its own position. For positions 0 and 2 of 4::

                1 0 0 0
                1 1 1 0

        heads: None for each head, ``"mean"`` for their mean.
        out: The tensor to write into, allowed if ``may_tile(query)``.

    Returns:
        ``(B, heads, Q, N)``, or ``(B, Q, N)`` for the mean, in the dtype of ``query``.

    """
    with without_autocast(query.device):
        dtype = torch.promote_types(query.dtype, torch.float32)
        bias, seen = _masks(key, bias, causal_rows, dtype)
        if may_tile(query):
            if out is None:
                out = new_result(query, shape_of_weights(query, key, heads))
            if not _has_wide_products(query):
                query, key = query.to(dtype), key.to(dtype)
            softmax_into(out, query, key, scale, bias=bias, seen=seen)
            return out
        scores = (query.to(dtype) * scale) @ key.to(dtype).transpose(2, 3)
        if bias is not None:
            scores = scores + bias
        if seen is not None:
            scores = scores.masked_fill(~seen, -math.inf)
        masked = None if bias is None else fully_masked_rows(scores.detach())
        if masked is None:
            weights = scores.softmax(dim=-1)
        else:
            weights = scores.masked_fill(masked, 0).softmax(dim=-1).masked_fill(masked, 0)
        if heads == "mean":
            weights = weights.mean(dim=1)
        return weights.to(query.dtype)


def weights_and_output(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    *,
    bias: Tensor | None = None,
    causal_rows: Tensor | None = None,
    out: Tensor,
) -> Tensor:
    """Write ``attention_weights`` into ``out``, and return their product with ``value``.

    Products are in float32 at least. Each tile of the weights is multiplied while it is in the
    cache. Heads of a sample that are several tiles, but no more than a third-level cache may hold,
    are multiplied together: threads take whole heads then, which is faster.

    Args:
        query: ``(B, heads, Q, head_dim)``, allowed if ``may_tile(query)``.
        key: ``(B, heads or 1, N, head_dim)``.
        value: ``(B, heads or 1, N, d)``.
        scale: The factor on the products.
        bias: As for ``attention_weights``.
        causal_rows: As for ``attention_weights``.
        out: ``(B, heads, Q, N)``, any floating dtype.

    Returns:
        ``(B, heads, Q, d)`` in the dtype of ``query``.

    """
    with without_autocast(query.device):
        dtype = torch.promote_types(query.dtype, torch.float32)
        bias, seen = _masks(key, bias, causal_rows, dtype)
        output = query.new_empty((*query.shape[:3], value.shape[3]), dtype=dtype)
        wide = (query.to(dtype), key.to(dtype), scale)
        value, each = value.to(dtype), out[:1].numel() * out.element_size()
        if out.dtype == dtype and out.device.type == "cpu" and tile_bytes() < each <= HEADS_BYTES:
            softmax_into(out, *wide, bias=bias, seen=seen)
            for weights, factor, product in zip(out, value, output, strict=True):
                torch.matmul(weights, factor, out=product)
        else:
            softmax_into(out, *wide, bias=bias, seen=seen, value=value, output=output)
        return output.to(query.dtype)


def _masks(
    key: Tensor, bias: Tensor | None, causal_rows: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor | None, Tensor | None]:
    """Return what is added to the scores, and a mask ``(Q, N)`` of the keys that are seen."""
    seen = None if causal_rows is None else past(causal_rows, key.shape[2])
    if bias is not None and bias.dtype == torch.bool:
        bias = torch.zeros_like(bias, dtype=dtype).masked_fill_(~bias, -math.inf)
    return bias, seen


def shape_of_weights(query: Tensor, key: Tensor, heads: Heads) -> tuple[int, ...]:
    """Return the shape of what ``attention_weights`` returns."""
    kept = query.shape[:1] if heads == "mean" else query.shape[:2]
    return (*kept, query.shape[2], key.shape[2])


def check_heads(heads: object) -> None:
    """Raise ``InvalidInputError`` unless ``heads`` is ``None`` (keep all) or ``"mean"``."""
    if not (heads is None or (isinstance(heads, str) and heads == "mean")):
        raise InvalidInputError(
            'heads=None (every head) or heads="mean"',
            f"heads={heads!r}",
            "Leave heads out and select from dimension 1 of the result.",
        )


def may_tile(tensor: Tensor) -> bool:
    """Return whether results may be written in place: no autograd, no trace, no subclass."""
    return (
        not torch.is_grad_enabled()
        and type(tensor) in (Tensor, nn.Parameter)
        and not is_transformed()
        and not is_traced()
        and not has_tangents()
    )


def without_needless_grad(*inputs: object) -> AbstractContextManager[object]:
    """Switch grad off inside where no input needs it: tiles take less time."""
    known = all(one is None or isinstance(one, Tensor) for one in inputs)
    needed = not known or any(isinstance(one, Tensor) and one.requires_grad for one in inputs)
    if needed or not torch.is_grad_enabled() or is_transformed() or is_traced():
        return nullcontext()
    return torch.no_grad()


def softmax_into(
    result: Tensor,
    query: Tensor,
    key: Tensor,
    scale: float,
    *,
    bias: Tensor | None = None,
    seen: Tensor | None = None,
    value: Tensor | None = None,
    output: Tensor | None = None,
) -> None:
    """Write ``softmax(query @ keyᵀ · scale + bias)`` into ``result``.

    On a CPU, scores are made in tiles that stay in the cache. They are written straight into a
    fresh result, so that the threads of the product fault its pages in.

    Args:
        result: ``(B, heads, Q, N)``, or ``(B, Q, N)`` for the mean over heads. Any dtype,
            contiguous.
        query: ``(B, heads, Q, head_dim)``, float32 or float64, or half precision on a device whose
            products of it are float32.
        key: ``(B, heads or 1, N, head_dim)``, the same dtype.
        scale: The factor on the products.
        bias: Broadcastable to ``(B, heads, Q, N)``, added to the scores.
        seen: Boolean ``(Q, N)``, true where a key is visible.
        value: ``(B, heads or 1, N, d)``, float32 or float64.
        output: ``(B, heads, Q, d)``, contiguous, for the product of the weights with ``value``.

    """
    shape = (*query.shape[:3], key.shape[2])
    mean, on_cpu = result.ndim == 3, query.device.type == "cpu"
    dtype = torch.promote_types(query.dtype, torch.float32)
    direct = not mean and result.dtype == dtype
    in_place = direct and output is None and is_fresh(result)
    if bias is not None:
        bias = bias.expand(shape)
    row = max(1, shape[3] * torch.finfo(dtype).bits // 8)
    limit = tile_bytes() if on_cpu and not in_place else PIECE_BYTES
    rows, together = limit // row, _samples_at_once(key)
    if together == shape[0] and math.prod(shape[:3]) <= rows:
        scores = result if direct else query.new_empty(shape, dtype=dtype)
        _at_once_into(result, scores, query, key, scale, bias, seen)
        if value is not None and output is not None:
            _product_into(output, result if direct else scores, value.flatten(0, 1))
        return
    pieces = list(_pieces(shape[:3], rows, samples=together, heads_last=mean))
    keys = _RightFactors(key, shape[2])
    values = None if value is None else _RightFactors(value, shape[2])
    tile = None if in_place else _tile(query, pieces[:1], shape[3], dtype)
    total = _Mean(result, shape[1]) if mean else None
    for piece in pieces:
        samples, _, lines = piece
        part, after = _scaled(query[piece], scale)
        out = result[samples, lines] if mean else result[piece]
        scores = out if tile is None else _like(part, tile, shape[3])
        _product_into(scores, part, keys.keys(piece), after)
        if bias is not None:
            scores += bias[piece]
        if seen is not None:
            scores.masked_fill_(~seen[lines], -math.inf)
        weights = out if direct else scores
        _softmax_into(weights, scores, biased=bias is not None)
        if values is not None and output is not None:
            _product_into(output[piece], weights, values.values(piece))
        if total is not None:
            total.add(piece, scores)
        elif not direct:
            out.copy_(scores)


def _at_once_into(
    result: Tensor,
    scores: Tensor,
    query: Tensor,
    key: Tensor,
    scale: float,
    bias: Tensor | None,
    seen: Tensor | None,
) -> None:
    """Write all weights into ``result`` in the fewest steps, by way of ``scores``."""
    query, after = _scaled(query, scale)
    _product_into(scores, query, key.flatten(0, 1).transpose(1, 2), after)
    if bias is not None:
        scores += bias
    if seen is not None:
        scores.masked_fill_(~seen, -math.inf)
    _softmax_into(scores, scores, biased=bias is not None)
    if scores is not result:
        result.copy_(scores.mean(dim=1) if result.ndim == 3 else scores)


def tile_bytes() -> int:
    """Return how many bytes of scores stay in the cache, for more than eight threads more."""
    return TILE_BYTES * max(8, torch.get_num_threads()) // 8


class _Mean:
    """The mean over heads in ``result (B, Q, N)``, added up while its rows are in the cache."""

    def __init__(self, result: Tensor, heads: int) -> None:
        self._result, self._heads, self._sum = result, heads, result

    def add(self, piece: Piece, weights: Tensor) -> None:
        """Add ``weights (b, heads of the piece, lines, N)``. Pieces go through heads last."""
        samples, heads, lines = piece
        out, some = self._result[samples, lines], weights.shape[1]
        part = weights[:, 0] if some == 1 else weights.sum(dim=1)
        if heads.start == 0:
            # In the dtype of the weights, of which the result may have half the digits.
            self._sum = out if out.dtype == part.dtype else torch.empty_like(part)
            torch.mul(part, 1 / self._heads, out=self._sum)
        else:
            self._sum.add_(part, alpha=1 / self._heads)
        if heads.stop == self._heads and self._sum.dtype != out.dtype:
            out.copy_(self._sum)


class _RightFactors:
    """The keys or the values of the heads, as right factors of products.

    If several pieces take those of a head, they are copied once into the order of the product.
    """

    def __init__(self, tensor: Tensor, lines: int) -> None:
        self._tensor, self._lines = tensor, lines
        self._copies: dict[int, Tensor] = {}
        self._sample = 0

    def keys(self, piece: Piece) -> Tensor:
        """Return those of a piece as columns, ``(units, d, N)``."""
        return self._of(piece, lambda own: own.transpose(1, 2))

    def values(self, piece: Piece) -> Tensor:
        """Return those of a piece as rows, ``(units, N, d)``."""
        return self._of(piece, lambda own: own)

    def _of(self, piece: Piece, arrange: Callable[[Tensor], Tensor]) -> Tensor:
        samples, heads, lines = piece
        shared = self._tensor.shape[1] == 1
        own = self._tensor[samples] if shared else self._tensor[samples, heads]
        if lines.stop - lines.start == self._lines or own.device.type != "cpu":
            return arrange(own.flatten(0, 1))
        if samples.start != self._sample:
            self._copies, self._sample = {}, samples.start
        place = 0 if shared else heads.start
        if place not in self._copies:
            self._copies[place] = arrange(own.flatten(0, 1)).contiguous()
        return self._copies[place]


def fully_masked_rows(scores: Tensor) -> Tensor | None:
    """Return a mask ``(…, 1)`` of the rows that are zero, ``None`` if no row can be."""
    if not (MASKED_ROWS_ARE_ZERO and scores.shape[-1]):
        return None
    return scores.amax(dim=-1, keepdim=True) == -math.inf


def chunks(length: int, step: int) -> Iterator[slice]:
    """Yield slices of at least 1 and at most ``step`` that cover ``length``."""
    step = max(1, step)
    for start in range(0, length, step):
        yield slice(start, min(start + step, length))


def past(rows: Tensor, length: int) -> Tensor:
    """Return a mask ``(Q, N)`` of the keys that are not after the position of each row."""
    keys = torch.arange(length, device=rows.device)
    return keys[None, :] <= rows[:, None]


def without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """Switch autocast off inside, where there is one for ``device``."""
    # A graph switches it off as a part of its own. Else there may be nothing to switch off, which
    # is asked first because the context takes ten microseconds.
    if device.type in _AUTOCAST_DEVICES and (is_compiling() or is_autocast_on(device.type)):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()


def may_autocast(device: torch.device) -> bool:
    """Return whether autocast may be on for ``device``: it is, or that is not known."""
    return device.type not in _AUTOCAST_DEVICES or is_autocast_on(device.type)


def _has_wide_products(tensor: Tensor) -> bool:
    """Return whether a product of half precision can have float32, without a copy of its factors.

    So it keeps the tensor cores of a GPU, and adds up in float32 as the fused kernels do.
    """
    return tensor.is_cuda and tensor.element_size() == 2 and BMM_HAS_OUT_DTYPE


def _scaled(query: Tensor, scale: float) -> tuple[Tensor, float]:
    """Return ``query · scale``, and the factor on the scores that is left.

    Half precision is scaled by powers of two only, which round nothing.
    """
    if query.element_size() == 2 and math.frexp(scale)[0] != 0.5:
        return query, scale
    return query * scale, 1.0


def _tile(query: Tensor, largest: list[Piece], length: int, dtype: torch.dtype) -> Tensor:
    """Return memory for the scores of the ``largest`` piece. All pieces use it, in the cache."""
    size = sum(query[piece].shape[:3].numel() for piece in largest) * length
    return new_result(query, (size,), dtype)


def _like(query: Tensor, tile: Tensor, length: int) -> Tensor:
    rows = query.shape[:3]
    return tile[: rows.numel() * length].view(*rows, length)


def _product_into(out: Tensor, left: Tensor, right: Tensor, factor: float = 1.0) -> None:
    """Write ``left (b, heads, lines, …) @ right (units, …, …) · factor`` into ``out``.

    The rows of all heads that share a key make one product.
    """
    units = len(right)
    lines = left.shape[:3].numel() // max(1, units)
    # It must be a view, because the product writes into it. A piece is whole in every dimension
    # after the first one that it cuts, so a view exists.
    out, left = out.view(units, lines, right.shape[2]), left.reshape(units, lines, right.shape[1])
    if out.dtype != left.dtype:
        torch.bmm(left, right, out_dtype=out.dtype, out=out)
    elif units == 1:
        torch.mm(left[0], right[0], out=out[0])
    else:
        torch.bmm(left, right, out=out)
    if factor != 1:
        out *= factor


def _softmax_into(out: Tensor, scores: Tensor, *, biased: bool) -> None:
    masked = fully_masked_rows(scores) if biased else None
    if masked is not None:
        scores.masked_fill_(masked, 0)
    if scores.device.type in ("cpu", "cuda"):
        # Safe if out is scores: these kernels read a whole row before they write to it.
        torch.softmax(scores, -1, out=out)
    else:
        out.copy_(scores.softmax(dim=-1))
    if masked is not None:
        out.masked_fill_(masked, 0)


def _samples_at_once(key: Tensor) -> int:
    """Return of how many samples one product takes the keys without a copy."""
    batch, heads, *rest = key.shape
    apart = batch > 1 and heads > 1 and key.stride(0) != heads * key.stride(1)
    size = heads * math.prod(rest) * key.element_size()
    return 1 if apart and size >= KEY_BYTES and key.device.type == "cpu" else batch


def _pieces(
    shape: tuple[int, ...], rows: int, *, samples: int, heads_last: bool
) -> Iterator[Piece]:
    """Yield pieces of ``shape (B, heads, Q)`` with about ``rows`` rows each.

    Each has as many whole samples as fit, else whole heads, else rows of one head. ``samples`` is
    the most that one has. With ``heads_last`` all heads of some rows come before the next rows.
    """
    batch, heads, lines = shape
    several = min(heads, max(1, rows // max(1, lines)))
    fit = min(samples, rows // max(1, heads * lines))
    some_heads = list(chunks(heads, several))
    some_lines = list(chunks(lines, rows // max(1, several)))
    inner = [(head, line) for head in some_heads for line in some_lines]
    if heads_last:
        inner = [(head, line) for line in some_lines for head in some_heads]
    for some in chunks(batch, fit):
        yield from ((some, head, line) for head, line in inner)
