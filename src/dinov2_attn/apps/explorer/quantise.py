"""Weights in 8 bits: one code for each, and the minimum and maximum of each row."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from torch import Tensor

from dinov2_attn.errors import InvalidInputError

# The values of the codes 0 … 255, between the minimum of a row (0) and its maximum (1).
# Attention has a few large values and many small ones. Measured on rows of 1374 logits with a
# deviation of 2: cubic steps have an error of at most 0.8e-3, linear steps of 1.0e-3. The median
# relative error is 2 % with cubic steps and 97 % with linear steps. Logarithmic steps have the
# smallest relative error, and an absolute error of 5e-3. A cube is two products, which every
# language rounds in the same way: the page computes exactly these numbers.
_STEPS = np.arange(256) / 255
LEVELS: npt.NDArray[np.float64] = _STEPS * _STEPS * _STEPS
_BETWEEN = (LEVELS[1:] + LEVELS[:-1]) / 2


@dataclass(frozen=True, eq=False)
class Table:
    """Some rows of one layer's weights, quantised.

    Attributes:
        queries: The positions of the tokens of the rows.
        codes: uint8 ``(heads, Q, N)``; one head for the mean of heads.
        least: float32 ``(heads, Q)``: the minimum of each row.
        most: float32 ``(heads, Q)``: the maximum of each row.
        error: The largest difference between a weight and the value of its code.

    """

    queries: tuple[int, ...]
    codes: npt.NDArray[np.uint8]
    least: npt.NDArray[np.float32]
    most: npt.NDArray[np.float32]
    error: float

    def weights(self) -> npt.NDArray[np.float64]:
        """Return the values of the codes, ``(heads, Q, N)``, as the page computes them."""
        return _decode(self.codes, self.least, self.most)

    def content(self) -> bytes:
        """Return the bytes of ``least``, ``most`` (little-endian) and the codes, in this order."""
        limits = (limit.astype("<f4").tobytes() for limit in (self.least, self.most))
        return b"".join((*limits, self.codes.tobytes()))


def quantise(weights: Tensor, queries: tuple[int, ...]) -> Table:
    """Quantise weights ``(heads, Q, N)``, whose rows are those of the tokens at ``queries``.

    Each weight becomes the nearest of the 256 values of its row.

    Raises:
        InvalidInputError: if a weight is not finite.

    """
    shape = tuple(weights.shape)
    codes = np.empty(shape, np.uint8)
    least, most = (np.empty(shape[:2], np.float32) for _ in range(2))
    error = 0.0
    for head in range(shape[0]):  # a whole layer in float64 would double the memory
        exact = weights[head].detach().cpu().double().numpy()
        if not np.isfinite(exact).all():
            raise not_finite()
        least[head], most[head] = exact.min(-1), exact.max(-1)
        codes[head] = _encode(exact, least[head], most[head])
        seen = _decode(codes[head], least[head], most[head])
        error = max(error, float(np.abs(seen - exact).max(initial=0)))
    return Table(queries, codes, least, most, error)


def not_finite() -> InvalidInputError:
    """Return the error for weights, or what they are made of, that are no numbers."""
    return InvalidInputError(
        "weights that are finite numbers",
        "NaN or infinity",
        "Run the model in float32, and search its checkpoint for NaN.",
    )


def _encode(
    exact: npt.NDArray[np.float64], least: npt.NDArray[np.float32], most: npt.NDArray[np.float32]
) -> npt.NDArray[np.uint8]:
    low = least.astype(np.float64)[..., None]
    width = most.astype(np.float64)[..., None] - low
    share = np.clip((exact - low) / np.where(width > 0, width, 1), 0, 1)
    # The cube root gives the right code or the one before it, without a search in 256 values.
    before = np.minimum(np.floor(np.cbrt(share) * 255), 254).astype(np.uint8)
    codes: npt.NDArray[np.uint8] = before + (share > _BETWEEN[before])
    return codes


def _decode(
    codes: npt.NDArray[np.uint8], least: npt.NDArray[np.float32], most: npt.NDArray[np.float32]
) -> npt.NDArray[np.float64]:
    low = least.astype(np.float64)[..., None]
    return low + (most.astype(np.float64)[..., None] - low) * LEVELS[codes]
