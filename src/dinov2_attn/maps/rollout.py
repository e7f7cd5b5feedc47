"""Attention rollout of chosen tokens, without a matrix product and without a matrix.

The textbook multiplies one N × N matrix per layer into another. One row of that product needs
less: its vector goes through the layers from the last to the first, ``r ← r · A``, and a
layer's rows are made a few at a time and let go.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any, Literal, get_args, overload

import torch
from torch import Tensor, nn

from dinov2_attn.backbone.backbone import Backbone, grafted_backbone
from dinov2_attn.backbone.projection import Piece
from dinov2_attn.errors import InvalidInputError
from dinov2_attn.grafting.modules import queries_and_keys_from
from dinov2_attn.math.attention import attention_weights, chunks
from dinov2_attn.math.selection import to_index
from dinov2_attn.typing import Images, Layers, Masks, Model, Queries

Fusion = Literal["mean", "min", "max"]
Tokens = Callable[[], Tensor]

# The rows of all heads that exist at a time. Small beside one layer's matrix, large beside a call.
TILE_BYTES = 2**23


@dataclass(frozen=True, eq=False)
class Rollout:
    """How much of every token has come into some tokens by way of all layers.

    =======  ==================================================================
    weights  ``(B, Q, N)``, float32 at least: rows of the rolled-out attention,
             which sum to one; columns are CLS, registers, patches row by row
    grid     ``(h, w)``, the patches of the images
    prefix   1 + R, the columns in front of the patches
    =======  ==================================================================
    """

    weights: Tensor
    grid: tuple[int, int]
    prefix: int

    def patch_maps(self) -> Tensor:
        """Return the patch columns as maps ``(B, Q, h, w)``.

        CLS and registers stay out of the picture; what went through them on its way did not
        stay out of the weights. A map sums to less than one by what they hold themselves.
        """
        return self.weights[..., self.prefix :].reshape(*self.weights.shape[:2], *self.grid)


@overload
def rollout(
    model: Model,
    images: Tensor,
    layers: Layers = None,
    *,
    queries: Queries = "cls",
    heads: Fusion = "mean",
    residual: float = 0.5,
    masks: Tensor | None = None,
) -> Rollout: ...
@overload
def rollout(
    model: Model,
    images: Sequence[Tensor],
    layers: Layers = None,
    *,
    queries: Queries = "cls",
    heads: Fusion = "mean",
    residual: float = 0.5,
    masks: Sequence[Tensor | None] | None = None,
) -> list[Rollout]: ...


@torch.no_grad()
def rollout(
    model: Any,
    images: Images,
    layers: Layers = None,
    *,
    queries: Queries = "cls",
    heads: Fusion = "mean",
    residual: float = 0.5,
    masks: Masks = None,
) -> Rollout | list[Rollout]:
    """Return the attention rollout of some tokens, a ``Rollout``; for a list, a list of these.

    ========  ==================================================================
    images    ``(B, C, H, W)``, or a list of such batches
    layers    the blocks to roll out over, as in ``get_self_attention``: all, the
              last few (an int), or those
    queries   the tokens to start from, as in ``get_self_attention``; their order
              is that of the rows
    heads     how the heads of a layer are fused: ``"mean"``, ``"min"``, ``"max"``
    residual  the share, from 0 to 1, of what goes past the attention of a layer
    masks     ``None`` or boolean ``(B, h·w)``; for a list, one for each tensor
    ========  ==================================================================

    Memory beyond one forward pass is O(N): the tokens of each layer, the queries and keys
    of one, a few rows of its weights; time is O(N²) for each layer. Nothing is differentiated.
    The equivalent code is::

        product = identity
        for weights in model.get_self_attention(images, layers):
            layer = residual * identity + (1 - residual) * fuse(weights, dim=1)
            product = (layer / layer.sum(-1, keepdim=True)) @ product
        return product[:, queries]

    Raises ``InvalidInputError`` and ``OutOfRangeError`` for what cannot be, ``NotGraftedError`` for
    a model that ``install`` has not reached.

    Source: Abnar and Zuidema, *Quantifying Attention Flow in Transformers*, 2020; the fusion
    of heads by min and max: Gildenblat, vit-explain.
    """
    _check(heads, residual)
    backbone = grafted_backbone(model)
    layer = Layer(heads, float(residual))
    queries = backbone.resolve_names(queries)
    wanted = backbone.layers(layers)
    if not wanted:
        raise InvalidInputError(
            "at least one block to roll out over", f"layers={layers!r}", "Leave layers out."
        )
    found = [
        _one(backbone, batch, layer, _inputs(backbone, wanted, batch, mask), queries)
        for batch, mask in backbone.batches(images, masks, queries)
    ]
    return found if isinstance(images, list | tuple) else found[0]


def _check(heads: object, residual: object) -> None:
    if not (isinstance(heads, str) and heads in get_args(Fusion)):
        raise InvalidInputError(
            f"heads to be one of {', '.join(map(repr, get_args(Fusion)))}",
            f"heads={heads!r}",
            "A rollout goes through one matrix per layer, so heads are fused.",
        )
    if not (isinstance(residual, int | float) and 0 <= residual <= 1):
        raise InvalidInputError(
            "residual as a number from 0 to 1",
            repr(residual),
            "0.5 weighs what goes past the attention of a layer as much as what goes through.",
        )


def _inputs(
    backbone: Backbone, wanted: list[int], images: Tensor, masks: Any
) -> list[tuple[nn.Module, Tokens]]:
    """Return the ``wanted`` blocks with what makes the tokens that each is given in a pass.

    The tokens of all but the first are kept: those come out of the images again.
    """
    prepare = partial(backbone.tokens, images, masks)
    return [
        (block, prepare if i == 0 else partial(_same, tokens))
        for i, block, tokens in backbone.walk(prepare(), wanted[-1] + 1)
        if i in wanted
    ]


def _same(tokens: Tensor) -> Tensor:
    return tokens


def _one(
    backbone: Backbone,
    images: Tensor,
    layer: Layer,
    inputs: list[tuple[nn.Module, Tokens]],
    queries: Queries,
) -> Rollout:
    length = backbone.length(images)
    positions = torch.arange(length, device=images.device)
    start = positions[to_index(queries, length)]
    # Of the last layer no other rows are needed than those of the tokens to start from.
    shares = torch.eye(len(start), device=images.device).expand(len(images), -1, -1)
    for block, tokens in reversed(inputs):
        pieces = queries_and_keys_from(block, tokens(), queries)
        shares = torch.cat([layer.push(shares[p.samples], start, p, scale) for p, scale in pieces])
        queries, start = None, positions
    return Rollout(shares, backbone.grid(images), backbone.prefix)


@dataclass(frozen=True)
class Layer:
    """What one layer does to the shares that its output tokens hold."""

    heads: Fusion
    residual: float

    def push(self, shares: Tensor, positions: Tensor, piece: Piece, scale: float) -> Tensor:
        """Return ``shares (b, S, L) @ A``, ``(b, S, N)``, for the rows ``positions (L,)`` of A."""
        dtype = torch.promote_types(piece.query.dtype, torch.float32)
        query, key = piece.query.to(dtype), piece.key.to(dtype)
        result = shares.new_zeros((*shares.shape[:2], key.shape[2]), dtype=dtype)
        for out, own, q, k in zip(result, shares.to(dtype), query, key, strict=True):
            for lines, rows, part in self._fused(q, k, scale):
                some = own[:, lines] * part
                if self.heads != "mean":  # whose rows, and those of each head, sum to one
                    some = some / (self.residual + (1 - self.residual) * rows.sum(-1))
                out.addmm_(some, rows, alpha=1 - self.residual)
                out.index_add_(1, positions[lines], some, alpha=self.residual)
        return result

    def _fused(
        self, query: Tensor, key: Tensor, scale: float
    ) -> Iterator[tuple[slice, Tensor, float]]:
        """Yield lines, rows ``(l, N)`` and the part of the fused heads that these are."""
        mean = self.heads == "mean"
        count, length = len(query), key.shape[1]
        together = 1 if mean else count
        step = max(1, TILE_BYTES // (together * length * key.element_size()))
        # One tile for all: fresh memory costs as much as what is written into it.
        memory = query.new_empty(together * min(step, query.shape[1]) * length)
        for heads, lines in product(chunks(count, together), chunks(query.shape[1], step)):
            some, keys = query[None, heads, lines], key[None, heads if len(key) > 1 else slice(1)]
            out = memory[: some.shape[1] * some.shape[2] * length].view(*some.shape[:3], length)
            weights = attention_weights(some, keys, scale, out=out)[0]
            if mean:
                yield lines, weights[0], 1 / count
            else:
                yield lines, weights.amin(0) if self.heads == "min" else weights.amax(0), 1
