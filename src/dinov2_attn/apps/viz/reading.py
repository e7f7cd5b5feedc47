"""How the numbers of an image become the input of a model: channels, range, mean, deviation."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from dinov2_attn.errors import InvalidInputError

# Mean and deviation of ImageNet's channels, used for the training of every DINOv2.
MEAN = (0.485, 0.456, 0.406)
DEVIATION = (0.229, 0.224, 0.225)

# Their averages, for a model with another number of channels.
GREY_MEAN, GREY_DEVIATION = 0.449, 0.226

# The values that become 0 and 1: given, those of each image ("auto"), or those of the format.
Range = tuple[float, float] | str | None


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


def reading_for(channels: int, range: Any = None, mean: Any = None, std: Any = None) -> Reading:
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


def check_range(range: Any) -> Range:
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
    name: str, given: Any, channels: int, imagenet: tuple[float, ...], grey: float
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
