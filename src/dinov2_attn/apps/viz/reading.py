"""How the numbers of an image are read: its channels and range, and the conversion to 8 bits."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import numpy.typing as npt

from dinov2_attn.errors import InvalidInputError, SuspiciousRangeWarning, UnreadableFileError, shown

if TYPE_CHECKING:
    from torch import Tensor

# Mean and deviation of ImageNet's channels, used for the training of every DINOv2.
MEAN = (0.485, 0.456, 0.406)
DEVIATION = (0.229, 0.224, 0.225)

# Their averages, for a model with another number of channels.
GREY_MEAN, GREY_DEVIATION = 0.449, 0.226

# Bit depths of sensors, which write 16-bit files.
DEPTHS = (8, 10, 12, 14)

# The values that become 0 and 1: given, those of each image ("auto"), or those of the format.
Range = tuple[float, float] | str | None
# One number or one for each channel, in any container with a length or ``tolist``.
Numbers: TypeAlias = "float | Sequence[float] | npt.NDArray[Any] | Tensor | None"


@dataclass(frozen=True)
class Reading:
    """How an image is read for one model.

    Attributes:
        channels: The number of channels of the model.
        range: ``(low, high)``, the values that become 0 and 1. ``"auto"`` is the minimum and
            maximum of each image, ``None`` the range of the file's format.
        mean: Subtracted from each channel after scaling to 0…1.
        std: The divisor of each channel.

    """

    channels: int = 3
    range: Range = None
    mean: tuple[float, ...] = MEAN
    std: tuple[float, ...] = DEVIATION

    def __str__(self) -> str:
        mean, std = (", ".join(f"{v:g}" for v in each) for each in (self.mean, self.std))
        return f"values of 0…1 are normalised with mean {mean} and standard deviation {std}"


# RGB images for the published models.
IMAGENET = Reading()


def reading_for(
    channels: int, range: object = None, mean: Numbers = None, std: Numbers = None
) -> Reading:
    """Return how to read images for a model.

    Args:
        channels: The number of channels of the model.
        range: ``(low, high)``, ``"auto"`` or ``None``.
        mean: One number, or one per channel. By default ImageNet's; for other than 3 channels
            their average, 0.449.
        std: Like ``mean``. By default ImageNet's; for other than 3 channels their average, 0.226.

    Raises:
        InvalidInputError: if one of them is not of this form, or out of scale.

    """
    means = _each("mean", mean, channels, MEAN, GREY_MEAN)
    deviations = _each("std", std, channels, DEVIATION, GREY_DEVIATION)
    if wrong := [value for value in means if not 0 <= value <= 1]:
        raise _out_of_scale("mean between 0 and 1, as pixels are scaled to 0…1", wrong[0])
    if wrong := [value for value in deviations if not 0 < value <= 1]:
        raise _out_of_scale("std above 0 and up to 1, as pixels are scaled to 0…1", wrong[0])
    return Reading(channels, check_range(range), means, deviations)


def check_range(range: object) -> Range:
    """Return a range as ``(low, high)``, ``"auto"`` or ``None``. Raise ``InvalidInputError``."""
    if range is None or (isinstance(range, str) and range == "auto"):
        return range
    ends = _numbers(range)
    if ends is None or len(ends) != 2 or not ends[0] < ends[1]:
        raise InvalidInputError(
            "range as (low, high) with low < high, or 'auto'", repr(range), "Try (0, 4095)."
        )
    return ends[0], ends[1]


def _each(
    name: str, given: Numbers, channels: int, imagenet: tuple[float, ...], grey: float
) -> tuple[float, ...]:
    if given is None:
        return imagenet if channels == len(imagenet) else (grey,) * channels
    numbers = _numbers(given)
    if numbers is None or len(numbers) not in (1, channels):
        wanted = "one number" if channels == 1 else f"one number, or {channels}"
        raise InvalidInputError(
            f"{name} as {wanted}, the model taking {channels} channel{'s' * (channels != 1)}",
            repr(given) if numbers is None else f"{len(numbers)} numbers",
            f"Give {'it once' if channels == 1 else 'one for each channel, or one for all'}.",
        )
    return tuple(numbers) * (channels if len(numbers) == 1 else 1)


def _numbers(given: Any) -> list[float] | None:
    """Return finite numbers as a list, or ``None`` for anything else."""
    if hasattr(given, "tolist"):  # an array or a tensor
        given = given.tolist()
    several = given if isinstance(given, Sequence) and not isinstance(given, str) else [given]
    try:
        numbers = [float(one) for one in several]
    except (TypeError, ValueError):
        return None
    return numbers if all(map(math.isfinite, numbers)) else None


def _out_of_scale(expected: str, found: float) -> InvalidInputError:
    advice = f"Divide by 255: {found / 255:.6g}." if 1 < found <= 255 else "Try 0.5."
    return InvalidInputError(expected, f"{found:g}", advice)


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
    ends = _ends(raw, wanted, name)
    pixels = _scaled(raw.values, *ends)
    doubt = _doubt(raw, name) if wanted is None else _flat(ends, name)
    return (255 - pixels if raw.inverted else pixels), ends, doubt


# Values that are scaled together: in float64 they take 8 bytes each, several times.
_TOGETHER = 2**20


def _scaled(values: npt.NDArray[Any], low: float, high: float) -> npt.NDArray[np.uint8]:
    """Return ``values`` as uint8, with ``low`` as 0 and ``high`` as 255."""
    if values.dtype == np.uint8 and (low, high) == (0, 255):
        return values
    pixels = np.empty(values.size, np.uint8)
    flat = values.reshape(-1)
    for start in range(0, values.size, _TOGETHER):
        some = slice(start, start + _TOGETHER)
        with np.errstate(invalid="ignore", over="ignore"):
            scaled = (flat[some].astype(np.float64) - low) / ((high - low) or 1.0) * 255
        pixels[some] = np.rint(scaled.clip(0, 255)).astype(np.uint8)
    return pixels.reshape(values.shape)


def warn(doubt: str | None) -> None:
    """Warn about a suspicious range of an image."""
    if doubt is not None:
        warnings.warn(shown(doubt), SuspiciousRangeWarning, stacklevel=3)


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
