"""From a file to 8 bits in the channels that a model takes, upright, before it is resized."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps, UnidentifiedImageError

from dinov2_attn.apps.viz.channels import (
    Bytes,
    check_channels,
    has_page_per_channel,
    image_of,
    in_channels,
    page,
)
from dinov2_attn.apps.viz.depths import (
    deep,
    greatest_high_byte,
    is_deep,
    lacks_channels,
    sixteen_bits,
    tags_of,
)
from dinov2_attn.apps.viz.opening import (
    is_array,
    is_tiff,
    opened,
    read_array,
    read_tiff,
    reported,
    tiff_page,
)
from dinov2_attn.apps.viz.ranges import Raw, full_range, in_eight_bits
from dinov2_attn.apps.viz.reading import IMAGENET, Reading

log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Decoded:
    """An image as a model takes it, before it is resized and normalised.

    Attributes:
        pixels: uint8 ``(H, W, C)``.
        ends: The values of the file that became 0 and 255.
        doubt: A warning about them, or ``None``.

    """

    pixels: Bytes
    ends: tuple[float, float]
    doubt: str | None = None


def decode(
    path: Path,
    reading: Reading = IMAGENET,
    max_pixels: int | None = None,
    content: bytes | None = None,
) -> Decoded:
    """Decode a whole image, upright and in the channels of ``reading``.

    Args:
        path: The file, or only its name if ``content`` is given.
        reading: The channels and the range.
        max_pixels: The largest image that is decoded; 100 million by default.
        content: The bytes of the file.

    Raises:
        UnreadableFileError: if it is no complete image.
        InvalidInputError: if it has too many pixels or other channels.

    """
    with reported(path, max_pixels):
        if is_array(path, content):
            return _of_array(read_array(path, content, max_pixels), path, reading)
        try:
            image = opened(path, content)
        except UnidentifiedImageError:
            if not is_tiff(path, content):
                raise
            return _of_array(read_tiff(path, content, max_pixels), path, reading)
        with image:
            return _of_image(image, path, content, reading, max_pixels)


def decode_open(image: Image.Image, path: Path, reading: Reading = IMAGENET) -> Decoded:
    """Decode an image that is already open. ``path`` is its name in errors."""
    with reported(path, None):
        return _of_image(image, path, b"", reading, None)


def stored_size(
    path: Path, max_pixels: int | None = None, content: bytes | None = None
) -> tuple[int, int]:
    """Return the height and width of an image from its header.

    EXIF orientation is not applied: ``decode`` may swap the two.
    """
    with reported(path, max_pixels):
        if is_array(path, content):
            height, width = read_array(path, content, max_pixels).shape[:2]
            return height, width
        try:
            with opened(path, content) as image:
                return image.height, image.width
        except UnidentifiedImageError:
            if not is_tiff(path, content):
                raise
            with tiff_page(path, content) as first:
                return first.imagelength, first.imagewidth


def _of_image(
    image: Image.Image,
    path: Path,
    content: bytes | None,
    reading: Reading,
    max_pixels: int | None,
) -> Decoded:
    if has_page_per_channel(image, reading.channels):
        pages = np.stack([page(image, i) for i in range(reading.channels)], axis=-1)
        log.info("%s has %d pages: each is a channel", path, reading.channels)
        return _of_array(pages, path, reading)
    if getattr(image, "is_animated", False):
        log.info("%s has several frames or pages: the first is taken", path)
        image.seek(0)
    tags = tags_of(image)
    wide = ";16" in str(getattr(image, "tile", "")) and not image.mode.startswith("I")
    image.load()
    upright = ImageOps.exif_transpose(image)
    if lacks_channels(image, tags):
        return _of_array(_turned(read_tiff(path, content, max_pixels), image), path, reading)
    if is_deep(image, tags):
        return _of_array(deep(upright, image, tags), path, reading)
    if wide and (reading.range is not None or greatest_high_byte(upright) < 64):
        values = sixteen_bits(image, path, content, max_pixels)
        return _scaled(Raw(_turned(values, image), (0, 65535), True), path, reading, image.mode)
    pixels = in_channels(upright, reading.channels, path)
    return _scaled(Raw(pixels, (0, 255)), path, reading)


def _of_array(found: Raw | npt.NDArray[Any], path: Path, reading: Reading) -> Decoded:
    raw = found if isinstance(found, Raw) else _raw(found)
    check_channels(raw.values.shape, path, reading.channels)
    return _scaled(raw, path, reading)


def _scaled(raw: Raw, path: Path, reading: Reading, mode: str | None = None) -> Decoded:
    """Return ``raw`` in the channels of ``reading``; ``mode`` is Pillow's name of its own."""
    pixels, ends, doubt = in_eight_bits(raw, reading.range, str(path))
    if pixels.ndim == 2:
        pixels = pixels[..., np.newaxis]
    if pixels.shape[2] != reading.channels:
        pixels = in_channels(image_of(pixels, mode), reading.channels, path)
    return Decoded(pixels, ends, doubt)


def _raw(values: npt.NDArray[Any]) -> Raw:
    return Raw(values, full_range(values.dtype), assumed=values.dtype.itemsize == 2)


_ORIENTATION = 0x0112
_TURNS: dict[int, Callable[[npt.NDArray[Any]], npt.NDArray[Any]]] = {
    2: np.fliplr,
    3: lambda values: np.rot90(values, 2),
    4: np.flipud,
    5: lambda values: values.swapaxes(0, 1),
    6: lambda values: np.rot90(values, -1),
    7: lambda values: np.rot90(values, 2).swapaxes(0, 1),
    8: lambda values: np.rot90(values, 1),
}


def _turned(values: npt.NDArray[Any], image: Image.Image) -> npt.NDArray[Any]:
    """Apply the EXIF orientation of ``image`` to what another library has read."""
    turn = _TURNS.get(image.getexif().get(_ORIENTATION, 1))
    return values if turn is None else turn(values)
