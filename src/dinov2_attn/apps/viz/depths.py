"""Images with other than 8 bits per channel, as Pillow, tifffile or torchvision reads them."""

from __future__ import annotations

import contextlib
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from dinov2_attn.apps.viz.opening import read_tiff
from dinov2_attn.apps.viz.reading import Raw, full_range
from dinov2_attn.errors import UnreadableFileError

# Tags of TIFF.
_BITS, _WHITE_IS_ZERO, _SAMPLES, _FORMAT = 258, 262, 277, 339
_MOST, _SIGNED_LEAST, _SIGNED_MOST = 281, 340, 341
_SIGNED = 2

# Formats whose mode I is 16 bits deep, as older versions of Pillow open them.
_SIXTEEN_BITS = {"PNG", "PPM"}

Tags = dict[int, float]


def tags_of(image: Image.Image) -> Tags:
    """Return what the header of a TIFF says about the numbers of its first channel."""
    tags: Any = getattr(image, "tag_v2", {})
    wanted = (_BITS, _WHITE_IS_ZERO, _SAMPLES, _FORMAT, _MOST, _SIGNED_LEAST, _SIGNED_MOST)
    found = {tag: tags.get(tag) for tag in wanted}
    firsts = {tag: v[0] if isinstance(v, tuple) else v for tag, v in found.items() if v}
    if tags.get(_WHITE_IS_ZERO) == 0:
        firsts[_WHITE_IS_ZERO] = 0
    return firsts


def lacks_channels(image: Image.Image, tags: Tags) -> bool:
    """Return whether Pillow drops channels that the TIFF has."""
    return len(image.getbands()) < tags.get(_SAMPLES, 1) and image.mode != "P"


def is_deep(image: Image.Image, tags: Tags) -> bool:
    """Return whether the numbers are signed, floating, or have more than 8 bits in grey."""
    return image.mode.startswith(("I", "F")) or tags.get(_FORMAT) == _SIGNED


def deep(upright: Image.Image, image: Image.Image, tags: Tags) -> Raw:
    """Return the numbers of a grey image for which ``is_deep`` holds."""
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


def greatest_high_byte(image: Image.Image) -> int:
    """Return the greatest high byte of 16-bit colours. Pillow keeps no low bytes."""
    colours = np.asarray(image)[..., :3]
    return int(colours.max()) if colours.size else 0


def sixteen_bits(
    image: Image.Image, path: Path, content: bytes | None, max_pixels: int | None
) -> npt.NDArray[np.uint16]:
    """Return 16-bit colours ``(H, W, C)``. Raise ``UnreadableFileError`` if nothing reads them."""
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


def _declared(values: npt.NDArray[Any], tags: Tags) -> tuple[float, float] | None:
    """Return the range that the header of a TIFF states, if all numbers lie in it.

    For integers, the stated maximum may be that of the image instead of the sensor. The range
    is therefore that of its bits.
    """
    least, greatest = tags.get(_SIGNED_LEAST, 0), tags.get(_SIGNED_MOST, tags.get(_MOST, 0))
    if values.dtype.kind == "u":
        bits = int(greatest).bit_length() or int(tags.get(_BITS, 0))
        least, greatest = 0, 2**bits - 1
        if bits >= 8 * values.dtype.itemsize:
            return None
    within = values.size and least <= values.min() and values.max() <= greatest
    return (float(least), float(greatest)) if within and least < greatest else None


def _png_colours(data: bytes) -> npt.NDArray[np.uint16] | None:
    """Return the colours of a 16-bit PNG, or ``None`` if torchvision cannot decode it."""
    with contextlib.suppress(ImportError, RuntimeError), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the decoders will move to another package
        from torchvision.io import ImageReadMode, decode_png

        encoded = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        values = decode_png(encoded, ImageReadMode.UNCHANGED)
        if values.dtype != torch.uint8:
            colours: npt.NDArray[np.uint16] = values.permute(1, 2, 0).numpy().astype(np.uint16)
            return colours
    return None
