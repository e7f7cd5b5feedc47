"""From a file to 8 bits in the channels that a model takes, upright, before it is resized."""

from __future__ import annotations

import contextlib
import logging
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, ImageOps, UnidentifiedImageError

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
from dinov2_attn.errors import InvalidInputError, UnreadableFileError

log = logging.getLogger(__name__)

Bytes = npt.NDArray[np.uint8]


@dataclass(frozen=True, eq=False)
class Decoded:
    """An image as a model takes it, but for its size and its normalisation.

    ======  ====================================================================
    pixels  uint8 ``(H, W, C)``
    ends    the values of the file that became 0 and 255
    doubt   what is doubtful about them
    ======  ====================================================================
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
    """Read the image at ``path`` whole, upright and in the channels of ``reading``.

    ``content`` is the file itself, where it is not at ``path``, which then only names it.
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
    """Make of an open image, called ``path``, what ``decode`` makes of a file."""
    with reported(path, None):
        return _of_image(image, path, b"", reading, None)


def stored_size(
    path: Path, max_pixels: int | None = None, content: bytes | None = None
) -> tuple[int, int]:
    """Return height and width of the image at ``path``, by its header, as it is stored.

    Where it lies on its side the two change places in what ``decode`` reads.
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
            with tiff_page(path, content) as page:
                return page.imagelength, page.imagewidth


def _of_image(
    image: Image.Image,
    path: Path,
    content: bytes | None,
    reading: Reading,
    max_pixels: int | None,
) -> Decoded:
    if _are_channels(image, reading.channels):
        pages = np.stack([_page(image, i) for i in range(reading.channels)], axis=-1)
        log.info("%s has %d pages: each is a channel", path, reading.channels)
        return _of_array(pages, path, reading)
    if getattr(image, "is_animated", False):
        log.info("%s has several frames or pages: the first is taken", path)
        image.seek(0)
    tags = _tags(image)
    wide = ";16" in str(getattr(image, "tile", "")) and not image.mode.startswith("I")
    image.load()
    upright = ImageOps.exif_transpose(image)
    if len(image.getbands()) < tags.get(_SAMPLES, 1) and image.mode != "P":
        return _of_array(_turned(read_tiff(path, content, max_pixels), image), path, reading)
    if image.mode.startswith(("I", "F")) or tags.get(_FORMAT) == _SIGNED:
        return _of_array(_deep(upright, image, tags), path, reading)
    if wide and (reading.range is not None or _high_bytes(upright) < 64):
        values = _sixteen_bits(image, path, content, max_pixels)
        return _scaled(Raw(_turned(values, image), (0, 65535), True), path, reading, image.mode)
    pixels = in_channels(upright, reading.channels, path)
    return _scaled(Raw(pixels, (0, 255)), path, reading)


def _of_array(found: Raw | npt.NDArray[Any], path: Path, reading: Reading) -> Decoded:
    raw = found if isinstance(found, Raw) else _raw(found)
    _check_channels(raw.values.shape, path, reading.channels)
    return _scaled(raw, path, reading)


def _scaled(raw: Raw, path: Path, reading: Reading, mode: str | None = None) -> Decoded:
    """Return ``raw`` in the channels of ``reading``; ``mode`` is Pillow's word for its own."""
    pixels, ends, doubt = in_eight_bits(raw, reading.range, str(path))
    if pixels.ndim == 2:
        pixels = pixels[..., np.newaxis]
    if pixels.shape[2] != reading.channels:
        pixels = in_channels(_image_of(pixels, mode), reading.channels, path)
    return Decoded(pixels, ends, doubt)


def _raw(values: npt.NDArray[Any]) -> Raw:
    return Raw(values, full_range(values.dtype), assumed=values.dtype.itemsize == 2)


# Channels


def in_channels(image: Image.Image, channels: int, path: Path) -> Bytes:
    """Return an image of 8 bits as ``(H, W, channels)``.

    For 3 channels any image is shown in RGB, what is transparent on white; for 1 in grey. Other
    numbers have to be those of the image. Raises ``InvalidInputError``.
    """
    if channels in (1, 3):
        rgb = _in_rgb(image)
        shown = np.array(rgb if channels == 3 else rgb.convert("L"))
        return shown.reshape(image.height, image.width, channels)
    if channels == 4 and (image.mode == "PA" or "transparency" in image.info):
        image = image.convert("RGBA")
    bands = len(image.getbands())
    if image.mode == "P" or bands != channels:
        raise _other_channels(path, 3 if image.mode == "P" else bands, channels)
    return np.array(image)


def shown(pixels: Bytes) -> Bytes:
    """Return pixels ``(H, W, C)`` as a picture ``(H, W, 3)``.

    One or two channels are shown by the first in grey, more by the first three as RGB.
    """
    if pixels.shape[2] < 3:
        return pixels[..., :1].repeat(3, axis=2)
    return np.ascontiguousarray(pixels[..., :3])


def _check_channels(shape: tuple[int, ...], path: Path, channels: int) -> None:
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


def _other_channels(path: Path, found: int, channels: int) -> InvalidInputError:
    kind = f"{channels} channel{'s' * (channels != 1)}"
    return InvalidInputError(
        f"an image of {kind}, as the model takes",
        f"{path}, which has {found}",
        f"Give a TIFF of {kind}, or an array (H, W, {channels}) saved as .npy.",
    )


def _in_rgb(image: Image.Image) -> Image.Image:
    if image.mode in _TRANSPARENT or "transparency" in image.info:
        # As viewers show it: below there may be any colour, black as a rule.
        opaque = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(opaque, image.convert("RGBA"))
    return image.convert("RGB")


_TRANSPARENT = {"LA", "PA", "RGBA", "RGBa"}


def _image_of(pixels: Bytes, mode: str | None) -> Image.Image:
    """Return channels as an image: without a ``mode`` grey, grey and alpha, RGB, or RGB and alpha.

    Pillow opens grey and alpha of 16 bits as RGB and alpha.
    """
    if mode is None or pixels.shape[2] < 3:
        mode = {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}[pixels.shape[2]]
    height, width = pixels.shape[:2]
    return Image.frombytes(mode, (width, height), np.ascontiguousarray(pixels).tobytes())


def _are_channels(image: Image.Image, channels: int) -> bool:
    """Return whether the pages of a TIFF are as many grey ones as a model has channels."""
    if channels in (1, 3) or image.format != "TIFF":
        return False
    return getattr(image, "n_frames", 1) == channels and len(image.getbands()) == 1


def _page(image: Image.Image, number: int) -> npt.NDArray[Any]:
    image.seek(number)
    return np.array(image)


# Depths


# Tags of TIFF.
_BITS, _WHITE_IS_ZERO, _SAMPLES, _FORMAT = 258, 262, 277, 339
_MOST, _SIGNED_LEAST, _SIGNED_MOST = 281, 340, 341
_SIGNED = 2

# Whose mode I is 16 bits deep, as Pillow's older versions open it.
_SIXTEEN_BITS = {"PNG", "PPM"}


def _tags(image: Image.Image) -> dict[int, float]:
    """Return what the header of a TIFF says of its numbers, of its first channel."""
    tags: Any = getattr(image, "tag_v2", {})
    wanted = (_BITS, _WHITE_IS_ZERO, _SAMPLES, _FORMAT, _MOST, _SIGNED_LEAST, _SIGNED_MOST)
    found = {tag: tags.get(tag) for tag in wanted}
    firsts = {tag: v[0] if isinstance(v, tuple) else v for tag, v in found.items() if v}
    if tags.get(_WHITE_IS_ZERO) == 0:
        firsts[_WHITE_IS_ZERO] = 0
    return firsts


def _deep(upright: Image.Image, image: Image.Image, tags: dict[int, float]) -> Raw:
    """Return the numbers of a grey image that has not 8 bits, or signed ones."""
    values = np.asarray(upright)
    if image.format == "TIFF" and tags.get(_FORMAT) == _SIGNED and image.mode == "L":
        values = values.view(np.int8)
    elif image.format == "TIFF" and tags.get(_FORMAT, 1) == 1 and image.mode == "I":
        values = values.view(np.uint32)  # Pillow has no mode for them
    elif image.mode == "I" and image.format in _SIXTEEN_BITS:
        values = values.astype(np.uint16)
    inverted = tags.get(_WHITE_IS_ZERO) == 0 and image.mode != "L"
    full = _declared(values, tags)
    if full is not None:
        return Raw(values, full, inverted=inverted)
    full = full_range(values.dtype)
    return Raw(values, full, full is not None and image.format != "PPM", inverted)


def _declared(values: npt.NDArray[Any], tags: dict[int, float]) -> tuple[float, float] | None:
    """Return the range that the header of a TIFF states, if the numbers keep to it.

    The greatest value of integers is that of the image as often as that of the sensor: the
    range is that of its bits.
    """
    least, greatest = tags.get(_SIGNED_LEAST, 0), tags.get(_SIGNED_MOST, tags.get(_MOST, 0))
    if values.dtype.kind == "u":
        bits = int(greatest).bit_length() or int(tags.get(_BITS, 0))
        least, greatest = 0, 2**bits - 1
        if bits >= 8 * values.dtype.itemsize:
            return None
    within = values.size and least <= values.min() and values.max() <= greatest
    return (float(least), float(greatest)) if within and least < greatest else None


def _high_bytes(image: Image.Image) -> int:
    """Return the greatest high byte of colours of 16 bits, of which Pillow keeps no other."""
    colours = np.asarray(image)[..., :3]
    return int(colours.max()) if colours.size else 0


def _sixteen_bits(
    image: Image.Image, path: Path, content: bytes | None, max_pixels: int | None
) -> npt.NDArray[np.uint16]:
    """Return colours of 16 bits ``(H, W, C)``. Raises ``UnreadableFileError``."""
    if image.format == "TIFF":
        return read_tiff(path, content, max_pixels)
    if image.format == "PNG":
        data = path.read_bytes() if content is None else content
        if (colours := _png_colours(data)) is not None:
            return colours
    raise UnreadableFileError(
        "an image of 8 bits in colour, or a TIFF or PNG of 16",
        f"{path} of 16 bits, of which the upper 8 are read here",
        "Scale it to 0…65535, or save it as TIFF.",
    )


def _png_colours(data: bytes) -> npt.NDArray[np.uint16] | None:
    """Return the colours of a PNG of 16 bits, or ``None`` where torchvision has no decoder."""
    with contextlib.suppress(ImportError, RuntimeError), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # they will move to another package one day
        from torchvision.io import ImageReadMode, decode_png

        encoded = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        values = decode_png(encoded, ImageReadMode.UNCHANGED)
        if values.dtype != torch.uint8:
            colours: npt.NDArray[np.uint16] = values.permute(1, 2, 0).numpy().astype(np.uint16)
            return colours
    return None


def _turned(values: npt.NDArray[Any], image: Image.Image) -> npt.NDArray[Any]:
    """Turn what another library read as the orientation of ``image`` says."""
    orientation = image.getexif().get(_ORIENTATION, 1)
    turn = _TURNS.get(orientation)
    return values if turn is None else turn(values)


_ORIENTATION = 0x0112
_TURNS = {
    2: np.fliplr,
    3: lambda values: np.rot90(values, 2),
    4: np.flipud,
    5: lambda values: values.swapaxes(0, 1),
    6: lambda values: np.rot90(values, -1),
    7: lambda values: np.rot90(values, 2).swapaxes(0, 1),
    8: lambda values: np.rot90(values, 1),
}
