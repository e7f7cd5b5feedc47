"""Attention rollout of chosen tokens, without a matrix product and without a matrix.

The textbook multiplies one N × N matrix per layer into another. One row of that product needs
less: its vector goes through the layers from the last to the first, ``r ← r · A``. The rows of
a layer are computed a few at a time and released.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Generic, Literal, get_args, overload

import torch
from torch import Tensor, nn

from dinov2_attn.backbone.backbone import Backbone
from dinov2_attn.backbone.layout import Layout, cut_maps
from dinov2_attn.errors import InvalidInputError
from dinov2_attn.grafting.modules import queries_and_keys_from
from dinov2_attn.grafting.tokens import named
from dinov2_attn.kernels.call import FusedCall, KernelCall
from dinov2_attn.maps import _facts
from dinov2_attn.maps.calls import calls_of_pass
from dinov2_attn.maps.layers import has_paths
from dinov2_attn.maps.one_batch import batches_of, run_model, walks_as_counted
from dinov2_attn.maps.result import Array, Result, W, as_array
from dinov2_attn.maps.tiles import tiles, without_lowest
from dinov2_attn.math.selection import positions
from dinov2_attn.typing import Grid, Images, Masks, Model, Queries, RecordedLayers

Fusion = Literal["mean", "min", "max"]
Tokens = Callable[[], Tensor]


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
        suffix: The number of columns behind the patches.
        per_cell: The number of tokens of each cell of the grid.
        planes: Where a cell has several tokens: whether one grid follows the other.

    """

    _LAYOUT: ClassVar[tuple[str, ...]] = (
        "grid",
        "prefix",
        "queries",
        "suffix",
        "per_cell",
        "planes",
    )

    weights: W
    grid: Grid
    prefix: int
    queries: tuple[int, ...] | None = None
    suffix: int = 0
    per_cell: int = 1
    planes: bool = False

    def patch_maps(self) -> W:
        """Return the patch columns as maps ``(B, Q, h, w)``.

        CLS and registers are left out of the picture; what passed through them stays in the
        weights. The sum of a map is one minus the shares of CLS and registers themselves.
        """
        weights: Any = self.weights
        layout = Layout(self.prefix, self.suffix, self.grid, self.per_cell, self.planes)
        maps: W = cut_maps(weights, layout)
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
            **({"suffix": f"{self.suffix}"} if self.suffix else {}),
            "queries": "unknown"
            if unknown
            else _facts.tokens(self.queries, self.prefix, self.grid),
        }


@overload
def rollout(
    model: Model,
    images: Tensor,
    layers: RecordedLayers = None,
    *,
    queries: Queries = "cls",
    heads: Fusion = "mean",
    residual: float = 0.5,
    discard_ratio: float = 0.0,
    masks: Tensor | None = None,
) -> Rollout: ...
@overload
def rollout(
    model: Model,
    images: Sequence[Tensor],
    layers: RecordedLayers = None,
    *,
    queries: Queries = "cls",
    heads: Fusion = "mean",
    residual: float = 0.5,
    discard_ratio: float = 0.0,
    masks: Sequence[Tensor | None] | None = None,
) -> list[Rollout]: ...


@torch.no_grad()
def rollout(
    model: Any,
    images: Images,
    layers: RecordedLayers = None,
    *,
    queries: Queries = "cls",
    heads: Fusion = "mean",
    residual: float = 0.5,
    discard_ratio: float = 0.0,
    masks: Masks = None,
) -> Rollout | list[Rollout]:
    """Return the attention rollout of some tokens.

    Memory beyond one forward pass is O(N): the tokens of each layer, the queries and keys
    of one, a few rows of its weights. A model whose blocks cannot be run from outside runs its own
    pass: the queries and keys of all layers are kept then, and the matrices that explicit code
    makes. Biases and causal masks of the pass count. Time is O(N²) for each layer. Nothing is
    differentiated. The equivalent code is::

        product = identity
        for weights in attention_maps(model, images, layers).weights:
            layer = residual * identity + (1 - residual) * fuse(weights, dim=1)
            product = (layer / layer.sum(-1, keepdim=True)) @ product
        return product[:, queries]

    Args:
        model: A module whose forward takes images as its first argument.
        images: ``(B, C, H, W)``, or a list of such batches.
        layers: The layers to roll out over, as in ``attention_maps``: ``None`` for all, an int for
            the last so many, or a sequence.
        queries: The tokens to start from, as in ``attention_maps``, in the order of the rows.
        heads: How the heads of a layer are fused: ``"mean"``, ``"min"`` or ``"max"``.
        residual: The share, from 0 to 1, of the residual connection around the attention.
        discard_ratio: The share, from 0 and less than 1, of the lowest weights of each layer that
            become zero, but never that from CLS to itself. vit-explain discards 0.9 of them. The
            fused matrix of one layer and one image exists then.
        masks: ``None`` or boolean ``(B, h·w)``; for a list, one for each batch.

    Returns:
        The rollout of the batch; for a list of batches, a list of rollouts.

    Raises:
        InvalidInputError: An argument is of the wrong kind or shape, the layers have tokens of
            several kinds, or no patch grid is found.
        OutOfRangeError: A layer or a query does not exist.
        NotRecordedError: A layer did not run, or not once.

    Sources: Abnar and Zuidema, *Quantifying Attention Flow in Transformers*, 2020. The fusion
    of heads by min and max, and ``discard_ratio``: Gildenblat, vit-explain (``vit_rollout.py``).
    That code divides column ``j`` by the sum of row ``j``; here each row is divided by its own sum.

    """
    _check(heads, residual)
    layer = Layer(heads, float(residual), check_ratio(discard_ratio))
    pairs = batches_of(model, images, masks)
    if not has_paths(layers) and walks_as_counted(model, [batch for batch, _ in pairs]):
        found = _of_blocks(Backbone(model), images, masks, layer, layers, queries)
    else:
        found = [_of_pass(model, *pair, layer, layers, queries) for pair in pairs]
    return found if isinstance(images, list | tuple) else found[0]


def _of_blocks(
    backbone: Backbone, images: Any, masks: Any, layer: Layer, layers: Any, queries: Queries
) -> list[Rollout]:
    """Return the rollouts of a model whose blocks run one by one, from outside."""
    queries = backbone.resolve_names(queries)
    wanted = backbone.layers(layers)
    if not wanted:
        raise InvalidInputError(
            "at least one block to roll out over", f"layers={layers!r}", "Leave layers out."
        )
    return [
        _one(backbone, batch, layer, _inputs(backbone, wanted, batch, mask), queries)
        for batch, mask in backbone.batches(images, masks, queries)
    ]


def _of_pass(
    model: Any, images: Tensor, masks: Any, layer: Layer, layers: RecordedLayers, queries: Queries
) -> Rollout:
    """Return the rollout of a model that runs its own pass."""
    found = calls_of_pass(model, layers, partial(run_model, model, images, masks))
    layout, calls = found.layout(images), found.take_all()
    rows = positions(named(queries, layout), layout.length)
    every = torch.arange(layout.length, device=images.device)
    start, shares = starting(every, rows, whole=layer.discard_ratio > 0)
    last = calls.pop()
    shares = shares.expand(last.batch, -1, -1)
    shares = layer.push(shares, start, last if layer.discard_ratio else last.at(list(rows)))
    while calls:  # each is released when it is used
        shares = layer.push(shares, every, calls.pop())
    place = (layout.suffix, layout.per_cell, layout.planes)
    return Rollout(shares, layout.grid, layout.prefix, rows, *place)


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


def check_ratio(ratio: object) -> float:
    """Return ``discard_ratio`` as a float.

    Raises:
        InvalidInputError: If it is no number from 0 and less than 1.

    """
    if isinstance(ratio, int | float) and 0 <= ratio < 1:
        return float(ratio)
    raise InvalidInputError(
        "discard_ratio as a number from 0 and less than 1",
        repr(ratio),
        "Leave it out to keep all weights. 0.9 keeps a tenth of them.",
    )


def _inputs(
    backbone: Backbone, wanted: list[int], images: Tensor, masks: Any
) -> list[tuple[nn.Module, Tokens]]:
    """Return the ``wanted`` blocks, each with a function that returns its input tokens.

    The tokens of the first block are computed again from the images; the others are kept.
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
    rows = positions(queries, length)
    every = torch.arange(length, device=images.device)
    start, shares = starting(every, rows, whole=layer.discard_ratio > 0)
    shares = shares.expand(len(images), -1, -1)
    queries = None if layer.discard_ratio else queries
    for block, tokens in reversed(inputs):
        pieces = calls_from(block, tokens(), queries)
        shares = torch.cat([layer.push(shares[own], start, call) for own, call in pieces])
        queries, start = None, every
    return Rollout(shares, backbone.grid(images), backbone.prefix, rows)


def starting(every: Tensor, rows: Sequence[int], *, whole: bool) -> tuple[Tensor, Tensor]:
    """Return rows of the last layer, and the shares ``(S, rows)`` of the tokens to start from.

    Args:
        every: All positions.
        rows: The tokens to start from.
        whole: Whether all rows are needed, although the others have no shares.

    """
    start = every[list(rows)]
    if whole:
        return every, (start[:, None] == every).float()
    return start, torch.eye(len(start), device=every.device)


def calls_from(
    block: nn.Module, tokens: Tensor, queries: Queries = None
) -> list[tuple[slice, KernelCall]]:
    """Return samples of the batch, with the calls that ``block`` on ``tokens`` amounts to."""
    return [
        (piece.samples, FusedCall("projection", piece.query, piece.key, piece.key, scale))
        for piece, scale in queries_and_keys_from(block, tokens, queries)
    ]


@dataclass(frozen=True)
class Layer:
    """What one layer does to the shares of its output tokens."""

    heads: Fusion
    residual: float
    discard_ratio: float = 0.0

    def push(self, shares: Tensor, positions: Tensor, call: KernelCall) -> Tensor:
        """Return ``shares (b, S, L) @ A``, ``(b, S, N)``, for the rows ``positions (L,)`` of A."""
        call = call.wide()
        dtype = torch.promote_types(call.dtype, torch.float32)
        result = shares.new_zeros((*shares.shape[:2], call.columns), dtype=dtype)
        for sample, (out, own) in enumerate(zip(result, shares.to(dtype), strict=True)):
            for lines, rows, part in self._fused(call, sample, positions):
                some = own[:, lines] * part
                if not self._goes_by_heads(call):
                    some = some / (self.residual + (1 - self.residual) * rows.sum(-1))
                out.addmm_(some, rows, alpha=1 - self.residual)
                out.index_add_(1, positions[lines], some, alpha=self.residual)
        return result

    def _goes_by_heads(self, call: KernelCall) -> bool:
        """Return whether heads can be added one by one: the rows of each sum to one."""
        return self.heads == "mean" and call.sums_to_one and not self.discard_ratio

    def _fused(
        self, call: KernelCall, sample: int, positions: Tensor
    ) -> Iterator[tuple[slice, Tensor, float]]:
        """Yield lines, rows ``(l, N)`` and the part of the fused heads that these are."""
        if self._goes_by_heads(call):
            for tile in tiles(call, sample, positions, 1):
                yield tile.lines, tile.weights[0], 1 / call.heads
            return
        fuse = _FUSE[self.heads]
        fused = ((t.lines, fuse(t.weights)) for t in tiles(call, sample, positions, call.heads))
        if self.discard_ratio:
            whole = torch.cat([rows for _, rows in fused])
            yield slice(None), without_lowest(whole, self.discard_ratio, keep_first=True), 1
            return
        for lines, rows in fused:
            yield lines, rows, 1


_FUSE: dict[Fusion, Callable[[Tensor], Tensor]] = {
    "mean": lambda weights: weights.mean(0),
    "min": lambda weights: weights.amin(0),
    "max": lambda weights: weights.amax(0),
}
