"""Attention rollout of chosen tokens, without a matrix product and without a matrix.

The textbook multiplies one N × N matrix per layer into another. One row of that product needs
less: its vector goes through the layers from the last to the first, ``r ← r · A``. The rows of
a layer are computed a few at a time and released.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any, ClassVar, Generic, Literal, get_args, overload

import torch
from torch import Tensor, nn

from dinov2_attn.backbone.backbone import Backbone, grafted_backbone
from dinov2_attn.backbone.projection import Piece
from dinov2_attn.errors import InvalidInputError
from dinov2_attn.grafting.modules import queries_and_keys_from
from dinov2_attn.grafting.ways import runs_itself
from dinov2_attn.maps import _facts
from dinov2_attn.maps.own_pass import pieces, scores_of_pass
from dinov2_attn.maps.result import Array, Result, W, as_array
from dinov2_attn.math.attention import attention_weights, chunks
from dinov2_attn.math.selection import positions
from dinov2_attn.typing import Grid, Images, Layers, Masks, Model, Queries

Fusion = Literal["mean", "min", "max"]
# Returns pieces of the batch, with queries and keys of these rows, and the scale of each.
Scores = Callable[[Queries], list[tuple[Piece, float]]]

# Bytes of the rows that exist at a time: few against one layer's matrix, many against a call.
TILE_BYTES = 2**23


@dataclass(frozen=True, eq=False, repr=False)
class Rollout(Result, Generic[W]):
    """The share that every token has in some tokens after all layers.

    Attributes:
        weights: ``(B, Q, N)``, float32 at least: rows of the rolled-out attention. A row sums
            to one; its columns are CLS, registers, patches row by row.
        grid: Height and width ``(h, w)`` of the patch grid.
        prefix: ``1 + R``, the number of columns before the patches.
        queries: The positions of the tokens whose rows these are, CLS being 0; ``None`` if
            they are not known.

    """

    _LAYOUT: ClassVar[tuple[str, ...]] = ("grid", "prefix", "queries")

    weights: W
    grid: Grid
    prefix: int
    queries: tuple[int, ...] | None = None

    def patch_maps(self) -> W:
        """Return the patch columns as maps ``(B, Q, h, w)``.

        CLS and registers are left out of the picture; what passed through them stays in the
        weights. The sum of a map is one minus the shares of CLS and registers themselves.
        """
        weights: Any = self.weights
        maps: W = weights[..., self.prefix :].reshape(*weights.shape[:2], *self.grid)
        return maps

    def numpy(self: Rollout[Tensor]) -> Rollout[Array]:
        """Return the same with NumPy arrays."""
        arrays: Rollout[Array] = self._with(as_array)
        return arrays

    def _facts(self) -> dict[str, str]:
        unknown = self.queries is None
        return {
            "weights": _facts.shapes([self.weights]),
            "grid": _facts.size(self.grid),
            "prefix": f"{self.prefix}",
            "queries": "unknown"
            if unknown
            else _facts.tokens(self.queries, self.prefix, self.grid),
        }


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
    """Return the attention rollout of some tokens.

    Memory beyond one forward pass is O(N): the tokens of each layer, the queries and keys
    of one, a few rows of its weights. Time is O(N²) for each layer. Nothing is differentiated.
    The equivalent code is::

        product = identity
        for weights in model.get_self_attention(images, layers):
            layer = residual * identity + (1 - residual) * fuse(weights, dim=1)
            product = (layer / layer.sum(-1, keepdim=True)) @ product
        return product[:, queries]

    Args:
        model: A DINOv2 that ``install`` has reached.
        images: ``(B, C, H, W)``, or a list of such batches.
        layers: The blocks to roll out over: ``None`` for all, an int for the last so many, or
            a sequence of blocks.
        queries: The tokens to start from, as in ``attention_maps``, in the order of the rows.
        heads: How the heads of a layer are fused: ``"mean"``, ``"min"`` or ``"max"``.
        residual: The share, from 0 to 1, of the residual connection around the attention.
        masks: ``None`` or boolean ``(B, h·w)``; for a list, one for each batch.

    Returns:
        The rollout of the batch; for a list of batches, a list of rollouts.

    Raises:
        InvalidInputError: An argument is of the wrong kind or shape.
        OutOfRangeError: A layer or a query does not exist.
        NotGraftedError: ``install`` has not reached the model.

    Sources: Abnar and Zuidema, *Quantifying Attention Flow in Transformers*, 2020. The fusion
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


def _inputs(backbone: Backbone, wanted: list[int], images: Tensor, masks: Any) -> list[Scores]:
    """Return for each of the ``wanted`` blocks a function that returns its queries and keys.

    The tokens of the first block are computed again from the images; the others are kept.
    """
    if runs_itself(backbone.model):
        scored = scores_of_pass(backbone, images, masks, wanted)
        return [partial(pieces, one) for one in scored]
    prepare = partial(backbone.tokens, images, masks)
    return [
        partial(_project, block, None if i == 0 else tokens, prepare)
        for i, block, tokens in backbone.walk(prepare(), wanted[-1] + 1)
        if i in wanted
    ]


def _project(
    block: nn.Module, tokens: Tensor | None, prepare: Callable[[], Tensor], queries: Queries
) -> list[tuple[Piece, float]]:
    return queries_and_keys_from(block, prepare() if tokens is None else tokens, queries)


def _one(
    backbone: Backbone,
    images: Tensor,
    layer: Layer,
    inputs: list[Scores],
    queries: Queries,
) -> Rollout:
    length = backbone.length(images)
    rows = positions(queries, length)
    every = torch.arange(length, device=images.device)
    start = every[list(rows)]
    # Of the last layer only the rows of the tokens to start from are needed.
    shares = torch.eye(len(start), device=images.device).expand(len(images), -1, -1)
    for scores in reversed(inputs):
        found = scores(queries)
        shares = torch.cat([layer.push(shares[p.samples], start, p, scale) for p, scale in found])
        queries, start = None, every
    return Rollout(shares, backbone.grid(images), backbone.prefix, rows)


@dataclass(frozen=True)
class Layer:
    """What one layer does to the shares of its output tokens."""

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
