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

from dinov2_attn.apps.viz.depths import (
    deep,
    greatest_high_byte,
    is_deep,
    lacks_channels,
    sixteen_bits,
    tags_of,
)
from dinov2_attn.apps.viz.dicom import dicom_size, is_called_dicom, is_dicom, read_dicom
from dinov2_attn.apps.viz.opening import (
    Content,
    array_shape,
    check_pixels,
    is_array,
    is_tiff,
    opened,
    read_array,
    read_tiff,
    reported,
    tiff_page,
)
from dinov2_attn.apps.viz.reading import IMAGENET, Raw, Reading, full_range, in_eight_bits
from dinov2_attn.errors import InvalidInputError, shown_name

log = logging.getLogger(__name__)

Bytes = npt.NDArray[np.uint8]

_TRANSPARENT = {"LA", "PA", "RGBA", "RGBa"}


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
        if is_dicom(path, content):
            return _of_dicom(path, content, reading, max_pixels)
        try:
            with opened(path, content) as image:
                return _of_image(image, path, content, reading, max_pixels)
        except UnidentifiedImageError:
            if is_called_dicom(path):
                return _of_dicom(path, content, reading, max_pixels)
            if not is_tiff(path, content):
                raise
            return _of_array(read_tiff(path, content, max_pixels), path, reading)


def decode_open(image: Image.Image, path: Path, reading: Reading = IMAGENET) -> Decoded:
    """Decode an image that is already open. ``path`` is its name in errors."""
    with reported(path, None):
        return _of_image(image, path, b"", reading, None)


def stored_size(
    path: Path, max_pixels: int | None = None, content: Content = None
) -> tuple[int, int]:
    """Return the height and width of an image from its header.

    EXIF orientation is not applied: ``decode`` may swap the two.

    Args:
        path: The file, or only its name if ``content`` is given.
        max_pixels: The largest image that is taken; 100 million by default.
        content: The bytes of the file, or the open file, of which only the header is read.

    """
    with reported(path, max_pixels):
        if is_array(path, content):
            height, width = array_shape(path, content, max_pixels)[:2]
            return height, width
        if is_dicom(path, content):
            return _within(path, dicom_size(path, content, max_pixels), max_pixels)
        try:
            with opened(path, content) as image:
                return image.height, image.width
        except UnidentifiedImageError:
            if is_called_dicom(path):
                return _within(path, dicom_size(path, content, max_pixels), max_pixels)
            if not is_tiff(path, content):
                raise
            with tiff_page(path, content) as first:
                return first.imagelength, first.imagewidth


def _of_dicom(
    path: Path, content: bytes | None, reading: Reading, max_pixels: int | None
) -> Decoded:
    _within(path, dicom_size(path, content, max_pixels), max_pixels)
    return _of_array(read_dicom(path, content, reading.range, max_pixels), path, reading)


def _within(path: Path, size: tuple[int, int], max_pixels: int | None) -> tuple[int, int]:
    check_pixels(path, size, max_pixels)
    return size


def _of_image(
    image: Image.Image,
    path: Path,
    content: bytes | None,
    reading: Reading,
    max_pixels: int | None,
) -> Decoded:
    if has_page_per_channel(image, reading.channels):
        pages = np.stack([page(image, i, path, max_pixels) for i in range(reading.channels)], -1)
        log.info("%s has %d pages: each is a channel", shown_name(path), reading.channels)
        return _of_array(pages, path, reading)
    if getattr(image, "is_animated", False):
        log.info("%s has several frames or pages: the first is taken", shown_name(path))
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


def in_channels(image: Image.Image, channels: int, path: Path) -> Bytes:
    """Convert an image of 8 bits to ``(H, W, channels)``.

    Any image becomes RGB for 3 channels, on white where it is transparent, and grey for 1.

    Raises:
        InvalidInputError: if another number of channels is not that of the image.

    """
    if channels in (1, 3):
        rgb = _in_rgb(image)
        pixels = np.array(rgb if channels == 3 else rgb.convert("L"))
        return pixels.reshape(image.height, image.width, channels)
    if channels == 4 and (image.mode == "PA" or "transparency" in image.info):
        image = image.convert("RGBA")
    bands = len(image.getbands())
    if image.mode == "P" or bands != channels:
        raise _other_channels(path, 3 if image.mode == "P" else bands, channels)
    return np.array(image)


def shown(pixels: Bytes) -> Bytes:
    """Return pixels ``(H, W, C)`` as a picture ``(H, W, 3)``.

    With one or two channels, the first one in grey. With more, the first three as RGB.
    """
    if pixels.shape[2] < 3:
        return pixels[..., :1].repeat(3, axis=2)
    return np.ascontiguousarray(pixels[..., :3])


def check_channels(shape: tuple[int, ...], path: Path, channels: int) -> None:
    """Raise ``InvalidInputError`` unless an array of this shape has so many channels."""
    found = shape[2] if len(shape) == 3 else 1
    if found == channels or {found, channels} == {1, 3}:
        return
    if len(shape) == 3 and found > shape[0] in (1, 3, channels):
        raise InvalidInputError(
            f"channels last: (H, W, {channels})",
            f"{path} of shape {shape}",
            "Save array.transpose(1, 2, 0).",
        )
    raise _other_channels(path, found, channels)


def image_of(pixels: Bytes, mode: str | None) -> Image.Image:
    """Return channels as an image. Without a ``mode``: grey, grey and alpha, RGB, or RGBA.

    Pillow opens grey and alpha of 16 bits as RGBA.
    """
    if mode is None or pixels.shape[2] < 3:
        mode = {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}[pixels.shape[2]]
    height, width = pixels.shape[:2]
    return Image.frombytes(mode, (width, height), np.ascontiguousarray(pixels).tobytes())


def has_page_per_channel(image: Image.Image, channels: int) -> bool:
    """Return whether a TIFF has as many grey pages as a model has channels."""
    if channels in (1, 3) or image.format != "TIFF":
        return False
    if len(image.getbands()) != 1:
        return False
    # Not n_frames: there may be a million.
    found = _has_page(image, channels - 1) and not _has_page(image, channels)
    image.seek(0)
    return found


def _has_page(image: Image.Image, number: int) -> bool:
    try:
        image.seek(number)
    except EOFError:
        return False
    return True


def page(image: Image.Image, number: int, path: Path, max_pixels: int | None) -> npt.NDArray[Any]:
    """Return a page of a TIFF."""
    image.seek(number)
    check_pixels(path, (image.height, image.width), max_pixels)
    return np.array(image)


def _in_rgb(image: Image.Image) -> Image.Image:
    if image.mode in _TRANSPARENT or "transparency" in image.info:
        # As in image viewers. The colour under transparent pixels is arbitrary, often black.
        opaque = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(opaque, image.convert("RGBA"))
    return image.convert("RGB")


def _other_channels(path: Path, found: int, channels: int) -> InvalidInputError:
    kind = f"{channels} channel{'s' * (channels != 1)}"
    return InvalidInputError(
        f"an image of {kind}, as the model takes",
        f"{path}, which has {found}",
        f"Give a TIFF of {kind}, or an array (H, W, {channels}) saved as .npy.",
    )
