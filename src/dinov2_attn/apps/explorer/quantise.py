"""Weights in 8 bits: one code each, and for each row its least and its greatest value."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from torch import Tensor

from dinov2_attn.errors import InvalidInputError

# What the codes 0 … 255 stand for, between the least value of a row (0) and its greatest (1).
# Attention is a few large values and many small ones. On rows of 1374 logits with a deviation
# of 2, cubes are off by at most 0.8e-3, even steps by 1.0e-3; but half of all weights are off by
# more than 2 % with cubes, and by more than 97 % with even steps. Logarithmic steps, by
# relative error the best, are off by 5e-3. The cube is two products, which every language
# rounds alike: the page computes these very numbers.
_STEPS = np.arange(256) / 255
LEVELS: npt.NDArray[np.float64] = _STEPS * _STEPS * _STEPS
_BETWEEN = (LEVELS[1:] + LEVELS[:-1]) / 2


@dataclass(frozen=True, eq=False)
class Table:
    """Some rows of one layer's weights, quantised.

    =======  ==================================================================
    queries  the positions of the tokens whose rows these are
    codes    uint8 ``(heads, Q, N)``; one head for the mean of heads
    least    float32 ``(heads, Q)``: the least weight of each row
    most     float32 ``(heads, Q)``: the greatest
    error    the largest difference between a weight and what its code stands for
    =======  ==================================================================
    """

    queries: tuple[int, ...]
    codes: npt.NDArray[np.uint8]
    least: npt.NDArray[np.float32]
    most: npt.NDArray[np.float32]
    error: float

    def weights(self) -> npt.NDArray[np.float64]:
        """Return what the codes stand for, ``(heads, Q, N)``; the page does the same."""
        return _decode(self.codes, self.least, self.most)

    def content(self) -> bytes:
        """Return ``least``, ``most`` (little-endian) and the codes, one after the other."""
        limits = (limit.astype("<f4").tobytes() for limit in (self.least, self.most))
        return b"".join((*limits, self.codes.tobytes()))


def quantise(weights: Tensor, queries: tuple[int, ...]) -> Table:
    """Quantise ``(heads, Q, N)`` weights, whose rows belong to the tokens at ``queries``.

    Each weight gets the nearest of the 256 values of its row. Raises ``InvalidInputError`` where
    a weight is no finite number.
    """
    shape = tuple(weights.shape)
    codes = np.empty(shape, np.uint8)
    least, most = (np.empty(shape[:2], np.float32) for _ in range(2))
    error = 0.0
    for head in range(shape[0]):  # a whole layer in float64 would be twice the layer
        exact = weights[head].detach().cpu().double().numpy()
        if not np.isfinite(exact).all():
            raise InvalidInputError(
                "weights that are finite numbers",
                "NaN or infinity among them",
                "Run the model in float32, and look for NaN in its checkpoint.",
            )
        least[head], most[head] = exact.min(-1), exact.max(-1)
        codes[head] = _encode(exact, least[head], most[head])
        seen = _decode(codes[head], least[head], most[head])
        error = max(error, float(np.abs(seen - exact).max(initial=0)))
    return Table(queries, codes, least, most, error)


def _encode(
    exact: npt.NDArray[np.float64], least: npt.NDArray[np.float32], most: npt.NDArray[np.float32]
) -> npt.NDArray[np.uint8]:
    low = least.astype(np.float64)[..., None]
    width = most.astype(np.float64)[..., None] - low
    share = np.clip((exact - low) / np.where(width > 0, width, 1), 0, 1)
    # The root is at most the code before the right one, and spares a search among 256.
    before = np.minimum(np.floor(np.cbrt(share) * 255), 254).astype(np.uint8)
    codes: npt.NDArray[np.uint8] = before + (share > _BETWEEN[before])
    return codes


def _decode(
    codes: npt.NDArray[np.uint8], least: npt.NDArray[np.float32], most: npt.NDArray[np.float32]
) -> npt.NDArray[np.float64]:
    low = least.astype(np.float64)[..., None]
    return low + (most.astype(np.float64)[..., None] - low) * LEVELS[codes]
