"""The attention of one token of one image, which pictures show."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import numpy.typing as npt

from dinov2_attn.errors import InvalidInputError
from dinov2_attn.maps.attention_maps import AttentionMaps
from dinov2_attn.maps.places import (
    Head,
    place_of_head,
    place_of_layer,
    place_of_query,
    place_of_sample,
)
from dinov2_attn.math.selection import name_token
from dinov2_attn.math.token_names import Token, position_of
from dinov2_attn.typing import Layer

if TYPE_CHECKING:
    from dinov2_attn.maps.recording import Recording

Values = npt.NDArray[np.float64]
# What pictures show. A Recording must hold one pass.
Drawable: TypeAlias = "AttentionMaps[Any] | Recording[Any]"


@dataclass(frozen=True, eq=False)
class AttentionRow:
    """The row of one token in some layers and heads.

    Attributes:
        rows: float64 ``(layers, heads, N)``; one head if heads were averaged.
        layers: The numbers of the blocks.
        grid: The patch grid ``(h, w)``.
        prefix: The number of tokens before the patches, ``1 + R``.
        query: The position of the token.
        heads: The meaning of the second dimension: ``(0, 1, …)``, or ``("mean",)``.

    """

    rows: Values
    layers: tuple[Layer, ...]
    grid: tuple[int, int]
    prefix: int
    query: int
    heads: tuple[Head, ...]

    @property
    def name(self) -> str:
        """The name of the token."""
        return name_token(self.query, self.prefix, self.grid)

    @property
    def patch(self) -> tuple[int, int] | None:
        """Row and column of the token if it is a patch."""
        if self.query < self.prefix:
            return None
        row, column = divmod(self.query - self.prefix, self.grid[1])
        return row, column

    def layer(self, number: Layer | None) -> int:
        """Return the index of block ``number`` in ``layers``. ``None`` is the last."""
        return place_of_layer(self.layers, number)

    def row(self, layer: Layer | None, head: Head) -> Values:
        """Return the attention to all tokens ``(N,)`` in a layer, in a head or the mean."""
        rows = self.rows[self.layer(layer)]
        place = place_of_head(self.heads, head)
        one: Values = rows.mean(axis=0) if place is None else rows[place]
        return one

    def map(self, layer: Layer | None, head: Head) -> Values:
        """Return the attention to patches as a map ``(h, w)``."""
        height, width = self.grid
        return self.row(layer, head)[self.prefix :][: height * width].reshape(self.grid)

    @property
    def tokens(self) -> int:
        """The number N of tokens. Uniform attention gives 1/N to each of them."""
        return int(self.rows.shape[-1])

    def times(self, layer: Layer | None, head: Head) -> Values:
        """Return the ``map`` in multiples of uniform attention, the unit of pictures."""
        return self.map(layer, head) * self.tokens

    def prefix_mass(self, layer: Layer | None, head: Head) -> float:
        """Return the sum of the attention to CLS and the registers, before patches or behind."""
        row = self.row(layer, head)
        return float(row[: self.prefix].sum() + row[self.prefix + math.prod(self.grid) :].sum())


def select_row(maps: Any, query: Token = "cls", sample: int = 0) -> AttentionRow:
    """Return the row of ``query`` in one image.

    Args:
        maps: An ``AttentionMaps``, or a ``Recording`` of one pass.
        query: The token, as in ``plot``.
        sample: Which image of the batch.

    Raises:
        InvalidInputError: if the maps have no rows of one image to show.
        OutOfRangeError: if there is no such query or sample.

    """
    _check(maps)
    maps.patch_maps()  # raises what does not fit
    rows = [_of_image(weights, sample) for weights in maps.weights]
    position = position_of(query, maps.prefix, maps.grid)
    length = rows[0].shape[-1]
    queries = tuple(range(length)) if maps.queries is None else maps.queries
    row = place_of_query(queries, position, maps.prefix, maps.grid)
    averaged = maps.weights[0].ndim == 3
    heads = ("mean",) if averaged else tuple(range(rows[0].shape[0]))
    shown = np.stack([values[..., row, :].reshape(len(heads), length) for values in rows])
    return AttentionRow(shown, maps.layers, maps.grid, maps.prefix, position, heads)


def _check(maps: Any) -> None:
    if isinstance(maps, list | tuple):
        raise InvalidInputError(
            "the maps of one batch",
            f"a {type(maps).__name__} of {len(maps)}",
            "A list of batches gives a list of maps: draw one of them, such as maps[0].",
        )
    for layer in maps.weights:
        if getattr(layer, "ndim", 0) not in (3, 4):
            raise InvalidInputError(
                "weights of shape (B, heads, Q, N) or (B, Q, N)",
                str(tuple(getattr(layer, "shape", ())) or type(layer).__name__),
                "Draw what attention_maps returns, without reduce.",
            )


def _of_image(weights: Any, index: int) -> Values:
    one = weights[place_of_sample(index, len(weights))]
    if hasattr(one, "detach"):
        one = one.detach().cpu().double()
    return np.asarray(one, dtype=np.float64)
