"""Convert the numbers of a file, of any depth, to 8 bits."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from dinov2_attn.apps.viz.reading import Range
from dinov2_attn.errors import SuspiciousRangeWarning, UnreadableFileError

# Bit depths of sensors, which write 16-bit files.
DEPTHS = (8, 10, 12, 14)


@dataclass(frozen=True, eq=False)
class Raw:
    """The numbers of an image as its file holds them.

    Attributes:
        values: Integers or floats ``(H, W)`` or ``(H, W, C)``.
        full: The range ``(low, high)`` that the file or its format states, or ``None``.
        assumed: Whether ``full`` is only the range of the data type.
        inverted: Whether low values are white.

    """

    values: npt.NDArray[Any]
    full: tuple[float, float] | None
    assumed: bool = False
    inverted: bool = False


def full_range(dtype: np.dtype[Any]) -> tuple[float, float] | None:
    """Return the range of booleans and of unsigned integers of 8 or 16 bits; else ``None``."""
    if dtype.kind == "b":
        return 0.0, 1.0
    return (
        (0.0, 2.0 ** (8 * dtype.itemsize) - 1)
        if dtype.kind == "u" and dtype.itemsize <= 2
        else None
    )


def in_eight_bits(
    raw: Raw, wanted: Range, name: str
) -> tuple[npt.NDArray[np.uint8], tuple[float, float], str | None]:
    """Return ``raw`` as uint8, the values that became 0 and 255, and a warning about them.

    Args:
        raw: The numbers. Those outside of the range become 0 or 255.
        wanted: The range to use; ``None`` for that of the file.
        name: The name of the file in errors.

    Raises:
        UnreadableFileError: if no range is known, or values are NaN.

    """
    low, high = ends = _ends(raw, wanted, name)
    with np.errstate(invalid="ignore", over="ignore"):
        scaled = (raw.values.astype(np.float64) - low) / ((high - low) or 1.0) * 255
    pixels = np.rint(scaled.clip(0, 255)).astype(np.uint8)
    doubt = _doubt(raw, name) if wanted is None else _flat(ends, name)
    return (255 - pixels if raw.inverted else pixels), ends, doubt


def warn(doubt: str | None) -> None:
    """Warn about a suspicious range of an image."""
    if doubt is not None:
        warnings.warn(doubt, SuspiciousRangeWarning, stacklevel=3)


def _ends(raw: Raw, wanted: Range, name: str) -> tuple[float, float]:
    values = raw.values
    if values.dtype.kind == "f" and (count := int(np.isnan(values).sum())):
        raise UnreadableFileError(
            "an image of numbers",
            f"{name}, of which {count:,} value{'s are' if count > 1 else ' is'} NaN",
            "Replace them, and save the image again.",
        )
    if isinstance(wanted, tuple):
        return wanted
    if wanted == "auto" or raw.full is None:
        finite = values[np.isfinite(values)] if values.dtype.kind == "f" else values
        least, greatest = (float(finite.min()), float(finite.max())) if finite.size else (0.0, 0.0)
        if wanted == "auto":
            return least, greatest
        raise UnreadableFileError(
            "an image of 8 or 16 bits per channel, or --range",
            f"{name} of {_kind(values)}, whose values run from {least:g} to {greatest:g} and have "
            "no known range",
            f"Say what is black and what is white: {_option(*_guess(values, least, greatest))}, or "
            "--range auto for each image's own least and greatest value (in Python range=).",
        )
    return raw.full


def _kind(values: npt.NDArray[Any]) -> str:
    kind = "floating numbers" if values.dtype.kind == "f" else "integers"
    signed = "signed " if values.dtype.kind == "i" else ""
    return f"{signed}{kind} of {8 * values.dtype.itemsize} bits"


def _guess(values: npt.NDArray[Any], least: float, greatest: float) -> tuple[float, float]:
    """Return the most likely range of such values, for the advice."""
    if least < 0:
        bound = _bound(max(-least, greatest))
        return -bound, bound
    if values.dtype.kind == "f" and greatest <= 1:
        return 0, 1
    return 0, _bound(greatest)


def _bound(greatest: float) -> float:
    """Return the maximum of the smallest usual bit depth that holds ``greatest``."""
    fitting = [2**bits - 1 for bits in (*DEPTHS, 16) if greatest <= 2**bits - 1]
    return float(fitting[0]) if fitting and greatest > 1 else max(greatest, 1.0)


def _option(low: float, high: float) -> str:
    return f"--range{'=' if low < 0 else ' '}{low:.9g},{high:.9g}"


def _doubt(raw: Raw, name: str) -> str | None:
    """Return a warning if 16 bits were assumed and only a small part is used."""
    if not raw.assumed or raw.full is None or not raw.values.size:
        return None
    greatest = int(raw.values.max())
    bound = next((2**bits - 1 for bits in DEPTHS if greatest <= 2**bits - 1), None)
    if bound is None or not greatest:
        return None
    return (
        f"{name}: the largest value is {greatest:,} of {raw.full[1]:,.0f}, so that the image is "
        f"nearly black. If it has {bound.bit_length()} bits, give {_option(0, bound)} (in Python "
        f"range=(0, {bound})); if it is as dark as this, {_option(*raw.full)}"
    )


def _flat(ends: tuple[float, float], name: str) -> str | None:
    if ends[0] < ends[1]:
        return None
    return (
        f"{name}: every value is {ends[0]:g}, so that with --range auto the image is black. Give "
        "the range as LOW,HIGH"
    )
