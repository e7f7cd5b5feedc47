"""The channels of an image of 8 bits: RGB, grey, or those that a model takes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from dinov2_attn.errors import InvalidInputError

Bytes = npt.NDArray[np.uint8]

_TRANSPARENT = {"LA", "PA", "RGBA", "RGBa"}


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
    return getattr(image, "n_frames", 1) == channels and len(image.getbands()) == 1


def page(image: Image.Image, number: int) -> npt.NDArray[Any]:
    """Return a page of a TIFF."""
    image.seek(number)
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
