"""How coarse the numbers of a page have to be, and which layers have no room at all."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from dinov2_attn.apps.explorer.budget import KeptRows, Shape, cost, everything
from dinov2_attn.apps.explorer.coded import CodedLayer, encode, estimate, layer_factors
from dinov2_attn.apps.explorer.factors import Factors, QueriesKeys

# At this coarseness, errors are at most those of 8 bits for each weight.
COARSEST = 4.0

# Bytes of the description of a layer and of its element, and of each of its heads.
_DESCRIBED, _HEAD_DESCRIBED = 300, 40


@dataclass(frozen=True, eq=False)
class Candidate:
    """A layer that may be kept as queries and keys.

    Attributes:
        layer: Its queries and keys.
        factors: Their factors, head by head.
        bytes: About how many bytes of the page it takes at coarseness 1.

    """

    layer: QueriesKeys
    factors: Sequence[Factors]
    bytes: int

    @property
    def bytes_per_doubling(self) -> float:
        """How many bytes each doubling of the coarseness saves: one bit of each number."""
        return in_base64(2 * self.layer.query.numel() / 8)

    def at(self, coarseness: float) -> float:
        """Return about how many bytes of the page it takes."""
        return self.bytes - self.bytes_per_doubling * math.log2(coarseness)

    def encode(self, coarseness: float) -> CodedLayer:
        """Return its numbers."""
        return encode(self.layer, self.factors, coarseness)


def candidate(layer: QueriesKeys) -> Candidate:
    """Factor the queries and keys of a layer, and estimate what they take.

    Raises:
        InvalidInputError: if a query or key is not finite.

    """
    found = layer_factors(layer)
    described = _DESCRIBED + _HEAD_DESCRIBED * layer.heads
    return Candidate(layer, found, int(in_base64(estimate(layer, found))) + described)


def fit(
    candidates: Mapping[int, Candidate], shape: Shape, room: int
) -> tuple[list[int], float] | None:
    """Choose the last layers that fit, and the coarseness at which they do.

    Layers that do not fit need room for the rows of CLS and the registers.

    Returns:
        The layers to keep and the coarseness, 1 at least; ``None`` if no layer fits.

    """
    layers = sorted(candidates)
    for first in range(len(layers)):
        chosen = [candidates[layer] for layer in layers[first:]]
        short = sum(one.bytes for one in chosen) - (room - reserved(first, shape))
        saved = sum(one.bytes_per_doubling for one in chosen)
        doublings = max(0.0, short / saved)
        if doublings <= math.log2(COARSEST):
            return layers[first:], 2**doublings
    return None


def smaller(candidates: Mapping[int, Candidate], shape: Shape) -> bool:
    """Return whether queries and keys take less than the weights themselves."""
    weights = len(candidates) * cost(everything(shape), shape)
    return sum(one.bytes for one in candidates.values()) < weights


def reserved(layers: int, shape: Shape) -> int:
    """Return the bytes of the rows of CLS and registers of so many layers."""
    return layers * cost(KeptRows(each=tuple(range(max(shape.prefix, 1)))), shape)


def size_of(layer: CodedLayer) -> int:
    """Return how many bytes of the page a layer takes."""
    content = in_base64(len(layer.content()))
    return int(content) + _DESCRIBED + _HEAD_DESCRIBED * len(layer.heads)


def in_base64(size: float) -> float:
    """Return the number of characters of ``size`` bytes in base64."""
    return 4 * size / 3 + 4
