"""Queries and keys in a few bits: whole numbers, with corrections where the weights are large."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from dinov2_attn._locks import cached_property
from dinov2_attn.apps.explorer.factors import Factors, QueriesKeys, factors
from dinov2_attn.apps.explorer.quantise import not_finite

# At coarseness 1: the deviation of the noise of the products, in deviations of the products
# themselves, and the largest error of a weight, in units of the largest weight of its head.
# Rows of 8 bits have an error of 0.0020 to 0.0045 of it, measured on nine heads of ViT-S and
# ViT-B at 588 × 504. One more bit for each number costs 16 bytes a row, a correction 3: few bits
# and some corrections make the smallest page.
_NOISE = 0.0035
_ERROR = 0.0015
_MOST_NOISE = 0.02

# Logarithms of sums are multiples of this, which is 6e-5 of a weight at most.
_LOG_STEP = 2.0**-13

# Rows whose weights are compared at a time.
_ROWS = 512

# The page adds in another order: a few units in the last place of float32.
_SLACK = 1.001
_PRODUCT = 2e-5

Codes = npt.NDArray[np.int32]
Rounded = tuple[Codes, Codes, npt.NDArray[np.float32]]


@dataclass(frozen=True, eq=False)
class CodedHead:
    """Whole numbers in place of the factors of one head.

    Attributes:
        left: int32 ``(N, r)``, for queries.
        right: int32 ``(N, r)``, for keys.
        factor: float32 ``(r,)``: what each product of two numbers counts.
        log_sums: int32 ``(N,)``: the logarithms of the sums of the rows, in steps of 2⁻¹³.

    """

    left: Codes
    right: Codes
    factor: npt.NDArray[np.float32]
    log_sums: Codes

    def weights(self, rows: slice) -> Tensor:
        """Return the weights of some rows without corrections, float32 ``(Q, N)``."""
        products = _products(self.left, self.right, self.factor, rows)
        sums = torch.from_numpy(self.log_sums[rows]).float() * _LOG_STEP
        return products.sub_(sums[:, None]).exp_()


@dataclass(frozen=True, eq=False)
class Corrections:
    """What is added to single weights of one head, and the errors that remain.

    Attributes:
        places: int64 ``(C,)``: row times N plus column, ascending.
        steps: int8 ``(C,)``: what is added, in units of ``unit``.
        unit: The value of one step.
        error: The largest error of a weight.
        relative: The largest error of a weight, as a share of the weight that is shown.

    """

    places: npt.NDArray[np.int64]
    steps: npt.NDArray[np.int8]
    unit: float
    error: float
    relative: float


@dataclass(frozen=True, eq=False)
class CodedLayer:
    """All weights of one layer, as a page holds them.

    Attributes:
        heads: The numbers of each head.
        corrections: The corrections of each head.

    """

    heads: Sequence[CodedHead]
    corrections: Sequence[Corrections]

    @property
    def error(self) -> float:
        """The largest difference between a weight and what the page shows."""
        return max(one.error for one in self.corrections)

    def description(self) -> dict[str, Any]:
        """Return what a page needs in order to read ``content()``."""
        return {
            "heads": len(self.heads),
            "rank": self.heads[0].left.shape[1],
            "unit": [one.unit for one in self.corrections],
            "corrections": [len(one.places) for one in self.corrections],
            "error": [one.error for one in self.corrections],
            "relative": [one.relative for one in self.corrections],
        }

    def content(self) -> bytes:
        """Return the deflated bytes.

        They are: factors and logarithms of sums, float32 and int32 ``(heads, r or N)``; the order
        of the planes, uint16; the lower bytes of all numbers, plane by plane; the upper bytes of
        those planes that need them; gaps between corrections (LEB128); their steps. A plane is
        one component of the queries or keys of one head. All is little-endian.
        """
        return self._content

    @cached_property
    def _content(self) -> bytes:
        return _deflate(b"".join((*self._numbers(), *self._planes(), *self._fixes())))

    def _numbers(self) -> list[bytes]:
        factor = np.stack([head.factor for head in self.heads])
        log_sums = np.stack([head.log_sums for head in self.heads])
        return [factor.astype("<f4").tobytes(), log_sums.astype("<i4").tobytes()]

    def _planes(self) -> list[bytes]:
        return pack_planes(_stacked([(one.left, one.right, one.factor) for one in self.heads]))

    def _fixes(self) -> list[bytes]:
        gaps = [_varints(np.diff(one.places, prepend=0)) for one in self.corrections]
        return [*gaps, *(one.steps.tobytes() for one in self.corrections)]


def encode(layer: QueriesKeys, found: Sequence[Factors], coarseness: float) -> CodedLayer:
    """Return the numbers of one layer, with their corrections.

    Args:
        layer: Its queries and keys.
        found: Their factors, ``layer_factors(layer)``.
        coarseness: 1 is finer than 8 bits for each weight; at 4 the error is at most theirs.

    """
    heads = [code(one, coarseness) for one in found]
    return CodedLayer(heads, [correct(layer, i, head, coarseness) for i, head in enumerate(heads)])


def layer_factors(layer: QueriesKeys) -> list[Factors]:
    """Return the factors of every head. Raise ``InvalidInputError`` unless all are finite."""
    if not (layer.query.isfinite().all() and layer.key.isfinite().all()):
        raise not_finite()
    return [factors(q, k, layer.scale) for q, k in zip(layer.query, layer.key, strict=True)]


def code(head: Factors, coarseness: float) -> CodedHead:
    """Round the factors of one head.

    Each component has a step of its own, such that all add the same noise to the products.
    """
    left, right, factor = _round(head, coarseness)
    return CodedHead(left, right, factor, _log_sums(left, right, factor))


def correct(layer: QueriesKeys, head: int, coded: CodedHead, coarseness: float) -> Corrections:
    """Compare every weight of a head, and correct those with the largest errors."""
    exact = torch.cat([layer.weights(head, rows).float() for rows in _parts(layer.tokens)])
    seen = torch.cat([coded.weights(rows) for rows in _parts(layer.tokens)])
    off = (exact - seen).ravel()
    places = (off.abs() > _ERROR * coarseness * float(exact.max())).nonzero().ravel()
    unit = rounded_up(float(off.abs().max()) / 127) or 1.0
    steps = (off[places] / unit).round().clamp(-127, 127)
    off[places] -= steps * unit
    seen.view(-1)[places] += steps * unit
    error = float((off.abs_() + _PRODUCT * seen.view(-1)).max())
    relative = float(off.div_(seen.view(-1)).nan_to_num_(0, 0, 0).max())
    return Corrections(
        places.numpy(),
        steps.to(torch.int8).numpy(),
        unit,
        rounded_up(error * _SLACK + 2.0**-40),
        rounded_up(relative * _SLACK + _PRODUCT),
    )


def estimate(layer: QueriesKeys, found: Sequence[Factors], sample: int = 16) -> int:
    """Return about how many bytes the layer takes at coarseness 1. Some rows are compared."""
    rank = found[0].left.shape[1]
    size = layer.heads * (3 * layer.tokens + 8 * rank)
    rounded = [_round(one, 1.0) for one in found]
    size += len(_deflate(b"".join(pack_planes(_stacked(rounded)))))
    rows = slice(None, None, sample)
    for i, (left, right, factor) in enumerate(rounded):
        exact = layer.weights(i, rows).float()
        seen = _products(left, right, factor, rows).softmax(1)
        limit = _ERROR * float(exact.max())
        size += 3 * sample * int(((exact - seen).abs_() > limit).sum())
    return size


def rounded_up(value: float) -> float:
    """Return ``value`` with four digits, not less than it is: a page need not spell out more."""
    return float(f"{value * 1.0005:.3e}")


def pack_planes(planes: Codes) -> list[bytes]:
    """Return the order of ``planes (P, N)``, their lower bytes, and upper bytes where needed.

    Planes of a similar spread are neighbours, since the Huffman codes of a block fit one spread.
    """
    order = np.argsort(np.abs(planes).sum(1), kind="stable")[::-1]
    planes = planes[order]
    wide = np.abs(planes).max(1) > 127
    listed = order.astype("<u2") | np.where(wide, 0x8000, 0).astype("<u2")
    lower = (planes & 255).astype(np.uint8)
    upper = ((planes[wide] - (planes[wide] << 24 >> 24)) >> 8).astype(np.int8)
    return [listed.astype("<u2").tobytes(), lower.tobytes(), upper.tobytes()]


def _stacked(heads: Sequence[Rounded]) -> Codes:
    sides = [side.T for left, right, _ in heads for side in (left, right)]
    return np.ascontiguousarray(np.concatenate(sides))


def _round(head: Factors, coarseness: float) -> Rounded:
    count, rank = head.left.shape
    noise = min(_NOISE * head.spread, _MOST_NOISE) * coarseness
    step = noise * (6 * count / rank) ** 0.5 or 1.0
    used = head.size > 0
    factor = torch.where(used, step**2 / head.size.where(used, torch.ones(())), 0)
    left, right = (_rounded(side / step) for side in (head.left, head.right))
    return left, right, factor.float().numpy()


def _rounded(values: Tensor) -> Codes:
    codes: Codes = values.round().clamp(-32000, 32000).to(torch.int32).numpy()
    return codes


def _products(left: Codes, right: Codes, factor: npt.NDArray[np.float32], rows: slice) -> Tensor:
    weighted = torch.from_numpy(left[rows]).float() * torch.from_numpy(factor)
    return weighted @ torch.from_numpy(right).float().T


def _log_sums(left: Codes, right: Codes, factor: npt.NDArray[np.float32]) -> Codes:
    parts = [_products(left, right, factor, rows).logsumexp(1) for rows in _parts(len(left))]
    sums: Codes = (torch.cat(parts) / _LOG_STEP).round().to(torch.int32).numpy()
    return sums


def _parts(count: int) -> list[slice]:
    return [slice(start, start + _ROWS) for start in range(0, count, _ROWS)]


def _varints(numbers: npt.NDArray[np.int64]) -> bytes:
    """Return numbers ≥ 0 in LEB128: 7 bits a byte, the lowest first."""
    parts = np.stack([numbers >> shift & 127 for shift in (0, 7, 14, 21, 28)], 1)
    needed = np.stack([numbers >> shift > 0 for shift in (0, 7, 14, 21, 28)], 1)
    needed[:, 0] = True
    follows = np.concatenate([needed[:, 1:], np.zeros((len(needed), 1), bool)], 1)
    return (parts | np.where(follows, 128, 0))[needed].astype(np.uint8).tobytes()


def _deflate(content: bytes) -> bytes:
    # Nothing repeats: only the lengths of the codes matter.
    deflate = zlib.compressobj(9, zlib.DEFLATED, -15, 9, zlib.Z_HUFFMAN_ONLY)
    return deflate.compress(content) + deflate.flush()
